"""Statistics over cases: means with intervals, areas, breaking sizes.

A case is the unit everywhere. Whatever is drawn is drawn from a seed, so that a report comes out the same again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict
from scipy import stats

from ima_seg.evaluate.run import Strict

Floats = npt.NDArray[np.float64]


class Estimate(Strict):
    """An estimate from ``n`` values with its interval, of 95 % in summary.json; bounds that do not exist are None."""

    model_config = ConfigDict(frozen=True)

    estimate: float
    low: float | None
    high: float | None
    n: int


class Breaking(Strict):
    """Smallest perturbations that break a case: their median over ``n`` cases of which ``broken`` were broken."""

    model: str
    attack: str
    median_rms: float | None  # None: more than half were not broken, so that it lies above what was tried
    low: float | None  # None: there is no bound from so few or so many unbroken cases
    high: float | None  # None: the median may lie anywhere above ``low``
    broken: int
    n: int


def finite(values: Iterable[float]) -> Floats:
    """The values as an array (n,).

    Raises:
        ValueError: one is NaN or infinite.
    """
    array = np.asarray(list(values), dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError("values that are not finite have no statistics; leave them out and say so")
    return array


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that exist, None without any."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def bootstrap_mean(values: Iterable[float | None], confidence: float = 0.95, resamples: int = 9999) -> Estimate | None:
    """Mean of the values that exist with a bias-corrected and accelerated bootstrap interval (Efron 1987).

    Equal values give an interval of no width, one value gives none, no values give ``None``. Where the acceleration is
    not defined the percentile interval is taken. Intervals from fewer than about ten values are too narrow.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    array = finite(value for value in values if value is not None)
    return _bootstrap(tuple(array.tolist()), confidence, resamples) if len(array) else None


@lru_cache(maxsize=4096)  # models share conditions, and a report asks for many of them twice
def _bootstrap(values: tuple[float, ...], confidence: float, resamples: int) -> Estimate:
    array, n = np.asarray(values), len(values)
    centre = float(array.mean())
    if n == 1 or np.ptp(array) == 0:
        bound = None if n == 1 else centre
        return Estimate(estimate=centre, low=bound, high=bound, n=n)
    for method in ("BCa", "percentile"):
        with np.errstate(all="ignore"):
            low, high = stats.bootstrap(
                (array,),
                np.mean,
                n_resamples=resamples,
                batch=max(1, 2_000_000 // n),
                vectorized=True,
                confidence_level=confidence,
                method=method,
                random_state=np.random.default_rng(0),
            ).confidence_interval
        if np.isfinite([low, high]).all():
            break
    return Estimate(estimate=centre, low=float(low), high=float(high), n=n)


def wilson(successes: int, n: int) -> Estimate | None:
    """Share ``successes / n`` with Wilson's 95 % score interval (Wilson 1927); ``None`` for n = 0."""
    if n == 0:
        return None
    interval = stats.binomtest(successes, n).proportion_ci(method="wilson")
    return Estimate(estimate=successes / n, low=float(interval.low), high=float(interval.high), n=n)


def area_under_dice(eps: Sequence[float], dice: Sequence[float]) -> float:
    """Mean Dice over budgets from 0 to the largest: trapezoids under ``dice`` (n,), divided by the range of ``eps``.

    Args:
        eps: budgets, strictly ascending from 0, two or more.
        dice: Dice at each; the first is the clean Dice.

    Raises:
        ValueError: budgets of another kind, or unequal lengths.
    """
    x, y = finite(eps), finite(dice)
    if len(x) != len(y) or len(x) < 2 or x[0] != 0 or not (np.diff(x) > 0).all():
        raise ValueError(f"no budgets ascending from 0 with a Dice each: {list(eps)} and {len(y)} values")
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / x[-1])


def median_breaking(values: Iterable[float | None], model: str = "", attack: str = "") -> Breaking | None:
    """Median breaking size, cases that were not broken (``None``) counted as larger than all others.

    For an even number the median is the mean of the middle two, and the lower of them where only that one was broken.
    The interval is the distribution-free one between two order statistics (``scipy.stats.quantile_test``), of at least
    95 %; there is none for n < 6. No values give ``None``.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    listed = list(values)
    broken = finite(value for value in listed if value is not None)
    n = len(listed)
    if n == 0:
        return None
    sizes = np.sort(np.pad(broken, (0, n - len(broken)), constant_values=np.inf))
    lower, upper = sizes[(n - 1) // 2], sizes[n // 2]
    median = (lower + upper) / 2 if np.isfinite(upper) else lower
    interval = stats.quantile_test(sizes, p=0.5).confidence_interval()
    median, low, high = (float(v) if np.isfinite(v) else None for v in (median, interval.low, interval.high))
    return Breaking(model=model, attack=attack, median_rms=median, low=low, high=high, broken=len(broken), n=n)


def pooled_dice(tp: Iterable[int], fp: Iterable[int], fn: Iterable[int]) -> float | None:
    """Dice of all voxels of all cases together, ``2 TP / (2 TP + FP + FN)``, from counts per case.

    ``None`` where the class is in no reference and no prediction.
    """
    hits, misses = 2 * math.fsum(tp), math.fsum(fp) + math.fsum(fn)
    return hits / (hits + misses) if hits + misses else None
