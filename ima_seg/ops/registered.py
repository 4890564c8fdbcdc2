"""The ops as operators of torch (``torch.ops.ima_seg``), so that torch.compile takes them as they are.

Each runs the reference or the Triton kernel, whichever :mod:`ima_seg.ops.backend` chooses for its device and dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ima_seg.ops import reference as plain
from ima_seg.ops.backend import requested_backend, resolve_backend, use_backend

Tensor = torch.Tensor


def _laid_out(result: Tensor, like: Tensor) -> Tensor:
    """``result`` in the dtype and layout of ``torch.empty_like(like)``, which torch.compile was promised."""
    expected = torch.empty_like(like, device="meta")
    fits = result.dtype == expected.dtype and result.stride() == expected.stride()
    return result if fits else torch.empty_like(like).copy_(result)


def _register(name: str, schema: str, fake: Callable[..., Any], *, main: int = 0, like_main: bool = True) -> Any:
    """The function ``name`` of the reference, or of the kernels, as an operator.

    Args:
        name: of the function.
        schema: its arguments and results.
        fake: what has the shapes, dtypes and layouts of its results.
        main: place of the argument whose device and dtype choose the backend.
        like_main: whether the result, or the first of them, is of the dtype and layout of that argument.
    """

    def run(*given: Any) -> Any:
        image, implementation = given[main], plain
        if resolve_backend(image.device, image.dtype) == "triton":
            from ima_seg.ops import kernels as implementation  # type: ignore[no-redef]
        found = getattr(implementation, name)(*given)
        if not like_main:
            return found
        return (_laid_out(found[0], image), *found[1:]) if isinstance(found, tuple) else _laid_out(found, image)

    operator = torch.library.custom_op(f"ima_seg::{name}", run, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator


def _image_and_size(image: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(image), image.new_empty(len(image), dtype=torch.float32)


def _counts(logits: Tensor, reference: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, outputs = logits.shape[:2]
    classes = outputs if reference.dtype == torch.bool else outputs - 1
    return logits.new_empty((batch, classes, 3), dtype=torch.int64), logits.new_empty(batch, dtype=torch.bool)


def _loss(logits: Tensor, reference: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    batch, outputs = logits.shape[:2]
    empty = logits.new_empty(batch, dtype=plain.accumulator(logits.dtype))
    return empty, empty.new_empty((batch, outputs, 3)), empty.new_empty(batch)


gradient_step: Callable[..., tuple[Tensor, Tensor]] = _register(
    "gradient_step",
    "(Tensor delta, Tensor gradient, Tensor alpha, Tensor eps, str norm, Tensor? mask, Tensor? image, Tensor? low, "
    "Tensor? high) -> (Tensor, Tensor)",
    _image_and_size,
)
random_start: Callable[..., Tensor] = _register(
    "random_start",
    "(Tensor like, Tensor radius, str norm, Tensor seeds, Tensor? mask) -> Tensor",
    lambda like, *_: torch.empty_like(like),
)
interpolate: Callable[..., tuple[Tensor, Tensor]] = _register(
    "interpolate", "(Tensor inner, Tensor outer, Tensor share, str norm) -> (Tensor, Tensor)", _image_and_size
)
hard_counts: Callable[..., tuple[Tensor, Tensor]] = _register(
    "hard_counts", "(Tensor logits, Tensor reference, Tensor? known) -> (Tensor, Tensor)", _counts, like_main=False
)
dice_ce: Callable[..., tuple[Tensor, Tensor, Tensor]] = _register(
    "dice_ce", "(Tensor logits, Tensor reference, Tensor? known) -> (Tensor, Tensor, Tensor)", _loss, like_main=False
)
dice_ce_backward: Callable[..., Tensor] = _register(
    "dice_ce_backward",
    "(Tensor upstream, Tensor logits, Tensor reference, Tensor? known, Tensor sums, Tensor voxels) -> Tensor",
    lambda upstream, logits, *_: torch.empty_like(logits),
    main=1,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    # On CUDA the backward pass runs in a thread of autograd's, which does not know what was asked for here.
    ctx.backend = requested_backend()


def _differentiate(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor, None, None]:
    with use_backend(ctx.backend):
        return dice_ce_backward(upstream, *ctx.saved_tensors), None, None


torch.library.register_autograd("ima_seg::dice_ce", _differentiate, setup_context=_save)
