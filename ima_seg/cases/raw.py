"""A case on disk and in memory, and what follows from its intensities and its grid alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating[Any]]
LabelArray = npt.NDArray[np.integer[Any] | np.bool_]

_log = logging.getLogger("ima_seg.cases")

#: What lies so many times the range of all other values away from them is no intensity.
_FAR = 1000

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
        limits: (C, 2) lowest and highest intensity that files of its kind can hold; None: any.
        colour: whether its channels are red, green and blue of one picture.
    """

    case: str
    image: npt.NDArray[np.float32]
    properties: dict[str, Any]
    reference: LabelArray
    limits: FloatArray | None = None
    colour: bool = False

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Along the axes of :attr:`image`."""
        z, y, x = (float(value) for value in self.properties["spacing"])
        return z, y, x


def padding(channel: FloatArray) -> float | None:
    """The value that stands for "no image here" in ``channel``, such as the lowest float32 outside the field of view.

    It is the least or the greatest value and lies 1000 times the range of all others away from them. None: there is no
    such value, as in ordinary images, whose padding (-1024, -2000, 0) is an intensity that the network sees.
    """
    least, most = float(channel.min()), float(channel.max())
    second = float(channel.min(where=channel > least, initial=np.inf))
    last = float(channel.max(where=channel < most, initial=-np.inf))
    if most > second and second - least > _FAR * (most - second):
        return least
    return most if last > least and most - last > _FAR * (last - least) else None


def without_padding(channel: FloatArray, *others: FloatArray) -> list[FloatArray]:
    """``channel``, and others of its shape, with the nearest intensity of each where ``channel`` is :func:`padding`."""
    value = padding(channel)
    if value is None:
        return [channel, *others]
    there = channel != value
    nearest = np.min if value < float(channel[there].min()) else np.max
    return [np.where(there, image, nearest(image[there])) for image in (channel, *others)]


def warn_of_padding(case: str, image: FloatArray) -> None:
    """Log which value of which channel of (C, *S) is taken for padding."""
    for channel, values in enumerate(image):
        value = padding(values)
        if value is not None:
            where = f"channel {channel} of " if len(image) > 1 else ""
            _log.warning(
                f"{case}: {where}the image holds {value:g} in {np.mean(values == value):.1%} of its voxels, far from "
                "all other values; that is taken for padding, and left out of its intensity range"
            )


def intensity_range(image: FloatArray) -> FloatArray:
    """(C,) distance between the 0.5 and the 99.5 percentile of each channel of (C, *S), without :func:`padding`."""
    return np.array([np.subtract(*np.percentile(values, (99.5, 0.5))) for values in map(intensities, image)])


def intensities(channel: FloatArray) -> FloatArray:
    """The values of ``channel`` but its :func:`padding`; it itself where there is none."""
    value = padding(channel)
    return channel if value is None else channel[channel != value]


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
