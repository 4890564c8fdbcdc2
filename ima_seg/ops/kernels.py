"""The ops as Triton kernels; :mod:`ima_seg.ops.reference` says what they compute.

A sample is a row. Each of its ``parts`` programs walks over every ``parts``-th block of the row and leaves its partial
sums; whoever needs the sums adds the parts up again, in the same order each time, so that results are reproducible
without atomics. Memory passes per op: L2 step two (the second step's size follows from the sums of g g, d g and d d of
the first), L-infinity step one, random start one write and no read, loss one forward and one back, counts one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton

from ima_seg.ops import elementwise_kernels as elementwise
from ima_seg.ops import logits_kernels as over_logits
from ima_seg.ops.reference import SMOOTH
from ima_seg.types import Norm

#: Elements of a block of an image, and programs per row at most: enough to fill a GPU, few enough to add up again.
BLOCK, MOST_PARTS = 2048, 256
#: Elements of a block of logits, classes times voxels.
LOGITS_BLOCK = 4096

Grid = tuple[int, ...]


def _launch(kernel: Any, grid: Grid, device: torch.device, *arguments: Any, **constants: Any) -> None:
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **constants)


def _parts(size: int, block: int) -> int:
    return max(1, min(math.ceil(size / block), MOST_PARTS))


def _dense(image: torch.Tensor) -> bool:
    """Whether each row of ``image`` (B, ...) fills its memory without gaps, in whatever order of its axes."""
    expected = 1
    for stride, size in sorted(zip(image.stride()[1:], image.shape[1:], strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _same_order(image: torch.Tensor, like: torch.Tensor) -> bool:
    axes = zip(image.stride()[1:], like.stride()[1:], image.shape[1:], strict=True)
    return all(a == b for a, b, size in axes if size != 1)


def _rows(*images: torch.Tensor) -> list[torch.Tensor]:
    """``images`` in one memory layout, the first one's where its rows are dense; copied only where they differ."""
    first = images[0] if _dense(images[0]) else images[0].contiguous()
    return [
        first,
        *(i if _same_order(i, first) else torch.empty_like(first, dtype=i.dtype).copy_(i) for i in images[1:]),
    ]


def _mask(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """``mask`` as bytes in the layout of ``like``; without one ``like``, for something must be passed."""
    if mask is None:
        return like
    whole = mask.expand(mask.shape[0], *like.shape[1:])
    bytes_ = torch.empty_like(like[: mask.shape[0]], dtype=torch.uint8).copy_(whole)
    return bytes_.expand(like.shape)


def _values(*values: torch.Tensor) -> list[torch.Tensor]:
    return [value.float().contiguous() for value in values]


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
    """See :func:`ima_seg.ops.gradient_step`."""
    boxed = image is not None and low is not None and high is not None
    d, g, *others = _rows(delta, gradient, *([image] if image is not None else []))
    x = others[0] if others else d
    m = _mask(mask, d)
    a, e, least, most = _values(alpha, eps, *((low, high) if boxed else (alpha, alpha)))  # type: ignore[arg-type]
    out, length = torch.empty_like(d), torch.empty(len(d), device=d.device)
    size, rows = d[0].numel(), len(d)
    parts = _parts(size, BLOCK)
    partial = torch.empty((rows, parts, 3), device=d.device)
    grid, strides = (rows, parts), (d.stride(0), g.stride(0), out.stride(0), m.stride(0), x.stride(0))
    common = {"BLOCK": BLOCK, "MASKED": mask is not None, "num_warps": 8}
    all_parts = triton.next_power_of_2(parts)
    if norm == "l2":
        _launch(elementwise.step_sums, grid, d.device, d, g, m, partial, size, *strides[:2], strides[3], **common)
        _launch(elementwise.l2_step, grid, d.device, d, g, out, m, x, partial, a, e, least, most, length, size,
                *strides, BOXED=boxed, PARTS=all_parts, **common)  # fmt: skip
    else:
        _launch(elementwise.linf_step, grid, d.device, d, g, out, m, x, partial, a, e, least, most, size, *strides,
                BOXED=boxed, **common)  # fmt: skip
        _launch(elementwise.linf_finish, grid, d.device, d, out, x, partial, e, least, most, length, size,
                d.stride(0), out.stride(0), x.stride(0), BOXED=boxed, PARTS=all_parts, BLOCK=BLOCK)  # fmt: skip
    return out, length


def random_start(
    like: torch.Tensor, radius: torch.Tensor, norm: Norm, seeds: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """See :func:`ima_seg.ops.random_start`."""
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    size, rows = out[0].numel(), len(out)
    # A program makes four values from one counter.
    block = BLOCK // 4
    parts = _parts(math.ceil(size / 4), block)
    partial = torch.empty((rows, parts), device=out.device)
    m = _mask(mask, out)
    (r,) = _values(radius)
    common = {"BLOCK": block, "MASKED": mask is not None}
    if norm == "l2":
        _launch(elementwise.noise_sums, (rows, parts), out.device, m, seeds, partial, size, m.stride(0), **common)
    _launch(elementwise.noise, (rows, parts), out.device, out, m, seeds, partial, r, size, out.stride(0), m.stride(0),
            L2=norm == "l2", PARTS=triton.next_power_of_2(parts), **common)  # fmt: skip
    return out


def interpolate(
    inner: torch.Tensor, outer: torch.Tensor, share: torch.Tensor, norm: Norm
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`ima_seg.ops.interpolate`."""
    a, b = _rows(inner, outer)
    out = torch.empty_like(a)
    size, rows = a[0].numel(), len(a)
    parts = _parts(size, BLOCK)
    partial = torch.empty((rows, parts), device=a.device)
    _launch(elementwise.interpolate, (rows, parts), a.device, a, b, out, partial, *_values(share), size,
            a.stride(0), b.stride(0), out.stride(0), L2=norm == "l2", BLOCK=BLOCK, num_warps=8)  # fmt: skip
    length = partial.amax(1) if norm == "linf" else (partial.sum(1) / size).sqrt()
    return out, length


def dice_ce(
    logits: torch.Tensor, reference: torch.Tensor, known: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`ima_seg.ops.reference.dice_ce`."""
    walk = _Walk(logits, reference, known)
    partial = torch.empty((walk.rows, walk.parts, walk.outputs, 3), device=logits.device)
    scalars = torch.empty((walk.rows, walk.parts, 2), device=logits.device)
    walk.launch(over_logits.dice_ce_sums, [partial, scalars], [])
    loss, sums, voxels = (
        torch.empty(shape, device=logits.device) for shape in ((walk.rows,), (walk.rows, walk.outputs, 3), (walk.rows,))
    )
    constants = {name: walk.constants[name] for name in ("OUTPUTS", "REGIONS")}
    _launch(over_logits.dice_ce_finish, (walk.rows,), logits.device, partial, scalars, loss, sums, voxels, walk.parts,
            walk.outputs, SMOOTH, CHUNK=16, **constants)  # fmt: skip
    return loss, sums, voxels


def dice_ce_backward(
    upstream: torch.Tensor,
    logits: torch.Tensor,
    reference: torch.Tensor,
    known: torch.Tensor | None,
    sums: torch.Tensor,
    voxels: torch.Tensor,
) -> torch.Tensor:
    """See :func:`ima_seg.ops.reference.dice_ce_backward`."""
    walk = _Walk(logits, reference, known)
    out = torch.empty_like(walk.logits)
    walk.launch(
        over_logits.dice_ce_gradient, [out, *_values(upstream, sums, voxels)], [SMOOTH], strides_after=out.stride()
    )
    return out.view(logits.shape)


def hard_counts(
    logits: torch.Tensor, reference: torch.Tensor, known: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`ima_seg.ops.reference.hard_counts`."""
    walk = _Walk(logits, reference, known)
    partial = torch.empty((walk.rows, walk.parts, walk.outputs, 3), device=logits.device, dtype=torch.int32)
    checks = torch.empty((walk.rows, walk.parts), device=logits.device)
    walk.launch(over_logits.hard_counts, [partial, checks], [])
    counts = partial.sum(1, dtype=torch.int64)
    return counts if walk.constants["REGIONS"] else counts[:, 1:].contiguous(), torch.isfinite(checks.amax(1))


class _Walk:
    """How a kernel walks over logits and their reference."""

    def __init__(self, logits: torch.Tensor, reference: torch.Tensor, known: torch.Tensor | None) -> None:
        regions = reference.dtype == torch.bool
        # A view wherever the voxels have one stride, as in channels_last.
        self.logits = logits.flatten(2)
        self.truth = reference.view(torch.uint8) if regions else reference
        self.known = self.truth if known is None else known.view(torch.uint8)
        self.rows, self.outputs, self.size = self.logits.shape
        outputs = triton.next_power_of_2(max(self.outputs, 2))
        block = max(16, LOGITS_BLOCK // outputs)
        self.parts = _parts(self.size, block)
        self.constants = {"REGIONS": regions, "KNOWN": known is not None, "OUTPUTS": outputs, "BLOCK": block}

    def launch(
        self, kernel: Any, tensors: Sequence[torch.Tensor], numbers: Sequence[float], strides_after: Sequence[int] = ()
    ) -> None:
        """``kernel(logits, truth, known, *tensors, size, outputs, *numbers, *strides)``."""
        strides = [*self.logits.stride(), *self.truth.stride(), *self.known.stride(), *strides_after]
        _launch(kernel, (self.rows, self.parts), self.logits.device, self.logits, self.truth, self.known, *tensors,
                self.size, self.outputs, *numbers, *strides, **self.constants)  # fmt: skip
