"""The report's pictures, drawn from report.py's figures and the logs and probes that it read.

python -m scripts.reporting.figures OUT.png NAME=PROBE.npz...        the maps alone (scripts/probe.sh --image)
"""

import argparse
import io
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from scripts.common import write_whole
from scripts.reporting.markup import plain
from scripts.reporting.runs import Run

# By variant, baseline first.
COLORS = ["#6b7280", "#c2410c", "#2563eb", "#15803d", "#7c3aed", "#db2777", "#0891b2", "#a16207", "#1e3a8a"]
DELTA = "\N{GREEK CAPITAL LETTER DELTA}"  # the mean relative gain over a table's columns
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
    """scores, differences, loss_stage_1, loss_stage_2, theorem and maps as PNGs, those that there is something for."""
    color = dict(zip(run.variants, itertools.cycle(COLORS), strict=False))
    figures = scores(run, report, color) | differences(run, report, color)
    for stage in sorted({stage for *_, stage in run.logs}):
        figures[f"loss_{stage.replace(' ', '_')}"] = loss(run, color, stage)
    if report["probes"]:
        figures["theorem"] = theorem({name: probe["theorem"] for name, probe in report["probes"].items()}, color)
        seed = next(seed for seed, _ in run.probes)
        figures["maps"] = maps({name: probe for (s, name), probe in run.probes.items() if s == seed})
    return {name: png(figure) for name, figure in figures.items()}


def png(figure: Figure, dpi: float | None = None) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    return buffer.getvalue()


GAP = 0.9  # between rows, in lines
Point = tuple[float, float | None, float | None]  # a value, and its interval where there is one


def forest(rows: Mapping[str, Mapping[str, Point]], color: Mapping[str, str], title: str) -> tuple[Figure, Axes]:
    """A block of lines for each row, one for each variant, from the top. A row that begins with DELTA is bold."""
    starts = np.cumsum([0.0, *(max(1, len(points)) + GAP for points in rows.values())])
    pitch = 0.16 if len(rows) < 8 else 0.105  # inches
    figure, axis = plt.subplots(figsize=(4.8, 0.8 + 0.17 * (len(color) + 1) + pitch * starts[-1]))
    for start, points in zip(starts, rows.values(), strict=False):
        for k, (name, (value, low, high)) in enumerate(points.items()):
            if low is not None and high is not None:
                axis.plot([low, high], [start + k] * 2, color=color[name], lw=1.6, solid_capstyle="butt")
            axis.plot(value, start + k, "o", color=color[name], ms=4.5, mec="white", mew=0.5)
    ticks = [start + (max(1, len(points)) - 1) / 2 for start, points in zip(starts, rows.values(), strict=False)]
    axis.set_yticks(ticks, [plain(label) for label in rows])
    for tick, label in zip(axis.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if label.startswith(DELTA) else "normal")
    axis.set_ylim(starts[-1] - GAP, -1)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#e5e7eb", lw=0.6)
    axis.set_axisbelow(True)
    figure.suptitle(plain(title), x=0.01, ha="left", fontsize=9)
    return figure, axis


def legend(figure: Figure, entries: Mapping[str, Line2D | Patch]) -> None:
    names = [textwrap.shorten(plain(name), 60) for name in entries]
    figure.legend(entries.values(), names, loc="outside lower left", ncols=1)


def dot(color: str) -> Line2D:
    return Line2D([], [], color=color, marker="o", lw=1.6, ms=4.5)


def around(value: float, error: float | None) -> Point:
    return (value, None, None) if error is None else (value, value - 1.96 * error, value + 1.96 * error)


def scores(run: Run, report: Mapping[str, Any], color: Mapping[str, str]) -> dict[str, Figure]:
    """The miniature's scores, over what is right without the image; of the paper's tables, how far from the paper's."""
    cells = {name: {c: cell for c, cell in row.items() if cell} for name, row in report["table"].items()}
    names = [column.name for column in run.columns if any(column.name in row for row in cells.values())]
    if any("paper" in cell for row in cells.values() for cell in row.values()):
        title = "Score here, relative to the paper's (%, 95% interval)"
        rows = {column: {name: relative(cell) for name, row in cells.items() if (cell := row.get(column)) and
                         cell.get("paper")} for column in names}  # fmt: skip
        shown = {name: color[name] for name in run.variants if any(name in points for points in rows.values())}
        figure, axis = forest(rows, shown, title)
        axis.axvline(0, color="black", lw=0.8)
        legend(figure, {name: dot(color[name]) for name in shown})
        return {"scores": figure}
    rows = {column: {name: around(row[column]["score"], row[column]["stderr"]) for name, row in cells.items() if
                     column in row} for column in names}  # fmt: skip
    figure, axis = forest(rows, color, "Right answers (%, 95% interval)")
    entries: dict[str, Line2D | Patch] = {name: dot(color[name]) for name in run.variants}
    for tick, (task, points) in zip(axis.get_yticks(), rows.items(), strict=True):
        if blind := [max(row["blank_image"], row["most_frequent"]) for row in report["blind"] if row["task"] == task]:
            bar = axis.barh(tick, np.mean(blind), height=len(points) + 0.5, color="#e5e7eb", zorder=0)
            entries["right without the image (blank, or the usual answer)"] = bar[0]
    axis.set_xlim(0, 100)
    legend(figure, entries)
    return {"scores": figure}


def relative(cell: Mapping[str, Any]) -> Point:
    """A score and its interval, in % of the paper's."""
    value, low, high = around(cell["score"], cell["stderr"])

    def percent(score: float | None) -> float | None:
        return None if score is None else 100 * (score / cell["paper"] - 1)

    return 100 * (value / cell["paper"] - 1), percent(low), percent(high)


def differences(run: Run, report: Mapping[str, Any], color: Mapping[str, str]) -> dict[str, Figure]:
    """Each variant's difference to the baseline, and the paper's: in points or, in the paper's tables, in % of the
    baseline's score, with each table's mean."""
    baseline, *others = run.variants
    rows: dict[str, dict[str, Point]] = {}
    papers: dict[tuple[str, str], float] = {}
    for column in run.columns:
        pairs = {name: pair for name in others if (pair := report["paired"][name].get(column.name))}
        base = report["table"][baseline][column.name]
        scale = 1.0 if not column.table else 100 / base["score"] if base and base["score"] else None
        if scale is not None and pairs:
            rows[column.name] = {name: scaled(pair, scale) for name, pair in pairs.items()}
            cited = {name: pair["paper"] / base["paper"] for name, pair in pairs.items() if "paper" in pair}
            papers |= {(column.name, name): 100 * value for name, value in cited.items()}
    for table in sorted({column.table for column in run.columns} - {0}):
        gains = {name: gain for name in others if (gain := report["delta"][name].get(table))}
        if found := {name: scaled(gain, 1.0) for name, gain in gains.items() if gain["value"] is not None}:
            rows[f"{DELTA} Table {table}"] = found
            papers |= {
                (f"{DELTA} Table {table}", name): gain["paper"] for name, gain in gains.items() if "paper" in gain
            }
    if not rows:
        return {}
    unit = "% of its score" if any(column.table for column in run.columns) else "points"
    shown = {name: color[name] for name in others if any(name in points for points in rows.values())}
    figure, axis = forest(rows, shown, f"Difference to {baseline} ({unit}, 95% interval)")
    axis.axvline(0, color="black", lw=0.8)
    entries: dict[str, Line2D | Patch] = {name: dot(color[name]) for name in shown}
    for tick, (row, points) in zip(axis.get_yticks(), rows.items(), strict=True):
        for k, name in enumerate(points):
            if (row, name) in papers:
                y = tick - (len(points) - 1) / 2 + k
                (entries["the paper's"],) = axis.plot(papers[row, name], y, "D", mfc="none", mec="black", ms=4, mew=0.8)
    legend(figure, entries)
    return {"differences": figure}


def scaled(interval: Mapping[str, Any], scale: float) -> Point:
    low, high = interval["ci95"] or (None, None)
    if low is None or high is None:
        return scale * interval["value"], None, None
    return scale * interval["value"], scale * low, scale * high


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
    """Rows: held-out images; columns: the image, then its map for each variant. One colour scale for all. An outline
    shows what the question asks for, where that is known."""
    first = next(iter(probes.values()))
    low, high = (float(f([f(probe["map"]) for probe in probes.values()])) for f in (np.nanmin, np.nanmax))
    rows, columns = len(first["image"]), 1 + len(probes)
    size = (1.4 * columns, 1.7 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for k, (photo, *others) in enumerate(axes):
        photo.imshow(first["image"][k])
        outline(photo, first, k, len(first["image"][k]))
        photo.set_title(textwrap.fill(plain(str(first["question"][k])), 24), fontsize=7)
        for axis, (name, probe) in zip(others, probes.items(), strict=True):
            map_SS = probe["map"][k]
            shown = axis.imshow(map_SS, cmap="Blues", vmin=low, vmax=high)
            outline(axis, probe, k, len(map_SS))
            title = "" if k else textwrap.fill(plain(name), 16, break_on_hyphens=True) + "\n"
            axis.set_title(f"{title}{np.nanmin(map_SS):.2f} to {np.nanmax(map_SS):.2f}", fontsize=7)
    figure.colorbar(shown, ax=axes, location="bottom", shrink=0.7, aspect=40, label="cosine similarity")
    return figure


def outline(axis: Axes, probe: Mapping[str, Any], k: int, side: int) -> None:
    """The k-th mask's edge, over a picture of side x side."""
    if "mask" in probe:
        mask_HW = np.pad(probe["mask"][k], 1).astype(float)  # an edge of its own also at the picture's
        at = ((np.arange(n) - 0.5) * side / (n - 2) - 0.5 for n in mask_HW.shape[::-1])
        axis.autoscale(False)
        axis.contour(*at, mask_HW, levels=[0.5], colors="#c2410c", linewidths=0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT.png", type=Path)
    parser.add_argument("probes", nargs="+", metavar="NAME=PROBE.npz")
    args = parser.parse_args()
    probes = {name: np.load(path) for name, path in (probe.rsplit("=", 1) for probe in args.probes)}
    write_whole(args.out, png(maps(probes), dpi=320))


if __name__ == "__main__":
    main()
