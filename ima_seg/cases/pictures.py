"""Pictures: PNG, BMP and TIFF, which hold whole numbers of a fixed range, in colour or grey, and no place in space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ima_seg.cases.raw import FloatArray

Pixels = npt.NDArray[Any]

_TIFF = (".tif", ".tiff")
_ENDINGS = (".png", ".bmp", *_TIFF)


def is_picture(path: Path) -> bool:
    """By the name."""
    return path.suffix.lower() in _ENDINGS


def read_pixels(path: Path) -> Pixels:
    """What is stored, as nnU-Net's readers get it: (Y, X), with colours (Y, X, C); TIFF also (C, Y, X) or a volume."""
    if path.suffix.lower() in _TIFF:
        import tifffile

        return np.asarray(tifffile.imread(path))
    from skimage import io

    return np.asarray(io.imread(path))


def claimed_bytes(path: Path) -> int:
    """How many bytes of pixels the header of a picture claims, at least: palettes may have one bit per pixel."""
    if path.suffix.lower() in _TIFF:
        import tifffile

        with tifffile.TiffFile(path) as file:
            return int(file.series[0].nbytes)
    from PIL import Image

    with Image.open(path) as picture:
        return picture.width * picture.height * len(picture.getbands()) // 8


def picture_limits(pictures: Sequence[Pixels], channels: int) -> FloatArray:
    """(C, 2) lowest and highest value that the files of ``pictures`` can hold, of all channels together."""
    each = channels // len(pictures)
    return np.array([_limits(pixels.dtype) for pixels in pictures for _ in range(each)])


def _limits(dtype: np.dtype[Any]) -> tuple[float, float]:
    if dtype.kind == "b":
        return 0.0, 1.0
    if dtype.kind in "iu":
        return float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)
    return -np.inf, np.inf


def difference_name(source: Path) -> str:
    """Of the file with the difference to ``source``: a TIFF, for no other picture holds negative numbers."""
    return source.name if source.suffix.lower() in _TIFF else f"{source.stem}.tif"


def spacing_file(source: Path) -> Path:
    """Where nnU-Net looks for the voxel size of a TIFF of three dimensions ``CASE_0000.tif``."""
    return source.with_name(f"{source.stem[:-5]}.json")


def write_picture(source: Path, change: FloatArray, path: Path, *, add: bool) -> None:
    """Write ``source`` changed by ``change`` (C, Z, Y, X), of its format, shape and dtype; or the difference alone.

    Whole numbers are rounded and stay in their range. The difference is that of the two files, as float32.
    """
    stored = read_pixels(source)
    planar = stored.ndim == 3 and len(change) > 1 and stored.shape[0] == len(change)
    laid_out = change[:, 0] if planar else change[:, 0].transpose(1, 2, 0) if len(change) > 1 else change
    exact = stored.astype(np.float64) + laid_out.reshape(stored.shape)
    if stored.dtype.kind != "f":
        exact = np.clip(np.rint(exact), *_limits(stored.dtype))
    pixels = exact.astype(stored.dtype) if add else (exact - stored).astype(np.float32)
    if path.suffix.lower() in _TIFF:
        import tifffile

        layout: dict[str, Any] = {"photometric": "rgb" if len(change) > 1 else "minisblack"}
        if planar:
            layout["planarconfig"] = "separate"
        tifffile.imwrite(path, pixels, compression="zlib", **layout)
        return
    from skimage import io

    io.imsave(path, pixels, check_contrast=False)
