"""Per-sample attack losses: the loss of one sample never depends on the rest of the batch.

nnU-Net's own 2D training loss couples the samples through batch Dice; an attack on that loss would perturb one patient
to harm another.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ima_seg.types import Target

#: As in nnU-Net's Dice loss.
SMOOTH = 1e-5


def dice_ce_loss(logits: torch.Tensor, target: Target) -> torch.Tensor:
    """Soft Dice loss plus cross-entropy of each sample, the sum that nnU-Net trains with; (B,) float32.

    Multi-class: softmax, cross-entropy, Dice over the foreground classes. Regions: sigmoid, binary cross-entropy, Dice
    over all regions; with regions and an ignore label together nnU-Net sums the cross-entropy over regions, here it is
    the mean as everywhere else. Means are over the voxels that are not ignored; a sample that is ignored throughout
    has no gradient.

    Args:
        logits: full-resolution logits (B, K, *S); computed in float32 whatever their dtype.
        target: the reference.
    """
    flat = logits.flatten(2).float()
    onehot = target.onehot
    voxels = flat.shape[2] if target.valid is None else target.valid.sum((1, 2)).clamp_min(1)
    if target.labels.regions:
        probabilities = flat.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(flat, onehot.float(), reduction="none")
        if target.valid is not None:
            entropy = entropy * target.valid
            probabilities = probabilities * target.valid
        cross_entropy = entropy.sum((1, 2)) / (voxels * flat.shape[1])
        truth = onehot
    else:
        log_probabilities = F.log_softmax(flat, dim=1)
        cross_entropy = -(log_probabilities * onehot).sum((1, 2)) / voxels
        probabilities = log_probabilities[:, 1:].exp()
        if target.valid is not None:
            probabilities = probabilities * target.valid
        truth = onehot[:, 1:]
    overlap = (probabilities * truth).sum(2)
    dice = (2 * overlap + SMOOTH) / (probabilities.sum(2) + truth.sum(2) + SMOOTH)
    return cross_entropy - dice.mean(1)
