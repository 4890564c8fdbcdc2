"""Random perturbations of a given size: the weakest adversary, and the floor that every attack must beat."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ima_seg.attacks.base import UNTARGETED, AttackResult, Goal
from ima_seg.attacks.network import Precision, frozen
from ima_seg.attacks.passes import Best, Perturbed, check_batch, check_counts
from ima_seg.ops import per_row, perturbation_size
from ima_seg.types import Network, Norm, Target, ThreatModel


def scaled_to(delta: torch.Tensor, eps: torch.Tensor, norm: Norm) -> torch.Tensor:
    """``delta`` (B, C, *S) scaled to the sizes ``eps`` (B,); a sample that is zero throughout stays zero."""
    size = perturbation_size(delta, norm)
    return delta * per_row(torch.where(size > 0, eps / size, 0.0), delta).to(delta.dtype)


@torch.no_grad()
def gaussian_noise(
    model: Network,
    x: torch.Tensor,
    target: Target,
    *,
    eps: torch.Tensor,
    threat: ThreatModel,
    restarts: int = 1,
    goal: Goal = UNTARGETED,
    support: torch.Tensor | None = None,
    precision: Precision = "auto",
    generator: torch.Generator | None = None,
) -> AttackResult:
    """White Gaussian noise scaled to exactly ``eps``: its RMS (l2) or its largest value (linf).

    Args:
        model: network (B, C, *S) -> logits; its flags are restored.
        x: batch (B, C, *S) in network units.
        target: reference of the batch.
        eps: size of the noise of each sample, (B,), per voxel in network units.
        threat: norm and perturbable channels.
        restarts: how many draws; the one of most damage is kept. The clean image is not among them: noise that does
            good is a finding too. The trace has a row for each draw.
        goal: what counts as damage.
        support: bool, broadcastable to the perturbable channels; the noise is zero outside and scaled after masking.
        precision: of the passes, see :func:`ima_seg.attacks.network.resolve_precision`.
        generator: source of the noise, on the device of ``x``.
    """

    def draw(batch: Perturbed) -> torch.Tensor:
        noise = batch.supported(batch.zero().normal_(generator=generator))
        return scaled_to(noise, eps, threat.norm)

    return _worst_of(draw, Perturbed(model, x, threat, precision, goal.loss, support), target, eps, restarts, goal)


@torch.no_grad()
def uniform_noise(
    model: Network,
    x: torch.Tensor,
    target: Target,
    *,
    eps: torch.Tensor,
    threat: ThreatModel,
    restarts: int = 1,
    goal: Goal = UNTARGETED,
    support: torch.Tensor | None = None,
    precision: Precision = "auto",
    generator: torch.Generator | None = None,
) -> AttackResult:
    """Uniform white noise: scaled to the RMS ``eps`` (l2), or drawn from the box [-eps, eps] (linf).

    Arguments as for :func:`gaussian_noise`.
    """

    def draw(batch: Perturbed) -> torch.Tensor:
        noise = batch.supported(batch.zero().uniform_(-1.0, 1.0, generator=generator))
        return scaled_to(noise, eps, "l2") if threat.norm == "l2" else noise * per_row(eps, noise).to(noise.dtype)

    return _worst_of(draw, Perturbed(model, x, threat, precision, goal.loss, support), target, eps, restarts, goal)


def _worst_of(
    draw: Callable[[Perturbed], torch.Tensor],
    batch: Perturbed,
    target: Target,
    eps: torch.Tensor,
    restarts: int,
    goal: Goal,
) -> AttackResult:
    check_batch(batch.x, eps, target)
    check_counts(1, restarts)
    best = Best(batch, target, goal, eps, restarts - 1)
    forwards = 0
    with frozen(batch.model):
        for step in range(restarts):
            delta = draw(batch)
            best.visit(delta, batch.logits(delta), step)
            forwards += len(delta)
    return best.result(forwards)
