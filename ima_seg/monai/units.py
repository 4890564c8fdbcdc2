"""Images on other grids, and original units per network unit, measured from a pre-processed image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialResample

from ima_seg.cases.raw import FloatArray, intensity_range

#: Share of the voxels that must lie on the line between original intensities and network units, within so much of the
#: network's range: interpolation and clipping take some off it.
_ON_LINE, _NEAR = 0.9, 0.01


def onto(
    values: torch.Tensor, source: FloatArray, grid: FloatArray, shape: Sequence[int], *, mode: str = "bilinear"
) -> torch.Tensor:
    """``values`` (C, X, Y, Z) of one grid, interpolated on another; zero outside."""
    moved = SpatialResample(mode=mode, padding_mode="zeros", align_corners=True)(
        MetaTensor(values, affine=torch.from_numpy(source)),
        dst_affine=torch.from_numpy(grid),
        spatial_size=tuple(shape),
    )
    plain: torch.Tensor = moved.as_tensor()
    return plain


def channel_sd(image: torch.Tensor) -> list[float]:
    """Standard deviation of each channel of (C, *S), over the voxels that are not 0; 1 of a channel without contrast.

    That is what z-scoring makes 1, over all voxels or over those that were not 0 before.
    """
    found = (float(values[values != 0].double().std(correction=0)) for values in image)
    return [sd if sd > 0 else 1.0 for sd in found]


def native_units(
    network: torch.Tensor, raw: FloatArray, affine: FloatArray, grid: FloatArray
) -> tuple[FloatArray | None, FloatArray, int]:
    """Original units per network unit, by a line through the voxels of both, and how far the image's values reach.

    Args:
        network: (C, *S) pre-processed image.
        raw: (C, Z, Y, X) original image.
        affine: (4, 4) voxels of the original grid to mm.
        grid: of the network's.

    Returns:
        (C,) scale or ``None`` where a channel has no line; (C,) range from the 0.5 to the 99.5 percentile, of original
        intensities or without a scale of network units; and the original voxels that the network's grid covers.
    """
    original = torch.from_numpy(np.ascontiguousarray(raw.transpose(0, 3, 2, 1)))
    covered = onto(torch.ones(1, *network.shape[1:]), grid, affine, original.shape[1:], mode="nearest")[0] > 0.5
    inside = onto(torch.ones_like(original[:1]), affine, grid, network.shape[1:])[0] > 0.999
    scales = []
    for values, before in zip(network, onto(original, affine, grid, network.shape[1:]), strict=True):
        scale = _slope(before[inside].double().numpy(), values[inside].double().numpy())
        if scale is None:
            return None, intensity_range(network.numpy()), int(covered.sum())
        scales.append(scale)
    return np.array(scales), intensity_range(original[:, covered].numpy()), int(covered.sum())


def _slope(before: npt.NDArray[np.float64], after: npt.NDArray[np.float64]) -> float | None:
    """Change of ``before`` per change of ``after``, if they lie on a line, but for clipped and masked values."""
    if len(after) == 0 or after.max() == after.min():
        return None
    width = after.max() - after.min()
    # What is clipped lies at the ends, what is masked stays zero.
    free = (after > after.min()) & (after < after.max()) & (after != 0)
    x, y = before[free], after[free]
    for _ in range(5):
        if len(x) < 10 or np.ptp(x) == 0:
            return None
        slope, offset = np.polyfit(x, y, 1)
        near = np.abs(slope * before[free] + offset - after[free]) < _NEAR * width
        x, y = before[free][near], after[free][near]
    return float(1 / slope) if near.mean() >= _ON_LINE and slope > 0 else None
