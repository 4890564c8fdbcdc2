"""Two models on the same cases: the paired comparisons of summary.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from ima_seg.evaluate.measure.statistics import Estimate, Floats, bootstrap_mean, finite
from ima_seg.evaluate.run import Strict

#: Largest loss of clean Dice that is not called a cost.
CLEAN_MARGIN = 0.02

_DECIMALS = 12  # differences are rounded to this, so that equal ones tie whatever the rounding of their terms


class Comparison(Strict):
    """A model against the reference model on the ``n`` cases that both have."""

    model: str = ""
    reference: str = ""
    attack: str = ""
    eps: float | None = None
    n: int
    reference_mean: float  # Dice, over these cases
    model_mean: float
    difference: Estimate  # mean of model minus reference
    effect: float  # -1 where the model is worse in every case, 1 where better
    p: float
    p_holm: float  # corrected for all comparisons of the report


class CleanCost(Strict):
    """Whether a model's clean Dice is at most ``margin`` below the reference model's."""

    model: str = ""
    reference: str = ""
    n: int
    difference: float  # mean of model minus reference
    lower: float | None  # its one-sided 95 % bound, None for a single pair
    margin: float
    holds: bool  # lower > -margin


def _differences(a: Sequence[float], b: Sequence[float]) -> Floats:
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values are no pairs")
    rounded: Floats = np.round(finite(b) - finite(a), _DECIMALS)
    return rounded


def paired(a: Sequence[float], b: Sequence[float], *, resamples: int = 9999, **names: Any) -> Comparison | None:
    """Compare ``b`` with ``a`` (n,), values of the same cases in the same order; ``None`` for no pairs.

    The interval of the mean difference is the one of :func:`bootstrap_mean`. The Wilcoxon signed-rank test leaves out
    pairs of no difference; p is 1 where all are. The effect is the matched-pairs rank-biserial correlation,
    ``(R+ - R-) / (R+ + R-)`` with the rank sums of the positive and negative differences (Kerby 2014), 0 where there
    are none. ``names``: model, reference, attack and eps, to be kept in the result.

    Raises:
        ValueError: unequal lengths, or a value that is NaN or infinite.
    """
    differences = _differences(a, b)
    mean = bootstrap_mean(differences, resamples=resamples)
    if mean is None:
        return None
    changed = differences[differences != 0]
    p, effect = 1.0, 0.0
    if len(changed):
        p = float(stats.wilcoxon(changed).pvalue)
        ranks = stats.rankdata(np.abs(changed))
        effect = float((ranks * np.sign(changed)).sum() / ranks.sum())
    n = len(differences)
    return Comparison(
        n=n, reference_mean=sum(a) / n, model_mean=sum(b) / n, difference=mean, effect=effect, p=p, p_holm=p, **names
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Holm 1979) in the order of ``p_values``; compare with the level of the family."""
    count = len(p_values)
    adjusted = [0.0] * count
    largest = 0.0
    for rank, index in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def non_inferiority(a: Sequence[float], b: Sequence[float], margin: float, **names: str) -> CleanCost | None:
    """Test whether ``b`` is not worse than ``a`` (n,) by ``margin`` or more; higher values are better.

    One-sided: it holds where the lower 95 % bound of the mean difference ``b - a``, which is the lower end of the
    two-sided 90 % interval of :func:`bootstrap_mean`, lies above ``-margin``. A single pair has no bound, so it never
    holds; no pairs give ``None``. ``names``: model and reference, to be kept in the result.

    Raises:
        ValueError: a margin that is not positive, unequal lengths, or a value that is NaN or infinite.
    """
    if margin <= 0:
        raise ValueError(f"the margin is {margin}, not positive")
    mean = bootstrap_mean(_differences(a, b), 2 * 0.95 - 1)
    if mean is None:
        return None
    holds = mean.low is not None and mean.low > -margin
    return CleanCost(n=mean.n, difference=mean.estimate, lower=mean.low, margin=margin, holds=holds, **names)


def comparisons(models: Sequence[str], groups: Mapping[Any, Mapping[str, float]]) -> list[Comparison]:
    """Every model against the first, in each condition that both have.

    Args:
        models: names, the reference first.
        groups: Dice by case, for each condition, a named tuple with at least model, attack and eps.
    """
    tests = [
        paired(*_common(values, mine), model=model, reference=models[0], attack=group.attack, eps=group.eps)
        for model in models[1:]
        for group, values in groups.items()
        if group.model == models[0] and (mine := groups.get(group._replace(model=model))) is not None
    ]
    found = [test for test in tests if test is not None]
    corrected = holm([item.p for item in found])
    return [item.model_copy(update={"p_holm": p}) for item, p in zip(found, corrected, strict=True)]


def clean_costs(models: Sequence[str], clean: Mapping[str, Mapping[str, float]]) -> list[CleanCost]:
    """Non-inferiority of every model to the first on unchanged images."""
    reference, *others = models
    tests = [
        non_inferiority(*_common(clean[reference], clean[model]), CLEAN_MARGIN, model=model, reference=reference)
        for model in others
    ]
    return [test for test in tests if test is not None]


def _common(reference: Mapping[str, float], other: Mapping[str, float]) -> tuple[list[float], list[float]]:
    cases = [case for case in reference if case in other]
    return [reference[case] for case in cases], [other[case] for case in cases]
