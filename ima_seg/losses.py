"""Per-sample attack losses: the loss of one sample never depends on the rest of the batch.

nnU-Net's own 2D training loss couples the samples through batch Dice; an attack on that loss would perturb one patient
to harm another.
"""

from __future__ import annotations

import torch

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
