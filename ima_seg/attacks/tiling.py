"""A network on overlapping tiles as a network of the whole, with exact gradients in the memory of one batch of tiles.

Forward: all tiles without gradient, their logits averaged with weights. Backward: tile by tile, forward again with
gradient, and that tile's share of the gradient is propagated into the input. Blending is linear in the tiles' logits,
so the sum of the shares is the gradient of the whole, whatever tiles overlap.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ima_seg.attacks.network import full_resolution
from ima_seg.errors import UserError


class Tiling(nn.Module):
    """Logits of whole volumes (or slices, or stacks of slices) from tiles that are spread evenly and weigh the same.

    Args:
        networks: one per fold; their logits are averaged. Their parameters are frozen here.
        patch_size: of the network, in voxels; two entries for a 2D network.
        step_size: distance of neighbouring tiles as a share of the patch size.
        mirror_axes: spatial axes of the patch to mirror over, in all combinations; ``None`` or empty: none.
        tile_batch: how many tiles the network sees at once; memory grows with it.

    Where a single batch holds all there is to compute, its activations are simply kept for the backward pass. Other
    sliding windows override where tiles lie (:meth:`_steps`), their weights and the padding.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        *,
        patch_size: Sequence[int],
        step_size: float = 0.5,
        mirror_axes: Sequence[int] | None = None,
        tile_batch: int = 1,
    ) -> None:
        super().__init__()
        if not 0.01 <= step_size <= 1:  # smaller, and a volume has millions of tiles
            raise UserError(
                f"the step size of the sliding window is {step_size}; it is a share of the patch, 0.01 to 1"
            )
        self.networks = nn.ModuleList(networks).eval().requires_grad_(False)
        self.patch_size = tuple(int(size) for size in patch_size)
        self.step_size = step_size
        axes = [axis + 2 for axis in mirror_axes or ()]
        self.flips = [flip for count in range(len(axes) + 1) for flip in itertools.combinations(axes, count)]
        self.tile_batch = tile_batch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Blended logits (B, K, *S) in float32 of ``x`` (B, C, *S).

        S has as many axes as the patch, or one more in front for a stack of slices.
        """
        if x.ndim == len(self.patch_size) + 3:
            logits: torch.Tensor = self(x.transpose(1, 2).flatten(0, 1))
            return logits.view(x.shape[0], x.shape[2], *logits.shape[1:]).transpose(1, 2)
        if x.ndim != len(self.patch_size) + 2:
            raise UserError(f"an input of shape {tuple(x.shape)} does not fit the patch size {self.patch_size}")
        padded, inside = self._pad(x)
        single = padded.shape[2:] == self.patch_size
        if single and len(x) <= self.tile_batch and len(self.networks) * len(self.flips) == 1:
            logits = full_resolution(self.networks[0](padded)).float()
        elif torch.is_grad_enabled() and padded.requires_grad:
            logits = _Blend.apply(padded, self)
        else:
            logits = self.blend(padded)
        return logits[(slice(None), slice(None), *inside)]

    def tiles(self, shape: torch.Size) -> int:
        """Number of tiles that an input of ``shape`` (B, C, *S) is cut into."""
        stack = shape[0] if len(shape) == len(self.patch_size) + 2 else shape[0] * shape[2]
        spatial = shape[-len(self.patch_size) :]
        padded = [max(size, patch) for size, patch in zip(spatial, self.patch_size, strict=True)]
        return stack * len(list(itertools.product(*self._steps(padded))))

    def _steps(self, size: Sequence[int]) -> list[list[int]]:
        """Where tiles begin along each axis of a volume of ``size``, which is at least the patch size."""
        steps = []
        for whole, patch in zip(size, self.patch_size, strict=True):
            count = math.ceil((whole - patch) / (patch * self.step_size)) + 1
            steps.append([round((whole - patch) / max(count - 1, 1) * index) for index in range(count)])
        return steps

    def _pad(self, x: torch.Tensor) -> tuple[torch.Tensor, list[slice]]:
        """``x`` padded on both sides to at least the patch size, and where ``x`` lies in it."""
        missing = [max(patch - size, 0) for patch, size in zip(self.patch_size, x.shape[2:], strict=True)]
        inside = [slice(m // 2, m // 2 + size) for m, size in zip(missing, x.shape[2:], strict=True)]
        if not any(missing):
            return x, inside
        widths = [width for m in reversed(missing) for width in (m // 2, m - m // 2)]
        return self._padding(x, widths), inside

    def _padding(self, x: torch.Tensor, widths: list[int]) -> torch.Tensor:
        return F.pad(x, widths)

    def _importance(self, device: torch.device) -> torch.Tensor:
        """Weights of a tile, of the patch size, float32."""
        return torch.ones(self.patch_size, device=device)

    def _batches(self, shape: torch.Size) -> Iterator[list[tuple[Any, ...]]]:
        """Index tuples (sample, all channels, *tile) in batches."""
        steps = self._steps(shape[2:])
        index = (
            (sample, slice(None), *(slice(start, start + size) for start, size in zip(o, self.patch_size, strict=True)))
            for sample in range(shape[0])
            for o in itertools.product(*steps)
        )
        while batch := list(itertools.islice(index, self.tile_batch)):
            yield batch

    def _passes(self, tiles: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits of ``tiles`` (T, C, *patch) from each network and flip."""
        for network in self.networks:
            for flip in self.flips:
                logits = full_resolution(network(torch.flip(tiles, flip) if flip else tiles)).float()
                yield torch.flip(logits, flip) if flip else logits

    @torch.no_grad()
    def _weights(self, shape: torch.Size, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of a tile, and 1 / (its sum over all tiles x passes), both (*spatial)."""
        importance = self._importance(device)
        total = torch.zeros(shape[2:], device=device)
        for batch in self._batches(torch.Size((1, *shape[1:]))):
            for index in batch:
                total[index[2:]] += importance
        return importance, total.mul_(len(self.networks) * len(self.flips)).reciprocal_()

    @torch.no_grad()
    def blend(self, x: torch.Tensor) -> torch.Tensor:
        """Blended logits of ``x`` (B, C, *S), S at least the patch size."""
        importance, weight = self._weights(x.shape, x.device)
        logits: torch.Tensor | None = None
        for batch in self._batches(x.shape):
            tiles = torch.stack([x[index] for index in batch])
            summed = sum(self._passes(tiles))
            assert isinstance(summed, torch.Tensor)
            if logits is None:
                logits = x.new_zeros((x.shape[0], summed.shape[1], *x.shape[2:]), dtype=torch.float32)
            for index, part in zip(batch, summed, strict=True):
                logits[index].addcmul_(part, importance)
        assert logits is not None
        return logits.mul_(weight)

    def pull_back(self, x: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
        """Gradient with respect to ``x`` of <blended logits, ``outer``> (B, K, *S)."""
        importance, weight = self._weights(x.shape, x.device)
        gradient = torch.zeros_like(x)
        for batch in self._batches(x.shape):
            # Weighted tile by tile: the whole would be one more copy of the logits.
            share = torch.stack([outer[index] * weight[index[2:]] for index in batch]) * importance
            # In float16 the gradient of a small structure, scaled up against underflow, may overflow.
            height = share.abs().amax().clamp_min(torch.finfo(share.dtype).tiny)
            share = share / height
            tiles = torch.stack([x[index] for index in batch])
            for network in self.networks:
                for flip in self.flips:
                    # One pass at a time: the activations of one batch of tiles are all that is ever kept.
                    leaf = tiles.detach().requires_grad_(True)
                    with torch.enable_grad():
                        logits = full_resolution(network(torch.flip(leaf, flip) if flip else leaf))
                    toward = torch.flip(share, flip) if flip else share
                    (part,) = torch.autograd.grad(logits, leaf, toward.to(logits.dtype))
                    for index, piece in zip(batch, part, strict=True):
                        gradient[index] += piece * height
        return gradient


class _Blend(torch.autograd.Function):
    """:meth:`Tiling.blend` whose backward recomputes the tiles instead of keeping their activations."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, window: Tiling) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.window = window
        kind = x.device.type
        ctx.autocast = (
            (kind, torch.get_autocast_dtype(kind)) if kind != "mps" and torch.is_autocast_enabled(kind) else None
        )
        return window.blend(x)

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        # The backward pass runs outside of the caller's autocast; the tiles are recomputed as they were.
        cast = torch.autocast(ctx.autocast[0], ctx.autocast[1]) if ctx.autocast else contextlib.nullcontext()
        with cast:
            return ctx.window.pull_back(x, outer), None
