"""What the paper prints, what its own figures say, and which of them cannot be compared (paper.toml).

python -m scripts.reporting.paper
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tomllib

HALF = 0.005  # the largest rounding error of what the paper prints with two decimals


@dataclass(frozen=True)
class Printed:
    """A row of one of the paper's tables."""

    scores: dict[str, float]  # by column
    delta: float | None


@dataclass(frozen=True)
class Row:
    tables: dict[int, Printed]
    baseline: str | None  # the experiment whose row delta is over

    @property
    def scores(self) -> dict[str, float]:
        return {column: score for printed in self.tables.values() for column, score in printed.scores.items()}


@dataclass(frozen=True)
class Published:
    """What a model's authors give for columns that can be compared."""

    row: str  # the paper's row to read it beside
    source: str
    scores: dict[str, float]
    public: str | None = None  # the hub's name of the checkpoint
    other_split: tuple[str, ...] = ()  # columns that were measured on another split than suite.toml's: the challenge's
    note: str = ""

    def equal(self) -> list[str]:
        """The columns in which the paper's row is this one, to the decimal that is published."""
        row = ROWS[self.row].scores
        return [column for column, score in self.scores.items() if abs(round(row[column], 1) - score) < HALF]

    @property
    def is_row(self) -> bool:
        """Whether the paper's row is this model's."""
        return len(self.equal()) == len(self.scores)


@dataclass(frozen=True)
class Delta:
    """A printed delta beside the one that its printed scores give."""

    name: str
    table: int
    printed: float
    computed: float
    follows: bool  # rounding of the scores can explain the rest


@dataclass(frozen=True)
class Incomparable:
    numbers: str
    why: str


@dataclass(frozen=True)
class Paper:
    rows: dict[str, Row]
    published: dict[str, Published]
    incomparable: list[Incomparable] = field(default_factory=list)


def load() -> Paper:
    toml = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))

    def printed(table: str, row: dict[str, Any]) -> Printed:
        return Printed(dict(zip(toml["columns"][table], row["scores"], strict=True)), row.get("delta"))

    rows = {
        name: Row({int(table): printed(table, of) for table, of in row["tables"].items()}, row.get("baseline"))
        for name, row in toml["rows"].items()
    }
    published = {
        name: Published(**row | {"other_split": tuple(row.get("other_split", ()))})
        for name, row in toml["published"].items()
    }
    return Paper(rows, published, [Incomparable(**entry) for entry in toml["incomparable"]])


PAPER = load()
ROWS = PAPER.rows


def of(name: str, column: str) -> float | None:
    """What the paper prints of an experiment, or of a public checkpoint that its row is."""
    published = PAPER.published.get(name)
    row = published.row if published and published.is_row else name
    return ROWS[row].scores[column] if row in ROWS else None


def delta(scores: Sequence[float], baseline: Sequence[float]) -> float:
    """The paper's delta: mean over the tasks of the relative gain, in %. NaN where a baseline score is 0."""
    return float(np.mean([100 * (s / b - 1) if b else np.nan for s, b in zip(scores, baseline, strict=True)]))


def deltas() -> list[Delta]:
    """Each delta that the paper prints."""
    found = []
    for name, row in ROWS.items():
        for table, printed in row.tables.items():
            if printed.delta is None or row.baseline is None:
                continue
            base = ROWS[row.baseline].tables[table].scores
            pairs = [(score, base[column]) for column, score in printed.scores.items()]
            computed = delta(*zip(*pairs, strict=True))
            rounding = HALF + np.mean([100 * HALF / b * (1 + s / b) for s, b in pairs])
            follows = bool(abs(computed - printed.delta) <= rounding)
            found.append(Delta(name, table, printed.delta, computed, follows))
    return found


def findings() -> list[str]:
    """A sentence for each thing that the printed figures say of themselves."""
    rows, said = deltas(), []
    names = ", ".join(f"{row.name} in Table {row.table}" for row in rows if row.follows)
    said.append(
        f"{sum(row.follows for row in rows)} of the paper's {len(rows)} printed deltas follow from its printed scores, "
        f"up to their rounding: {names}."
    )
    for published in PAPER.published.values():
        equal, all_of = len(published.equal()), len(published.scores)
        if published.public:
            verb = "is" if published.is_row else "is not"
            said.append(
                f"The paper's {published.row} row {verb} the public checkpoint's: {equal} of the {all_of} columns that "
                f"can be compared equal what is published of {published.public} ({published.source})."
            )
    vista, base = ROWS["llava-v1.5-7b-vista"].scores, ROWS["llava-v1.5-7b"].scores
    lora, full = PAPER.published["llava-v1.5-7b-lora"].scores, PAPER.published["llava-v1.5-7b-public"].scores
    moved = {c: (vista[c] - base[c], lora[c] - full[c]) for c in full}
    further = sum(abs(second) > abs(ours) for ours, second in moved.values())
    said.append(
        "So the paper's VISTA row for LLaVA is compared with a checkpoint that others trained. LLaVA's authors' own "
        f"second training, with LoRA, differs from that checkpoint by more in {further} of the {len(moved)} columns: "
        + "; ".join(f"{c} {second:+.1f} (VISTA {ours:+.2f})" for c, (ours, second) in moved.items())
        + "."
    )
    return said


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(*findings(), sep="\n")
    for row in deltas():
        says = "follows" if row.follows else "does not follow"
        print(f"  {row.name}, Table {row.table}: printed {row.printed:+.2f}%, computed {row.computed:+.2f}%: {says}")
    print("\nWhich of the paper's numbers cannot be compared, or not without care, and why:")
    print(*(f"- **{entry.numbers}:** {entry.why}" for entry in PAPER.incomparable), sep="\n")


if __name__ == "__main__":
    main()
