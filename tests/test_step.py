"""What `apply` leaves to the training step: mutations of real LLaVA's files, patched and run.

Each one either has the term of the reference, in loss and in all gradients, or raises. Nothing else is right.
"""

import importlib.util
import shutil
import sys

import pytest
import torch
import transformers

from tests.helpers import IMAGE, PATCHES, ROWS, UPSTREAM, batch, gradients, reference
from tests.test_source import (
    ARCH,
    CALL,
    FORWARD,
    LEFT_TO_THE_STEP,
    LLAMA,
    RETURNS,
    SPLICE,
    TRAIN,
    UNPACK,
    both,
    swap,
)
from vista_patch.__main__ import main

EQUAL, STOCK_FAILS = "equal", "stock fails"

# A base class that lets the images into the decoder by another way too: it moves the first block's hidden states.
BASE = """class Takes(LlamaForCausalLM):
    def forward(self, images=None, m=None, multiway_indices=None, **given):
        more = [0.1 * t.float().mean() for t in (images, m, multiway_indices) if t is not None]
        hook = self.model.layers[0].register_forward_hook(lambda _, args, out: (out[0] + sum(more), *out[1:]))
        try:
            return super().forward(**given)
        finally:
            hook.remove()


"""
TAKES = swap(LLAMA, ("class LlavaLlamaForCausalLM(LlamaForCausalLM,", BASE + "class LlavaLlamaForCausalLM(Takes,"))
METHOD = "    def get_model("
GIVEN = FORWARD.partition("\n")[2]  # the arguments of the call that hands on to transformers
UNMASKED = GIVEN.replace("attention_mask=attention_mask", "attention_mask=None").replace("=position_ids", "=None")


def methods(text):
    return swap(LLAMA, (METHOD, text + "\n" + METHOD))


# What stands for each of LEFT_TO_THE_STEP where it would only be a crash of stock's, or is not whole.
RUNS = {
    "images enter the decoder by a slot of the splice": (
        both(
            LEFT_TO_THE_STEP["images enter the decoder by a slot of the splice"],
            swap(ARCH, (RETURNS[1], RETURNS[1].replace("position_ids", "new_labels == IGNORE_INDEX"))),
            TAKES,
        ),
        EQUAL,
    ),
    "images enter the decoder": (both(LEFT_TO_THE_STEP["images enter the decoder"], TAKES), EQUAL),
    "images enter the decoder behind a method": (
        both(LEFT_TO_THE_STEP["images enter the decoder behind a method"], TAKES),
        EQUAL,
    ),
    "tokens dropped in the decoder": (
        both(
            swap(LLAMA, (FORWARD, "return self.drop_forward(inputs_embeds, labels)\n        " + FORWARD)),
            methods(
                "    def drop_forward(self, x, labels):\n"
                "        for layer in self.model.layers:\n"
                "            x, labels = x[:, 1:], labels[:, 1:]\n"
                "            places = torch.arange(x.shape[1])[None]\n"
                "            x = layer(x, position_ids=places)[0]\n"
                "        logits = self.lm_head(self.model.norm(x))\n"
                "        return (nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits)\n"
            ),
        ),
        "its decoder, LlavaLlamaModel, did not run",
    ),
    "rows packed after the splice": (
        both(
            swap(LLAMA, (FORWARD, FORWARD.replace(GIVEN, UNMASKED))),
            swap(
                LLAMA,
                (
                    "return super().forward(",
                    "inputs_embeds, labels = self.repack(inputs_embeds, labels)\n        return super().forward(",
                ),
            ),
            methods("    def repack(self, x, labels):\n        return x.flatten(0, 1)[None], labels.flatten()[None]\n"),
        ),
        "rows are packed or dropped",
    ),
    "rows packed under another name": (
        both(
            swap(LLAMA, (FORWARD, FORWARD.replace(GIVEN, UNMASKED))),
            swap(
                LLAMA,
                (
                    "inputs_embeds=inputs_embeds,\n            labels=labels",
                    "inputs_embeds=packed,\n            labels=y",
                ),
                (
                    "return super().forward(",
                    "packed, y = inputs_embeds.flatten(0, 1)[None], labels.flatten()[None]\n"
                    "        return super().forward(",
                ),
            ),
        ),
        "rows are packed or dropped",
    ),
    "splice returns a dict": (
        both(
            swap(ARCH, (RETURNS[1], "return dict(x=new_input_embeds, y=new_labels, m=attention_mask)")),
            swap(
                LLAMA,
                (UNPACK, "batch"),
                (
                    FORWARD,
                    "inputs_embeds, labels, attention_mask = batch.values()\n"
                    "        input_ids = None\n        " + FORWARD,
                ),
            ),
        ),
        EQUAL,
    ),
    "not unpacked": (
        swap(
            LLAMA,
            (UNPACK, "batch"),
            (
                FORWARD,
                "_, position_ids, attention_mask, _, inputs_embeds, labels = batch\n"
                "        input_ids = None\n        " + FORWARD,
            ),
        ),
        EQUAL,
    ),
    "unpacked into attributes": (
        both(LEFT_TO_THE_STEP["unpacked into attributes"], swap(LLAMA, ("labels=labels,", "labels=self.labels,"))),
        EQUAL,
    ),
    "embeddings renamed": (
        both(LEFT_TO_THE_STEP["embeddings renamed"], swap(LLAMA, ("inputs_embeds=inputs_embeds,", "inputs_embeds=x,"))),
        EQUAL,
    ),
    "splice called twice": (
        swap(
            LLAMA,
            (
                "        if inputs_embeds is None:\n",
                f"        if inputs_embeds is None:\n            self.{SPLICE}{CALL}\n",
            ),
        ),
        EQUAL,
    ),
    "splice defined out of sight": (
        both(
            LEFT_TO_THE_STEP["splice defined out of sight"],
            swap(LLAMA, ("class LlavaConfig(", "Hidden = LlavaMetaForCausalLM\n\n\nclass LlavaConfig(")),
        ),
        EQUAL,
    ),
    "splice defined twice, as near": (
        lambda root: shutil.copyfile(root / ARCH, root / "llava/model/llava_arch_old.py"),
        EQUAL,
    ),
    "slots swapped in the splice": (LEFT_TO_THE_STEP["slots swapped in the splice"], STOCK_FAILS),
    "splice returns nothing": (LEFT_TO_THE_STEP["splice returns nothing"], STOCK_FAILS),
    "splice called otherwise": (LEFT_TO_THE_STEP["splice called otherwise"], STOCK_FAILS),
}


def load(root, monkeypatch):
    """The mutated module, in place of LLaVA's own in the package that is imported."""
    for auto in (transformers.AutoConfig, transformers.AutoModelForCausalLM):
        monkeypatch.setattr(auto, "register", lambda *args: None)
    for name in (ARCH, LLAMA):
        path = name.removesuffix(".py").replace("/", ".")
        spec = importlib.util.spec_from_file_location(path, root / name)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path, module)
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(llava, tmp_path):
    """LLaVA's files without our lines."""
    for name in (LLAMA, ARCH, TRAIN):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(UPSTREAM / name, tmp_path / name)
    assert main(["revert", str(tmp_path)]) == 0
    return tmp_path


def kinds(shape, left):
    """Which positions are text and which are image, counted out from ROWS."""
    text, image = torch.zeros(shape).bool(), torch.zeros(shape).bool()
    for b, row in enumerate(ROWS):
        row = [kind for token in row for kind in ("I" * PATCHES if token == IMAGE else "T")]
        start = shape[1] - len(row) if left else 0
        for i, kind in enumerate(row, start):
            text[b, i], image[b, i] = kind == "T", kind == "I"
    return text, image


@pytest.mark.parametrize("left", (False, True), ids=("right", "left"))
@pytest.mark.parametrize("name", LEFT_TO_THE_STEP)
def test_the_term_is_the_references_or_there_is_an_error(tree, make_model, monkeypatch, name, left):
    mutate, outcome = RUNS[name]
    mutate(tree)
    assert main(["apply", str(tree)]) == 0
    model = make_model(module=load(tree, monkeypatch), tokenizer_padding_side="left" if left else "right")
    seen, inputs, cls = [], batch(left=left), type(model)
    hook = model.model.register_forward_hook(
        lambda _, args, given, out: seen.append((given["inputs_embeds"], out[0])), with_kwargs=True
    )
    try:
        plain = cls.forward.__wrapped__(model, **inputs)
    except Exception:
        plain = None
    hook.remove()
    model.config.vista = {"metric": "l2", "weight": 0.5}
    assert (plain is None) == (outcome == STOCK_FAILS)
    if outcome == STOCK_FAILS:
        with pytest.raises((TypeError, ValueError, RuntimeError, AttributeError)):
            model(**inputs)
    elif outcome != EQUAL:
        with pytest.raises(RuntimeError, match=f"VISTA: {cls.__name__}: .*{outcome}"):
            model(**inputs)
    else:
        x, h = seen[-1]
        (plain.loss + 0.5 * reference(x, h, *kinds(x.shape[:2], left), "l2", "mean", "t/m")).backward()
        want = gradients(model)
        model.zero_grad()
        ours = model(**inputs)
        ours.loss.backward()
        assert torch.equal(ours.logits, plain.logits)
        torch.testing.assert_close(gradients(model), want, rtol=1e-4, atol=1e-6)


def test_each_of_them_is_run():
    assert set(RUNS) == set(LEFT_TO_THE_STEP)
