"""Perturbed images hold what their files can: pixels of 8 bits end at 0 and 255."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ima_seg.cases.raw import FloatArray
from ima_seg.nnunet.normalisation import ChannelScale

#: What nnU-Net's normalisation of colours takes; it refuses other values, also those of files that could hold them.
_RGB = (0.0, 255.0)


def network_limits(
    native: FloatArray | None, scales: Sequence[ChannelScale], clean: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32] | None:
    """Lowest and highest value of each channel in SDs, (2, C); ``None`` where there are none.

    Args:
        native: (C, 2) what the files can hold.
        scales: normalisation of each channel.
        clean: (C, *S) the clean image in SDs, which is within the limits whatever its rounding.
    """
    limits = np.tile([-np.inf, np.inf], (len(scales), 1)) if native is None else native.astype(np.float64)
    for channel, scale in zip(limits, scales, strict=True):
        if scale.scheme == "RGBTo01Normalization":
            channel[:] = np.clip(channel, *_RGB)
        channel[:] = (channel - scale.shift) / scale.scale
    if not np.isfinite(limits).any():
        return None
    flat = clean[: len(scales)].reshape(len(scales), -1)
    return np.stack([np.minimum(limits[:, 0], flat.min(1)), np.maximum(limits[:, 1], flat.max(1))]).astype(np.float32)


class Within(nn.Module):
    """(B, C + extra, *S) perturbed image in SDs -> the same with its C channels within ``limits`` (2, C)."""

    def __init__(self, limits: torch.Tensor) -> None:
        super().__init__()
        self.limits = limits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A new tensor; what lies beyond has no gradient."""
        count = self.limits.shape[1]
        low, high = (limit.view(1, -1, *(1,) * (x.ndim - 2)) for limit in self.limits)
        return torch.cat([torch.clamp(x[:, :count], low, high), x[:, count:]], 1)
