"""The tensor work of an attack as fused ops: one signature for any number of spatial dimensions, sizes per sample.

:mod:`ima_seg.ops.reference` is their specification, in plain torch, and what runs on CPUs; on CUDA devices Triton
kernels do the same work in as few passes over memory as it allows (:mod:`ima_seg.ops.backend` says which runs). Sums
are taken in float32 whatever the dtype of the tensors, positions are 64-bit, and any memory layout gives the right
result. Sizes, radii and step lengths are per voxel in network units (see :mod:`ima_seg.types`).

All functions raise :class:`~ima_seg.errors.UserError` for tensors that do not fit, by shape, dtype or device; they
never read values, which would wait for the device.
"""

from __future__ import annotations

from typing import get_args

import torch

from ima_seg.errors import UserError
from ima_seg.ops import registered
from ima_seg.ops.backend import Backend, describe_backend, resolve_backend, use_backend
from ima_seg.ops.reference import SMOOTH, per_row, perturbation_size, project
from ima_seg.types import Norm, Target

__all__ = [
    "SMOOTH",
    "Backend",
    "check_device",
    "check_images",
    "check_mask",
    "check_per_sample",
    "describe_backend",
    "dice_ce",
    "draw_seeds",
    "gradient_step",
    "hard_counts",
    "hard_dice",
    "interpolate",
    "mean_dice",
    "per_row",
    "perturbation_size",
    "project",
    "random_start",
    "resolve_backend",
    "use_backend",
]


def gradient_step(
    delta: torch.Tensor,
    gradient: torch.Tensor,
    *,
    alpha: torch.Tensor,
    eps: torch.Tensor,
    norm: Norm,
    mask: torch.Tensor | None = None,
    image: torch.Tensor | None = None,
    box: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of normalised gradient ascent, projected onto the ball.

    ``delta + alpha * g / rms(g)`` for l2, ``delta + alpha * sign(g)`` for linf, projected onto the ``eps``-ball.
    A sample whose gradient is all zero stays where it is; so does one with a NaN or infinite gradient.

    Args:
        delta: perturbations (B, C, *S), floating point.
        gradient: gradient of the loss, of the same shape.
        alpha: step length (B,).
        eps: radius (B,).
        norm: ``"l2"`` or ``"linf"``.
        mask: bool, broadcastable to ``delta``; the gradient counts as zero where it is False.
        image: what is perturbed, of the shape of ``delta``; goes with ``box``.
        box: least and greatest value (B,) of ``image + delta`` in network units. A voxel of ``image`` that lies outside
            is moved no further out. Applied after the projection, which it cannot undo.

    Returns:
        The stepped perturbation, a new tensor, and the size of the gradient, (B,) float32: 0 or not finite where the
        sample stayed.
    """
    _check_norm(norm)
    check_images(delta=delta, gradient=gradient)
    check_per_sample(delta, alpha=alpha, eps=eps)
    check_mask(delta, mask)
    if (image is None) != (box is None):
        raise UserError("a box bounds image + delta; give image and box together, or neither")
    low, high = box or (None, None)
    if image is not None and low is not None and high is not None:
        check_images(delta=delta, image=image)
        check_per_sample(delta, low=low, high=high)
    return registered.gradient_step(delta, gradient, alpha, eps, norm, mask, image, low, high)


def draw_seeds(size: int, device: torch.device, generator: torch.Generator | None = None) -> torch.Tensor:
    """(size,) int64 seeds for :func:`random_start`, one per sample, from ``generator`` (on ``device``)."""
    return torch.randint(2**62, (size,), device=device, generator=generator)


def random_start(
    like: torch.Tensor, radius: torch.Tensor, norm: Norm, seeds: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """A random perturbation of the shape of ``like`` (B, C, *S), each of size at most ``radius`` (B,).

    l2: a Gaussian direction scaled to a size drawn uniformly from [0, radius]. (Uniform in the ball would put all the
    mass on the sphere in thousands of dimensions.) linf: uniform in the box. A sample's perturbation follows from its
    own seed, whatever else is in the batch; the backends agree to rounding.

    Args:
        like: gives shape, dtype and device.
        radius: (B,).
        norm: ``"l2"`` or ``"linf"``.
        seeds: (B,) int64, see :func:`draw_seeds`.
        mask: bool, broadcastable to ``like``; the perturbation is zero where it is False, and of the size that it would
            have without.
    """
    _check_norm(norm)
    check_images(like=like)
    check_per_sample(like, radius=radius)
    check_mask(like, mask)
    if seeds.shape != like.shape[:1] or seeds.dtype != torch.int64 or seeds.device != like.device:
        raise UserError(
            f"seeds are {seeds.dtype} of shape {tuple(seeds.shape)} on {seeds.device}; expected int64 of shape "
            f"{tuple(like.shape[:1])} on {like.device} (see draw_seeds)"
        )
    return registered.random_start(like, radius, norm, seeds, mask)


def interpolate(
    inner: torch.Tensor, outer: torch.Tensor, share: torch.Tensor, norm: Norm
) -> tuple[torch.Tensor, torch.Tensor]:
    """The point (B, C, *S) at ``share`` (B,) of the way from ``inner`` to ``outer``, and its size (B,) float32.

    Both ends are (B, C, *S), of one dtype; ``norm`` is that of the size. One pass does both.
    """
    _check_norm(norm)
    check_images(inner=inner, outer=outer)
    if inner.dtype != outer.dtype:
        raise UserError(f"inner is {inner.dtype}, outer {outer.dtype}; a point between them needs one dtype")
    check_per_sample(inner, share=share)
    return registered.interpolate(inner, outer, share, norm)


def dice_ce(logits: torch.Tensor, target: Target) -> torch.Tensor:
    """Soft Dice loss plus cross-entropy of each sample, the sum that nnU-Net trains with; (B,), differentiable once.

    Multi-class: softmax, cross-entropy, Dice over the foreground classes. Regions: sigmoid, binary cross-entropy, Dice
    over all regions; with regions and an ignore label together nnU-Net sums the cross-entropy over regions, here it is
    the mean as everywhere else. Means are over the voxels that are not ignored; a sample that is ignored throughout
    has no gradient.

    Args:
        logits: full-resolution logits (B, K, *S); computed in float32 whatever their dtype, float64 in float64.
        target: the reference.
    """
    _check_logits(logits, target)
    return registered.dice_ce(logits, target.reference, target.known)[0]


def hard_counts(logits: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """Voxels of the hard prediction and of the reference, per sample and foreground class, from one pass.

    The prediction is the argmax, the first of equals, or sigmoid > 0.5 for regions. Ignored voxels do not count.

    Args:
        logits: (B, K, *S), any floating dtype.
        target: the reference.

    Returns:
        (B, F, 3) int64: voxels in both, in the prediction, in the reference. (B,) bool: all logits are finite.
    """
    _check_logits(logits, target)
    return registered.hard_counts(logits, target.reference, target.known)


def mean_dice(counts: torch.Tensor) -> torch.Tensor:
    """(B,) float32 mean Dice over the classes present in the reference, of ``counts`` (B, F, 3); NaN without any."""
    hits, predicted, true = counts.unbind(-1)
    present = true > 0
    dice = torch.where(present, 2 * hits / (predicted + true).clamp_min(1), 0.0).float()
    classes = present.sum(1)
    return torch.where(classes > 0, dice.sum(1) / classes, torch.nan)


def hard_dice(logits: torch.Tensor, target: Target) -> torch.Tensor:
    """Hard foreground Dice of each sample, (B,) float32; NaN where the reference has no foreground.

    The mean is over the foreground classes (regions) present in the sample's reference; arguments as for
    :func:`hard_counts`.
    """
    return mean_dice(hard_counts(logits, target)[0])


def _check_norm(norm: str) -> None:
    if norm not in get_args(Norm):
        raise UserError(f"norm is {norm!r}; the norms there are: {', '.join(get_args(Norm))}")


def check_images(**images: torch.Tensor) -> None:
    """Refuse images (B, C, *S) that are not floating point, or not of the shape and device of the first."""
    (first_name, first), *others = images.items()
    if first.ndim < 3 or first.numel() == 0 or not first.is_floating_point():
        shape = tuple(first.shape)
        raise UserError(
            f"{first_name} is {first.dtype} of shape {shape}; expected floating point (B, C, *S), not empty"
        )
    for name, image in others:
        if image.shape != first.shape or not image.is_floating_point():
            raise UserError(
                f"{name} is {image.dtype} of shape {tuple(image.shape)}; expected floating point of the shape of "
                f"{first_name}, {tuple(first.shape)}"
            )
        check_device(first, **{name: image})


def check_per_sample(image: torch.Tensor, **values: torch.Tensor) -> None:
    """Refuse values that are not floating point (B,), on the device of ``image`` (B, C, *S)."""
    for name, value in values.items():
        if value.shape != image.shape[:1] or not value.is_floating_point():
            raise UserError(
                f"{name} is {value.dtype} of shape {tuple(value.shape)} for a batch of {image.shape[0]}; expected one "
                "floating-point value per sample"
            )
        check_device(image, **{name: value})


def check_mask(image: torch.Tensor, mask: torch.Tensor | None, name: str = "mask") -> None:
    """Refuse a ``mask`` that is not bool, broadcastable to ``image`` (B, C, *S); None is none."""
    if mask is None:
        return
    fits = mask.ndim == image.ndim and all(a in (1, b) for a, b in zip(mask.shape, image.shape, strict=True))
    if mask.dtype != torch.bool or not fits:
        shape, wanted = tuple(mask.shape), tuple(image.shape)
        raise UserError(f"{name} is {mask.dtype} of shape {shape}; expected bool that broadcasts to {wanted}")
    check_device(image, **{name: mask})


def _check_logits(logits: torch.Tensor, target: Target) -> None:
    batch, _, voxels = target.reference.shape
    fits = logits.ndim >= 3 and logits.is_floating_point() and 0 < logits.numel() == batch * logits.shape[1] * voxels
    if not fits or tuple(logits.shape[:2]) != (batch, target.labels.outputs):
        raise UserError(
            f"logits are {logits.dtype} of shape {tuple(logits.shape)}; the reference expects floating point "
            f"({batch}, {target.labels.outputs}, *S) with {voxels} voxels"
        )
    check_device(logits, reference=target.reference)
    if target.known is not None:
        check_device(logits, known=target.known)


def check_device(first: torch.Tensor, **others: torch.Tensor) -> None:
    """Refuse tensors that are not on the device of the ``first``, a batch."""
    for name, other in others.items():
        if other.device != first.device:
            raise UserError(f"{name} is on {other.device}, the batch on {first.device}; move them to one device")
