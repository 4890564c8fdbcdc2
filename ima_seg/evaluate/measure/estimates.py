"""Means and intervals in the form that summary.json stores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from statistics import median as _median

from pydantic import BaseModel, ConfigDict

from ima_seg.evaluate.measure.statistics import Interval, bootstrap_mean


class Estimate(BaseModel):
    """An estimate from ``n`` values with its 95 % interval; a bound that does not exist is None."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    estimate: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, interval: Interval | None) -> Estimate | None:
        """From an interval, None from None."""
        if interval is None:
            return None
        return cls(estimate=interval.estimate, low=interval.low, high=interval.high, n=interval.n)


@lru_cache(maxsize=4096)
def _bootstrap(values: tuple[float, ...]) -> Estimate | None:
    return Estimate.of(bootstrap_mean(values))


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """Mean of the values that exist, with its bootstrap interval; None without any."""
    return _bootstrap(tuple(float(value) for value in values if value is not None))


def mean(values: Sequence[float]) -> float | None:
    """Their mean, None without any."""
    return math.fsum(values) / len(values) if values else None


def median(values: Sequence[float]) -> float | None:
    """Their median, None without any."""
    return float(_median(values)) if values else None
