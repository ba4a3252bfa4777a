"""Bootstrap intervals and exact tests. Knows nothing of files or tables."""

from collections.abc import Sequence
from typing import NotRequired, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

Array = NDArray[np.float64]
RESAMPLES = 10_000


class Interval(TypedDict):
    """A statistic, its 95% interval and the two-sided p of "it is 0"; None where it cannot be had."""

    value: float | None
    ci95: list[float] | None
    p: float | None
    paper: NotRequired[float]  # what the paper's printed scores give
    verdict: NotRequired[str]
    smallest: NotRequired[float]  # true value that so many seeds, spread as these, show four times in five


def resample(a_Sn: Array, b_Sn: Array, resamples: int = RESAMPLES, seed: int | Sequence[int] = 0) -> Array:
    """Means of a and of b, [2, resamples], over the same S seeds and the same n samples, both drawn with replacement.

    a_Sn, b_Sn: [S, n], or [n] of one seed. `seed` is that of the samples' draws: those of the seeds are the same in
    every call, as one training has a score in every column."""
    ours_Sn, base_Sn = np.atleast_2d(a_Sn), np.atleast_2d(b_Sn)
    count_S = len(ours_Sn)
    values, count = np.unique(np.concatenate([ours_Sn, base_Sn]), axis=1, return_counts=True)  # few differ: 214,354
    rng, chunk = np.random.default_rng(seed), max(1, 10**7 // len(count))  # rows in a second; bounds the memory
    sizes = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    drawn = [rng.multinomial(count.sum(), count / count.sum(), size) @ values.T for size in sizes]
    means_2RS = np.stack(np.split(np.concatenate(drawn) / count.sum(), 2, axis=1))
    if count_S == 1:
        return np.asarray(means_2RS[..., 0], dtype=np.float64)
    weights_RS = np.random.default_rng(0).multinomial(count_S, np.full(count_S, 1 / count_S), resamples) / count_S
    return np.asarray((means_2RS * weights_RS).sum(-1), dtype=np.float64)


def interval(value: float, draws: Array | None) -> Interval:
    """A statistic with its 95% percentile interval and the two-sided bootstrap p of "it is 0"; without draws, alone."""
    if draws is None and np.isfinite(value):
        return {"value": float(value), "ci95": None, "p": None}
    if draws is None or not np.isfinite([value, *draws]).all():  # a relative gain over 0
        return {"value": None, "ci95": None, "p": None}
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    p = min(1, 2 * (tail + 1) / (len(draws) + 1))
    return {"value": float(value), "ci95": np.percentile(draws, [2.5, 97.5]).tolist(), "p": float(p)}


def mcnemar(a_n: Array, b_n: Array) -> float:
    """One-sided exact McNemar p of "a is right more often than b" for paired 0/1 answers."""
    better, worse = int((a_n > b_n).sum()), int((a_n < b_n).sum())
    if not better + worse:
        return 1.0
    return float(stats.binomtest(better, better + worse, alternative="greater").pvalue)


def sd(values: ArrayLike) -> float | None:
    """The sample standard deviation; None of fewer than two values, or where one is not finite."""
    array = np.asarray(values, dtype=float)
    return float(np.std(array, ddof=1)) if array.size > 1 and np.isfinite(array).all() else None


def stderr(strata: Sequence[Array]) -> float | None:
    """The standard error of the sum of the strata's means; None where a stratum is too small to tell."""
    value = float(np.linalg.norm([stats.sem(stratum) for stratum in strata]))
    return value if np.isfinite(value) else None


def holm(ps: Sequence[float]) -> list[float]:
    """The p of a family of comparisons, adjusted by Holm: each is the largest of those that come before it in order."""
    order = np.argsort(ps)
    steps = np.array(ps)[order] * np.arange(len(ps), 0, -1)
    adjusted = np.empty(len(ps))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(steps))
    return [float(p) for p in adjusted]


def detectable(seeds: int, alpha: float = 0.05) -> float:
    """The true difference, in SDs of the seeds' differences, that a paired t-test at p < alpha (two-sided) sees with a
    power of 80%. seeds: 3 or more, for two tell their SD too badly. What the test sees in the wrong direction is left
    out: less than a millionth."""
    critical, root = stats.t.ppf(1 - alpha / 2, seeds - 1), np.sqrt(seeds)
    most = (1.5 * critical + 4) / root
    found = optimize.brentq(lambda d: 1 - stats.nct.cdf(critical, seeds - 1, d * root) - 0.8, 0.01, most)
    return float(found)


def smallest(differences: Sequence[float], alpha: float = 0.05) -> float | None:
    """The true difference that so many seeds, whose differences are these, show four times in five; in their units.
    None of fewer than three."""
    spread = sd(differences)
    return None if len(differences) < 3 or spread is None else detectable(len(differences), alpha) * spread
