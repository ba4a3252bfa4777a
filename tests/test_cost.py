"""scripts/training/cost.py: its shapes against published sizes, its predictions against public runs, its tables."""

import pytest

from scripts import config
from scripts.training import cost

EXPERIMENTS = [f"{name}{v}" for name in ("llava-v1.5-7b", "tinyllava-3b") for v in ("", "-vista", "-vista-cosine")]


def stage(experiment, name):
    return cost.Cost(config.load(experiment), name)


@pytest.mark.parametrize(
    "name, published",
    [
        ("vicuna-7b-v1.5", 6.738e9),
        ("phi-2", 2.780e9),
        ("clip-vit-large-patch14-336", 0.304e9),
        ("siglip-so400m-patch14-384", 0.428e9),
    ],
)
def test_weights_are_the_published_number(name, published):
    """Norms, biases and position embeddings are left out; SigLIP's pooling head is 4%."""
    assert cost.MODELS[name].weights == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize("names, name, gpus, hours, source", cost.PUBLIC)
def test_public_runs_are_predicted(names, name, gpus, hours, source):
    """One utilisation for two models, two stages, and other people's machines: within 1.5x. Stage 2 of the 7B on
    8 A100-40GB was looked at when it was chosen, so it is held to 10%."""
    done = stage("llava-v1.5-7b" if names[0].startswith("vicuna") else "tinyllava-3b", name)
    assert done.names == names
    bound = 1.1 if (name, gpus, hours) == ("finetune", 8, 10) else 1.5
    assert 1 / bound < done.hours(gpus) / hours < bound, f"{done.hours(gpus):.1f} h against {hours} h ({source})"


def test_the_epochs_are_the_known_ones():
    assert stage("llava-v1.5-7b", "pretrain").steps == 2181  # as upstream's logs and checkpoints have it
    assert stage("llava-v1.5-7b", "finetune").steps == 5198


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_papers_batches_fit_the_papers_gpus(experiment):
    """8 x A100-40GB with 32, then 16 a device (appendix D)."""
    assert stage(experiment, "pretrain").batch(8, 40) == (32, 1)
    assert stage(experiment, "finetune").batch(8, 40) == (16, 1)


@pytest.mark.parametrize("gpus", (1, 2, 4, 8, 16, 32))
@pytest.mark.parametrize("name", ("pretrain", "finetune"))
def test_the_global_batch_is_kept_and_memory_bounds_the_batch(name, gpus):
    done = stage("llava-v1.5-7b", name)
    for gib in (24, 40, 80, 1000):
        if fit := done.batch(gpus, gib):
            per_device, accumulation = fit
            assert gpus * per_device * accumulation == done.global_batch
            assert done.memory(gpus, per_device) <= gib and per_device <= done.per_device
        else:
            assert done.memory(gpus, 1) > gib
    assert done.hours(gpus) == pytest.approx(done.hours(1) / gpus)


def test_the_tables_say_what_does_not_fit_or_divide(capsys):
    assert cost.main(["llava-v1.5-7b-vista", "--gpus", "1", "--gpu-memory", "80"]) == 0
    out = capsys.readouterr().out
    assert "2,181 steps of 256" in out and "5,198 steps of 128" in out
    assert "32 x 8" in out and "does not fit (104 GB)" in out
    assert cost.main(["llava-v1.5-7b-vista", "--gpus", "6"]) == 0
    assert capsys.readouterr().out.count("128 rows do not divide") == 2


@pytest.mark.parametrize(
    "argv, message",
    [
        (["llava-v1.5-8b"], "did you mean 'llava-v1.5-7b'"),
        (["llava-tiny"], "nothing is known of llama-tiny"),
        (["llava-v1.5-7b", "--gpus", "0"], "--gpus 0"),
    ],
)
def test_a_wrong_call_is_one_error(argv, message, capsys):
    try:
        assert cost.main(argv) == 2
    except SystemExit as error:
        assert error.code == 2
    assert message in capsys.readouterr().err
