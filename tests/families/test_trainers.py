"""The term in real trainers: one optimizer step of four samples, whoever computes the loss and however they are split.

What training with VISTA changes over stock is `weight` times the reference's term, in the logged loss and in all
gradients; or there is an error.
"""

import functools
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.families.reference import assert_same_gradients
from tests.families.registry import FAMILIES
from tests.families.test_families import release
from tests.families.training import IMAGES, WEIGHT, reference, train

pytestmark = pytest.mark.families
SPLITS = [(4, 1), (2, 2), (1, 4)]
# A family whose forward in Liger runs in this release: docs/models.md says what the others lack.
LIGER = "GLM-4V" if importlib.metadata.version("transformers") >= "5" else "InternVL"
TRAINERS = {
    "transformers.Trainer": ("plain", "LLaVA"),
    "Trainer, num_items_in_batch not passed on": ("plain", "Qwen2-VL"),
    "Trainer, label smoothing": ("label smoothing", "LLaVA"),
    "Trainer, compute_loss_func": ("own loss", "LLaVA"),
    "TRL": ("trl", "LLaVA"),
    "TRL, compute_loss_func": ("trl own loss", "LLaVA"),
    "TRL, label smoothing": ("trl label smoothing", "LLaVA"),
    "Liger on the instance": ("liger instance", LIGER),
    "Liger on the class": ("liger class", LIGER),
}


def installed(kind: str) -> None:
    for word, package in (("trl", "trl"), ("liger", "liger_kernel")):
        if word in kind and importlib.util.find_spec(package) is None:
            pytest.skip(f"no {package} in this environment")


def run(tmp_path, ranks: int = 1, script: str = "training", **spec) -> dict | None:
    """A script of this folder in processes of its own, and what it has saved."""
    module = ["-m", f"tests.families.{script}", json.dumps(spec), str(tmp_path / "out.pt")]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    variables = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, *(launch if ranks > 1 or script == "sharded" else []), *module]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return torch.load(tmp_path / "out.pt") if script == "training" else None


stock_of = functools.cache(train)
reference_of = functools.cache(lambda family, images: reference(FAMILIES[family], images))


def assert_term_added(on: dict, stock: dict, family: str, images=IMAGES, rtol: float = 1e-5) -> None:
    # Norms round to fp32 inside of a model in fp64, so a difference of two gradients is that good.
    term, want = reference_of(family, images)
    assert on["log"]["loss_vista"] == pytest.approx(term, rel=1e-4)
    assert on["log"]["loss"] - stock["log"]["loss"] == pytest.approx(
        WEIGHT * term, abs=2e-4 if release() < "5" else 5e-6
    )
    added = {name: on["gradients"][name] - stock["gradients"][name] for name in want}
    scale = max(g.abs().max() for g in stock["gradients"].values())
    want = {name: torch.zeros_like(added[name]) if g is None else WEIGHT * g for name, g in want.items()}
    assert_same_gradients(added, want, rtol, noise=rtol * 1e-2 * scale)


@pytest.mark.parametrize("split", SPLITS, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("name", TRAINERS)
def test_trainer(name, split, tmp_path):
    kind, family = TRAINERS[name]
    installed(kind)
    if "liger" in kind:
        if split == (2, 2):
            pytest.skip("slow in triton's interpreter")
        both = [run(tmp_path, kind=kind, family=family, per_device=split[0], accumulation=split[1], vista=vista)
                for vista in ("", "attach")]  # fmt: skip
        return assert_term_added(both[1], both[0], family, rtol=1e-3)
    on = train(kind, family, *split, "attach")
    assert_term_added(on, stock_of(kind, family, *split), family)


@pytest.mark.parametrize("split", [(2, 1), (1, 2)], ids="{0[0]}x{0[1]}".format)
def test_two_ranks(split, tmp_path):
    spec = {"kind": "plain", "family": "LLaVA", "per_device": split[0], "accumulation": split[1]}
    both = [run(tmp_path, 2, vista=vista, **spec) for vista in ("", "attach")]
    assert_term_added(both[1], both[0], "LLaVA")


@pytest.mark.parametrize("split", [(4, 1), (2, 2)], ids="{0[0]}x{0[1]}".format)
def test_text_alone_among_them(split):
    images = (1, 0, 2, 0)
    for family in ("Qwen2-VL",) if release() == "4.46" else ("LLaVA", "Qwen2-VL"):  # its LLaVA fails on text alone
        both = [train("plain", family, *split, vista, images=images) for vista in ("", "attach")]
        assert both[1]["log"]["vista_share"] == 0.5
        if split == (4, 1):
            assert_term_added(both[1], both[0], family, images)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_forward_replaced_after_patching(name):
    """The trainer's loss has the term whatever forward runs; the patched forward's is gone, and that is an error."""
    kind, family = TRAINERS[name]
    installed(kind)
    if "liger" in kind:
        pytest.skip("replaces it itself")
    try:
        train(kind, family, 2, 2, replace=True)
    except AttributeError as error:  # TRL reads what its own forward returns
        pytest.skip(f"stock fails: {error}")
    on = train(kind, family, 2, 2, "attach", replace=True)
    assert_term_added(on, stock_of(kind, family, 2, 2), family)
    with pytest.raises(RuntimeError, match=r"VISTA.*trained without its term"):
        train(kind, family, 2, 2, "patch", replace=True)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_patched_model_in_a_trainer_trains_with_its_term_or_raises(name, tmp_path):
    kind, family = TRAINERS[name]
    installed(kind)
    spec = {"kind": kind, "family": family, "per_device": 4, "accumulation": 1}
    go = (lambda **given: run(tmp_path, **given)) if "liger" in kind else (lambda **given: train(**given))
    try:
        on = go(**spec, vista="patch")
    except RuntimeError as error:
        assert "VISTA" in str(error)
    else:
        _, want = reference_of(family, IMAGES)
        stock = go(**spec) if "liger" in kind else stock_of(*spec.values())
        scale = max(g.abs().max() for g in stock["gradients"].values())
        added = {name: on["gradients"][name] - stock["gradients"][name] for name in want}
        want = {name: torch.zeros_like(added[name]) if g is None else WEIGHT * g for name, g in want.items()}
        rtol = 1e-3 if "liger" in kind else 1e-5
        assert_same_gradients(added, want, rtol, noise=rtol * 1e-2 * scale)
