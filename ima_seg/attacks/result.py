"""What an attack finds, and how it keeps the best of the points that it visits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ima_seg.attacks.passes import Passes, all_finite
from ima_seg.attacks.problem import Problem
from ima_seg.ops import per_row, perturbation_size, project
from ima_seg.types import PassCount


@dataclass(frozen=True)
class AttackResult:
    """What an attack found, per sample of the batch.

    Attributes:
        adversarial: (B, C, *S) of the dtype of the batch: the point of most damage among those visited.
        distance: (B,) size of the perturbation, per voxel in network units.
        damage: (B,) float32 of that point; NaN where the logits never were finite.
        zero_gradient: (B,) float32, share of its gradient passes whose gradient was exactly zero; 0 without gradients.
        trace: (T, B) float32, most damage up to each step (for random attacks: each query).
        passes: network passes over samples.
    """

    adversarial: torch.Tensor
    distance: torch.Tensor
    damage: torch.Tensor
    zero_gradient: torch.Tensor
    trace: torch.Tensor
    passes: PassCount


def finish(
    problem: Problem,
    delta: torch.Tensor,
    damage: torch.Tensor,
    zero: torch.Tensor,
    trace: torch.Tensor,
    made: PassCount,
) -> AttackResult:
    """The result for ``delta`` (B, image channels, *S), its size measured on the batch that is handed out.

    A damage of infinity, which stands for none that was measured, becomes NaN.
    """
    adversarial = problem.apply(delta)
    distance = perturbation_size(problem.difference(adversarial), problem.threat.norm)
    damage, trace = (torch.where(torch.isinf(part), torch.nan, part) for part in (damage, trace))
    return AttackResult(adversarial, distance, damage, zero, trace, made)


class Best:
    """The point of most damage among those visited, per sample, over all restarts. Never waits for the device.

    Of points that do equal damage the last one counts: it was climbed further. Points with NaN or infinite logits do
    not count.

    Args:
        problem: what is attacked.
        eps: budget (B,); points must be within it when they are visited.
        steps: of one restart; the trace holds one more.
    """

    def __init__(self, problem: Problem, eps: torch.Tensor, steps: int) -> None:
        self.problem, self.passes, self.eps = problem, Passes(problem), eps
        self.delta = problem.zero()
        self.damage = torch.full(eps.shape, -torch.inf, device=eps.device)
        self._by_step = self.damage.repeat(steps + 1, 1)
        self._gradients, self._zero = 0, torch.zeros_like(self.damage)

    @property
    def trace(self) -> torch.Tensor:
        """(steps + 1, B), most damage up to each step, over all restarts."""
        return self._by_step.cummax(0).values

    def look(self, delta: torch.Tensor, step: int) -> torch.Tensor:
        """Visit ``x + delta``; returns its logits (B, K, *S)."""
        logits = self.passes.logits(delta)
        self.visit(delta, logits, step)
        return logits

    def visit(self, delta: torch.Tensor, logits: torch.Tensor, step: int) -> torch.Tensor:
        """Note the logits (B, K, *S) of ``x + delta``, the point after ``step`` steps of this restart.

        Returns:
            (B,) bool, whether all logits are finite.
        """
        sane = all_finite(logits)
        damage = torch.where(sane, self.problem.goal.damage(logits, self.problem.target).float(), -torch.inf)
        better = (damage >= self.damage) & (damage > -torch.inf)
        self.delta = torch.where(per_row(better, delta), delta, self.delta)
        self.damage = torch.where(better, damage, self.damage)
        self._by_step[step] = torch.fmax(self._by_step[step], damage)
        return sane

    def count(self, length: torch.Tensor) -> None:
        """Count a gradient pass whose gradients are of size ``length`` (B,), and those that are exactly zero."""
        self._gradients += 1
        self._zero = self._zero + ((length == 0) & ~self.passes.scale.skipped)

    def result(self) -> AttackResult:
        """The best point, projected and measured once more."""
        delta, zero = project(self.delta, self.eps, self.problem.threat.norm), self._zero / max(self._gradients, 1)
        return finish(self.problem, delta, self.damage, zero, self.trace, self.passes.made)
