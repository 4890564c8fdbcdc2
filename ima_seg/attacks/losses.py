"""What an attack may climb: losses per sample, of which none depends on the rest of the batch.

nnU-Net's own 2D training loss couples the samples through batch Dice; an attack on that loss would perturb one patient
to harm another.

A loss maps (logits (B, K, *S), target, progress in [0, 1]) to (B,) float32. The network makes *decisions*: one class
per voxel, or with regions one yes or no per voxel and region; an image that a classifier judges (B, K) is one voxel.
Where a formula says p_y, that is the probability of the reference's answer to a decision: softmax(z)_y, or sigmoid(z)
where the region is and 1 - sigmoid(z) where it is not. CE is -log p_y. Means are over the decisions of a sample;
ignored voxels, and voxels whose label is no class, are none. Differences of logits are in logits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F

from ima_seg.errors import UserError
from ima_seg.ops import dice_ce
from ima_seg.types import Target

#: (logits (B, K, *S) or (B, K), target, progress in [0, 1]) -> (B,) float32, to be maximised. ``progress`` is the
#: share of the steps already made, for losses that change on the way.
Loss = Callable[[torch.Tensor, Target, float], torch.Tensor]


#: nnU-Net's loss of each sample, as a function of logits and target alone.
dice_ce_loss = dice_ce


def class_ce_loss(logits: torch.Tensor, target: Target) -> torch.Tensor:
    """Cross-entropy of each image, multi-label the mean binary cross-entropy over labels; (B,).

    Of a classifier's ``logits`` (B, K); refuses and computes as :func:`class_logits`.
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


def flattened(logits: torch.Tensor) -> torch.Tensor:
    """Logits (B, K, *S), or of a classifier (B, K), as (B, K, N) float32."""
    return logits[..., None].flatten(2).float()


def wrong_side(flat: torch.Tensor, target: Target) -> torch.Tensor:
    """How far each decision of logits (B, K, N) is on the wrong side, (B, D, N): positive where it is wrong.

    Best other logit minus the reference's; regions: -z in the region, z outside.
    """
    if target.labels.regions:
        return torch.where(target.onehot, -flat, flat)
    others = flat.masked_fill(target.onehot, -torch.inf).amax(1, keepdim=True)
    return others - flat.masked_fill(~target.onehot, 0.0).sum(1, keepdim=True)


class Decisions:
    """The decisions of a batch; D is 1 for classes and K for regions.

    Attributes:
        logits: (B, K, N) float32.
        target: the reference.
        counted: (B, D, N) bool, the decisions there are.
    """

    def __init__(self, logits: torch.Tensor, target: Target) -> None:
        self.logits, self.target = flattened(logits), target
        if not target.labels.regions:
            self.counted = target.onehot.any(1, keepdim=True)
        elif target.valid is None:
            self.counted = torch.ones_like(target.onehot)
        else:
            self.counted = target.valid.expand_as(target.onehot)

    @cached_property
    def ce(self) -> torch.Tensor:
        """-log p_y, (B, D, N); 0 where nothing is decided."""
        z, onehot = self.logits, self.target.onehot
        if self.target.labels.regions:
            return -F.logsigmoid(torch.where(onehot, z, -z)).masked_fill(~self.counted, 0.0)
        return -F.log_softmax(z, dim=1).masked_fill(~onehot, 0.0).sum(1, keepdim=True)

    @property
    def wrong(self) -> torch.Tensor:
        """(B, D, N) bool."""
        return wrong_side(self.logits.detach(), self.target) > 0

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the decisions of ``values`` (B, D, N), which may hold anything where nothing is decided; (B,)."""
        return values.masked_fill(~self.counted, 0.0).sum((1, 2)) / self.counted.sum((1, 2)).clamp_min(1)


def _mean(each: Callable[[Decisions, float], torch.Tensor]) -> Loss:
    """The loss that is the mean of what ``each`` returns for the decisions, (B, D, N)."""

    @functools.wraps(each)
    def loss(logits: torch.Tensor, target: Target, progress: float) -> torch.Tensor:
        decisions = Decisions(logits, target)
        return decisions.mean(each(decisions, progress))

    return loss


@_mean
def ce(decisions: Decisions, progress: float) -> torch.Tensor:
    """Cross-entropy, mean of -log p_y (Goodfellow et al. 2015, Madry et al. 2018)."""
    return decisions.ce


@_mean
def margin(decisions: Decisions, progress: float) -> torch.Tensor:
    """Mean of max_{i != y} z_i - z_y, regions -z or z (Carlini & Wagner, "Towards evaluating the robustness of neural
    networks", S&P 2017, arXiv 1608.04644). Unbounded, it does not saturate as the softmax does.
    """
    return wrong_side(decisions.logits, decisions.target)


@_mean
def segpgd(decisions: Decisions, progress: float) -> torch.Tensor:
    """Mean of (1 - λ) CE where the decision is right and λ CE where it is wrong, λ = progress / 2.

    Gu et al., "SegPGD: An effective and efficient adversarial attack for evaluating and boosting segmentation
    robustness", ECCV 2022, arXiv 2207.12391: step t of T has λ = (t - 1) / 2T.
    """
    share = progress / 2
    return decisions.ce * torch.where(decisions.wrong, share, 1 - share)


@_mean
def cospgd(decisions: Decisions, progress: float) -> torch.Tensor:
    """Mean of cos(p, onehot(y)) CE, the cosine a weight without gradient, as in the authors' implementation.

    cos = p_y / ||p||_2 over the classes; for a region over its two answers, (p, 1 - p) against (1, 0) or (0, 1).
    Agnihotri, Jung & Keuper, "CosPGD: an efficient white-box adversarial attack for pixel-wise prediction tasks",
    ICML 2024, arXiv 2302.02213.
    """
    probability = (-decisions.ce).detach().exp()
    if decisions.target.labels.regions:
        length = (probability.square() + (1 - probability).square()).sqrt()
    else:
        length = torch.linalg.vector_norm(decisions.logits.detach().softmax(1), dim=1, keepdim=True)
    return decisions.ce * (probability / length)


@_mean
def masked_ce(decisions: Decisions, progress: float) -> torch.Tensor:
    """Cross-entropy of the decisions that are still right, divided by the number of all.

    Croce, Singh & Hein 2024 (SEA), arXiv 2306.12941. It falls as decisions turn wrong.
    """
    return decisions.ce.masked_fill(decisions.wrong, 0.0)


@_mean
def balanced_ce(decisions: Decisions, progress: float) -> torch.Tensor:
    """Mean of w_y CE, w_y inverse to how often the class y is in the sample's reference, 1 for the rarest present.

    Every class present then counts the same (Croce, Singh & Hein 2024 (SEA), arXiv 2306.12941). With regions the two
    answers of each region are two classes. The scale keeps the gradients within float16 however rare a class is.
    """
    onehot, counted, regions = decisions.target.onehot, decisions.counted, decisions.target.labels.regions
    # (B, 2 answers or 1, K, N)
    membership = torch.stack([onehot & counted, ~onehot & counted] if regions else [onehot], 1)
    voxels = membership.sum(3).float()
    rarest = torch.where(voxels > 0, voxels, torch.inf).amin((1, 2), keepdim=True)
    weights = torch.where(voxels > 0, rarest / voxels, 0.0)[..., None] * membership
    # Of the classes of a decision just one applies. Classes share a decision, a region has one of its own.
    return decisions.ce * weights.sum(1 if regions else 2)


@_mean
def js(decisions: Decisions, progress: float) -> torch.Tensor:
    """Mean Jensen-Shannon divergence of p and onehot(y): (KL(p, m) + KL(onehot, m)) / 2, m their mean; in nats.

    Only p_y matters: log 2 + (p_y log p_y - (1 + p_y) log(1 + p_y)) / 2. Its gradient fades on decisions that are
    wrong already (Croce, Singh & Hein 2024 (SEA), arXiv 2306.12941).
    """
    log_probability = -decisions.ce
    probability = log_probability.exp()
    return math.log(2) + (probability * log_probability - (1 + probability) * torch.log1p(probability)) / 2


def divergence(logits: torch.Tensor, target: Target, progress: float = 0.0, *, clean: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of the predictions p of ``clean`` and q of ``logits``, mean over voxels (B,), in nats.

    Regions, or labels of an image: of their yes and no, mean over voxels and regions. Ignored voxels do not count.

    Args:
        logits: (B, K, *S), of a classifier (B, K).
        target: tells regions from classes, and which voxels are ignored.
        progress: not used.
        clean: of the same shape.
    """
    flat, reference = (part.float().reshape(*part.shape[:2], -1) for part in (logits, clean))
    if target.labels.regions:
        p = reference.sigmoid()
        each = p * (F.logsigmoid(reference) - F.logsigmoid(flat))
        each = each + (1 - p) * (F.logsigmoid(-reference) - F.logsigmoid(-flat))
    else:
        log_p = reference.log_softmax(1)
        each = (log_p.exp() * (log_p - flat.log_softmax(1))).sum(1, keepdim=True)
    if target.valid is None:
        return each.mean((1, 2))
    counted = target.valid.expand_as(each)
    return each.masked_fill(~counted, 0.0).sum((1, 2)) / counted.sum((1, 2)).clamp_min(1)
