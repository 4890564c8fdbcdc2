"""Two models on the same cases: the paired comparisons of summary.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from ima_seg.evaluate.measure.estimates import Estimate
from ima_seg.evaluate.measure.statistics import holm, non_inferiority, paired

#: Largest loss of clean Dice that is not called a cost.
CLEAN_MARGIN = 0.02


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Comparison(_Strict):
    """A model against the reference model on the ``n`` cases that both have.

    Attributes:
        reference_mean: mean Dice of the reference model over these cases; ``model_mean`` of the other.
        difference: mean difference, model minus reference.
        effect: matched-pairs rank-biserial correlation, 1 where the model is better in every case.
        p: two-sided Wilcoxon signed-rank test.
        p_holm: the same, corrected for all comparisons of the report.
    """

    model: str
    reference: str
    attack: str
    eps: float | None
    n: int
    reference_mean: float
    model_mean: float
    difference: Estimate
    effect: float
    p: float
    p_holm: float


class CleanCost(_Strict):
    """Whether a model's clean Dice is at most ``margin`` below the reference model's.

    ``lower`` is the one-sided 95 % bound of the difference (model minus reference).
    """

    model: str
    reference: str
    n: int
    difference: float
    lower: float | None
    margin: float
    holds: bool


def _pairs(reference: Mapping[str, float], other: Mapping[str, float]) -> tuple[list[float], list[float]]:
    common = [case for case in reference if case in other]
    return [reference[case] for case in common], [other[case] for case in common]


def comparisons(models: Sequence[str], groups: Mapping[Any, Mapping[str, float]]) -> list[Comparison]:
    """Every model against the first, in each condition that both have.

    Args:
        models: names, the reference first.
        groups: Dice by case, for each condition, a named tuple with at least model, attack and eps.
    """
    reference = models[0]
    found: list[Comparison] = []
    for model in models[1:]:
        for group, values in groups.items():
            mine = groups.get(group._replace(model=model))
            if group.model != reference or mine is None:
                continue
            first, second = _pairs(values, mine)
            test = paired(first, second)
            difference = None if test is None else Estimate.of(test.mean)
            if test is None or difference is None:
                continue
            found.append(
                Comparison(
                    model=model,
                    reference=reference,
                    attack=group.attack,
                    eps=group.eps,
                    n=test.n,
                    reference_mean=sum(first) / test.n,
                    model_mean=sum(second) / test.n,
                    difference=difference,
                    effect=test.effect,
                    p=test.p,
                    p_holm=1.0,
                )
            )
    corrected = holm([item.p for item in found])
    return [item.model_copy(update={"p_holm": p}) for item, p in zip(found, corrected, strict=True)]


def clean_costs(models: Sequence[str], clean: Mapping[str, Mapping[str, float]]) -> list[CleanCost]:
    """Non-inferiority of every model to the first on unchanged images."""
    found = []
    for model in models[1:]:
        test = non_inferiority(*_pairs(clean[models[0]], clean[model]), CLEAN_MARGIN)
        if test is not None:
            found.append(
                CleanCost(
                    model=model,
                    reference=models[0],
                    n=test.n,
                    difference=test.difference,
                    lower=test.lower,
                    margin=test.margin,
                    holds=test.holds,
                )
            )
    return found
