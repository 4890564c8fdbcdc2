"""The tensor operations of an attack in plain torch: any device, any number of spatial dimensions, no host sync.

Sizes, radii and step lengths are per voxel in network units (see :mod:`ima_seg.types`), one value per sample.
"""

from __future__ import annotations

import math

import torch

from ima_seg.types import Norm, Target


def per_row(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 1, ..., 1) to broadcast over ``like`` (B, C, *S)."""
    return value.view(-1, *(1,) * (like.ndim - 1))


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
    delta: torch.Tensor, gradient: torch.Tensor, *, alpha: torch.Tensor, eps: torch.Tensor, norm: Norm
) -> torch.Tensor:
    """One step of normalised gradient ascent and projection; a new tensor.

    ``delta + alpha * g / rms(g)`` for l2, ``delta + alpha * sign(g)`` for linf, projected onto the ``eps``-ball.
    A sample whose gradient is all zero stays where it is; so does one with a NaN or infinite gradient.

    Args:
        delta: perturbations (B, C, *S).
        gradient: gradient of the loss, of the same shape.
        alpha: step length (B,).
        eps: radius (B,).
        norm: ``"l2"`` or ``"linf"``.
    """
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
    stepped = torch.where(per_row(usable, delta), stepped, delta)
    return project(stepped, eps, norm)


def random_start(
    like: torch.Tensor, radius: torch.Tensor, norm: Norm, generator: torch.Generator | None = None
) -> torch.Tensor:
    """A random perturbation of the shape of ``like`` (B, C, *S), each of size at most ``radius`` (B,).

    l2: a Gaussian direction scaled to a size drawn uniformly from [0, radius]. (Uniform in the ball would put all the
    mass on the sphere in thousands of dimensions.) linf: uniform in the box.
    """
    noise = torch.empty_like(like)
    if norm == "linf":
        return noise.uniform_(-1.0, 1.0, generator=generator).mul_(per_row(radius, like))
    noise.normal_(generator=generator)
    share = torch.rand(radius.shape, device=radius.device, generator=generator)
    return noise.mul_(per_row(radius * share / perturbation_size(noise, norm), like))


def hard_dice(logits: torch.Tensor, target: Target) -> torch.Tensor:
    """Hard foreground Dice of each sample, (B,) float32; NaN where the reference has no foreground.

    The prediction is the argmax, or sigmoid > 0.5 for regions. The mean is over the foreground classes (regions)
    present in the sample's reference; ignored voxels do not count.

    Args:
        logits: (B, K, *S), any floating dtype.
        target: the reference.
    """
    foreground = target.foreground
    flat = logits.flatten(2)
    first = 0 if target.labels.regions else 1
    winner = None if target.labels.regions else _argmax(flat)
    dice_sum = torch.zeros(logits.shape[0], device=logits.device)
    present_sum = torch.zeros_like(dice_sum)
    for index in range(foreground.shape[1]):
        truth = foreground[:, index]
        predicted = flat[:, index] > 0 if winner is None else winner == index + first
        if target.valid is not None:
            predicted = predicted & target.valid[:, 0]
        hits = (predicted & truth).sum(1)
        reference = truth.sum(1)
        present = reference > 0
        dice_sum += torch.where(present, 2 * hits / (predicted.sum(1) + reference).clamp_min(1), 0.0)
        present_sum += present
    return torch.where(present_sum > 0, dice_sum / present_sum, torch.full_like(dice_sum, float("nan")))


def _argmax(flat: torch.Tensor) -> torch.Tensor:
    """Class with the largest logit, the first of equals, of ``flat`` (B, K, N): ``flat.argmax(1)``, (B, N) int64.

    A pass of vectorised comparisons per class; torch's reduction over a strided dimension is ten times slower on CPUs.
    """
    best, winner = flat[:, 0], torch.zeros_like(flat[:, 0], dtype=torch.int64)
    for index in range(1, flat.shape[1]):
        better = flat[:, index] > best
        winner = torch.where(better, index, winner)
        best = torch.where(better, flat[:, index], best)
    return winner
