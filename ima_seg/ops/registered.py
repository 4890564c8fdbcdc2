"""The ops as operators of torch (``torch.ops.ima_seg``), so that torch.compile takes them as they are.

Each runs the reference or the Triton kernel, whichever :mod:`ima_seg.ops.backend` chooses for its device and dtype.
"""

from __future__ import annotations

from typing import Any

import torch

from ima_seg.ops import reference as plain
from ima_seg.ops.backend import requested_backend, resolve_backend, use_backend

Tensor = torch.Tensor


def _implementation(image: Tensor) -> Any:
    if resolve_backend(image.device, image.dtype) == "triton":
        from ima_seg.ops import kernels

        return kernels
    return plain


def _laid_out(result: Tensor, like: Tensor) -> Tensor:
    """``result`` in the dtype and layout of ``torch.empty_like(like)``, which torch.compile was promised."""
    expected = torch.empty_like(like, device="meta")
    fits = result.dtype == expected.dtype and result.stride() == expected.stride()
    return result if fits else torch.empty_like(like).copy_(result)


def _per_sample(image: Tensor) -> Tensor:
    return image.new_empty(image.shape[0], dtype=torch.float32)


@torch.library.custom_op("ima_seg::gradient_step", mutates_args=())
def gradient_step(
    delta: Tensor,
    gradient: Tensor,
    alpha: Tensor,
    eps: Tensor,
    norm: str,
    mask: Tensor | None,
    image: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`ima_seg.ops.gradient_step`."""
    stepped, size = _implementation(delta).gradient_step(delta, gradient, alpha, eps, norm, mask, image, low, high)
    return _laid_out(stepped, delta), size


@gradient_step.register_fake
def _(delta: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(delta), _per_sample(delta)


@torch.library.custom_op("ima_seg::random_start", mutates_args=())
def random_start(like: Tensor, radius: Tensor, norm: str, seeds: Tensor, mask: Tensor | None) -> Tensor:
    """See :func:`ima_seg.ops.random_start`."""
    return _laid_out(_implementation(like).random_start(like, radius, norm, seeds, mask), like)


@random_start.register_fake
def _(like: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(like)


@torch.library.custom_op("ima_seg::interpolate", mutates_args=())
def interpolate(inner: Tensor, outer: Tensor, share: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """See :func:`ima_seg.ops.interpolate`."""
    point, size = _implementation(inner).interpolate(inner, outer, share, norm)
    return _laid_out(point, inner), size


@interpolate.register_fake
def _(inner: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(inner), _per_sample(inner)


@torch.library.custom_op("ima_seg::hard_counts", mutates_args=())
def hard_counts(logits: Tensor, reference: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor]:
    """See :func:`ima_seg.ops.hard_counts`."""
    result: tuple[Tensor, Tensor] = _implementation(logits).hard_counts(logits, reference, known)
    return result


@hard_counts.register_fake
def _(logits: Tensor, reference: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, outputs = logits.shape[:2]
    classes = outputs if reference.dtype == torch.bool else outputs - 1
    return logits.new_empty((batch, classes, 3), dtype=torch.int64), logits.new_empty(batch, dtype=torch.bool)


@torch.library.custom_op("ima_seg::dice_ce", mutates_args=())
def dice_ce(logits: Tensor, reference: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`ima_seg.ops.dice_ce`."""
    result: tuple[Tensor, Tensor, Tensor] = _implementation(logits).dice_ce(logits, reference, known)
    return result


@dice_ce.register_fake
def _(logits: Tensor, reference: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    batch, outputs = logits.shape[:2]
    empty = logits.new_empty(batch, dtype=plain.accumulator(logits.dtype))
    return empty, empty.new_empty((batch, outputs, 3)), empty.new_empty(batch)


@torch.library.custom_op("ima_seg::dice_ce_backward", mutates_args=())
def dice_ce_backward(
    upstream: Tensor, logits: Tensor, reference: Tensor, known: Tensor | None, sums: Tensor, voxels: Tensor
) -> Tensor:
    """Gradient of the loss with respect to the logits."""
    gradient = _implementation(logits).dice_ce_backward(upstream, logits, reference, known, sums, voxels)
    return _laid_out(gradient, logits)


@dice_ce_backward.register_fake
def _(upstream: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, reference, known = inputs
    _, sums, voxels = output
    ctx.save_for_backward(logits, reference, known, sums, voxels)
    # On CUDA the backward pass runs in a thread of autograd's, which does not know what was asked for here.
    ctx.backend = requested_backend()


def _differentiate(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor, None, None]:
    with use_backend(ctx.backend):
        return dice_ce_backward(upstream, *ctx.saved_tensors), None, None


dice_ce.register_autograd(_differentiate, setup_context=_save)
