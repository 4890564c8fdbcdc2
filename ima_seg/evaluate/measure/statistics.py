"""Statistics of a report: intervals over cases, paired comparisons of two models, breaking sizes.

A case is the unit everywhere. Whatever is drawn is drawn from a seed, so that a report comes out the same again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]

_DECIMALS = 12  # differences are rounded to this, so that equal ones tie whatever the rounding of their terms


@dataclass(frozen=True)
class Interval:
    """An estimate from ``n`` values and its confidence interval; both bounds ``None`` where n is 1."""

    estimate: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class PairedTest:
    """Comparison of two models on the same cases; differences are second minus first.

    Attributes:
        n: number of pairs.
        mean: mean difference.
        median: median difference.
        p: two-sided Wilcoxon signed-rank test.
        effect: matched-pairs rank-biserial correlation, -1 (the second always lower) to 1 (always higher).
    """

    n: int
    mean: Interval
    median: Interval
    p: float
    effect: float


@dataclass(frozen=True)
class NonInferiority:
    """Whether the second model is at most ``margin`` worse than the first.

    Attributes:
        n: number of pairs.
        difference: mean of second minus first.
        lower: one-sided lower confidence bound of it; ``None`` for a single pair.
        margin: as asked for, positive.
        holds: ``lower > -margin``.
    """

    n: int
    difference: float
    lower: float | None
    margin: float
    holds: bool


@dataclass(frozen=True)
class Breaking:
    """Median breaking size over ``n`` cases of which ``broken`` were broken.

    Attributes:
        median: ``None``: more than half were not broken, so that it lies above what was tried.
        low: confidence bound of the median; ``None``: there is no bound from so few or so many unbroken cases.
        high: the same; ``None``: the median may lie anywhere above ``low``.
    """

    n: int
    broken: int
    median: float | None
    low: float | None
    high: float | None


def _array(values: Iterable[float]) -> Floats:
    array = np.asarray(list(values), dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError("values that are not finite have no statistics; leave them out and say so")
    return array


def _differences(a: Sequence[float], b: Sequence[float]) -> Floats:
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values are no pairs")
    rounded: Floats = np.round(_array(b) - _array(a), _DECIMALS)
    return rounded


def _bootstrap(
    values: Floats, statistic: Any, methods: Sequence[str], confidence: float, n: int, seed: int
) -> Interval:
    """Bootstrap interval by the first of ``methods`` that gives one; ``values`` is not empty."""
    estimate = float(statistic(values))
    if len(values) == 1:
        return Interval(estimate, None, None, 1)
    if np.ptp(values) == 0:
        return Interval(estimate, estimate, estimate, len(values))
    for method in methods:
        with np.errstate(all="ignore"):
            result = stats.bootstrap(
                (values,),
                statistic,
                n_resamples=n,
                batch=max(1, 2_000_000 // len(values)),
                vectorized=True,
                confidence_level=confidence,
                method=method,
                random_state=np.random.default_rng(seed),
            ).confidence_interval
        if np.isfinite([result.low, result.high]).all():
            break
    return Interval(estimate, float(result.low), float(result.high), len(values))


def bootstrap_mean(
    values: Iterable[float], confidence: float = 0.95, resamples: int = 9999, seed: int = 0
) -> Interval | None:
    """Mean of ``values`` (n,) with a bias-corrected and accelerated bootstrap interval (Efron 1987).

    Equal values give an interval of no width, one value gives none, no values give ``None``. Where the acceleration is
    not defined the percentile interval is taken. Intervals from fewer than about ten values are too narrow.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    array = _array(values)
    return _bootstrap(array, np.mean, ("BCa", "percentile"), confidence, resamples, seed) if len(array) else None


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval | None:
    """Share ``successes / n`` with Wilson's score interval (Wilson 1927); ``None`` for n = 0."""
    if n == 0:
        return None
    interval = stats.binomtest(successes, n).proportion_ci(confidence_level=confidence, method="wilson")
    return Interval(successes / n, float(interval.low), float(interval.high), n)


def paired(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95, resamples: int = 9999, seed: int = 0
) -> PairedTest | None:
    """Compare ``b`` with ``a`` (n,), values of the same cases in the same order; ``None`` for no pairs.

    The interval of the mean difference is the one of :func:`bootstrap_mean`, that of the median a percentile bootstrap.
    The Wilcoxon signed-rank test leaves out pairs of no difference; p is 1 where all are. The effect is the
    matched-pairs rank-biserial correlation, ``(R+ - R-) / (R+ + R-)`` with the rank sums of the positive and negative
    differences (Kerby 2014), 0 where there are none.

    Raises:
        ValueError: unequal lengths, or a value that is NaN or infinite.
    """
    differences = _differences(a, b)
    mean = bootstrap_mean(differences, confidence, resamples, seed)
    if mean is None:
        return None
    median = _bootstrap(differences, np.median, ("percentile",), confidence, resamples, seed)
    changed = differences[differences != 0]
    p, effect = 1.0, 0.0
    if len(changed):
        p = float(stats.wilcoxon(changed).pvalue)
        ranks = stats.rankdata(np.abs(changed))
        effect = float((ranks * np.sign(changed)).sum() / ranks.sum())
    return PairedTest(len(differences), mean, median, p, effect)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Holm 1979) in the order of ``p_values``; compare with the level of the family."""
    count = len(p_values)
    adjusted = [0.0] * count
    largest = 0.0
    for rank, index in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def non_inferiority(
    a: Sequence[float],
    b: Sequence[float],
    margin: float,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> NonInferiority | None:
    """Test whether ``b`` is not worse than ``a`` by ``margin`` or more; higher values are better.

    One-sided: it holds where the lower bound of the mean difference ``b - a`` at the given one-sided confidence lies
    above ``-margin``. The bound is the lower end of the two-sided interval of :func:`bootstrap_mean` at
    ``2 confidence - 1``. A single pair has no bound, so it never holds; no pairs give ``None``.

    Args:
        a: values of the reference model (n,).
        b: values of the other model, same cases.
        margin: largest loss that would be accepted, positive.
        confidence: one-sided, above 0.5.
        resamples: bootstrap resamples.
        seed: of the bootstrap.

    Raises:
        ValueError: a margin that is not positive, unequal lengths, or a value that is NaN or infinite.
    """
    if margin <= 0:
        raise ValueError(f"the margin is {margin}, not positive")
    mean = bootstrap_mean(_differences(a, b), 2 * confidence - 1, resamples, seed)
    if mean is None:
        return None
    return NonInferiority(mean.n, mean.estimate, mean.low, margin, mean.low is not None and mean.low > -margin)


def area_under_dice(eps: Sequence[float], dice: Sequence[float]) -> float:
    """Mean Dice over budgets from 0 to the largest: trapezoids under ``dice`` (n,), divided by the range of ``eps``.

    Args:
        eps: budgets, strictly ascending from 0, two or more.
        dice: Dice at each; the first is the clean Dice.

    Raises:
        ValueError: budgets of another kind, or unequal lengths.
    """
    x, y = _array(eps), _array(dice)
    if len(x) != len(y) or len(x) < 2 or x[0] != 0 or not (np.diff(x) > 0).all():
        raise ValueError(f"no budgets ascending from 0 with a Dice each: {list(eps)} and {len(y)} values")
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / (x[-1] - x[0]))


def median_breaking(values: Iterable[float | None], confidence: float = 0.95) -> Breaking | None:
    """Median breaking size, cases that were not broken (``None``) counted as larger than all others.

    For an even number the median is the mean of the middle two, and the lower of them where only that one was broken.
    The interval is the distribution-free one between order statistics ``k`` and ``n + 1 - k``, with the largest ``k``
    for which it covers the median with at least the given confidence (from the binomial distribution; David and
    Nagaraja, Order Statistics, 7.1); there is none for n < 6 at 95 %. No values give ``None``.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    listed = list(values)
    n = len(listed)
    if n == 0:
        return None
    broken = np.sort(_array(value for value in listed if value is not None))

    def ordered(position: int) -> float | None:
        """The order statistic at ``position``, from 1."""
        return float(broken[position - 1]) if 1 <= position <= len(broken) else None

    lower, upper = ordered((n + 1) // 2), ordered(n // 2 + 1)
    median = lower if lower is None or upper is None else (lower + upper) / 2
    k = 0
    while 2 * stats.binom.cdf(k, n, 0.5) <= 1 - confidence:
        k += 1
    return Breaking(n, len(broken), median, ordered(k) if k else None, ordered(n + 1 - k) if k else None)


def pooled_dice(tp: Iterable[int], fp: Iterable[int], fn: Iterable[int]) -> float | None:
    """Dice of all voxels of all cases together, ``2 TP / (2 TP + FP + FN)``, from counts per case.

    ``None`` where the class is in no reference and no prediction.
    """
    hits, misses = 2 * math.fsum(tp), math.fsum(fp) + math.fsum(fn)
    return hits / (hits + misses) if hits + misses else None
