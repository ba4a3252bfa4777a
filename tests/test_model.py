"""VISTA in the real, patched LLaVA forward: where it looks, what it adds, and that stock stays stock without it."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch

from tests.helpers import IMAGE, PATCHES, ROWS, batch, gradients, reference, stock
from vista_patch import VistaConfig, vista_metrics


def expected(model, inputs, rows, tokens_of, max_length, left, **settings):
    """The term from the token lists alone: where each token lands is counted out here, not asked of the splice."""
    out = stock(model, **inputs, output_hidden_states=True)
    x, h = out.hidden_states[0], out.hidden_states[-1]
    text, image = torch.zeros(x.shape[:2]).bool(), torch.zeros(x.shape[:2]).bool()
    counts = iter(tokens_of)
    for b, row in enumerate(rows):
        kinds = []
        for token in row:
            kinds += ["I"] * next(counts) if token == IMAGE else ["T"]
        if IMAGE not in row:
            next(counts)
        kinds = kinds[:max_length]
        start = x.shape[1] - len(kinds) if left else 0
        for i, kind in enumerate(kinds):
            (text if kind == "T" else image)[b, start + i] = True
    words = model.get_model().embed_tokens
    for b, row in enumerate(rows):  # and x_t really are the embeddings of the row's own tokens
        kept = [token for token in row if token != IMAGE][: text[b].sum()]
        torch.testing.assert_close(x[b, text[b]], words(torch.tensor(kept, dtype=torch.long)), rtol=0, atol=0)
    return reference(x, h, text, image, **settings)


@pytest.mark.parametrize("left", (False, True), ids=("right", "left"))
@pytest.mark.parametrize("metric", ("l2", "cosine"))
@pytest.mark.parametrize("max_length", (None, 12))
@pytest.mark.parametrize("mask", (True, False), ids=("mask", "no_mask"))
def test_the_term_on_every_kind_of_row(make_model, metric, left, max_length, mask):
    config = {"tokenizer_padding_side": "left" if left else "right", "tokenizer_model_max_length": max_length}
    model = make_model({"metric": metric}, **config)
    rows = ROWS if mask else [[*row[:1], IMAGE, *row[2:4]] for row in ROWS[:3]]
    inputs = batch(rows, left)
    if not mask:
        inputs["attention_mask"] = None
    ours, plain = model(**inputs), stock(model, **inputs)
    settings = {"metric": metric, "reduction": "mean", "ramp": "t/m"}
    term = expected(model, inputs, rows, [PATCHES] * 99, max_length, left, **settings)
    torch.testing.assert_close((ours.loss - plain.loss).double(), term, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours.logits, plain.logits)


def test_rows_with_different_numbers_of_image_tokens(make_model):
    rows = [[1, 5, IMAGE, 6, 7], [1, IMAGE, 8, 9, 10, 11], [1, 2, 3]]
    tiles = [torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (1, 3, 1)]
    model = make_model({"metric": "l2", "reduction": "sum", "ramp": "t", "weight": 0.5})
    inputs = batch(rows, images=tiles)
    difference = (model(**inputs).loss - stock(model, **inputs).loss).double()
    term = expected(model, inputs, rows, [4, 12, 4], None, False, metric="l2", reduction="sum", ramp="t")
    torch.testing.assert_close(difference, 0.5 * term, rtol=1e-5, atol=0)


def test_the_gradient_is_the_reference_terms(make_model):
    model = make_model({"metric": "l2", "weight": 0.3})
    inputs = batch()
    model(**inputs).loss.backward()
    ours = gradients(model)
    model.zero_grad()
    out = stock(model, **inputs)
    settings = {"metric": "l2", "reduction": "mean", "ramp": "t/m"}
    (out.loss + 0.3 * expected(model, inputs, ROWS, [PATCHES] * 99, None, False, **settings)).backward()
    torch.testing.assert_close(ours, gradients(model), rtol=1e-4, atol=1e-7)  # fp32 against an fp64 term


OFF = {
    "absent": (None, {}),
    "off": ({"metric": "off"}, {}),
    "weight 0": ({"metric": "l2", "weight": 0.0}, {}),
    "eval": ({"metric": "l2"}, {"eval": True}),
    "no labels": ({"metric": "l2"}, {"labels": None}),
    "no images": ({"metric": "l2"}, {"images": None}),
}


@pytest.mark.parametrize("vista,change", OFF.values(), ids=OFF)
def test_off_is_bitwise_stock(make_model, vista, change):
    model = make_model(vista)
    inputs = batch() | {key: value for key, value in change.items() if key in ("labels", "images")}
    if change.get("images", 1) is None:
        inputs["input_ids"] = inputs["input_ids"].clamp(min=0)
    model.train(not change.get("eval"))
    results = []
    for forward in (model, lambda **kwargs: stock(model, **kwargs)):
        out = forward(**inputs)
        (out.logits.sum() if out.loss is None else out.loss).backward()
        results.append((out.loss, out.logits, gradients(model)))
        model.zero_grad()
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_all_text_batch_is_stock_with_the_graph_whole(make_model):
    model = make_model({"metric": "l2"})
    inputs = batch([[1, 2, 3, 4], [1, 5, 6]])
    ours = model(**inputs).loss
    ours.backward()
    assert torch.equal(ours, stock(model, **inputs).loss)
    touched = gradients(model)
    stock(make_model(), **inputs).loss.backward()
    assert "model.mm_projector.weight" in touched  # DeepSpeed waits for every parameter's gradient
    assert vista_metrics(model)["vista_share"] == 0


def test_the_vision_tower_and_the_decoder_run_once(make_model):
    model, calls = make_model({"metric": "l2"}), []
    model.get_vision_tower().register_forward_hook(lambda *_: calls.append("vision tower"))
    model.get_model().register_forward_hook(lambda *_: calls.append("decoder"))
    model(**batch())
    assert sorted(calls) == ["decoder", "vision tower"]


def test_nothing_is_left_behind_even_by_an_error(make_model):
    model = make_model({"metric": "l2"})
    hooks, attributes = len(model.get_model()._forward_hooks), set(vars(model))
    with pytest.raises(IndexError):
        model(**batch() | {"images": torch.randn(1, 3, 8, 8)})
    assert len(model.get_model()._forward_hooks) == hooks and set(vars(model)) == attributes


def test_gradient_checkpointing_gives_the_same_gradients(make_model):
    results = []
    for checkpointing in (False, True):
        model = make_model({"metric": "cosine"})
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()  # as train.py does
        model(**batch()).loss.backward()
        results.append(gradients(model))
    # Checkpointed segments run backward at other times, so gradients that meet are summed in another order.
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-7)


def test_a_tuple_output_carries_the_same_loss(make_model):
    model = make_model({"metric": "l2"})
    assert torch.equal(model(**batch(), return_dict=False)[0], model(**batch()).loss)


def test_bf16_term_is_the_fp32_term_of_the_same_values(make_model):
    model = make_model({"metric": "l2"}).bfloat16()
    inputs = batch() | {"images": batch()["images"].bfloat16()}
    model(**inputs)
    settings = {"metric": "l2", "reduction": "mean", "ramp": "t/m"}
    term = expected(model, inputs, ROWS, [PATCHES] * 99, None, False, **settings)
    assert vista_metrics(model)["loss_vista"] == pytest.approx(term.item(), rel=1e-5)


def test_generate_is_stock(make_model):
    inputs = {"inputs": torch.tensor([[1, 5, IMAGE, 6]]), "images": batch()["images"][:1]}
    outputs = [make_model(vista).eval().generate(**inputs, max_new_tokens=5) for vista in (None, {"metric": "l2"})]
    assert torch.equal(*outputs)


def test_metrics_are_means_over_micro_steps(make_model):
    model = make_model({"metric": "l2", "weight": 0.5})
    losses = [model(**batch()).loss, model(**batch([ROWS[1], ROWS[0]])).loss]
    metrics = vista_metrics(model)
    total = sum(loss.item() for loss in losses) / 2
    assert metrics["loss_ce"] + 0.5 * metrics["loss_vista"] == pytest.approx(total, rel=1e-6)
    assert metrics["vista_share"] == pytest.approx((4 + 1) / 8)  # rows 0, 2, 3, 4 have image and text; then one of two
    assert -1 <= metrics["vista_cosine"] <= 1
    assert vista_metrics(model) == {}


@pytest.mark.parametrize("where,terms", (("lm_head", "loss_ce"), ("model.embed_tokens", "loss_ce and loss_vista")))
def test_non_finite_values_raise_naming_term_and_step(make_model, where, terms):
    model = make_model({"metric": "l2"})
    for step in range(3):
        if step == 1:
            model.get_submodule(where).weight.data.fill_(math.inf)
        model(**batch())
    with pytest.raises(FloatingPointError, match=rf"{terms} not finite, first at micro-step 2 .* before step 7"):
        vista_metrics(model, where="step 7")


def test_spliced_embeddings_from_outside_are_refused(make_model):
    model, inputs = make_model({"metric": "l2"}), batch()
    embeds = torch.randn(6, 15, 32)
    with pytest.raises(RuntimeError, match=r"VISTA: LlavaLlamaForCausalLM: .*pass input_ids"):
        model(**inputs | {"input_ids": None, "inputs_embeds": embeds})


def test_checkpoint_says_how_it_was_trained_and_stock_loads_it(make_model, llava, tmp_path):
    settings = VistaConfig("cosine", ramp="t", weight=0.1).to_dict()
    make_model(settings).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vista"] == settings
    loaded = llava.LlavaLlamaForCausalLM.from_pretrained(tmp_path)
    loaded.get_vision_tower().load_model()
    assert torch.equal(stock(loaded.train(), **batch()).loss, stock(make_model(), **batch()).loss)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"metric": "L2"}, "choose from off, l2, cosine"),
        ({"metric": "l2", "ramp": "t/n"}, "choose from t/m, t, one"),
        ({"metrik": "l2"}, "did you mean metric"),
        ({"metric": "l2", "weight": math.nan}, "finite number"),
        ({"metric": "l2", "weight": "1"}, "finite number"),
        ({"metric": "l2", "detach_text": "no"}, "true or false"),
    ],
)
def test_unknown_settings_are_refused(make_model, settings, message):
    with pytest.raises(ValueError, match=message):
        make_model(settings)(**batch())


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"vista_metric": "l2"}, "unknown key 'vista_metric': did you mean vista?"),
        ({"metric": "l2"}, "did you mean vista?"),
        ({"vista_wieght": 1}, "did you mean vista_weight?"),
        ({"vista_ramp": "t/n"}, "choose from t/m, t, one"),
    ],
)
def test_unknown_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        VistaConfig.from_arguments(arguments)


def test_settings_walk_from_flags_to_config_and_back():
    """One mapping: what a script parsed, a config's [vista] table, model.config.vista."""
    config = VistaConfig("cosine", "sum", "one", 0.5, True)
    flags = config.to_arguments()
    assert flags == {
        "vista": "cosine", "vista_reduction": "sum", "vista_ramp": "one", "vista_weight": 0.5,
        "vista_detach_text": True,
    }  # fmt: skip
    parsed = SimpleNamespace(**flags, model_name_or_path="x")
    assert VistaConfig.from_arguments(flags) == VistaConfig.from_arguments(parsed) == config
    assert VistaConfig.from_dict(config.to_dict()) == config
    assert VistaConfig.from_arguments({}) == VistaConfig()


def test_setup_refuses_a_model_that_would_not_add_the_term(make_model, tmp_path):
    from torch import nn
    from transformers import Trainer, TrainingArguments

    from vista_patch import vista_setup

    flags = SimpleNamespace(
        vista="l2", vista_reduction="mean", vista_ramp="t/m", vista_weight=1.0, vista_detach_text=False
    )
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    plain = Trainer(model=nn.Linear(2, 2), args=args)
    with pytest.raises(TypeError, match="the forward of Linear does not add it"):
        vista_setup(plain, flags)
    model = make_model()
    vista_setup(Trainer(model=model, args=args), flags)
    assert model.config.vista["metric"] == "l2"
