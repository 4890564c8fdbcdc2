"""A bundle's inferer as a differentiable network, with exact gradients in the memory of one batch of tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import SimpleInferer, SlidingWindowInferer, SlidingWindowInfererAdapt
from monai.utils import ensure_tuple_rep, fall_back_tuple
from torch import nn

from ima_seg.attacks.network import full_resolution
from ima_seg.attacks.tiling import Tiling
from ima_seg.errors import UserError
from ima_seg.monai.network import AsUsed


class Logits(nn.Module):
    """A bundle's network, whose output is checked: (B, C, *S) -> logits (B, K, *S) in float32."""

    def __init__(self, network: nn.Module, outputs: int) -> None:
        super().__init__()
        self.network, self.outputs = network, outputs

    def forward(self, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        """The logits; ``arguments`` are what else an inferer passes on.

        Raises:
            UserError: something else comes out.
        """
        logits = full_resolution(self.network(x, *arguments)).float()
        if logits.shape != (len(x), self.outputs, *x.shape[2:]):
            raise UserError(
                f"the bundle's network returned {tuple(logits.shape)} for an input of {tuple(x.shape)}; by "
                f"metadata and labels it should be (B, {self.outputs}, *S) with the same S: correct num_channels"
            )
        return logits


class InfererWindow(Tiling):
    """MONAI's SlidingWindowInferer: its tiles, padding and weights; also a whole image as one tile (SimpleInferer).

    ``network`` returns the logits of a tile; ``tile_batch`` tiles at once, by default the inferer's ``sw_batch_size``.
    """

    def __init__(self, network: nn.Module, inferer: Any, *, tile_batch: int | None = None) -> None:
        super().__init__([network], patch_size=(), tile_batch=tile_batch or int(getattr(inferer, "sw_batch_size", 1)))
        self.inferer, self.roi_size = inferer, getattr(inferer, "roi_size", -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Blended logits (B, K, *S) in float32 of ``x`` (B, C, *S); where roi_size is open, it is that of ``x``."""
        if isinstance(self.roi_size, Sequence) and len(self.roi_size) != x.ndim - 2:
            raise UserError(f"the inferer's roi_size {tuple(self.roi_size)} does not fit an image {tuple(x.shape[2:])}")
        self.patch_size = tuple(int(size) for size in fall_back_tuple(self.roi_size, x.shape[2:]))
        return super().forward(x)

    def _steps(self, size: Sequence[int]) -> list[list[int]]:
        overlap = ensure_tuple_rep(getattr(self.inferer, "overlap", 0.0), len(size))
        interval = [max(1, int(p * (1 - share))) for p, share in zip(self.patch_size, overlap, strict=True)]
        tiles = dense_patch_slices(size, self.patch_size, interval, return_slice=False)
        return [sorted({int(tile[axis][0]) for tile in tiles}) for axis in range(len(size))]

    def _padding(self, x: torch.Tensor, widths: list[int]) -> torch.Tensor:
        mode = str(getattr(self.inferer.padding_mode, "value", self.inferer.padding_mode))
        return F.pad(x, widths, mode=mode, value=self.inferer.cval if mode == "constant" else None)

    def _importance(self, device: torch.device) -> torch.Tensor:
        """The inferer's weights of a tile, Gaussian or constant."""
        mode, sigma = getattr(self.inferer, "mode", "constant"), getattr(self.inferer, "sigma_scale", 0.125)
        weights = compute_importance_map(self.patch_size, mode=mode, sigma_scale=sigma, device=device)
        return torch.as_tensor(weights, dtype=torch.float32, device=device)


class RecomputedInferer(AsUsed):
    """Any other inferer, called as it is; arguments of :class:`InfererWindow`."""

    def __init__(self, network: nn.Module, inferer: Any, *, tile_batch: int | None = None) -> None:
        super().__init__(network, inferer)
        if tile_batch is not None:
            self.tile_batch = tile_batch

    @property
    def tile_batch(self) -> int:
        """The inferer's ``sw_batch_size``, where it has one."""
        return int(getattr(self.inferer, "sw_batch_size", 1))

    @tile_batch.setter
    def tile_batch(self, count: int) -> None:
        if hasattr(self.inferer, "sw_batch_size"):
            self.inferer.sw_batch_size = count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, K, *S) in float32."""
        logits = full_resolution(super().forward(x))
        if logits.shape[2:] != x.shape[2:]:
            raise UserError(
                f"the bundle's {type(self.inferer).__name__} returned {tuple(logits.shape)} for an input of "
                f"{tuple(x.shape)}; expected logits (B, K, *S) of the same S"
            )
        return logits.float()


def make_window(network: nn.Module, inferer: Any, *, outputs: int, tile_batch: int | None = None) -> nn.Module:
    """The inferer as a network.

    Raises:
        UserError: it is no inferer.
    """
    checked = Logits(network, outputs)
    tiled = type(inferer) in (SimpleInferer, SlidingWindowInferer, SlidingWindowInfererAdapt)
    if tiled and not getattr(inferer, "with_coord", False):
        return InfererWindow(checked, inferer, tile_batch=tile_batch)
    if not callable(inferer):
        raise UserError(f"the bundle's 'inferer' is {type(inferer).__name__}; expected an Inferer of monai.inferers")
    return RecomputedInferer(checked, inferer, tile_batch=tile_batch)


def patch_size(inferer: Any) -> list[int]:
    """Voxels of a tile; empty for whole images or where it depends on the image."""
    size = getattr(inferer, "roi_size", None)
    sizes = [int(value or 0) for value in (size if isinstance(size, Sequence) else [size] * 3)]
    return sizes if min(sizes) > 0 else []


class Frame(nn.Module):
    """Puts an image (B, C, *S) into its padded one (1, C, *P), at ``box``."""

    def __init__(self, padded: torch.Tensor, box: tuple[slice, ...]) -> None:
        super().__init__()
        self.padded, self.index = padded, (slice(None), slice(None), *box)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, *P)."""
        if x.shape[2:] == self.padded.shape[2:]:
            return x
        framed = self.padded.repeat(len(x), *(1,) * (x.ndim - 1))
        framed[self.index] = x
        return framed


class Cut(Frame):
    """The part of the logits that belongs to the image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, K, *S)."""
        return x[self.index]
