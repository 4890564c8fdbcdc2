"""What a boundary search watches: how good the answer to each sample is, as one number."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ima_seg.attacks.goals import wrong
from ima_seg.attacks.losses import class_logits, dice_ce_loss, wrong_side
from ima_seg.attacks.passes import all_finite
from ima_seg.ops import hard_counts, mean_dice
from ima_seg.types import Target

#: (logits (B, K, *S) or (B, K), target) -> the quality (B,) float32, and whether all logits of a sample are finite,
#: (B,) bool.
Quality = Callable[[torch.Tensor, Target], tuple[torch.Tensor, torch.Tensor]]

#: Stands for a loss that is not finite.
HOPELESS = 1e4
#: The lead, in logits, of a wrong answer that is tied with the right one.
TIE = 1e-6


def loss_quality(logits: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """Minus the sample's Dice + CE in excess of its least, which is 0 where all is right; (B,) float32, finite.

    The Dice of ``dice_ce_loss`` is the mean over all foreground classes, of which those that the
    reference lacks have none to gain.
    """
    gained = target.foreground.any(2).float().mean(1)
    return -(dice_ce_loss(logits, target) + gained).nan_to_num(HOPELESS, HOPELESS, HOPELESS), all_finite(logits)


def class_quality(logits: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """By how much a classifier's answer is right: the true class's logit minus the best other; (B,) float32, finite.

    Multi-label: the least of z over the labels there are and -z over the others. Below 0 the answer is wrong. That it
    is continuous, other than right or wrong, is what finds the boundary in a few steps.
    """
    right = -wrong_side(class_logits(logits, target).float(), target).amax((1, 2))
    right = right.nan_to_num(-HOPELESS, HOPELESS, -HOPELESS)
    return torch.where(wrong(logits, target).any(1), right.clamp_max(-TIE), right), all_finite(logits)


def hard_quality(logits: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """Hard foreground Dice, NaN without foreground; of a classifier :func:`class_quality`."""
    if target.whole_image:
        return class_quality(logits, target)
    counts, sane = hard_counts(logits, target)
    return mean_dice(counts), sane
