"""Whether this harness gives, for a public checkpoint, what is published of it. No training is needed for that.

The same model on the same questions has no sampling error: only answers that other numerics flip may differ. Up to
FLIPS of them are allowed, as if drawn anew; more is another task, split, judge or library.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from scripts.evaluation import results
from scripts.evaluation.results import Submission
from scripts.reporting import comparison
from scripts.reporting.comparison import Cell
from scripts.reporting.paper import PAPER, Published
from scripts.reporting.runs import Run, load_run, seeds_of

FLIPS = 0.02
NOISE = 1.96 * (2 * FLIPS) ** 0.5  # standard errors: of a mean of which FLIPS are drawn anew
WITHIN, DIFFERS = "within noise", "differs"


@dataclass(frozen=True)
class Check:
    """One column of a public checkpoint. paper: only where the paper's row is this checkpoint's."""

    column: str
    paper: float | None
    published: float | None
    here: float | None
    stderr: float | None
    verdict: str

    @property
    def off(self) -> float | None:
        target = self.published if self.published is not None else self.paper
        return None if self.here is None or target is None else self.here - target


@dataclass(frozen=True)
class Calibration:
    name: str
    row: str
    checkpoint: str
    checks: list[Check]
    note: str
    run: Run

    def verdicts(self, verdict: str) -> list[Check]:
        return [check for check in self.checks if check.verdict == verdict]

    @property
    def state(self) -> str:
        """ "calibrated", "not calibrated", "missing" or "cannot tell"."""
        if self.verdicts(DIFFERS):
            return "not calibrated"
        if self.verdicts(WITHIN):
            return "calibrated"
        return "missing" if all(check.here is None for check in self.checks) else "cannot tell"

    def sentence(self) -> str:
        within, differs = self.verdicts(WITHIN), self.verdicts(DIFFERS)
        missing = [check.column for check in self.verdicts("missing")]
        lacks = f" Not evaluated: {', '.join(missing)}. scripts/eval.sh {self.name} does that." if missing else ""
        match self.state:
            case "calibrated":
                return (
                    f"{self.name}: this harness is calibrated. All {len(within)} columns that can tell are within "
                    f"noise of what is published of {self.checkpoint}.{lacks}"
                )
            case "not calibrated":
                off = ", ".join(f"{check.column} by {check.off:+.2f}" for check in differs)
                return (
                    f"NOT CALIBRATED: {self.name} differs from what is published of {self.checkpoint} in "
                    f"{len(differs)} of the {len(within) + len(differs)} columns that can tell: {off}. In these, no "
                    f"trained row can be read against the paper.{lacks}"
                )
            case "missing":
                return (
                    f"{self.name} is not evaluated: whether this harness gives what is published of "
                    f"{self.checkpoint} is not known. scripts/reproduce.sh --experiment {self.name} tells; it trains "
                    "nothing."
                )
            case _:
                return f"{self.name}: no column can tell whether this harness is calibrated.{lacks}"


def load(run: Path, rows: Collection[str]) -> list[Calibration]:
    """The public checkpoints that are evaluated in this run, or whose row of the paper is among `rows`."""
    found = []
    for name, published in PAPER.published.items():
        there = any((run / seed / "eval" / name).is_dir() for seed in seeds_of(run))
        if published.public and (there or published.row in rows):
            loaded = load_run(run, [name])
            cells = {column.name: comparison.cell(loaded, name, column) for column in results.load_columns()}
            sent = [evaluation.submission for evaluation in loaded.evaluations.values() if evaluation.submission]
            checked = checks(published, cells, {submission.challenge.column: submission for submission in sent})
            found.append(Calibration(name, published.row, published.public, checked, published.note, loaded))
    return found


def checks(published: Published, cells: Mapping[str, Cell | None], sent: Mapping[str, Submission]) -> list[Check]:
    """sent: what was written for a challenge's server, by the column that its score is to be read in."""
    out = []
    for column, cell in cells.items():
        paper = PAPER.rows[published.row].scores[column] if published.is_row else None
        score = published.scores.get(column)
        if paper is None and score is None:
            continue
        here, stderr = (cell["score"], cell["stderr"]) if cell else (None, None)
        target, rounding = (score, 0.05) if score is not None else (paper or 0.0, 0.005)
        submission = sent.get(column)
        if column in published.other_split and submission and submission.score is not None:
            here, stderr = submission.score, submission.stderr
            reason = None if submission.whole else "not the whole split"
        elif column in published.other_split:
            reason = "another split"
        elif cell and not cell["whole"]:
            reason = "not the whole split"
        else:
            reason = "no standard error" if stderr is None else None
        if here is None or stderr is None or reason:
            verdict = "missing" if here is None else f"cannot tell: {reason}"
        else:
            verdict = WITHIN if abs(here - target) <= NOISE * stderr + rounding else DIFFERS
        out.append(Check(column, paper, score, here, stderr, verdict))
    return out
