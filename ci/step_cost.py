"""Measures what the term adds to a whole training step. Off and l2 take turns in one process, on one batch.

    python ci/step_cost.py CHECKPOINT EVAL_DATA

Run it in scripts/probe.sh's environment and with its PYTHONPATH. It prints JSON: the device; for off and l2 the median
of a forward and backward in ms, and on a GPU the peak of allocated memory in MB; the paired overhead in %.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

from scripts.reporting.probe import IGNORE_INDEX, held_out, load

ROUNDS, WARM_UP, ROWS = 20, 3, 16
checkpoint, data = map(Path, sys.argv[1:])
probe = load(checkpoint)
model, device = probe.model.train(), probe.model.device
if device.type == "cuda":
    model.bfloat16()
rows = held_out(data)[0][:ROWS]
ids = [probe.tokens(row) for row in rows]
pad = torch.nn.utils.rnn.pad_sequence
labels = [torch.cat([torch.full_like(i[:-t], IGNORE_INDEX), i[-t:]]) for i, t in ids]
batch = {
    "input_ids": pad([i for i, _ in ids], True, 0),
    "attention_mask": pad([torch.ones_like(i, dtype=torch.bool) for i, _ in ids], True, False),
    "labels": pad(labels, True, IGNORE_INDEX),
}
batch = {name: value.to(device) for name, value in batch.items()}
batch["images"] = torch.cat([probe.pixels(row["image"]) for row in rows]).to(model.dtype)


def step(metric):
    """One forward and backward: ms and, on a GPU, MB."""
    model.config.vista = {"metric": metric}
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model(**batch).loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
    return (time.perf_counter() - start) * 1e3, peak


rounds = [[step(metric) for metric in ("off", "l2")] for _ in range(WARM_UP + ROUNDS)][WARM_UP:]
overhead = [100 * (l2[0] / off[0] - 1) for off, l2 in rounds]
name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
off, l2 = ([statistics.median(r[i][0] for r in rounds)] + [r[i][1] for r in rounds[:1]] for i in (0, 1))
print(json.dumps({"device": name, "off": off, "l2": l2, "overhead": statistics.median(overhead)}))
