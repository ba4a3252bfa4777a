"""Runs an upstream's stock train.py in this process, with what no flag of it can do.

1. Its projector is initialised before the trainer seeds anything: `--seed` is set here, so that two runs are equal.
2. Without CUDA, accelerate would still ask for NCCL under DeepSpeed: gloo is set up first, and found by it.
3. Without CUDA, `torch.cuda.synchronize()` at the final save must do nothing.
4. Newer torch loads nothing but weights by default: the classes in a checkpoint to continue from are named.
5. Every stage continues from its newest whole checkpoint. LLaVA's stage 1 writes nothing but the projector at its
   checkpoints: transformers' own checkpoint is written instead. TinyLLaVA's train.py never asks to continue.
6. OUTPUT_DIR/stop (launch.py makes it on SIGTERM) ends the training after a checkpoint, with exit code 143.
7. A step whose loss is not finite leaves its rows in OUTPUT_DIR/nonfinite.json, as training data to replay. A row that
   cannot be read is named.
8. The log gains tokens_per_second (positions that the decoder ran: text, image and padding, over all ranks) and
   gpu_hours (of the steps so far and this process's start; what a killed run did after its checkpoint is not in it).
9. A micro-batch in which no token has a label is 0/0. Stock's own run goes on, since its gradient is 0; here it stops
   and the error says so, or with `--unlabelled skip` its cross-entropy is 0 and training goes on.

`--train_module` is the script as a module, such as llava.train.train_mem; all else goes to stock.
"""

import argparse
import importlib
import json
import os
import runpy
import sys
import time
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import transformers
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from scripts.common import die_with_parent, write_whole

START = time.monotonic()
STOPPED = 143
rows: list[int] = []  # of the micro-steps since the last log, on this rank
tokens = 0  # and theirs
labels: list[tuple[list[int], bool]] = []  # and for each of them: its rows, and whether any of its tokens had a label


def check(checkpoint: Path, ranks: int) -> None:
    """Raises OSError, ValueError or BadZipFile where a file that training continues from is not as it was written."""
    json.loads(
        (checkpoint / "trainer_state.json").read_text(encoding="utf-8")
    )  # written after the weights and the optimizer
    shards = len(list(checkpoint.glob("global_step*/*optim_states.pt")))
    if shards not in (0, ranks):
        raise ValueError(f"holds the optimizer of {shards} ranks, where {ranks} are training")
    for path in checkpoint.rglob("*.pt*"):
        with ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise BadZipFile(f"{path} is damaged at {damaged}")


def newest_whole(output_dir: str, ranks: int) -> str | None:
    """The checkpoint to continue from; None where there is none at all. Exits where none is whole."""
    found = sorted(Path(output_dir).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for checkpoint in found:
        try:
            check(checkpoint, ranks)
            return str(checkpoint)
        except (OSError, ValueError, BadZipFile) as error:
            print(f"train: cannot continue from {checkpoint}: {error}", file=sys.stderr)
    if found:
        sys.exit(f"train: no checkpoint in {output_dir} can be continued; remove them to start this stage over")
    return None


def from_rank_0(value):
    """What rank 0 has, on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


class Driver(transformers.TrainerCallback):
    """Between stock's steps: throughput, and stopping when asked."""

    hours_before = 0.0  # of the steps before the checkpoint

    def on_train_begin(self, args, state, control, **_):
        self.logged, self.tokens, self.stopping = time.monotonic(), 0, False

    def on_step_end(self, args, state, control, **_):
        if not control.should_log:  # where the log waits for the device anyway
            return
        asked = args.process_index == 0 and Path(args.output_dir, "stop").exists()
        sums = torch.tensor([asked, tokens], dtype=torch.float64, device=args.device)
        if dist.is_initialized():
            dist.all_reduce(sums)
        asked, self.tokens = sums.tolist()
        if asked and state.global_step < state.max_steps:
            self.stopping = control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs, **_):
        global tokens
        if "loss" in logs:  # in what is shown, not in the trainer's state: checkpoints do not depend on the clock
            now = time.monotonic()
            logs["tokens_per_second"] = round(self.tokens / (now - self.logged))
            logs["gpu_hours"] = round(self.gpu_hours(args), 4)
            self.logged, tokens = now, 0
            rows.clear()
            labels.clear()

    def gpu_hours(self, args) -> float:
        return self.hours_before + (time.monotonic() - START) * args.world_size / 3600

    def on_save(self, args, state, control, **_):
        if args.process_index == 0:
            hours = Path(args.output_dir, f"checkpoint-{state.global_step}", "gpu_hours")
            hours.write_text(str(self.gpu_hours(args)))

    def on_train_end(self, args, state, control, **_):
        if self.stopping:
            raise SystemExit(STOPPED)


def train(self, *_, **__):
    ranks = self.args.world_size
    checkpoint = newest_whole(self.args.output_dir, ranks) if self.args.process_index == 0 else None
    checkpoint = from_rank_0(checkpoint)
    if checkpoint and (hours := Path(checkpoint, "gpu_hours")).exists():
        Driver.hours_before = float(hours.read_text() or 0)
    number_rows(self)
    try:
        return stock_train(self, resume_from_checkpoint=checkpoint)
    except FloatingPointError as error:
        unlabelled = [row for batch, there in labels if not there for row in batch]
        of_ranks = [(rows, unlabelled)]
        if dist.is_initialized():  # the log that raises is every rank's
            of_ranks = [None] * ranks
            dist.all_gather_object(of_ranks, (rows, unlabelled))
        data = self.train_dataset.list_data_dict
        batch = [data[row] for part, _ in of_ranks for row in part]
        path = Path(self.args.output_dir, "nonfinite.json")
        if self.args.process_index == 0:
            write_whole(path, json.dumps(batch, indent=1))
        message = f"{str(error).rstrip('.')}. The rows since the last log are in {path}; their ids: {ids(batch)}"
        if found := [data[row] for _, part in of_ranks for row in part]:
            message += (
                f". There is a micro-batch in which no token has a label: its loss is 0/0. Its ids: {ids(found)}. "
                "Stock drops the labels of a row whose tokens do not match ('tokenization mismatch'), and of an answer "
                'beyond model_max_length. Take these rows out of the data, or set unlabelled = "skip" in the config: '
                "the cross-entropy of such a micro-batch is 0 then, and this stage continues"
            )
        raise FloatingPointError(message) from None


def ids(batch):
    return ", ".join(str(row.get("id")) for row in batch)


def number_rows(trainer) -> None:
    """Lets a batch say which rows of the data it is made of; `compute_loss` takes that out again."""
    dataset, collate = type(trainer.train_dataset), trainer.data_collator
    stock_getitem = dataset.__getitem__

    def getitem(self, i):
        try:
            return {**stock_getitem(self, i), "row": i}
        except Exception as error:
            row = self.list_data_dict[i]
            where = f"row {i} of the data (id {row.get('id')}, image {row.get('image')})"
            raise ValueError(f"{where} cannot be used: {type(error).__name__}: {error}") from error

    dataset.__getitem__ = getitem
    trainer.data_collator = lambda parts: {**collate(parts), "rows": [part["row"] for part in parts]}


def compute_loss(self, model, inputs, return_outputs=False):
    global tokens
    batch = inputs.pop("rows")
    rows.extend(batch)
    labels.append((batch, True))
    loss, outputs = stock_compute_loss(self, model, inputs, return_outputs=True)
    tokens += outputs["logits"].shape[:2].numel()
    return (loss, outputs) if return_outputs else loss


def cross_entropy(logits, targets, **settings):
    """torch's, as the language model's forward calls it once; notes whether a target counts."""
    there = (targets != settings.get("ignore_index", -100)).any()
    if labels:
        labels[-1] = labels[-1][0], there
    if own.unlabelled == "skip" and not there:
        print(f"train: no token has a label in the micro-batch of rows {labels[-1][0]}: it counts nothing", flush=True)
        return logits.flatten()[:1].float().sum() * 0  # its gradient is 0, as stock's
    return stock_cross_entropy(logits, targets, **settings)


parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
parser.add_argument("--train_module", required=True)
parser.add_argument("--unlabelled", choices=("stop", "skip"), default="stop")
own, stock_argv = parser.parse_known_args()
if "LOCAL_RANK" in os.environ:  # under a launcher
    die_with_parent()
parser.add_argument("--seed", type=int, required=True)
transformers.set_seed(parser.parse_known_args()[0].seed)
if not torch.cuda.is_available():
    if "LOCAL_RANK" in os.environ:  # under a launcher
        deepspeed.init_distributed("gloo", verbose=False)
    torch.cuda.synchronize = lambda device=None: None
if hasattr(torch.serialization, "add_safe_globals"):
    rebuild = np.core.multiarray._reconstruct  # type: ignore[attr-defined]
    numpy_state = [rebuild, np.ndarray, np.dtype, type(np.dtype("uint32"))]
    torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address, *numpy_state])

transformers.trainer.DEFAULT_CALLBACKS.append(Driver)
stock_train, stock_compute_loss = transformers.Trainer.train, transformers.Trainer.compute_loss
transformers.Trainer.train, transformers.Trainer.compute_loss = train, compute_loss
stock_cross_entropy = torch.nn.functional.cross_entropy
torch.nn.functional.cross_entropy = cross_entropy  # type: ignore[assignment]
if own.train_module.startswith("llava."):
    # Its final save does not go through this. `_save` stays: deepspeed's part of the checkpoint holds the weights.
    del importlib.import_module("llava.train.llava_trainer").LLaVATrainer._save_checkpoint

sys.argv[1:] = stock_argv
code = 0
try:
    runpy.run_module(own.train_module, run_name="__main__", alter_sys=True)
except SystemExit as stopped:
    if stopped.code != STOPPED:
        raise
    code = STOPPED
if dist.is_initialized():
    # Ranks that leave one by one can tear gloo's threads down under each other: "terminate called", exit code -6.
    dist.barrier()
    dist.destroy_process_group()
sys.exit(code)
