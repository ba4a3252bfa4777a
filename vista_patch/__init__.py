"""VISTA (arXiv 2505.10917): vision-text alignment as one loss term on stock LLaVA-style code."""

import importlib

_HOME = {
    "attach": "train",
    "VistaConfig": "config",
    "VistaLoss": "loss",
    "patch": "model",
    "vista_arguments": "train",
    "vista_forward": "model",
    "vista_loss": "loss",
    "vista_metrics": "model",
    "vista_setup": "train",
}
__all__ = list(_HOME)


def __getattr__(name):
    """Imports on first use: `python -m vista_patch` reads source and needs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'vista_patch' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
