"""Projected gradient descent of a fixed budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ima_seg.attacks._gradient import Perturbed, check_batch
from ima_seg.model import frozen
from ima_seg.ops import gradient_step, perturbation_size, random_start
from ima_seg.types import Network, PassCount, Target, ThreatModel


@dataclass(frozen=True)
class PGDResult:
    """Perturbed batch (B, C, *S), perturbation sizes (B,) per voxel in network units, and what it cost."""

    adversarial: torch.Tensor
    distance: torch.Tensor
    passes: PassCount


@torch.no_grad()
def pgd(
    model: Network,
    x: torch.Tensor,
    target: Target,
    *,
    eps: torch.Tensor,
    steps: int,
    step_factor: float = 4.0,
    threat: ThreatModel,
    start: bool = True,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> PGDResult:
    """PGD (Madry et al. 2018) on the per-sample Dice + CE loss; with one step and a random start, FGSM-RS.

    Args:
        model: network (B, C, *S) -> logits; its flags are restored.
        x: batch (B, C, *S) in network units.
        target: reference of the batch.
        eps: budget of each sample, (B,), per voxel in network units.
        steps: number of gradient steps.
        step_factor: each step is ``step_factor * eps / steps`` long.
        threat: norm and perturbable channels.
        start: whether to start at a random point of the ball.
        dtype: autocast dtype of the passes.
        generator: source of the random start.
    """
    check_batch(x, eps)
    batch = Perturbed(model, x, threat, dtype)
    image = threat.perturbable(x)
    delta = random_start(image, eps, threat.norm, generator) if start else torch.zeros_like(image)
    alpha = step_factor * eps / max(steps, 1)
    with frozen(model):
        for _ in range(steps):
            gradient = batch.gradient(*batch.logits_with_graph(delta), target)
            delta = gradient_step(delta, gradient, alpha=alpha, eps=eps, norm=threat.norm)
    return PGDResult(batch.apply(delta), perturbation_size(delta, threat.norm), PassCount(gradients=steps * len(x)))
