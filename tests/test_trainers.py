"""vista_patch.attach: the term in a transformers.Trainer, whoever computes the cross-entropy, however a batch is split.

A release of transformers that is not installed here runs these tests too: PYTHONPATH=<its folder> pytest this file.
"""

import inspect
import json
import types

import pytest
import torch
import transformers
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, Trainer

import vista_patch
from tests.helpers import reference

IMAGE, PATCHES, WEIGHT = 63, 4, 0.5
FUNCTIONS = "compute_loss_func" in inspect.signature(Trainer.__init__).parameters
EACH = {"plain": {}, "label smoothing": {"label_smoothing_factor": 0.1}}


def llava():
    torch.manual_seed(0)
    shape = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(hidden_size=16, image_size=8, patch_size=4, **shape)
    text = LlamaConfig(vocab_size=64, hidden_size=32, **shape)
    places = {"image_token_index": IMAGE, "image_seq_length": PATCHES}
    config = LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-2, **places)
    model = LlavaForConditionalGeneration(config).train()
    model.pad_token_id = 0
    return model


def moves():
    """Until transformers 4.46 one placeholder is one image."""
    names = inspect.unwrap(LlavaForConditionalGeneration.forward).__code__.co_names
    merges = "_merge_input_ids_with_image_features" in names
    return merges and "image_seq_length" not in inspect.signature(LlavaConfig.__init__).parameters


ROWS = [[1, 5, *[IMAGE] * (1 if moves() else PATCHES), 6 + i, 8, 9 + i, 10, 11 + i] for i in range(4)]


def collate(numbers):
    ids = torch.tensor([ROWS[i] for i in numbers])
    pictures = torch.stack([torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in numbers])
    labels = torch.where(ids == IMAGE, -100, ids)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pictures}


class InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(folder, model=None, batch=4, accumulate=1, kind=InOrder, **given):
    func = {"compute_loss_func": given.pop("compute_loss_func")} if "compute_loss_func" in given else {}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        logging_steps=1, report_to=[], remove_unused_columns=False, max_grad_norm=0.0, learning_rate=1.0, seed=0,
        lr_scheduler_type="constant", optim="sgd", save_strategy="no", use_cpu=True, **given,
    )  # fmt: skip
    return kind(model=model or llava(), args=arguments, train_dataset=range(4), data_collator=collate, **func)


def step(made):
    """Trains one step with a learning rate of 1: what was logged, and the gradients."""
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.train()
    log = next(row for row in made.state.log_history if "loss" in row)
    return log, {name: before[name] - p.detach() for name, p in made.model.named_parameters()}


def term(model, per_sample=True):
    """The mean over all samples, each run alone in stock."""
    total = 0.0
    for i in range(4):
        seen = {}

        def see(module, args, kwargs, output, seen=seen):
            seen["x"], seen["h"] = kwargs["inputs_embeds"], output[0]

        hook = vista_patch.observe.locate(model)[1].register_forward_hook(see, with_kwargs=True)
        model(**collate([i]))
        hook.remove()
        kinds = [k for t in ROWS[i] for k in ("I" * (PATCHES if moves() else 1) if t == IMAGE else "T")]
        image = torch.tensor([[k == "I" for k in kinds]])
        total = total + reference(seen["x"], seen["h"], ~image, image, "l2", "mean", "t/m")
    return total / 4


def cross_entropy(outputs, labels, num_items_in_batch=None):
    logits, labels = outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    items = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return nn.functional.cross_entropy(logits, labels, reduction="sum") / items


@pytest.mark.parametrize("given", EACH.values(), ids=EACH)
@pytest.mark.parametrize("batch,accumulate", ((4, 1), (2, 2), (1, 4)))
def test_the_term_does_not_depend_on_who_computes_the_loss_nor_on_the_split(tmp_path, given, batch, accumulate):
    if moves() and given:
        pytest.skip("this release's label smoothing cannot know where its Llava moved the labels to")
    stock_log, stock = step(trainer(tmp_path, batch=batch, accumulate=accumulate, **given))
    made = trainer(tmp_path, batch=batch, accumulate=accumulate, **given)
    vista_patch.attach(made, "l2", weight=WEIGHT)
    log, ours = step(made)
    check(stock_log, stock, log, ours)


def check(stock_log, stock, log, ours):
    model = llava()
    value = WEIGHT * term(model)
    value.backward()
    assert log["loss"] - stock_log["loss"] == pytest.approx(value.item(), abs=2e-4)  # loss: 4 digits
    assert log["loss_ce"] + WEIGHT * log["loss_vista"] == pytest.approx(log["loss"], abs=2e-4)
    for name, parameter in model.named_parameters():
        added = ours[name] - stock[name]
        expected = torch.zeros_like(added) if parameter.grad is None else parameter.grad
        # The weights that the gradients are read from are about 1, so they have an fp32's 1e-7 of that.
        torch.testing.assert_close(added, expected, rtol=2e-3, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.skipif(not FUNCTIONS, reason="this release of transformers has no compute_loss_func")
@pytest.mark.parametrize("batch,accumulate", ((4, 1), (1, 4)))
def test_a_loss_function_of_ones_own(tmp_path, batch, accumulate):
    given = {"batch": batch, "accumulate": accumulate, "compute_loss_func": cross_entropy}
    stock_log, stock = step(trainer(tmp_path, **given))
    made = trainer(tmp_path, **given)
    vista_patch.attach(made, "l2", weight=WEIGHT)
    check(stock_log, stock, *step(made))


def replaced(model, **given):
    return type(model).forward(model, **given)


def test_a_forward_that_is_replaced_when_training_starts(tmp_path):
    """As Liger's kernel and TRL's fused head do it, after the trainer is made."""
    stock_log, stock = step(trainer(tmp_path))
    made = trainer(tmp_path)
    vista_patch.attach(made, "l2", weight=WEIGHT)
    made.model.forward = types.MethodType(replaced, made.model)
    check(stock_log, stock, *step(made))


def test_a_trainer_that_throws_the_models_loss_away(tmp_path):
    class Logits(InOrder):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return model(**inputs).logits.float().square().mean()

    stock_log, stock = step(trainer(tmp_path, kind=Logits))
    made = trainer(tmp_path, kind=Logits)
    vista_patch.attach(made, "l2", weight=WEIGHT)
    check(stock_log, stock, *step(made))
    made = trainer(tmp_path, kind=Logits)
    with (
        vista_patch.patch(made.model),
        pytest.raises(RuntimeError, match="term: the loss that its forward returns is not"),
    ):
        step(made)


def test_patched_and_attached_adds_the_term_once(tmp_path):
    stock_log, stock = step(trainer(tmp_path))
    made = trainer(tmp_path)
    with vista_patch.patch(made.model, "cosine"):
        vista_patch.attach(made, "l2", weight=WEIGHT)
        check(stock_log, stock, *step(made))


@pytest.mark.parametrize("change", ("labels", "forward"))
def test_a_patched_model_in_a_trainer_that_bypasses_it_raises(tmp_path, change):
    if moves() and change == "labels":
        pytest.skip("this release's label smoothing cannot know where its Llava moved the labels to")
    made = trainer(tmp_path, label_smoothing_factor=0.1 if change == "labels" else 0.0)
    with vista_patch.patch(made.model):
        if change == "forward":
            made.model.forward = types.MethodType(inspect.unwrap(type(made.model).forward), made.model)
        why = "its forward got no labels" if change == "labels" else "its forward is not the patched one"
        with pytest.raises(RuntimeError, match=f"trained without its term: {why}"):
            step(made)


def test_a_step_that_goes_another_way_than_compute_loss_raises_at_the_log(tmp_path):
    class Own(InOrder):
        def training_step(self, model, inputs, *args):
            loss = InOrder.compute_loss(self, model, inputs)
            loss.backward()
            return loss.detach()

    made = trainer(tmp_path, kind=Own)
    vista_patch.attach(made)
    with pytest.raises(
        RuntimeError, match=r"no step before step 1 went through Own\.compute_loss|trained without its term"
    ):
        step(made)


def test_micro_batches_without_labels_raise_nothing(tmp_path):
    """All of their tokens ignored: 0 of 0 tokens, where the trainer passes num_items_in_batch."""
    made = trainer(tmp_path, batch=1, accumulate=4)
    whole = made.data_collator
    made.data_collator = lambda i: (
        whole(i) | ({"labels": torch.full_like(whole(i)["labels"], -100)} if i == [3] else {})
    )
    vista_patch.attach(made, "l2", weight=WEIGHT)
    if getattr(made, "model_accepts_loss_kwargs", False):
        log, _ = step(made)
        assert all(value == value for value in log.values())


def test_undo_gives_the_trainer_back(tmp_path):
    stock_log, stock = step(trainer(tmp_path))
    made = trainer(tmp_path)
    vista_patch.attach(made, "l2").undo()
    assert not {"compute_loss", "log", "save_model"} & set(vars(made)) and not hasattr(made.model.config, "vista")
    log, ours = step(made)
    assert log["loss"] == stock_log["loss"]
    torch.testing.assert_close(ours, stock, rtol=0, atol=0)


def test_attach_refuses_wrong_settings_and_models(tmp_path):
    made = trainer(tmp_path)
    with pytest.raises(ValueError, match="VISTA has no setting 'metrc': did you mean metric"):
        vista_patch.attach(made, metrc="l2")
    with pytest.raises(ValueError, match="choose from off, l2, cosine"):
        vista_patch.attach(made, "L2")
    made.model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="no module of Linear"):
        vista_patch.attach(made)


def test_an_adapters_folder_says_how_it_was_trained(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llava(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    made = trainer(tmp_path, model)
    vista_patch.attach(made, "cosine", weight=WEIGHT)
    made.train()
    made.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter/adapter_config.json").exists()
    assert json.loads((tmp_path / "adapter/config.json").read_text())["vista"]["metric"] == "cosine"


def test_the_release_is_asked_for_when_a_trainer_is_there(tmp_path, monkeypatch, caplog):
    """Not when vista_patch is imported: that may be before transformers."""
    attach = vista_patch.attach  # this imports it
    monkeypatch.setattr(transformers, "__version__", "4.46.3")
    attach(trainer(tmp_path, accumulate=4))
    assert "its gradient is 4 times too large" in caplog.text
