"""What the VISTA loss costs beside the least that any loss on x must do: read x once, and read and write it once.

python scripts/benchmark.py          forward and backward at [16, 1300, 1024] fp32, in turns in one process

Memory that is new to the process costs page faults, many times the arithmetic. Training reuses its memory; so does
this process, by glibc's settings below (a GPU's allocator does it by itself).
"""

import os
import statistics
import sys

import torch
from torch.utils.benchmark import Timer

REUSE = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(4 << 30)}
if not REUSE.items() <= os.environ.items():
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | REUSE)

from vista_patch import vista_loss  # noqa: E402

B, L, d, ROUNDS = 16, 1300, 1024, 30
torch.manual_seed(0)
x = torch.randn(B, L, d, requires_grad=True)
h = torch.randn(B, L, d)
image = torch.zeros(B, L, dtype=torch.bool)
image[:, 35:611] = True
other = torch.randn(B, L, d)


def least():
    x.detach().sum()
    other.mul_(1.0)


def loss(metric):
    x.grad = None
    vista_loss(x, h, ~image, image, metric=metric).loss.backward()


names = {"one read, one read-modify-write": "least()", "l2": "loss('l2')", "cosine": "loss('cosine')"}
timers = {name: Timer(stmt, globals=globals(), num_threads=torch.get_num_threads()) for name, stmt in names.items()}
times = {name: [] for name in names}
for _ in range(ROUNDS):
    for name, timer in timers.items():
        times[name].append(timer.timeit(1).mean * 1e3)
base = statistics.median(next(iter(times.values())))
print(f"[{B}, {L}, {d}] fp32, {torch.get_num_threads()} threads, median of {ROUNDS} (fastest) in ms")
for name, values in times.items():
    median = statistics.median(values)
    print(f"{name:32} {median:7.1f} ({min(values):.1f})   {median / base:.2f}x")
