"""The report's tables, as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from scripts.reporting import instrument
from scripts.reporting.calibration import Calibration
from scripts.reporting.markup import Markdown, escape, table
from scripts.reporting.paper import ROWS, Delta
from scripts.reporting.verdicts import ci
from vista_patch.config import FLAGS

Groups = Mapping[str, Mapping[str, Any]]
Columns = Mapping[str, Mapping[str, Any]]
NONE = "\N{EN DASH}"


def signed(value: float, unit: str = "") -> str:
    return f"{value:+.2f}{unit}"


def by_table(columns: Columns) -> list[tuple[int, list[Mapping[str, Any]]]]:
    ordered = sorted(columns.values(), key=lambda column: column["table"])
    return [(number, list(some)) for number, some in groupby(ordered, key=lambda column: column["table"])]


def scores(groups: Groups, in_table: Sequence[Mapping[str, Any]], number: int) -> Markdown:
    """One of the paper's tables (0: the miniature's tasks), with the paper's rows and the image-blind ones."""

    def head(column: Mapping[str, Any]) -> str:
        if not column["ns"]:
            return str(column["name"])
        n = "(n = " + ", ".join(f"{n:,}" if number else str(n) for n in column["ns"]) + ")"
        return Markdown(f"{Markdown(column['name'])}<br>{n}") if number else f"{column['name']} {n}"

    rows: list[list[str]] = []
    for baseline, group in groups.items():
        for name, cells in group["table"].items():
            label = f"{name} (not a row of the paper)" if number and name not in ROWS else name
            gain = group["delta"].get(name, {}).get(number)
            rows.append([label, *(score(cells.get(column["name"])) for column in in_table), delta(gain)])
            if number and name in ROWS:
                printed = ROWS[name].tables[number]
                cited = [f"*{printed.scores[column['name']]:.2f}*" for column in in_table]
                cited.append("" if printed.delta is None else f"*{signed(printed.delta, '%')}*")
                rows.append([Markdown(text) for text in ["*paper*", *cited]])
        if not number and group["blind"]:
            rows.append(blind(f"{baseline}, blank image", group["blind"], in_table, "blank_image"))
    first = next(iter(groups.values()))
    if not number and first["blind"]:
        label = "the question's most frequent answer in training"
        rows.append(blind(label, first["blind"], in_table, "most_frequent"))
    return table(["Method", *map(head, in_table), "Δ"], rows)


def score(cell: Mapping[str, Any] | None) -> str:
    if not cell:
        return "missing"
    error = "" if cell["stderr"] is None else f" ± {cell['stderr']:.2f}"
    spread = "" if cell["seed_sd"] is None else f" ({cell['seed_sd']:.2f})"
    return f"{cell['score']:.2f}{error}{spread}"


def delta(gain: Mapping[str, Any] | None) -> str:
    if not gain:
        return ""
    value = "undefined" if gain["value"] is None else signed(gain["value"], "%")
    spread = "" if gain["seed_sd"] is None else f" ({gain['seed_sd']:.2f})"
    return value + spread + part(gain)


def part(gain: Mapping[str, Any]) -> str:
    return f" ({gain['over']} of {gain['of']})" if gain["over"] < gain["of"] else ""


def blind(label: str, rows: Iterable[Mapping[str, Any]], in_table: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """A row of what is right without the image, seeds averaged."""
    by_task: dict[str, list[float]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row[key])
    means = {task: sum(values) / len(values) for task, values in by_task.items()}
    cells = [f"{means[c['name']]:.2f}" if c["name"] in means else "missing" for c in in_table]
    return [italic(label), *cells, ""]


def italic(text: str) -> Markdown:
    return Markdown(f"*{escape(text)}*")


def settings(groups: Groups) -> Markdown:
    """What each experiment was trained with, under the names of the flags."""
    rows = []
    for group in groups.values():
        for name, stages in group["settings"].items():
            same = len({str(setting) for setting in stages.values()}) == 1
            for stage, setting in list(stages.items())[: 1 if same else None]:
                label = name if same else f"{name}, {stage}"
                off = setting["vista"] == "off"
                rows.append([label, *(NONE if off and flag != "vista" else said(setting[flag]) for flag in FLAGS)])
    return table(["Method", *FLAGS], rows)


def said(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def differences(groups: Groups, columns: Columns, of_paper: bool) -> Markdown:
    """Each column's paired difference to the baseline, and each table's delta."""
    rows = []
    seen = any("smallest" in pair for group in groups.values() for pairs in group["paired"].values()
               for pair in pairs.values())  # fmt: skip
    for group in groups.values():
        for name, pairs in group["paired"].items():
            for number, in_table in by_table(columns):
                for column in (column["name"] for column in in_table if column["name"] in pairs):
                    rows.append([name, column, *numbers(pairs[column], seen), *cited(pairs[column], of_paper)])
                gain = group["delta"][name].get(number)
                if gain and gain["value"] is not None:
                    label = f"Δ in %{f', Table {number}' if number else ''}{part(gain)}"
                    rows.append([name, label, *numbers(gain, seen), *cited(gain, of_paper)])
    header = ["Method", "Column", "Difference", "95% CI", "p", *(["Smallest seen"] if seen else [])]
    return table([*header, *(["Paper", "Verdict"] if of_paper else [])], rows)


def numbers(interval: Mapping[str, Any], seen: bool) -> list[str]:
    """seen: whether the smallest effect that could have been seen is told too."""
    smallest = [f"{interval['smallest']:.2f}" if "smallest" in interval else NONE] if seen else []
    if not interval["ci95"]:
        return [signed(interval["value"]), NONE, NONE, *smallest]
    return [signed(interval["value"]), ci(interval["ci95"]), f"{interval['p']:.2g}", *smallest]


def cited(interval: Mapping[str, Any], of_paper: bool) -> list[str]:
    if not of_paper:
        return []
    return [signed(interval["paper"]) if "paper" in interval else "", interval.get("verdict", "")]


def levels(groups: Groups, calibrations: Iterable[Calibration]) -> Markdown:
    """Each score beside the paper's and, where its backbone's public checkpoint is evaluated, what that says."""
    known = {c.row: {k.column: k.verdict for k in c.checks} for c in calibrations if c.state != "missing"}
    rows = []
    for group in groups.values():
        for name, cells in group["table"].items():
            for column, cell in cells.items():
                if cell and "paper" in cell:
                    error = NONE if cell["stderr"] is None else f"{cell['stderr']:.2f}"
                    here, off = f"{cell['score']:.2f} ± {error}", signed(cell["score"] - cell["paper"])
                    row = [name, column, f"{cell['n']:,}", f"{cell['paper']:.2f}", here, off, cell["verdict"]]
                    rows.append([*row, known.get(group["baseline"], {}).get(column, "not known")] if known else row)
    harness = ["Public checkpoint"] if known else []
    return table(["Method", "Column", "n", "Paper", "Here", "Difference", "Verdict", *harness], rows)


def calibration(found: Calibration) -> Markdown:
    """A public checkpoint's columns: the paper's, its authors', and here."""

    def number(value: float | None) -> str:
        return NONE if value is None else f"{value:.2f}"

    rows = [
        [
            check.column,
            number(check.paper),
            NONE if check.published is None else f"{check.published:.1f}",
            NONE if check.here is None else f"{check.here:.2f} ± {number(check.stderr)}",
            NONE if check.off is None else signed(check.off),
            check.verdict,
        ]
        for check in found.checks
    ]
    return table(["Column", "Paper", "Its authors", "Here", "Difference", "Verdict"], rows)


def submissions(rows: Iterable[Mapping[str, Any]]) -> Markdown:
    """The files for the challenges' servers, and what these said."""
    lines = []
    for row in rows:
        score, paper = row["score"], row["paper"]
        lines.append(
            [
                row["experiment"],
                row["seed"],
                row["column"],
                row["file"],
                f"{row['questions']:,} of {row['n']:,}" + ("" if row["questions"] == row["n"] else ": refused"),
                NONE if score is None else f"{score:.2f} ± {row['stderr']:.2f}",
                NONE if paper is None else f"{paper:.2f}",
                NONE if score is None or paper is None else signed(score - paper),
            ]
        )
    return table(["Method", "Seed", "Column", "File", "Questions", "Server's score", "Paper", "Difference"], lines)


def paper_deltas(rows: Iterable[Delta]) -> Markdown:
    lines = [
        [
            row.name,
            str(row.table),
            signed(row.printed, "%"),
            signed(row.computed, "%"),
            "yes" if row.follows else "no",
        ]
        for row in rows
    ]
    return table(["Method", "Table", "Printed", "From its scores", "Follows"], lines)


def maps(groups: Groups) -> Markdown:
    rows = [
        [name, f"{probe['maps']['cosine']:+.3f}", f"{probe['maps']['sd_within_image']:.3f}"]
        for group in groups.values()
        for name, probe in group["probes"].items()
    ]
    return table(["Method", "Mean cosine", "Standard deviation within an image"], rows)


def terms(groups: Groups) -> Markdown:
    """The size of the VISTA term beside the cross-entropy."""
    rows = []
    for group in groups.values():
        for name, probe in group["probes"].items():
            t = probe["terms"]
            sizes = [f"{t[key]:.4g} ({t[key] / t['ce']:.3g})" for key in ("vista_mean", "vista_sum", "vista_cosine")]
            rows.append([name, str(t["d"]), f"{t['ce']:.3f}", *sizes, f"{t['ce_swapped'] - t['ce']:+.3f}"])
    vista = ["VISTA, mean over d", "VISTA, sum (Eq. 10)", "VISTA, cosine"]
    return table(["Method", "d", "CE", *vista, "CE swapped \N{MINUS SIGN} CE"], rows)


def measured(groups: Groups) -> Markdown:
    """What the ground truth of the miniature's pictures says of each variant."""
    rows = []
    for group in groups.values():
        for name, probe in group["probes"].items():
            m = probe["measured"]
            stage_1, facts, maps = m["stage_1"], m["facts"], m["maps"]["all"]
            rows.append(
                [
                    name,
                    f"{stage_1['ce']:.3f}, {stage_1['ce_swapped']:.3f}",
                    with_interval(facts["right"], ".1f"),
                    with_interval(facts["right_slope"], "+.3f"),
                    with_interval(facts["kl_slope"], "+.2g"),
                    with_interval(maps["auroc"], ".3f"),
                    f"{with_interval(maps['hit'], '.2f')}; chance {maps['hit_chance']['mean']:.2f}",
                ]
            )
    said = ["Stage 1: CE with the true, with a swapped picture", "Facts right, %", "Its slope, points per token"]
    said += ["Slope of the KL, nats per token", "AUROC of the map", "Pointing game, hits"]
    return table(["Method", *said], rows)


def with_interval(value: Mapping[str, Any], spec: str) -> str:
    if value["mean"] is None:
        return NONE
    return f"{value['mean']:{spec}}" + (f" {ci(value['ci95'], spec)}" if value["ci95"] else "")


def sizes(groups: Groups) -> Markdown:
    """The term beside the cross-entropy at the start and the end of each stage: l2 (cosine), both at weight 1."""
    rows = []
    for group in groups.values():
        for name, probe in group["probes"].items():
            for state, size in probe["measured"]["sizes"].items():
                ratios = [
                    f"{size['l2'][key] / size['ce'][key]:.3g} ({size['cosine'][key] / size['ce'][key]:.3g})"
                    for key in ("value", *instrument.PARTS)
                ]
                rows.append([name, state, f"{size['ce']['value']:.3f}", *ratios])
    parts = [f"Gradient: {part}" for part in instrument.PARTS]
    return table(["Method", "When", "CE", "Value", *parts], rows)
