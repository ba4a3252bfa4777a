"""What VISTA costs: the loss alone, beside the bytes that it moves and a per-sample loop, and in whole training steps.

    python -m scripts.benchmark [--write]        --write: into docs/performance.md, above what was written by hand

Times are medians of rounds. In each round all candidates take turns in one process.

Memory that is new to a process costs page faults, which take many times as long as the arithmetic. Training reuses its
memory. So does this process, by glibc's settings below; a GPU's allocator does it by itself.

It takes the GPU if there is one. It skips shapes that do not fit into memory.
"""

import argparse
import datetime
import gc
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import accumulate, product

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer

REUSE = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(4 << 30)}
if not REUSE.items() <= os.environ.items():
    os.execve(sys.executable, [sys.executable, "-m", "scripts.benchmark", *sys.argv[1:]], os.environ | REUSE)

from scripts.common import ROOT, cpu_name, write_whole  # noqa: E402
from vista_patch import vista_loss  # noqa: E402

PAGE, HAND = ROOT / "docs/performance.md", "<!-- Above: scripts/benchmark.py --write. Below: by hand. -->\n"
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
METRICS = ("l2", "cosine")
ROUNDS, STEP_ROUNDS = 3, 9
TENSORS = 4  # of [B, L, d]: x, h and their gradients. The loss must read x twice and write both gradients.


def inputs(B, L, d, dtype):
    """vista_loss's arguments; 576 image tokens (LLaVA-1.5's) behind the system prompt where L has room, else half."""
    torch.manual_seed(0)
    x, h = (torch.randn(B, L, d, dtype=dtype, device=DEVICE).requires_grad_() for _ in range(2))
    image = torch.zeros(B, L, dtype=torch.bool, device=DEVICE)
    image[:, 35 : 35 + min(576, L // 2)] = True
    return x, h, ~image, image


def released(x_BLd, h_BLd, text_BL, image_BL, metric):
    """The authors' formula as their LLaVA computes it, a sample at a time, in the model's dtype, without its prints."""
    losses = []
    for x_Ld, h_Ld, text_L, image_L in zip(x_BLd, h_BLd, text_BL, image_BL, strict=True):
        x_td, s_d = x_Ld[text_L], h_Ld[image_L.nonzero()[-1, 0]]
        f_t = torch.arange(1, len(x_td) + 1, device=x_td.device) / len(x_td)
        cosine_t = torch.nn.functional.cosine_similarity(x_td, s_d, dim=-1) if metric == "cosine" else None
        losses.append((f_t * (-cosine_t if metric == "cosine" else (x_td - s_d).square().mean(-1))).mean())
    return torch.stack(losses).mean()


def step(loss, arguments, metric):
    value = loss(*arguments, metric=metric)
    getattr(value, "loss", value).backward()
    arguments[0].grad = arguments[1].grad = None


def in_turns(candidates, rounds):
    """{name: milliseconds of each round} of functions that take turns, after one call each to warm up."""
    timers = {
        name: Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        for name, run in candidates.items()
    }
    for run in candidates.values():
        run()
    times = {name: [] for name in timers}
    for _, (name, timer) in product(range(rounds), timers.items()):
        times[name].append(timer.timeit(1).mean * 1e3)
    return times


def medians(candidates, rounds=ROUNDS):
    return {name: statistics.median(times) for name, times in in_turns(candidates, rounds).items()}


def bandwidth():
    """Bytes per second that a copy moves, read and written."""
    source = torch.randn(2**27, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (medians({"copy": lambda: target.copy_(source)})["copy"] / 1e3)


def peak(run):
    """Most bytes of tensors that `run` holds at a time beyond what there was before."""
    run()
    gc.collect()
    if CUDA:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())))


class HostReads(TorchDispatchMode):
    """Counts the operators for which a GPU would make the host wait."""

    WAIT = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.name().partition(".")[0] in self.WAIT
        return function(*args, **(kwargs or {}))


def host_syncs(run):
    """How often the host waits for the device; on a GPU torch itself raises at the first time."""
    if CUDA:
        run()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return 0
    with HostReads() as reads:
        run()
    return reads.count


def fits(B, L, d, dtype, tensors=TENSORS):
    free = torch.cuda.mem_get_info()[0] if CUDA else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return tensors * B * L * d * DTYPES[dtype].itemsize < 0.7 * min(free, 2**33 if not CUDA else free)


def table(head, rows):
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines)


def loss_alone(moved):
    """The table over shapes, and {(B, L, d, dtype, metric): (ms, times the limit)}."""
    found, rows = {}, []
    for B, L, d in product((1, 4, 16, 32), (256, 1024, 4096), (1024, 4096)):
        row = [f"{B}", f"{L}", f"{d}"]
        for dtype in DTYPES:
            if not fits(B, L, d, dtype):
                row += ["does not fit", ""]
                continue
            arguments = inputs(B, L, d, DTYPES[dtype])
            limit = TENSORS * arguments[0].nbytes / moved * 1e3
            runs = {m: (lambda m=m, a=arguments: step(vista_loss, a, m)) for m in METRICS}
            for metric, ms in medians(runs).items():
                found[B, L, d, dtype, metric] = ms, ms / limit
                row.append(f"{ms:.1f} ({ms / limit:.1f})")
            del arguments, runs
        rows.append(row)
        print(*row, file=sys.stderr)
    return table(["B", "L", "d", *(f"{t} {m}" for t in DTYPES for m in METRICS)], rows), found


def growth(found):
    """Exponents p of time ~ L^p and ~ d^p, at the largest B and d or L that ran."""
    rows = []
    for dtype, metric in product(DTYPES, METRICS):
        row = [f"{dtype} {metric}"]
        for axis, values in ((1, (256, 1024, 4096)), (2, (1024, 4096))):
            shape = [16, 4096 if axis == 2 else None, 4096 if axis == 1 else None]
            times = []
            for value in values:
                shape[axis] = value
                times.append(found.get((*shape, dtype, metric), (np.nan,))[0])
            row.append(f"{np.polyfit(np.log(values), np.log(times), 1)[0]:.2f}")
        rows.append(row)
    return table(["", "in L (B = 16, d = 4096)", "in d (B = 16, L = 4096)"], rows)


def at_the_targets(moved):
    """Beside the released formula at [16, 1300, 4096], memory and host syncs; the rows, and figures by name."""
    rows, figures = [], {}
    for dtype, metric in product(DTYPES, METRICS):
        candidates, key = {}, f"{dtype} {metric}"
        arguments = inputs(16, 1300, 4096, DTYPES[dtype])
        limit = TENSORS * arguments[0].nbytes / moved * 1e3
        for name, loss in (("ours", vista_loss), ("released", released)):
            candidates[name] = lambda loss=loss, a=arguments, m=metric: step(loss, a, m)
        ms = medians(candidates)
        syncs = {name: host_syncs(run) if name == "ours" or not CUDA else "" for name, run in candidates.items()}
        extra = {name: (peak(run) - 2 * arguments[0].nbytes) / 2**20 for name, run in candidates.items()}
        del arguments, candidates
        arguments = inputs(16, 2048, 4096, DTYPES[dtype])
        long = (peak(lambda a=arguments, m=metric: step(vista_loss, a, m)) - 2 * arguments[0].nbytes) / 2**20
        del arguments
        figures[key] = {"limit": ms["ours"] / limit, "faster": ms["released"] / ms["ours"], "extra": long}
        figures[key]["syncs"] = syncs["ours"]
        row = [key, f"{limit:.0f}", f"{ms['ours']:.0f}", f"{ms['released']:.0f}", f"{figures[key]['faster']:.1f}"]
        row += [f"{extra['ours']:.1f}", f"{extra['released']:.0f}", f"{long:.1f}"]
        rows.append([*row, f"{syncs['ours']}", f"{syncs['released']}"])
        print(*rows[-1], file=sys.stderr)
    head = ["", "limit, ms", "ours, ms", "per sample, ms", "times faster", "ours, MB", "per sample, MB"]
    return table([*head, "ours at L = 2048, MB", "host syncs", "per sample"], rows), figures


def make_llava():
    """A random LLaVA as large as fits a small machine: d = 1024, 8 layers, Llama's vocabulary, 256 image tokens."""
    sys.path.insert(0, str(ROOT / "upstream/llava"))
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        image_size=224, patch_size=14, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    with tempfile.TemporaryDirectory() as folder:
        CLIPVisionModel(tower).save_pretrained(folder)
        CLIPImageProcessor().save_pretrained(folder)
        model = LlavaLlamaForCausalLM(
            LlavaConfig(
                hidden_size=1024, intermediate_size=2752, num_hidden_layers=8, num_attention_heads=16, use_cache=False,
                mm_vision_tower=folder, mm_hidden_size=64, mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-2,
                mm_vision_select_feature="patch",
            )
        )  # fmt: skip
        model.get_vision_tower().load_model()
    return model.to(DEVICE, torch.bfloat16).train()


def whole_steps():
    """Forward and backward with VISTA off, l2 and cosine; the rows, and the overheads in % by row."""
    model, rows, overheads = make_llava(), [], {}
    ids = torch.randint(3, 32000, (2, 192), device=DEVICE)
    ids[:, 35] = -200  # llava/constants.py: IMAGE_TOKEN_INDEX
    batch = {"input_ids": ids, "labels": ids.where(ids > 0, -100), "attention_mask": torch.ones_like(ids, dtype=bool)}
    batch["images"] = torch.randn(2, 3, 224, 224, device=DEVICE, dtype=torch.bfloat16)

    def train(metric):
        model.config.vista = {"metric": metric}
        model(**batch).loss.backward()
        model.zero_grad()

    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        runs = {metric: (lambda metric=metric: train(metric)) for metric in ("off", *METRICS)}
        times = in_turns(runs, STEP_ROUNDS)
        peaks = {metric: peak(run) / 2**20 for metric, run in runs.items()}
        for metric in METRICS:
            pairs = [100 * (on / off - 1) for on, off in zip(times[metric], times["off"], strict=True)]
            low, middle, high = np.percentile(pairs, (25, 50, 75))
            name = f"{metric}{', gradient checkpointing' * checkpointing}"
            overheads[name] = middle
            row = [name, *(f"{statistics.median(times[m]):.0f}" for m in ("off", metric))]
            row += [f"{middle:+.2f} [{low:+.2f}, {high:+.2f}]", f"{peaks['off']:.0f}"]
            rows.append([*row, f"{peaks[metric] - peaks['off']:+.1f}"])
            print(*rows[-1], file=sys.stderr)
    head = ["", "off, ms", "on, ms", "overhead, %", "peak off, MB", "peak on - off, MB"]
    return table(head, rows), overheads


def page():
    start = datetime.datetime.now()
    moved = bandwidth()
    swept, found = loss_alone(moved)
    targets, figures = at_the_targets(moved)
    steps, overheads = whole_steps()
    worst = {name: max(f[name] for f in figures.values()) for name in ("limit", "extra", "syncs")}
    least = min(f["faster"] for f in figures.values())
    held = f"{least:.1f} to {max(f['faster'] for f in figures.values()):.1f} times"
    goals = [
        ["the loss within 2x of the bytes that it moves, [16, 1300, 4096]", f"at most {worst['limit']:.1f}x"],
        ["10x faster than the released formula, [16, 1300, 4096]", held],
        [f"a step's overhead at most {'0.1' if CUDA else '1'}%", f"at most {max(overheads.values()):+.2f}%"],
        ["50 MB beyond inputs and gradients, [16, 2048, 4096]", f"at most {worst['extra']:.1f} MB"],
        ["no host sync in the loss", f"{worst['syncs']}"],
        ["no Python loop over samples", "none: over chunks of L"],
    ]
    met = [worst["limit"] <= 2, least >= 10, max(overheads.values()) <= (0.1 if CUDA else 1), worst["extra"] <= 50]
    goals = [[*g, "met" if ok else "not met"] for g, ok in zip(goals, [*met, not worst["syncs"], True], strict=True)]
    device = (
        torch.cuda.get_device_name() if CUDA else f"{cpu_name()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    )
    command = f"{'' if CUDA else 'taskset -c 1 '}.venv/bin/python -m scripts.benchmark --write"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    minutes = (datetime.datetime.now() - start).seconds / 60
    return f"""# What VISTA costs

`{command}` wrote this in {minutes:.0f} minutes.
{device}; torch {torch.__version__}; {moved / 1e9:.1f} GB/s for a copy, read and written; commit {commit.strip()}.
{"" if CUDA else "No GPU was at hand: what the loss costs on one is not known."}

{table(["target", "measured", ""], goals)}

## The loss alone

Forward and backward of `vista_loss` in ms. In brackets: how many times as long as a copy takes for the same bytes.
These are x, read in each direction, and the gradients of x and of h, written whole, as autograd wants them. Medians of
{ROUNDS} rounds.

{swept}

Time grows as a power of

{growth(found)}

At [16, 1300, 4096], beside the authors' formula as their code computes it (a Python loop over the samples, in the
model's dtype). MB: the most that is held at a time beyond x, h and their gradients. Host syncs: on a CPU, the operators
for which a GPU would make the host wait.

{targets}

## Whole steps

Stock LLaVA in bf16, forward and backward, no optimizer: d = 1024, 8 layers, random weights, two samples of 256 image
and 191 text tokens. Off, l2 and cosine take turns in one process, {STEP_ROUNDS} rounds; the overhead is that of a
round's pair, median and quartiles. The peak is that of all tensors that the step makes.

{steps}

"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    text = page()
    print(text)
    if arguments.write:
        hand = PAGE.read_text().partition(HAND)[2] if PAGE.exists() else ""
        PAGE.parent.mkdir(exist_ok=True)
        write_whole(PAGE, text + HAND + hand)
