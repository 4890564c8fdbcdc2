"""What an adversary wants: what its steps climb, and how the damage is measured."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ima_seg.attacks import losses
from ima_seg.attacks.losses import Loss, class_ce_loss, class_logits, dice_ce_loss, flattened
from ima_seg.errors import UserError
from ima_seg.ops import hard_counts, mean_dice
from ima_seg.types import Target

#: Logits by which a targeted attack wants a voxel beyond the decision before it leaves it alone.
CONFIDENCE = 0.5


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

#: The untargeted goals by name; damage is the Dice that is lost, of classifiers the share of decisions that are wrong.
GOALS: dict[str, Goal] = {UNTARGETED.name: UNTARGETED} | {
    name: Goal(name, getattr(losses, name))
    for name in ("ce", "margin", "segpgd", "cospgd", "masked_ce", "balanced_ce", "js")
}


@dataclass(frozen=True)
class _Class:
    """A class, by its index into the foreground channels, that is to appear or to disappear.

    A class rather than closures, so that goals can be sent to other processes.
    """

    index: int
    appears: bool

    def _place(self, logits: torch.Tensor, target: Target) -> tuple[int, torch.Tensor]:
        """Its output channel, and the valid voxels that are not of the class, or those that are, (B, N) bool."""
        if target.whole_image:
            raise UserError("classes that disappear or appear are those of a segmentation; the network is a classifier")
        channel = self.index + (0 if target.labels.regions else 1)
        if self.index < 0 or channel >= logits.shape[1]:
            raise UserError(
                f"class_index is {self.index}; the network has {target.foreground.shape[1]} foreground classes"
            )
        inside = target.onehot[:, channel]
        if not self.appears:
            return channel, inside
        return channel, ~inside if target.valid is None else ~inside & target.valid[:, 0]

    def loss(self, logits: torch.Tensor, target: Target, progress: float) -> torch.Tensor:
        """See :func:`appear` and :func:`disappear`."""
        channel, voxels = self._place(logits, target)
        flat = flattened(logits)
        ahead = flat[:, channel]
        if not target.labels.regions:
            # A pass of maxima per class: torch's reduction over a strided dimension is slow on CPUs.
            ahead = ahead - functools.reduce(
                torch.maximum, [flat[:, index] for index in range(flat.shape[1]) if index != channel]
            )
        climbed = ahead.sigmoid() if self.appears else (-ahead).clamp_max(CONFIDENCE)
        # By the number of all voxels: by that of a small class, its gradients would overflow float16.
        return climbed.masked_fill(~voxels, 0.0).sum(1) / flat.shape[2]

    def damage(self, logits: torch.Tensor, target: Target) -> torch.Tensor:
        """Share of the voxels where it is predicted, or no longer; of equal logits the first class wins."""
        channel, voxels = self._place(logits, target)
        flat = logits.flatten(2)
        predicted = flat[:, channel] > 0 if target.labels.regions else flat.argmax(1) == channel
        return ((predicted == self.appears) & voxels).sum(1) / voxels.sum(1).clamp_min(1)


def disappear(class_index: int) -> Goal:
    """The class vanishes where the reference has it.

    Climbs, over the reference's voxels of the class, min(max_{i != c} z_i - z_c, 0.5), for regions min(-z_c, 0.5):
    beyond the decision by half a logit a voxel has no gradient, and all effort goes to the others. Damage: share of the
    reference's voxels of the class that are not predicted as it; 0 where the reference has none.

    Args:
        class_index: index into the foreground channels, ``target.foreground``.
    """
    wish = _Class(class_index, appears=False)
    return Goal(f"disappear:{class_index}", wish.loss, wish.damage)


def appear(class_index: int) -> Goal:
    """The class shows where the reference does not have it.

    Climbs, over the valid voxels that are not of the class, sigmoid(z_c - max_{i != c} z_i), for regions sigmoid(z_c):
    nearly all of them lie far from the decision, and without the sigmoid the budget would go to voxels that never flip.
    Damage: share of those voxels that are predicted as the class; 0 where there are none.

    Args:
        class_index: index into the foreground channels, ``target.foreground``.
    """
    wish = _Class(class_index, appears=True)
    return Goal(f"appear:{class_index}", wish.loss, wish.damage)
