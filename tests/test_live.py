"""vista_patch.patch on models in memory, and what the term refuses while it runs."""

import inspect
import os
import subprocess
import sys

import pytest
import torch

import vista_patch
from tests.helpers import ROOT, batch, reference, stock
from vista_patch import vista_metrics


@pytest.fixture
def plain(make_model):
    """A LLaVA whose source has no line of ours."""
    model = make_model()
    cls = type(model)
    decorated, cls.forward = cls.forward, cls.forward.__wrapped__
    yield model
    cls.forward = decorated


@pytest.mark.parametrize("padding", ("left", "none"))
@pytest.mark.parametrize("metric", ("l2", "cosine"))
def test_transformers_own_llava(metric, padding):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    image, patches, d = 63, 4, 32
    torch.manual_seed(0)
    shape = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(hidden_size=16, image_size=8, patch_size=4, **shape)
    text = LlamaConfig(vocab_size=64, hidden_size=d, **shape)
    config = LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-2, image_token_index=image)
    model = LlavaForConditionalGeneration(config).train()
    merge = "_merge_input_ids_with_image_features"
    moves = merge in inspect.unwrap(type(model).forward).__code__.co_names  # until 4.46, one placeholder is one image
    model.pad_token_id = 0
    # Padding on the right is left out: with it the merge, in stock, puts image features on padding.
    rows = (
        [[1, 5, 6, image, 8], [1, 2, 3], [1, image, 4]] if padding == "left" else [[1, 5, image, 8], [1, image, 2, 3]]
    )
    rows = [[t for token in row for t in [token] * (1 if token != image or moves else patches)] for row in rows]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": torch.randn(2, 3, 8, 8)}
    inputs["labels"] = torch.where((ids != 0) & (ids != image), ids, -100)
    before, untouched = type(model).forward, model(**inputs, output_hidden_states=True)

    x, h = untouched.hidden_states[0], untouched.hidden_states[-1]
    is_text, is_image = torch.zeros(x.shape[:2]).bool(), torch.zeros(x.shape[:2]).bool()
    for b, row in enumerate(rows):
        kinds = [k for token in row for k in (["I"] * (patches if moves else 1) if token == image else ["T"])]
        for i, kind in enumerate(kinds, start=x.shape[1] - len(kinds)):
            is_text[b, i], is_image[b, i] = kind == "T", kind == "I"
    term = reference(x, h, is_text, is_image, metric, "mean", "t/m")
    with vista_patch.patch(model, metric, weight=0.5):
        torch.testing.assert_close((model(**inputs).loss - untouched.loss).double(), 0.5 * term, rtol=1e-5, atol=1e-6)
        assert vista_metrics(model)["loss_vista"] == pytest.approx(term.item(), rel=1e-5)
        kinds = [p.kind for p in inspect.signature(before).parameters.values()]
        if inspect.Parameter.VAR_KEYWORD in kinds:  # the sum of CE over an optimizer step's tokens: so is the term
            items = 3 * (inputs["labels"][:, 1:] != -100).sum()
            third = model(**inputs, num_items_in_batch=items).loss
            torch.testing.assert_close(third, (untouched.loss + 0.5 * term.float()) / 3, rtol=1e-5, atol=1e-6)
        text_only = inputs | {"input_ids": ids.clamp(max=9), "pixel_values": None}
        assert torch.equal(model(**text_only).loss, before(model, **text_only).loss)
    assert type(model).forward is before and not hasattr(model.config, "vista")
    assert torch.equal(model(**inputs).loss, untouched.loss)


@pytest.mark.pins
@pytest.mark.parametrize("version", ("4.40.1", "4.48.3", "5.23.0"))
def test_transformers_own_llava_in_other_releases(tmp_path, version):
    """TinyLLaVA's pin, one with a placeholder per image token, the current one. (4.46, stock, fails on text alone.)"""
    install = [ROOT / ".uv/bin/uv", "pip", "install", "--quiet", "--python", sys.executable, "--target", tmp_path]
    subprocess.run([*install, f"transformers=={version}", "pillow"], check=True)
    variables = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "own_llava and not other",
    ]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert "4 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


def test_patch_finds_the_llava_in_a_wrapper_and_undoes_itself(plain):
    cls, inputs = type(plain), batch()
    before, loss = cls.forward, plain(**inputs).loss
    wrapper = torch.nn.ModuleList([plain])
    first = vista_patch.patch(wrapper)
    second = vista_patch.patch(plain, "cosine", ramp="one")
    assert plain.config.vista["metric"] == "cosine"
    second.undo()
    second.undo()
    assert plain.config.vista["metric"] == "l2" and not torch.equal(plain(**inputs).loss, loss)
    first.undo()
    assert cls.forward is before and not hasattr(plain.config, "vista")
    assert torch.equal(plain(**inputs).loss, loss)
    with pytest.raises(ZeroDivisionError), vista_patch.patch(plain):
        raise ZeroDivisionError
    assert cls.forward is before


def test_patch_refuses_what_it_does_not_know(plain):
    with pytest.raises(TypeError, match="no module of Linear"):
        vista_patch.patch(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="choose from"):
        vista_patch.patch(plain, "L2")


def test_a_forward_of_the_instance_is_patched_and_given_back(plain):
    """As Liger and accelerate set it."""
    own, inputs = plain.forward, batch()
    with vista_patch.patch(plain):
        term = plain(**inputs).loss
    plain.forward = own
    with vista_patch.patch(plain):
        assert torch.equal(plain(**inputs).loss, term)
    assert plain.forward == own and not torch.equal(plain(**inputs).loss, term)


def test_a_forward_that_is_replaced_after_patching_raises(plain):
    inputs = batch()
    vista_patch.patch(plain)
    plain.forward = lambda **given: type(plain).forward.__wrapped__(plain, **given)
    loss = plain(**inputs).loss
    with pytest.raises(
        RuntimeError, match=r"trained without its term: its forward is not the patched one .*test_live\.py:\d+"
    ):
        loss.backward()
    with pytest.raises(RuntimeError, match="trained without its term"):
        vista_metrics(plain)


def test_steps_that_say_they_want_no_labels_raise_only_where_there_are_no_others(make_model):
    model, inputs = make_model({"metric": "l2"}), batch()

    def bare():
        model(**inputs | {"labels": None}).logits.sum().backward()

    bare()
    with pytest.raises(RuntimeError, match="trained without its term: its forward got no labels"):
        vista_metrics(model)
    bare()
    model(**inputs).loss.backward()
    assert vista_metrics(model)["loss_vista"] > 0 and vista_metrics(model) == {}


def test_a_forward_that_calls_a_decorated_one_adds_the_term_once(make_model):
    model = make_model({"metric": "l2"})
    once, cls = model(**batch()).loss, type(model)

    class Sub(cls):
        @vista_patch.vista_forward
        def forward(self, labels=None, **given):
            return cls.forward(self, labels=labels, **given)

    model.__class__ = Sub
    assert torch.equal(model(**batch()).loss, once)


def test_dropped_tokens_and_a_second_run_are_refused(make_model):
    model = make_model({"metric": "l2"})
    decoder = model.get_model()
    whole = decoder.forward
    decoder.forward = lambda inputs_embeds, attention_mask, position_ids, **given: whole(
        inputs_embeds=inputs_embeds[:, 1:], attention_mask=attention_mask[:, 1:], **given
    )
    with pytest.raises(
        RuntimeError, match=r"VISTA: LlavaLlamaForCausalLM: its decoder, LlavaLlamaModel, got .*packed or dropped"
    ):
        model(**batch())
    decoder.forward = whole
    lm_head = model.lm_head.forward
    model.lm_head.forward = lambda h: lm_head(h + 0 * decoder(inputs_embeds=h)[0])
    with pytest.raises(RuntimeError, match="VISTA: LlavaLlamaForCausalLM: its decoder ran more than once"):
        model(**batch())
    with torch.no_grad():
        del model.lm_head.forward
        assert torch.isfinite(model(**batch()).loss)


def test_flags_that_a_script_parsed_but_never_set_up_are_not_ignored(make_model, tmp_path):
    from dataclasses import dataclass, field

    from transformers import Trainer, TrainingArguments

    @vista_patch.vista_arguments
    @dataclass
    class ModelArguments:
        model_name_or_path: str = field(default="x")

        def __post_init__(self):
            self.seen = True

    model, arguments = make_model(), ModelArguments(vista="l2")
    assert arguments.seen
    with pytest.raises(RuntimeError, match="parsed --vista l2 but sets nothing up"):
        model(**batch())
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    vista_patch.vista_setup(Trainer(model=model, args=args), arguments)
    assert not torch.equal(model(**batch()).loss, stock(model, **batch()).loss)
