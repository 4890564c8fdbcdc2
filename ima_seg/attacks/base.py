"""What all attacks share: the result, the goal of the adversary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ima_seg.attacks.sample_losses import class_ce_loss, class_logits, dice_ce_loss
from ima_seg.ops import hard_counts, mean_dice
from ima_seg.types import PassCount, Target

#: (logits (B, K, *S) or (B, K), target, progress in [0, 1]) -> (B,) float32, to be maximised. ``progress`` is the
#: share of the steps already made, for losses that change on the way.
Loss = Callable[[torch.Tensor, Target, float], torch.Tensor]


def lost_dice(logits: torch.Tensor, target: Target) -> torch.Tensor:
    """1 - hard foreground Dice of each sample, (B,) float32; without foreground the share of voxels that are wrong."""
    counts, _ = hard_counts(logits, target)
    dice = mean_dice(counts)
    decisions = target.reference.shape[2] * (counts.shape[1] if target.labels.regions else 1)
    return torch.where(torch.isnan(dice), counts[..., 1].sum(1) / decisions, 1 - dice)


def wrong(logits: torch.Tensor, target: Target) -> torch.Tensor:
    """Which decisions of a classifier are wrong, (B, 1) bool, multi-label (B, K).

    The prediction is the argmax of the logits (B, K), the first of equals, or sigmoid > 0.5 for labels.
    """
    flat = class_logits(logits, target)[..., 0]
    if target.labels.regions:
        return (flat > 0) != target.reference[..., 0]
    return flat.argmax(1, keepdim=True) != target.reference[..., 0].long() - 1


def harm(logits: torch.Tensor, target: Target) -> torch.Tensor:
    """What each sample lost, (B,) float32: :func:`lost_dice`, of a classifier the share of decisions that are wrong."""
    return wrong(logits, target).float().mean(1) if target.whole_image else lost_dice(logits, target)


@dataclass(frozen=True)
class Goal:
    """What the adversary wants.

    Attributes:
        name: for records and messages.
        loss: what its gradient steps climb.
        damage: (logits, target) -> (B,), how far it got; of all points visited an attack returns that of most damage.
    """

    name: str
    loss: Loss
    damage: Callable[[torch.Tensor, Target], torch.Tensor] = harm


def _untargeted(logits: torch.Tensor, target: Target, progress: float) -> torch.Tensor:
    return class_ce_loss(logits, target) if target.whole_image else dice_ce_loss(logits, target)


#: Nothing but a bad segmentation, or classification: Dice + CE is climbed, of classifiers CE.
UNTARGETED = Goal("dice_ce", _untargeted)


@dataclass(frozen=True)
class AttackResult:
    """What an attack found, per sample of the batch.

    Attributes:
        adversarial: (B, C, *S) of the dtype of the batch: the point of most damage among those visited.
        distance: (B,) size of the perturbation, per voxel in network units.
        damage: (B,) float32 of that point.
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
