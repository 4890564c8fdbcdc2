"""One case as an attack sees it: the whole volume, or its slices each with a budget of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ima_seg.attacks.base import AttackResult
from ima_seg.cases.raw import FloatArray
from ima_seg.errors import UserError
from ima_seg.evaluate.run import Budget, Unit
from ima_seg.evaluate.subject import Case, Window
from ima_seg.types import PassCount, Target, ThreatModel


@dataclass(frozen=True)
class Problem:
    """Arguments of an attack: a batch of one volume, or of the slices of one volume.

    Attributes:
        case: the case.
        network: (B, C + extra, *S) -> logits, through the sliding window.
        x: the batch, in the layout of :attr:`Case.base`.
        target: its reference.
        support: where it may be perturbed, or ``None``.
        threat: norm and number of image channels.
        budget: ``"volume"`` or ``"slice"``.
        chunk: how many samples an attack is given at once.
    """

    case: Case
    network: Callable[[torch.Tensor], torch.Tensor]
    x: torch.Tensor
    target: Target
    support: torch.Tensor | None
    threat: ThreatModel
    budget: Budget
    chunk: int

    @property
    def voxels(self) -> int:
        """Perturbable elements of one sample: image channels x space."""
        return self.case.image_channels * math.prod(self.x.shape[2:])

    def volume(self, batch: torch.Tensor) -> torch.Tensor:
        """A batch as the attack returns it -> (1, C + extra, *S)."""
        return batch if self.budget == "volume" else batch.movedim(0, 1)[None]

    def run(self, attack: Callable[..., AttackResult], eps: float) -> AttackResult:
        """Run ``attack(network, x, target, eps=..., threat=..., support=...)`` on all samples, in chunks.

        Args:
            attack: with its options bound.
            eps: budget of each sample, per voxel in network units.
        """
        parts = []
        for start in range(0, len(self.x), self.chunk):
            rows = slice(start, start + self.chunk)
            x = self.x[rows]
            parts.append(
                attack(
                    self.network,
                    x,
                    self.target[rows],
                    eps=torch.full((len(x),), eps, device=x.device),
                    threat=self.threat,
                    support=self.support if self.support is None or len(self.support) == 1 else self.support[rows],
                )
            )
        if len(parts) == 1:
            return parts[0]
        return AttackResult(
            adversarial=torch.cat([part.adversarial for part in parts]),
            distance=torch.cat([part.distance for part in parts]),
            damage=torch.cat([part.damage for part in parts]),
            zero_gradient=torch.cat([part.zero_gradient for part in parts]),
            trace=torch.cat([part.trace for part in parts], 1),
            passes=sum((part.passes for part in parts), PassCount()),
        )


def make_problem(case: Case, window: Window, threat: ThreatModel, budget: Budget) -> Problem:
    """The problem of attacking ``case`` through ``window``."""
    threat = replace(threat, image_channels=case.image_channels)
    if budget == "volume":
        return Problem(
            case, case.network(window, whole=True), case.base, case.target(), case.support, threat, budget, chunk=1
        )
    if not case.model.is_2d:
        raise UserError(
            f"budget 'slice' is for 2D models; {case.model.folder.name} sees volumes, evaluate it with --budget volume"
        )
    x = case.base[0].movedim(1, 0).contiguous()
    support = None if case.support is None else case.support[0].movedim(1, 0)
    network = case.network(window, whole=False)
    return Problem(case, network, x, case.target(slices=True), support, threat, budget, chunk=window.tile_batch)


def per_voxel(eps: float, unit: Unit, problem: Problem) -> float:
    """A budget in ``unit`` -> per voxel in network units (RMS or largest absolute value).

    With several channels, percent is that of the channel in which the same number of network units is worth most. With
    L2 the budget is the RMS over all channels together, of which one channel may take more than its share.

    Raises:
        UserError: HU for images that are not a single CT.
    """
    case = problem.case
    if unit in ("rms", "linf"):
        return eps
    if unit == "l2":
        return problem.threat.from_total(eps, problem.voxels)
    if unit == "hu":
        if not case.model.is_single_ct:
            raise UserError(
                f"unit 'hu' needs a model of a single CT channel; {case.model.folder.name} has "
                f"{', '.join(case.model.channels)}: use --unit percent or rms"
            )
        return eps / float(native_scale(case)[0])
    return float((eps / 100 * case.native_range / native_scale(case)).min())


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


def check_units(norm: str, unit: Unit) -> None:
    """Refuse a unit that does not go with the norm."""
    if (norm, unit) in (("l2", "linf"), ("linf", "rms"), ("linf", "l2")):
        fitting = "rms, l2, hu or percent" if norm == "l2" else "linf, hu or percent"
        raise UserError(f"unit {unit!r} does not go with norm {norm!r}; use --unit {fitting}")
