"""The steps of a run, each a folder: setup, data, miniature, training, evaluation, reporting."""
