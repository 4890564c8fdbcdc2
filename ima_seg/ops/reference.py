"""The specification of the ops in plain torch, and what runs where there are no kernels.

Any device, any number of spatial dimensions, no host sync. Sizes, radii and step lengths are per voxel in network units
(see :mod:`ima_seg.types`), one value per sample. Arguments are checked in :mod:`ima_seg.ops`, not here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ima_seg.ops import philox
from ima_seg.types import Norm

#: As in nnU-Net's Dice loss.
SMOOTH = 1e-5


def per_row(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 1, ..., 1) to broadcast over ``like`` (B, C, *S)."""
    return value.view(-1, *(1,) * (like.ndim - 1))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over tensors of ``dtype`` are taken in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def perturbation_size(delta: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Size of each perturbation of ``delta`` (B, C, *S): RMS (l2) or largest absolute value (linf); (B,) float32.

    Squares are summed in float32 whatever the dtype of ``delta``.
    """
    flat = delta.flatten(1).float()
    if norm == "linf":
        return flat.abs().amax(1)
    total: torch.Tensor = torch.linalg.vector_norm(flat, dim=1)
    return total / math.sqrt(flat.shape[1])


def project(delta: torch.Tensor, eps: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Project ``delta`` (B, C, *S) onto the balls of radius ``eps`` (B,), **in place**; returns ``delta``."""
    if norm == "linf":
        radius = per_row(eps, delta)
        return torch.maximum(torch.minimum(delta, radius, out=delta), -radius, out=delta)
    size = perturbation_size(delta, norm)
    shrink = torch.where(size > eps, eps / size, torch.ones_like(size))
    return delta.mul_(per_row(shrink, delta))


def gradient_step(
    delta: torch.Tensor,
    gradient: torch.Tensor,
    alpha: torch.Tensor,
    eps: torch.Tensor,
    norm: Norm,
    mask: torch.Tensor | None,
    image: torch.Tensor | None,
    low: torch.Tensor | None,
    high: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stepped perturbation, and the size of the gradient (B,) float32; see :func:`ima_seg.ops.gradient_step`."""
    if mask is not None:
        gradient = torch.where(mask, gradient, 0.0)
    size = perturbation_size(gradient, norm)
    usable = torch.isfinite(size) & (size > 0)
    if norm == "l2":
        direction = gradient
        scale = torch.where(usable, alpha / size, torch.zeros_like(size))
    else:
        direction = gradient.sign()
        scale = torch.where(usable, alpha, torch.zeros_like(alpha))
    stepped = torch.addcmul(delta, direction.to(delta.dtype), per_row(scale, delta).to(delta.dtype))
    # 0 * NaN is NaN: rows without a usable gradient are restored rather than scaled.
    stepped = project(torch.where(per_row(usable, delta), stepped, delta), eps, norm)
    if image is not None and low is not None and high is not None:
        # A voxel that lies outside the box already is not moved into it, but no further out either.
        least, most = (per_row(low, image) - image).clamp_max(0), (per_row(high, image) - image).clamp_min(0)
        stepped = torch.maximum(torch.minimum(stepped, most.to(delta.dtype)), least.to(delta.dtype))
    return stepped, size


def random_start(
    like: torch.Tensor, radius: torch.Tensor, norm: Norm, seeds: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """See :func:`ima_seg.ops.random_start`."""
    dtype = accumulator(like.dtype)
    size = like[0].numel()
    if norm == "linf":
        noise = (philox.uniform_field(seeds, size, dtype) * 2 - 1).view(like.shape)
        scale = radius
    else:
        noise = philox.normal_field(seeds, size, dtype).view(like.shape)
        scale = radius * philox.shares(seeds, dtype)
    if mask is not None:
        noise = torch.where(mask, noise, 0.0)
    if norm == "l2":
        length = perturbation_size(noise, norm)
        scale = torch.where(length > 0, scale / length, 0.0)
    return noise.mul_(per_row(scale, like)).to(like.dtype)


def interpolate(
    inner: torch.Tensor, outer: torch.Tensor, share: torch.Tensor, norm: Norm
) -> tuple[torch.Tensor, torch.Tensor]:
    """The points between, and their sizes (B,) float32; see :func:`ima_seg.ops.interpolate`."""
    dtype = accumulator(inner.dtype)
    point = torch.lerp(inner.to(dtype), outer.to(dtype), per_row(share, inner).to(dtype))
    return point.to(inner.dtype), perturbation_size(point, norm)


def _known(reference: torch.Tensor, known: torch.Tensor | None) -> torch.Tensor | None:
    """(B, 1, N) bool, the voxels that count; None where all do."""
    return known if reference.dtype == torch.bool else reference != 0


def _truth(flat: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """(B, K, N) bool."""
    if reference.dtype == torch.bool:
        return reference
    classes = torch.arange(1, flat.shape[1] + 1, device=flat.device, dtype=reference.dtype)
    return reference == classes[:, None]


def _classed(flat: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """(B, 1, N) bool, voxels that have a class (multi-class)."""
    return (reference > 0) & (reference <= flat.shape[1])


def dice_ce(
    logits: torch.Tensor, reference: torch.Tensor, known: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss (B,), sums (B, K, 3) of p t, p and t over voxels, and the number of voxels that count (B,), all float32.

    See :func:`ima_seg.ops.dice_ce`.
    """
    flat = logits.flatten(2).to(accumulator(logits.dtype))
    regions = reference.dtype == torch.bool
    truth, counted = _truth(flat, reference).to(flat.dtype), _known(reference, known)
    voxels = torch.full(flat.shape[:1], flat.shape[2], device=flat.device, dtype=flat.dtype)
    if counted is not None:
        voxels = counted.sum((1, 2)).to(flat.dtype)
    if regions:
        entropy = F.softplus(flat) - flat * truth
        if counted is not None:
            entropy = torch.where(counted, entropy, 0.0)
        probabilities = flat.sigmoid()
        cross_entropy = entropy.sum((1, 2)) / flat.shape[1]
    else:
        log_probabilities = F.log_softmax(flat, dim=1)
        # One value per voxel: masking all classes costs CPUs six times as much.
        own = log_probabilities.gather(1, (reference.long() - 1).clamp_(0, flat.shape[1] - 1))
        cross_entropy = -torch.where(_classed(flat, reference), own, 0.0).sum((1, 2))
        probabilities = log_probabilities.exp_()
    if counted is not None:
        probabilities = torch.where(counted, probabilities, 0.0)
    sums = torch.stack([(probabilities * truth).sum(2), probabilities.sum(2), truth.sum(2)], -1)
    overlap, predicted, true = sums[:, 0 if regions else 1 :].unbind(-1)
    dice = (2 * overlap + SMOOTH) / (predicted + true + SMOOTH)
    return cross_entropy / voxels.clamp_min(1) - dice.mean(1), sums, voxels


def dice_ce_backward(
    upstream: torch.Tensor,
    logits: torch.Tensor,
    reference: torch.Tensor,
    known: torch.Tensor | None,
    sums: torch.Tensor,
    voxels: torch.Tensor,
) -> torch.Tensor:
    """Gradient of :func:`dice_ce` with respect to ``logits``, times ``upstream`` (B,); of the dtype of ``logits``."""
    flat = logits.flatten(2).to(accumulator(logits.dtype))
    regions = reference.dtype == torch.bool
    truth, counted = _truth(flat, reference).to(flat.dtype), _known(reference, known)
    overlap, predicted, true = sums.unbind(-1)
    denominator = predicted + true + SMOOTH
    share = upstream[:, None] / (flat.shape[1] if regions else flat.shape[1] - 1)
    # d(-Dice)/dp of a voxel is ``push`` where it is background and ``push - pull`` where it is foreground.
    push = share * (2 * overlap + SMOOTH) / denominator.square()
    pull = share * 2 / denominator
    weight = (upstream / voxels.clamp_min(1))[:, None, None]
    if regions:
        probabilities = flat.sigmoid()
        slope = push[..., None] - pull[..., None] * truth
        gradient = probabilities * (1 - probabilities) * slope + (probabilities - truth) * (weight / flat.shape[1])
    else:
        probabilities = flat.softmax(1)
        push[:, 0], pull[:, 0] = 0, 0
        slope = push[..., None] - pull[..., None] * truth
        gradient = slope.mul_(probabilities)
        gradient.addcmul_(probabilities, gradient.sum(1, keepdim=True), value=-1)
        gradient.addcmul_(probabilities.sub_(truth), _classed(flat, reference) * weight)
    if counted is not None:
        gradient = torch.where(counted, gradient, 0.0)
    return gradient.view(logits.shape).to(logits.dtype)


def hard_counts(
    logits: torch.Tensor, reference: torch.Tensor, known: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Voxels (B, F, 3) int64 that are hit, predicted and true, per foreground class; whether logits are finite (B,).

    See :func:`ima_seg.ops.hard_counts`.
    """
    flat = logits.flatten(2)
    regions = reference.dtype == torch.bool
    counted = _known(reference, known)
    winner = None if regions else _argmax(flat)
    counts = []
    for index in range(0 if regions else 1, flat.shape[1]):
        truth = reference[:, index] if winner is None else reference[:, 0] == index + 1
        predicted = flat[:, index] > 0 if winner is None else winner == index
        if counted is not None:
            predicted = predicted & counted[:, 0]
        counts.append(torch.stack([(predicted & truth).sum(1), predicted.sum(1), truth.sum(1)], -1))
    return torch.stack(counts, 1), torch.isfinite(torch.linalg.vector_norm(flat, math.inf, dim=(1, 2)))


def _argmax(flat: torch.Tensor) -> torch.Tensor:
    """Class with the largest logit, the first of equals, of finite ``flat`` (B, K, N): ``flat.argmax(1)``, (B, N).

    A pass of vectorised comparisons per class; torch's reduction over a strided dimension is ten times slower on CPUs.
    """
    best, winner = flat[:, 0], torch.zeros_like(flat[:, 0], dtype=torch.int64)
    for index in range(1, flat.shape[1]):
        better = flat[:, index] > best
        winner = torch.where(better, index, winner)
        best = torch.where(better, flat[:, index], best)
    return winner
