"""A case on disk and in memory, and what follows from its intensities and its grid alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating[Any]]
LabelArray = npt.NDArray[np.integer[Any] | np.bool_]

#: Two grids coincide where corners differ by less, in voxels.
_SAME_GRID = 1e-2


@dataclass(frozen=True)
class CaseFiles:
    """One case on disk: one image per channel in the order of the channels, or one with all of them, and the label."""

    case: str
    images: tuple[Path, ...]
    label: Path


@dataclass(frozen=True)
class CaseProblem:
    """A case that cannot be evaluated because files are missing or too many."""

    case: str
    message: str


@dataclass(frozen=True)
class RawCase:
    """A case in its original geometry and intensities.

    Attributes:
        case: its id.
        image: (C, Z, Y, X) float32.
        properties: ``spacing`` along (Z, Y, X) in mm, and whatever else the reader's model needs to write it.
        reference: (Z, Y, X) label map.
    """

    case: str
    image: npt.NDArray[np.float32]
    properties: dict[str, Any]
    reference: LabelArray

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Along the axes of :attr:`image`."""
        z, y, x = (float(value) for value in self.properties["spacing"])
        return z, y, x


def intensity_range(image: FloatArray) -> FloatArray:
    """(C,) distance between the 0.5 and the 99.5 percentile of each channel of (C, *S)."""
    low, high = np.percentile(image.reshape(len(image), -1), (0.5, 99.5), axis=1)
    width: FloatArray = high - low
    return width


def shifted(affine: FloatArray, box: tuple[slice, ...]) -> FloatArray:
    """The affine (4, 4), voxels to mm, of the part ``box`` of a grid."""
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ [side.start for side in box]
    return moved


def same_grid(first: Any, second: Any, shape: tuple[int, ...]) -> bool:
    """Whether two affines agree at the corners of a volume of ``shape`` (X, Y, Z), in voxels of the second."""
    difference = np.linalg.inv(np.asarray(second, np.float64)) @ np.asarray(first, np.float64) - np.eye(4)
    return bool((np.abs(difference[:3]) @ [*shape, 1.0]).max() < _SAME_GRID)


def only_turned(transform: FloatArray) -> bool:
    """Whether voxels are mapped onto voxels: axes swapped or flipped, whole shifts."""
    whole = np.abs(transform - np.rint(transform)).max() < 1e-3
    return bool(whole and np.allclose(np.abs(np.rint(transform[:3, :3])).sum(0), 1))
