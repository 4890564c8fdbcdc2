"""One case as an attack sees it: the whole volume, or its slices each with a budget of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ima_seg.attacks import AttackResult, Problem
from ima_seg.cases.raw import FloatArray
from ima_seg.errors import UserError
from ima_seg.evaluate.run import Budget, Unit
from ima_seg.evaluate.subject import Case, Window
from ima_seg.types import PassCount, ThreatModel


@dataclass(frozen=True)
class Stage:
    """A case with the problem of attacking it: a batch of one volume, or of the slices of one volume."""

    case: Case
    problem: Problem  # its network is the sliding window, its batch in the layout of Case.base
    budget: Budget
    chunk: int  # how many samples an attack is given at once

    def volume(self, batch: torch.Tensor) -> torch.Tensor:
        """A batch as the attack returns it -> (1, C + extra, *S)."""
        return batch if self.budget == "volume" else batch.movedim(0, 1)[None]

    def run(self, attack: Callable[[Problem, float], AttackResult], eps: float) -> AttackResult:
        """``attack`` on all samples, in chunks, each with the budget ``eps`` per voxel in SDs."""
        if len(self.problem) <= self.chunk:
            return attack(self.problem, eps)
        starts = range(0, len(self.problem), self.chunk)
        parts = [attack(self.problem.select(slice(start, start + self.chunk)), eps) for start in starts]
        joined: dict[str, Any] = {"passes": sum((part.passes for part in parts), PassCount())}
        for name in (field.name for field in fields(AttackResult) if field.name != "passes"):
            joined[name] = torch.cat([getattr(part, name) for part in parts], 1 if name == "trace" else 0)
        return AttackResult(**joined)


def make_stage(case: Case, window: Window, threat: ThreatModel, budget: Budget, **options: Any) -> Stage:
    """The stage for attacking ``case`` through ``window``; ``options`` are further ones of :class:`Problem`."""
    threat = replace(threat, image_channels=case.image_channels)
    network = case.network(window, whole=budget == "volume")
    if budget == "volume":
        problem = Problem(network, case.base, case.target(), threat, support=case.support, **options)
        return Stage(case, problem, budget, chunk=1)
    x = case.base[0].movedim(1, 0).contiguous()
    support = None if case.support is None else case.support[0].movedim(1, 0)
    problem = Problem(network, x, case.target(slices=True), threat, support=support, **options)
    return Stage(case, problem, budget, chunk=window.tile_batch)


def per_voxel(eps: float, unit: Unit, stage: Stage) -> float:
    """A budget in ``unit`` -> per voxel in SDs (RMS or largest absolute value).

    With several channels, percent is that of the channel in which the same number of SDs is worth most. With
    L2 the budget is the RMS over all channels together, of which one channel may take more than its share.

    Raises:
        UserError: HU or percent of a case without :attr:`Case.scale`.
    """
    case = stage.case
    if unit in ("rms", "linf"):
        return eps
    if unit == "l2":
        return stage.problem.threat.from_total(eps, case.image_channels * math.prod(stage.problem.x.shape[2:]))
    native = eps if unit == "hu" else eps / 100 * case.native_range
    return float((native / native_scale(case)).min())


def native_scale(case: Case) -> FloatArray:
    """:attr:`Case.scale`.

    Raises:
        UserError: there is none.
    """
    if case.scale is None:
        raise UserError(
            f"{case.raw.case}: the pre-processing of {case.model.folder} is no line between original intensities and "
            "network units, so there are no units hu and percent, no adversarial files and no transfer: use --unit rms "
            "or linf, without --save-adversarial"
        )
    return case.scale
