"""One optimizer step by a real trainer on a tiny model, and what it changed. Also a script, for torchrun and for Liger.

python -m tests.families.training SPEC_JSON OUT_FILE
"""

import json
import sys
import tempfile

import torch

from tests.families.reference import batch, build, gradients, rows, term
from tests.families.registry import FAMILIES, PAD, Family

IMAGES = (1, 1, 2, 1)  # of each of the four samples of the optimizer step
WEIGHT = 0.5
LIGER = {  # family: what replaces its forward, less the kernels that do not run in triton's interpreter
    "InternVL": ("apply_liger_kernel_to_internvl", {"rms_norm": False, "layer_norm": False}),
    "GLM-4V": ("apply_liger_kernel_to_glm4v", {"rope": False, "rms_norm": False, "swiglu": False}),
}


def samples(family: Family, model, images=IMAGES) -> list[dict]:
    """One row each, not padded, with pixels of its own."""
    made = []
    for i, (row, n) in enumerate(zip(rows(family, list(images)), images, strict=True)):
        one = batch(family, model, images=[n], given=[row])
        if n:
            one["pixel_values"] = one["pixel_values"] + 0.3 * i
        made.append(one)
    return made


def collate(given: list[dict]) -> dict:
    """Padded on the right; images one after the other."""
    width = max(one["input_ids"].shape[1] for one in given)
    out = {}
    for key in dict.fromkeys(key for one in given for key in one):
        values = [one[key] for one in given if key in one]
        if not key.startswith(("pixel", "image")):
            fill = {"labels": -100, "input_ids": PAD}.get(key, 0)
            values = [torch.nn.functional.pad(v, (0, width - v.shape[1]), value=fill) for v in values]
        out[key] = torch.cat(values)
    return out


def reference(family: Family, images=IMAGES, metric: str = "l2") -> tuple[float, dict]:
    """The term of an optimizer step, a mean over its samples with an image, and its gradient. Each sample alone."""
    model = build(family, torch.float64)
    terms = [term(family, model, one, metric)[1] for one in samples(family, model, images)]
    terms = [t for t in terms if t is not None]
    total = sum(terms) / len(terms)
    total.backward()
    return total.item(), gradients(model)


def own_loss(outputs, labels, num_items_in_batch=None):
    """A loss function of one's own: cross-entropy summed over the tokens of the optimizer step."""
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return loss / (num_items_in_batch if num_items_in_batch is not None else (labels[:, 1:] != -100).sum())


def train(kind: str, family: str, per_device: int, accumulation: int, vista="", images=IMAGES, replace=False) -> dict:
    """Trains one optimizer step by SGD with rate 1: the log, and the gradients, which are what the weights lost.

    vista: "" (stock), "attach" to the trainer, or "patch" the model before it.
    replace: whether the model's forward is replaced on the instance by stock's just before training.
    """
    import transformers

    import vista_patch

    chosen = FAMILIES[family]
    model = build(chosen, torch.float32 if "liger" in kind else torch.float64)
    data, stock_forward = samples(chosen, model, images), type(model).forward
    if kind == "liger class":
        import liger_kernel.transformers

        name, kernels = LIGER[family]
        getattr(liger_kernel.transformers, name)(**kernels)
    patched = vista_patch.patch(model, weight=WEIGHT) if vista == "patch" else None
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "logging_steps": 1,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "remove_unused_columns": False,
        "max_grad_norm": 0,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "label_smoothing_factor": 0.1 if "label smoothing" in kind else 0.0,
    }
    if kind == "liger instance":
        settings |= {"use_liger_kernel": True, "liger_kernel_config": LIGER[family][1]}
    common = {"optimizers": (torch.optim.SGD(model.parameters(), lr=1.0), None), "model": model}
    common["data_collator"] = lambda indices: collate([data[i["index"]] for i in indices])
    dataset = [{"index": i} for i in range(len(data))]
    if "own loss" in kind:
        common["compute_loss_func"] = own_loss
    if kind.startswith("trl"):
        import datasets
        from trl import SFTConfig, SFTTrainer

        args = SFTConfig(**settings, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
        dataset = datasets.Dataset.from_list(dataset)
        trainer = SFTTrainer(args=args, train_dataset=dataset, processing_class=tokenizer(), **common)
    else:
        trainer = transformers.Trainer(args=transformers.TrainingArguments(**settings), train_dataset=dataset, **common)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if vista == "attach":
        vista_patch.attach(trainer, weight=WEIGHT)
    if replace:
        model.forward = lambda *args, **kwargs: stock_forward(model, *args, **kwargs)
    try:
        trainer.train()
    finally:
        if patched:
            patched.undo()
    change = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    return {"log": trainer.state.log_history[0], "gradients": change}


def tokenizer():
    """TRL asks for one; it is not used."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w3"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2", unk_token="w3")


if __name__ == "__main__":
    result = train(**json.loads(sys.argv[1]))
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(result, sys.argv[2])
    if dist.is_initialized():
        dist.destroy_process_group()
