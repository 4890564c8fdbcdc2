"""What an attack may climb: per-sample losses and the goals made of them.

A loss maps (logits (B, K, *S), target, progress in [0, 1]) to (B,) float32. The network makes *decisions*: one class
per voxel, or with regions one yes or no per voxel and region; an image that a classifier judges (B, K) is one voxel.
Where a formula says p_y, that is the probability of the reference's answer to a decision: softmax(z)_y, or sigmoid(z)
where the region is and 1 - sigmoid(z) where it is not. Means are over the decisions of a sample; ignored voxels, and
voxels whose label is no class, are none. Differences of logits are in logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from ima_seg.attacks.base import UNTARGETED, Goal, Loss
from ima_seg.errors import UserError
from ima_seg.types import Target

#: Soft Dice loss plus cross-entropy, see ``dice_ce_loss``; of classifiers cross-entropy.
dice_ce = UNTARGETED.loss

#: Logits by which a targeted attack wants a voxel beyond the decision before it leaves it alone.
CONFIDENCE = 0.5


@dataclass(frozen=True)
class _Decisions:
    """The decisions of a batch; D is 1 for classes and K for regions.

    Attributes:
        log_probability: (B, D, N) float32, log p_y; 0 where nothing is decided.
        counted: (B, D, N) bool, the decisions there are.
        total: (B,) their number, at least 1.
    """

    log_probability: torch.Tensor
    counted: torch.Tensor
    total: torch.Tensor

    @classmethod
    def of(cls, flat: torch.Tensor, target: Target) -> _Decisions:
        """From logits (B, K, N)."""
        counted = _counted(target)
        if target.labels.regions:
            log_probability = F.logsigmoid(torch.where(target.onehot, flat, -flat)).masked_fill(~counted, 0.0)
        else:
            log_probability = F.log_softmax(flat, dim=1).masked_fill(~target.onehot, 0.0).sum(1, keepdim=True)
        return cls(log_probability, counted, counted.sum((1, 2)).clamp_min(1))

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the decisions of ``values`` (B, D, N), which may hold anything where nothing is decided; (B,)."""
        return values.masked_fill(~self.counted, 0.0).sum((1, 2)) / self.total


def _counted(target: Target) -> torch.Tensor:
    """(B, D, N) bool: which decisions there are."""
    if not target.labels.regions:
        return target.onehot.any(1, keepdim=True)
    if target.valid is None:
        return torch.ones_like(target.onehot)
    return target.valid.expand_as(target.onehot)


def wrong_side(flat: torch.Tensor, target: Target) -> torch.Tensor:
    """How far each decision is on the wrong side, (B, D, N): positive where it is wrong.

    Best other logit minus the reference's; regions: -z in the region, z outside.
    """
    if target.labels.regions:
        return torch.where(target.onehot, -flat, flat)
    others = flat.masked_fill(target.onehot, -torch.inf).amax(1, keepdim=True)
    return others - flat.masked_fill(~target.onehot, 0.0).sum(1, keepdim=True)


def _flat(logits: torch.Tensor) -> torch.Tensor:
    return logits[..., None].flatten(2).float()  # of classifiers one voxel


def ce(logits: torch.Tensor, target: Target, progress: float) -> torch.Tensor:
    """Cross-entropy, mean of -log p_y (Goodfellow et al. 2015, Madry et al. 2018)."""
    decisions = _Decisions.of(_flat(logits), target)
    return decisions.mean(-decisions.log_probability)


def margin(logits: torch.Tensor, target: Target, progress: float) -> torch.Tensor:
    """Mean of max_{i != y} z_i - z_y, regions -z or z (Carlini & Wagner, "Towards evaluating the robustness of neural
    networks", S&P 2017, arXiv 1608.04644). Unbounded, it does not saturate as the softmax does.
    """
    flat = _flat(logits)
    return _Decisions.of(flat, target).mean(wrong_side(flat, target))


def dlr(logits: torch.Tensor, target: Target, progress: float) -> torch.Tensor:
    """Difference of logits ratio, mean of (max_{i != y} z_i - z_y) / (z_(1) - z_(3)), z_(j) the j-th largest.

    The margin without its scale (Croce & Hein 2020, arXiv 2003.01690, eq. 6). Two classes and regions have no third
    logit; there it is the margin.
    """
    flat = _flat(logits)
    lead = wrong_side(flat, target)
    if not target.labels.regions and flat.shape[1] > 2:
        top = flat.topk(3, dim=1).values
        lead = lead / (top[:, :1] - top[:, 2:] + 1e-12)
    return _Decisions.of(flat, target).mean(lead)


def segpgd(logits: torch.Tensor, target: Target, progress: float) -> torch.Tensor:
    """Mean of (1 - λ) CE where the decision is right and λ CE where it is wrong, λ = progress / 2.

    Gu et al., "SegPGD: An effective and efficient adversarial attack for evaluating and boosting segmentation
    robustness", ECCV 2022, arXiv 2207.12391: step t of T has λ = (t - 1) / 2T.
    """
    flat = _flat(logits)
    decisions = _Decisions.of(flat, target)
    wrong = wrong_side(flat.detach(), target) > 0
    share = progress / 2
    return decisions.mean(-decisions.log_probability * torch.where(wrong, share, 1 - share))


def cospgd(logits: torch.Tensor, target: Target, progress: float) -> torch.Tensor:
    """Mean of cos(p, onehot(y)) CE, the cosine a weight without gradient, as in the authors' implementation.

    cos = p_y / ||p||_2 over the classes; for a region over its two answers, (p, 1 - p) against (1, 0) or (0, 1).
    Agnihotri, Jung & Keuper, "CosPGD: an efficient white-box adversarial attack for pixel-wise prediction tasks",
    ICML 2024, arXiv 2302.02213.
    """
    flat = _flat(logits)
    decisions = _Decisions.of(flat, target)
    probability = decisions.log_probability.detach().exp()
    if target.labels.regions:
        length = (probability.square() + (1 - probability).square()).sqrt()
    else:
        length = torch.linalg.vector_norm(flat.detach().softmax(1), dim=1, keepdim=True)
    return decisions.mean(-decisions.log_probability * (probability / length))


def masked_ce(logits: torch.Tensor, target: Target, progress: float) -> torch.Tensor:
    """Cross-entropy of the decisions that are still right, divided by the number of all.

    Croce, Singh & Hein 2024 (SEA), arXiv 2306.12941. It falls as decisions turn wrong.
    """
    flat = _flat(logits)
    decisions = _Decisions.of(flat, target)
    wrong = wrong_side(flat.detach(), target) > 0
    return decisions.mean(-decisions.log_probability.masked_fill(wrong, 0.0))


def balanced_ce(logits: torch.Tensor, target: Target, progress: float) -> torch.Tensor:
    """Mean of w_y CE, w_y inverse to how often the class y is in the sample's reference, 1 for the rarest present.

    Every class present then counts the same (Croce, Singh & Hein 2024 (SEA), arXiv 2306.12941). With regions the two
    answers of each region are two classes. The scale keeps the gradients within float16 however rare a class is.
    """
    decisions = _Decisions.of(_flat(logits), target)
    counted = decisions.counted
    sides = [target.onehot & counted, ~target.onehot & counted] if target.labels.regions else [target.onehot]
    membership = torch.stack(sides, 1)  # (B, 2 answers or 1, K, N)
    voxels = membership.sum(3).float()
    rarest = torch.where(voxels > 0, voxels, torch.inf).amin((1, 2), keepdim=True)
    weights = torch.where(voxels > 0, rarest / voxels, 0.0)[..., None] * membership
    # Of the classes of a decision just one applies. Classes share a decision, a region has one of its own.
    weight = weights.sum(1) if target.labels.regions else weights.sum(2)
    return decisions.mean(-decisions.log_probability * weight)


def js(logits: torch.Tensor, target: Target, progress: float) -> torch.Tensor:
    """Mean Jensen-Shannon divergence of p and onehot(y): (KL(p, m) + KL(onehot, m)) / 2, m their mean; in nats.

    Only p_y matters: log 2 + (p_y log p_y - (1 + p_y) log(1 + p_y)) / 2. Its gradient fades on decisions that are
    wrong already (Croce, Singh & Hein 2024 (SEA), arXiv 2306.12941).
    """
    decisions = _Decisions.of(_flat(logits), target)
    log_probability = decisions.log_probability
    probability = log_probability.exp()
    return decisions.mean(
        math.log(2) + (probability * log_probability - (1 + probability) * torch.log1p(probability)) / 2
    )


def _channel(logits: torch.Tensor, target: Target, class_index: int) -> int:
    """Output channel of a foreground class."""
    if target.whole_image:
        raise UserError("classes that disappear or appear are those of a segmentation; the network is a classifier")
    channel = class_index + (0 if target.labels.regions else 1)
    if class_index < 0 or channel >= logits.shape[1]:
        raise UserError(
            f"class_index is {class_index}; the network has {target.foreground.shape[1]} foreground classes"
        )
    return channel


def _ahead(flat: torch.Tensor, target: Target, channel: int) -> torch.Tensor:
    """(B, N): how far the class of ``channel`` is ahead of the best other; for regions its logit."""
    if target.labels.regions:
        return flat[:, channel]
    # A pass of maxima per class: torch's reduction over a strided dimension is slow on CPUs.
    others = [flat[:, index] for index in range(flat.shape[1]) if index != channel]
    best = others[0]
    for other in others[1:]:
        best = torch.maximum(best, other)
    return flat[:, channel] - best


def _predicted(logits: torch.Tensor, target: Target, channel: int) -> torch.Tensor:
    """(B, N) bool: where the class of ``channel`` is predicted; of equal logits the first class wins."""
    flat = logits.flatten(2)
    if target.labels.regions:
        return flat[:, channel] > 0
    predicted = torch.ones_like(flat[:, 0], dtype=torch.bool)
    for index in range(flat.shape[1]):
        if index != channel:
            rival = flat[:, index]
            predicted &= flat[:, channel] > rival if index < channel else flat[:, channel] >= rival
    return predicted


def _inside(target: Target, channel: int) -> torch.Tensor:
    """(B, N) bool: the reference's voxels of the class; none is ignored."""
    return target.onehot[:, channel]


def _outside(target: Target, channel: int) -> torch.Tensor:
    """(B, N) bool: the valid voxels that are not of the class."""
    elsewhere = ~target.onehot[:, channel]
    return elsewhere if target.valid is None else elsewhere & target.valid[:, 0]


_Where = Callable[[Target, int], torch.Tensor]


def _targeted_loss(
    logits: torch.Tensor, target: Target, progress: float, *, where: _Where, class_index: int, sign: int
) -> torch.Tensor:
    flat = _flat(logits)
    channel = _channel(logits, target, class_index)
    ahead = sign * _ahead(flat, target, channel)
    climbed = ahead.sigmoid() if sign > 0 else ahead.clamp_max(CONFIDENCE)
    # By the number of all voxels: by that of a small class, its gradients would overflow float16.
    return climbed.masked_fill(~where(target, channel), 0.0).sum(1) / flat.shape[2]


def _share_predicted(
    logits: torch.Tensor, target: Target, *, where: _Where, class_index: int, predicted: bool
) -> torch.Tensor:
    channel = _channel(logits, target, class_index)
    voxels = where(target, channel)
    hits = (_predicted(logits, target, channel) == predicted) & voxels
    return hits.sum(1) / voxels.sum(1).clamp_min(1)


def _targeted(name: str, class_index: int, where: _Where, sign: int) -> Goal:
    # Partial functions of the module rather than closures, so that goals can be sent to other processes.
    return Goal(
        f"{name}:{class_index}",
        partial(_targeted_loss, where=where, class_index=class_index, sign=sign),
        partial(_share_predicted, where=where, class_index=class_index, predicted=sign > 0),
    )


def disappear(class_index: int) -> Goal:
    """The class vanishes where the reference has it.

    Climbs, over the reference's voxels of the class, min(max_{i != c} z_i - z_c, 0.5), for regions min(-z_c, 0.5):
    beyond the decision by half a logit a voxel has no gradient, and all effort goes to the others. Damage: share of the
    reference's voxels of the class that are not predicted as it; 0 where the reference has none.

    Args:
        class_index: index into the foreground channels, ``target.foreground``.
    """
    return _targeted("disappear", class_index, _inside, -1)


def appear(class_index: int) -> Goal:
    """The class shows where the reference does not have it.

    Climbs, over the valid voxels that are not of the class, sigmoid(z_c - max_{i != c} z_i), for regions sigmoid(z_c):
    nearly all of them lie far from the decision, and without the sigmoid the budget would go to voxels that never flip.
    Damage: share of those voxels that are predicted as the class; 0 where there are none.

    Args:
        class_index: index into the foreground channels, ``target.foreground``.
    """
    return _targeted("appear", class_index, _outside, +1)


_LOSSES: dict[str, Loss] = {
    "ce": ce,
    "margin": margin,
    "dlr": dlr,
    "segpgd": segpgd,
    "cospgd": cospgd,
    "masked_ce": masked_ce,
    "balanced_ce": balanced_ce,
    "js": js,
}

#: The untargeted goals by name; damage is the Dice that is lost, of classifiers the share of decisions that are wrong.
GOALS: dict[str, Goal] = {UNTARGETED.name: UNTARGETED} | {name: Goal(name, loss) for name, loss in _LOSSES.items()}
