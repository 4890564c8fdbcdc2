"""Per-sample attack losses: the loss of one sample never depends on the rest of the batch.

nnU-Net's own 2D training loss couples the samples through batch Dice; an attack on that loss would perturb one patient
to harm another.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ima_seg.errors import UserError
from ima_seg.ops import dice_ce
from ima_seg.types import Target


def dice_ce_loss(logits: torch.Tensor, target: Target) -> torch.Tensor:
    """Soft Dice loss plus cross-entropy of each sample, the sum that nnU-Net trains with; (B,) float32.

    Multi-class: softmax, cross-entropy, Dice over the foreground classes. Regions: sigmoid, binary cross-entropy, Dice
    over all regions; with regions and an ignore label together nnU-Net sums the cross-entropy over regions, here it is
    the mean as everywhere else. Means are over the voxels that are not ignored; a sample that is ignored throughout
    has no gradient.

    Args:
        logits: full-resolution logits (B, K, *S); computed in float32 whatever their dtype, float64 in float64.
        target: the reference.
    """
    return dice_ce(logits, target)


def class_ce_loss(logits: torch.Tensor, target: Target) -> torch.Tensor:
    """Cross-entropy of each image, multi-label the mean binary cross-entropy over labels; (B,) float32.

    Args:
        logits: of a classifier (B, K); computed in float32 whatever their dtype, float64 in float64.
        target: the reference.

    Raises:
        UserError: logits that do not fit the reference.
    """
    logits = class_logits(logits, target)[..., 0]
    if target.labels.regions:
        truth = target.reference[..., 0].to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
    return F.cross_entropy(logits, target.reference[:, 0, 0].long() - 1, reduction="none")


def class_logits(logits: torch.Tensor, target: Target) -> torch.Tensor:
    """``logits`` (B, K) of a classifier as (B, K, 1), float32 or float64.

    Raises:
        UserError: logits that do not fit the reference.
    """
    expected = (len(target.reference), target.labels.outputs)
    if tuple(logits.shape) != expected or not logits.is_floating_point():
        raise UserError(
            f"logits are {logits.dtype} of shape {tuple(logits.shape)}; the reference of a classifier expects floating "
            f"point {expected}"
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32))[..., None]
