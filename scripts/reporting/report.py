"""Write RUN_DIR/report.json, report.md (with figures/) and one self-contained report.html from result files.

    python -m scripts.reporting.report results/tiny

Reads what training, scripts/eval.sh and scripts/probe.sh left in RUN_DIR/seed*/, and RUN_DIR/manifest-*.json, and says
what is not there. A backbone's experiments are compared with its baseline, the config whose name theirs extend; what
paper.toml names, with the paper too. TASK_blind is TASK with a blank image. Figures and sentences are all computed;
a file that is odd is refused with one line that says what to do.
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from scripts.common import ROOT, write_whole
from scripts.evaluation.results import ODD, ResultError, Submission
from scripts.reporting import calibration, comparison, figures, paper, study, tables, verdicts
from scripts.reporting.calibration import FLIPS, Calibration
from scripts.reporting.markup import Markdown, clean, page, picture, plain, render
from scripts.reporting.paper import ROWS
from scripts.reporting.runs import Run, load_runs
from scripts.reporting.statistics import RESAMPLES

PNG = b"\x89PNG\r\n\x1a\n"
FIRST = {
    "scores": "each variant's score in each column, with its interval",
    "differences": "each variant's difference to the baseline in each column, with its interval",
}
LOSSES = {
    "loss_stage_1": "stage 1, cross-entropy of all variants and each VISTA term, by step",
    "loss_stage_2": "stage 2, the same",
}
CAPTIONS = {  # whether these are the paper's tables
    False: "First picture: what each variant gets right, and in grey what is right without the image. A baseline whose "
    "interval reaches into the grey is not known to see.",
    True: "First picture: how far each score is from the paper's.",
}
PACKAGES = ("lmms-eval", "torch", "transformers", "deepspeed", "numpy", "scipy", "matplotlib")


def write(folder: Path) -> list[str]:
    """Write the report of a run's folder; returns its sentences. Raises ResultError, and then leaves no report."""
    if not folder.is_dir():
        raise ResultError(folder, "is not a folder", "Give the run's folder, such as results/tiny.")
    runs, absent = load_runs(folder)
    manifests, found = load_manifests(folder), load_maps(folder)
    of_study = study.load(study.PLAN, ROOT / study.FOLDER / "results")
    groups, drawn = {}, dict(found)
    missing = [f"{baseline} and its variants: not evaluated" for baseline in absent]
    for baseline, run in runs.items():
        groups[baseline] = group = describe(run, of_study)
        missing += run.missing
        pictures = figures.draw(run, group)
        group["figures"] = list(pictures)
        drawn |= {f"figures/{baseline}/{name}.png": png for name, png in pictures.items()}
    calibrations = calibration.load(folder, {name for group in groups.values() for name in group["table"]})
    sent = submissions([*runs.values(), *(c.run for c in calibrations)])
    deltas = paper.deltas() if groups.keys() & ROWS.keys() else []
    r: dict[str, Any] = {
        "resamples": RESAMPLES,
        "columns": columns_of(runs, groups),
        "groups": groups,
        "missing": missing,
        "submissions": [row for row, _ in sent],
    }
    r |= {"paper_deltas": [asdict(row) for row in deltas], "maps": list(found)}
    r["calibration"] = {
        c.name: {"state": c.state, "checks": [asdict(check) for check in c.checks]} for c in calibrations
    }
    r["versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}
    r["versions"]["python"] = platform.python_version()
    r["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    r["manifests"] = manifests
    r = clean(r)
    numbers = json.dumps(r, indent=1, allow_nan=False)
    text = render("report.md.j2", run=folder.as_posix(), **prose(r, groups, deltas, list(found), calibrations))
    html = page(text, folder.as_posix(), drawn)
    written = {path: png for path, png in drawn.items() if path not in found}
    written |= {row["file"]: submission.path.read_bytes() for row, submission in sent}
    for path in [*drawn, *written]:
        check_inside((folder / path).parent, folder)
    for path, content in written.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder / path, content)
    for name, report in {"report.json": numbers, "report.md": text, "report.html": html}.items():
        write_whole(folder / name, report.encode("utf-8", "backslashreplace"))
    said = [line for group in groups.values() for line in group["verdicts"]]
    said += [c.sentence() for c in calibrations]
    return [plain(line) for line in (*said, *(f"missing: {line}" for line in missing), str(folder / "report.html"))]


def describe(run: Run, of_study: study.Results) -> dict[str, Any]:
    """All numbers and sentences of a baseline and its variants."""
    group: dict[str, Any] = {"seeds": run.seeds, "baseline": run.variants[0]} | comparison.scores(run)
    group |= {"blind_tasks": run.blind, "blind": comparison.sight(run)}
    probed = {name for _, name in run.probes}
    group["probes"] = {name: comparison.probed(run, name) for name in run.variants if name in probed}
    group["settings"] = {
        name: {stage: setting.to_arguments() for stage, setting in stages.items()}
        for name, stages in run.settings.items()
    }
    return group | {"verdicts": verdicts.sentences(group) + study.beside(group, of_study)}


def submissions(runs: Iterable[Run]) -> list[tuple[dict[str, Any], Submission]]:
    """What the report says of each file for a challenge's server, and the file."""
    found = []
    for run in runs:
        for (seed, name, task), evaluation in run.evaluations.items():
            if sent := evaluation.submission:
                row = {"experiment": name, "seed": seed, "column": sent.challenge.column, "n": sent.challenge.n}
                row |= {"questions": sent.questions, "score": sent.score, "stderr": sent.stderr}
                row["paper"] = paper.of(name, sent.challenge.column)
                found.append((row | {"file": f"submissions/{name}-{seed}-{task}.json"}, sent))
    return found


def columns_of(runs: Mapping[str, Run], groups: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{name: the column, the numbers of questions that it was asked with, and the task's version}."""
    columns = {column.name: asdict(column) for run in runs.values() for column in run.columns}
    for name, column in columns.items():
        cells = [cell for group in groups.values() for cells in group["table"].values() if (cell := cells.get(name))]
        column |= {"ns": sorted({cell["n"] for cell in cells}), "version": cells[0]["version"] if cells else None}
    return columns


def load_manifests(folder: Path) -> dict[str, Any]:
    def no_number(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    manifests = {}
    for path in sorted(folder.glob("manifest-*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"), parse_constant=no_number)
        except ODD as error:
            again = "Run python -m scripts.reporting.manifest again."
            raise ResultError(path, f"not a manifest ({type(error).__name__}: {error})", again) from None
        manifests[path.stem.removeprefix("manifest-")] = content
    return manifests


def load_maps(folder: Path) -> dict[str, bytes]:
    """The pictures that scripts/probe.sh --image left: PNGs that lie in the folder itself."""
    maps = {}
    for path in sorted(folder.glob("maps/*.png")):
        check_inside(path, folder)
        png = path.read_bytes()
        if not png.startswith(PNG):
            raise ResultError(path, "is not a PNG", "Draw it again with scripts/probe.sh --image, or remove it.")
        maps[path.relative_to(folder).as_posix()] = png
    return maps


def check_inside(path: Path, folder: Path) -> None:
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ResultError(path, f"leads out of {folder}", "Put a copy there, or remove the link.")


def prose(
    r: Mapping[str, Any],
    groups: Mapping[str, Any],
    deltas: list[paper.Delta],
    maps: list[str],
    calibrations: list[Calibration],
) -> dict[str, Any]:
    """What the template shows."""
    columns, of_paper = r["columns"], bool(deltas)
    said = [sentence for group in groups.values() for sentence in group["verdicts"]]
    said += [c.sentence() for c in calibrations if c.state != "missing"]
    versions = {task: evaluation.version for c in calibrations for (*_, task), evaluation in c.run.evaluations.items()}
    versions |= {column["task"]: column["version"] for column in columns.values()}
    return {
        "warnings": [sentence for sentence in said if verdicts.is_warning(sentence)],
        "said": [sentence for sentence in said if not verdicts.is_warning(sentence)],
        "first": side_by_side(groups, FIRST),
        "caption": Markdown(CAPTIONS[of_paper]),
        "missing": r["missing"],
        "of_paper": of_paper,
        "groups": bool(groups),
        "n_seeds": max((len(group["seeds"]) for group in groups.values()), default=0),
        "blind": any(group["blind"] for group in groups.values()),
        "scores": [(number, tables.scores(groups, some, number)) for number, some in tables.by_table(columns)],
        "settings": tables.settings(groups),
        "resamples": f"{RESAMPLES:,}",
        "differences": tables.differences(groups, columns, of_paper),
        "levels": tables.levels(groups, calibrations),
        "calibrations": [(c.name, c.sentence(), c.note, tables.calibration(c)) for c in calibrations],
        "submissions": tables.submissions(r["submissions"]) if r["submissions"] else None,
        "flips": f"{100 * FLIPS:.0f}",
        "findings": paper.findings() if of_paper or calibrations else [],
        "incomparable": paper.PAPER.incomparable,
        "follow": sum(row.follows for row in deltas),
        "of": len(deltas),
        "paper_deltas": tables.paper_deltas(deltas),
        "losses": side_by_side(groups, LOSSES),
        "maps": [picture(f"similarity maps: {path}", path) for path in maps],
        "probed": probed(groups),
        "date": r["date"],
        "versions": ", ".join(f"{name} {version}" for name, version in r["versions"].items()),
        "task_versions": ", ".join(
            f"{task} {tables.NONE if version is None else version}" for task, version in versions.items()
        ),
        "manifests": {name: code(content) for name, content in r["manifests"].items()},
    }


def code(content: Any) -> Markdown:
    """JSON for a fenced block, which a line of it cannot end: no line of JSON begins with the fence."""
    return Markdown(json.dumps(content, indent=1, ensure_ascii=False))


def side_by_side(groups: Mapping[str, Any], alts: Mapping[str, str]) -> list[Markdown]:
    """For each backbone, those of these pictures that it has. alts: what each picture shows, by its name."""
    return [
        Markdown(" ".join(picture(f"{baseline}: {alts[name]}", f"figures/{baseline}/{name}.png") for name in drawn))
        for baseline, group in groups.items()
        if (drawn := [name for name in alts if name in group["figures"]])
    ]


def probed(groups: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows of scripts/probe.sh's measurements; empty where there are none."""
    some = {baseline: group for baseline, group in groups.items() if group["probes"]}
    if not some:
        return {}

    def pictures(name: str, alt: str) -> Markdown:
        return Markdown("\n".join(picture(f"{b}: {alt}", f"figures/{b}/{name}.png") for b in some))

    return {
        "maps": pictures("maps", "held-out images and their similarity maps, one column per variant"),
        "map_averages": tables.maps(some),
        "n": next(iter(next(iter(some.values()))["probes"].values()))["theorem"]["n"],
        "theorem": pictures("theorem", "KL by answer position, mean and standard error, per variant"),
        "terms": tables.terms(some),
        "measured": tables.measured(some),
        "sizes": tables.sizes(some),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    folder = parser.parse_args(argv).run_dir
    try:
        said = write(folder)
    except ResultError as error:
        sys.exit(f"report.py: {plain(str(error))}")
    encoding = sys.stdout.encoding or "utf-8"
    for line in said:
        print(line.encode(encoding, "backslashreplace").decode(encoding))  # what the locale cannot write


if __name__ == "__main__":
    main()
