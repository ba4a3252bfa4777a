"""The report's pictures, drawn from report.py's figures and the logs and probes that it read.

python -m scripts.reporting.figures OUT.png NAME=PROBE.npz...        the maps alone (scripts/probe.sh --image)
"""

import argparse
import io
import itertools
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from scripts.reporting.markup import plain
from scripts.reporting.runs import Run

# By variant, baseline first.
COLORS = ["#6b7280", "#c2410c", "#2563eb", "#15803d", "#7c3aed", "#db2777", "#0891b2", "#a16207", "#1e3a8a"]
plt.rcParams.update(
    {
        "font.size": 9,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.constrained_layout.use": True,
        "savefig.dpi": 160,
        "text.parse_math": False,  # a name or a question with a $ in it is no formula
    }
)


def draw(run: Run, report: Mapping[str, Any]) -> dict[str, bytes]:
    """loss_stage_1, loss_stage_2, theorem and maps as PNGs, those that there is something for."""
    color = dict(zip(run.variants, itertools.cycle(COLORS), strict=False))
    figures = {
        f"loss_{stage.replace(' ', '_')}": loss(run, color, stage) for stage in sorted({s for *_, s in run.logs})
    }
    if report["probes"]:
        figures["theorem"] = theorem({name: probe["theorem"] for name, probe in report["probes"].items()}, color)
        seed = next(seed for seed, _ in run.probes)
        figures["maps"] = maps({name: probe for (s, name), probe in run.probes.items() if s == seed})
    return {name: png(figure) for name, figure in figures.items()}


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def running_mean(values: Sequence[float]) -> list[float]:
    out, weight = [values[0]], 2 / (2 + len(values) // 25)
    for value in values[1:]:
        out.append(out[-1] + weight * (value - out[-1]))
    return out


def loss(run: Run, color: Mapping[str, str], stage: str) -> Figure:
    """CE of all variants in one panel, then a panel for each VISTA term, as their scales differ."""
    logs = {name: [log for (_, n, s), log in run.logs.items() if (n, s) == (name, stage)] for name in run.variants}
    weighted = [name for name in run.variants if any(log["vista"] for log in logs[name])]
    panels = [("ce", "CE (nats)", run.variants)]
    panels += [("vista", f"VISTA term\n{plain(name)}", [name]) for name in weighted]
    size = (4.8, 1.2 + 1.6 * len(panels))
    figure, axes = plt.subplots(len(panels), 1, figsize=size, sharex=True, squeeze=False)
    for axis, (key, label, names) in zip(axes[:, 0], panels, strict=True):
        for name in names:
            for k, log in enumerate(logs[name]):
                step, value = np.array(log[key]).T
                axis.plot(step, value, color=color[name], alpha=0.2, lw=0.7)
                axis.plot(step, running_mean(value), color=color[name], lw=1.4, label=None if k else plain(name))
        axis.set_ylabel(label)
    axes[0, 0].set_title(f"{stage} (thin: as logged, thick: running mean)")
    axes[0, 0].legend()
    axes[-1, 0].set_xlabel("step")
    return figure


def theorem(curves: Mapping[str, Any], color: Mapping[str, str]) -> Figure:
    figure, axis = plt.subplots(figsize=(4.8, 3.4))
    for name, curve in curves.items():
        kl, stderr = np.array(curve["kl"]), np.array(curve["stderr"])
        position = np.arange(1, len(kl) + 1)
        axis.plot(position, kl, color=color[name], lw=1.3, label=plain(name))
        axis.fill_between(position, kl - stderr, kl + stderr, color=color[name], alpha=0.2, lw=0)
    axis.set(xlabel="position t of the answer's token", ylabel="KL(true image || swapped image), nats")
    axis.set_ylim(bottom=0)
    axis.legend()
    return figure


def maps(probes: Mapping[str, Any]) -> Figure:
    """Rows: held-out images; columns: the image, then its map for each variant. One colour scale for all."""
    first = next(iter(probes.values()))
    low, high = (float(f([f(probe["map"]) for probe in probes.values()])) for f in (np.nanmin, np.nanmax))
    rows, columns = len(first["image"]), 1 + len(probes)
    size = (1.4 * columns, 1.7 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for k, (photo, *others) in enumerate(axes):
        photo.imshow(first["image"][k])
        photo.set_title(textwrap.fill(plain(str(first["question"][k])), 24), fontsize=7)
        for axis, (name, probe) in zip(others, probes.items(), strict=True):
            map_SS = probe["map"][k]
            shown = axis.imshow(map_SS, cmap="Blues", vmin=low, vmax=high)
            title = "" if k else textwrap.fill(plain(name), 16, break_on_hyphens=True) + "\n"
            axis.set_title(f"{title}{np.nanmin(map_SS):.2f} to {np.nanmax(map_SS):.2f}", fontsize=7)
    figure.colorbar(shown, ax=axes, location="bottom", shrink=0.7, aspect=40, label="cosine similarity")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT.png")
    parser.add_argument("probes", nargs="+", metavar="NAME=PROBE.npz")
    args = parser.parse_args()
    probes = {name: np.load(path) for name, path in (probe.rsplit("=", 1) for probe in args.probes)}
    partial = Path(f"{args.out}.partial")
    maps(probes).savefig(partial, format="png", dpi=320)
    os.replace(partial, args.out)


if __name__ == "__main__":
    main()
