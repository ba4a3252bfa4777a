"""What the miniature's probes say in numbers: whether stage 1 aligned, facts by position, localisation, term sizes.

Reads the arrays that scripts/reporting/probe.py writes, of one experiment's seeds. Intervals are 95% t-intervals over
held-out rows, each row's seeds averaged; they do not know how much another seed changes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

# As in probe.py, which runs in environments without scipy.
SIZE_STATES = ("start of stage 1", "end of stage 1", "start of stage 2", "end of stage 2")
PARTS = ("projector", "embeddings", "decoder")
TERMS = ("ce", "l2", "cosine")
NEEDED = {
    "kl",
    "fact_token",
    "fact_right",
    "stage_1_ce",
    "stage_1_ce_swapped",
    "auroc",
    "hit",
    "hit_chance",
    "map_type",
}
NEEDED |= {f"{kind}_{term}" for kind in ("size", "grad") for term in TERMS}
Probe = dict[str, np.ndarray]


def measured(probes: Sequence[Probe]) -> dict[str, Any]:
    """stage_1, facts, maps and sizes (below) of probes of one experiment, one for each seed, on the same rows."""
    return {
        "stage_1": stage_1(probes),
        "facts": facts(probes),
        "maps": {name: maps(probes, chosen) for name, chosen in map_types(probes[0]).items()},
        "sizes": sizes(probes),
    }


def mean_and_interval(values_n: np.ndarray) -> dict[str, Any]:
    """mean, ci95 and n of the values that are not NaN; ci95 is None where they do not spread or there is one."""
    values = values_n[np.isfinite(values_n)]
    spread = len(values) > 1 and np.ptp(values) > 0
    interval = stats.ttest_1samp(values, 0).confidence_interval() if spread else None
    return {
        "mean": float(values.mean()) if len(values) else None,
        "ci95": None if interval is None else [float(bound) for bound in interval],
        "n": len(values),
    }


def over_seeds(probes: Sequence[Probe], name: str) -> np.ndarray:
    return np.mean([probe[name] for probe in probes], axis=0, dtype="float64")


def stage_1(probes: Sequence[Probe]) -> dict[str, Any]:
    """The held-out caption's CE after stage 1 alone, in nats per token: with the true and with a swapped picture, and
    the difference: above 0, stage 1 told the picture's content to the language model."""
    true_n, swapped_n = over_seeds(probes, "stage_1_ce"), over_seeds(probes, "stage_1_ce_swapped")
    return {
        "ce": float(true_n.mean()),
        "ce_swapped": float(swapped_n.mean()),
        "difference": mean_and_interval(swapped_n - true_n),
    }


def fact_kl(probe: Probe) -> np.ndarray:
    """[n, F]: KL(true image || swapped image) in nats at the first token of each fact; NaN where there is none."""
    token_nF = probe["fact_token"]
    return np.where(token_nF >= 0, np.take_along_axis(probe["kl"], token_nF.clip(min=0), axis=1), np.nan)


def slopes(token_nF: np.ndarray, value_nF: np.ndarray) -> np.ndarray:
    """[n]: how much each answer's value changes per token of depth, by least squares over its facts; NaN of fewer than
    two. token_nF is -1, and value_nF anything, where an answer has no more facts."""
    known_nF = token_nF >= 0
    token_nF = np.where(known_nF, token_nF, np.nan).astype("float64")
    away_nF = np.where(known_nF, token_nF - np.nanmean(token_nF, axis=1, keepdims=True), 0)
    with np.errstate(invalid="ignore"):
        return np.asarray((away_nF * np.where(known_nF, value_nF, 0)).sum(1) / (away_nF**2).sum(1))


def facts(probes: Sequence[Probe]) -> dict[str, Any]:
    """Theorem 3.3 on the words that only the image tells, in answers that hold several: their accuracy (%) and KL(true
    image || swapped image) in nats, and how both change per token of depth: the mean of each answer's slope."""
    token_nF = probes[0]["fact_token"]
    right_nF = 100 * over_seeds(probes, "fact_right")
    kl_nF = np.mean([fact_kl(probe) for probe in probes], axis=0)
    out: dict[str, Any] = {"answer_tokens": float(np.isfinite(probes[0]["kl"]).sum(1).mean())}
    for name, value_nF in (("right", right_nF), ("kl", kl_nF)):
        out[name] = mean_and_interval(np.nanmean(value_nF, axis=1))
        out[f"{name}_slope"] = mean_and_interval(slopes(token_nF, value_nF))
    return out


def map_types(probe: Probe) -> dict[str, np.ndarray]:
    """{"all" and each image set and question type: which rows}."""
    types = probe["map_type"]
    return {"all": np.full(len(types), True)} | {str(kind): types == kind for kind in sorted(set(types))}


def maps(probes: Sequence[Probe], chosen_q: np.ndarray) -> dict[str, Any]:
    """Figures 2 and 3: AUROC of the similarity map against the mask of what is asked for (0.5: chance), and the
    pointing game's hits against their chance."""
    return {name: mean_and_interval(over_seeds(probes, name)[chosen_q]) for name in ("auroc", "hit", "hit_chance")}


def sizes(probes: Sequence[Probe]) -> dict[str, Any]:
    """{state: {"ce", "l2", "cosine": {"value", and PARTS: the gradient's norm}}}, the terms at weight 1."""
    out: dict[str, Any] = {state: {} for state in SIZE_STATES}
    for term in TERMS:
        values, norms = over_seeds(probes, f"size_{term}"), over_seeds(probes, f"grad_{term}")
        for state, value, norm in zip(SIZE_STATES, values, norms, strict=True):
            out[state][term] = {"value": float(value)} | dict(zip(PARTS, map(float, norm), strict=True))
    return out
