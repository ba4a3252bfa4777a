"""What a report says of its numbers, in sentences. Those that begin in capitals are warnings."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

SEES, DIFFERS = 0.01, 0.05  # p below which the baseline is said to see, and two variants to differ


def level(cell: Mapping[str, Any]) -> str:
    """Whether a score is the paper's. The paper's has a sampling error too, at most as large as ours if independent."""
    if not cell["whole"]:
        return "cannot tell: not the whole split"
    if cell["stderr"] is None:
        return "cannot tell: no standard error"
    near = abs(cell["score"] - cell["paper"]) <= 1.96 * 2**0.5 * cell["stderr"]
    return "within noise" if near else "differs"


def claim(pair: Mapping[str, Any], whole: bool) -> str:
    """Whether an experiment's difference to its baseline is the paper's, as far as its 95% interval can say."""
    if not whole:
        return "cannot tell: not the whole split"
    if pair["ci95"] is None:
        return "cannot tell: no interval"
    (low, high), paper = pair["ci95"], pair["paper"]
    if low <= 0 <= high:
        if paper == 0:
            return "reproduced: no difference"
        return "cannot tell: 0 and the paper's fit both" if low <= paper <= high else "not reproduced: too small"
    if pair["value"] * paper <= 0:
        return "not reproduced: the opposite" if paper else "not reproduced: a difference"
    if low <= paper <= high:
        return "reproduced"
    return f"reproduced, but {'larger' if abs(pair['value']) > abs(paper) else 'smaller'}"


def sentences(group: Mapping[str, Any]) -> list[str]:
    """All that is said of a baseline and its variants."""
    return [*of_sight(group), *of_levels(group), *of_differences(group), *of_probes(group)]


def is_warning(sentence: str) -> bool:
    return sentence[:3].isupper()


def of_sight(group: Mapping[str, Any]) -> list[str]:
    """Whether the baseline uses the image, without which no comparison means anything."""
    baseline, out = group["baseline"], []
    for task in group["blind_tasks"]:
        rows = [row for row in group["blind"] if row["task"] == task]
        if not rows:
            out.append(f"NOT KNOWN whether {baseline} sees ({task}): its answers or the blank image's are missing.")
            continue
        row = max(rows, key=lambda row: row["p"])
        seed = f"{row['seed']}, the least sure of {len(rows)}" if len(rows) > 1 else row["seed"]
        best = max(row["blank_image"], row["most_frequent"])
        source = "a blank image" if best == row["blank_image"] else "the question's most frequent answer in training"
        said = f"{baseline} sees" if row["p"] < SEES else f"NO SIGHT in {baseline}"
        out.append(
            f"{said} ({task}, {seed}): {row['baseline']:.1f}% right against {best:.1f}% for the best image-"
            f"blind answer ({source}), exact McNemar p = {row['p']:.2g}, n = {row['n']}."
        )
    if any(row["p"] >= SEES for row in group["blind"]):
        out.insert(0, f"NO COMPARISON WITH {baseline} MEANS ANYTHING: a task shows no sight in it.")
    return out


def of_levels(group: Mapping[str, Any]) -> list[str]:
    out = []
    for name, cells in group["table"].items():
        levels = Counter(cell["verdict"].partition(":")[0] for cell in cells.values() if cell and "verdict" in cell)
        if levels:
            out.append(f"{name}: of {len(cells)} columns, against the paper's scores: {counts(levels)}.")
    return out


def of_differences(group: Mapping[str, Any]) -> list[str]:
    out = []
    for name, gains in group["delta"].items():
        pairs = group["paired"][name]
        if claims := Counter(re.split("[:,]", pair["verdict"])[0] for pair in pairs.values() if "verdict" in pair):
            differences = f"the paper's differences to {group['baseline']}, column by column"
            out.append(f"{name}: {differences}: {counts(claims)}.")
        for table, gain in gains.items():
            where = f"{name}, Table {table}" if table else name
            if gain["over"] < gain["of"]:
                where += f" ({gain['over']} of {gain['of']} columns)"
            said = of_gain(gain, group["seeds"])
            out.append(f"{where}: the mean relative gain over {group['baseline']} {said}.")
        moved = [
            f"{column} {pair['value']:+.1f} (p = {pair['p']:.2g})"
            for column, pair in pairs.items()
            if pair["p"] is not None and pair["p"] < DIFFERS
        ]
        if gains:
            out.append(f"{name}: columns that differ at p < {DIFFERS}, uncorrected: {', '.join(moved) or 'none'}.")
    return out


def of_gain(gain: Mapping[str, Any], seeds: Sequence[str]) -> str:
    if gain["value"] is None:
        return "is undefined, as a baseline score can be 0"
    if gain["p"] is None:
        return f"is {gain['value']:+.2f}%; no interval, as a column logs no per-sample scores"
    word = "better" if gain["value"] > 0 else "worse"
    word = word if gain["p"] < DIFFERS else "no measurable difference"
    if gain["p"] < DIFFERS and len(seeds) == 1:
        word += " in this one run each; how much another seed changes, the interval does not know"
    return f"is {gain['value']:+.2f}% (95% CI {ci(gain['ci95'])}, p = {gain['p']:.2g}): {word}"


def of_probes(group: Mapping[str, Any]) -> list[str]:
    out = []
    for name, probe in group["probes"].items():
        t = probe["theorem"]
        word = "shows no trend" if t["slope_p"] >= DIFFERS else "falls" if t["slope"] < 0 else "rises"
        out.append(
            f"{name}: the image's influence on the next token (mean KL {t['mean']:.3g} nats) {word} with the "
            f"token's position: {t['slope']:+.2g} nats per token, 95% CI {ci(t['slope_ci95'], '+.2g')}, "
            f"n = {t['n']} answers."
        )
    return out


def counts(counter: Counter[str]) -> str:
    return ", ".join(f"{n} {word}" for word, n in sorted(counter.items()))


def ci(pair: Sequence[float], spec: str = "+.2f") -> str:
    return f"[{pair[0]:{spec}}, {pair[1]:{spec}}]"
