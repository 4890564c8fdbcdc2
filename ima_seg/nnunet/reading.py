"""Images and labels through the reader that a model's plans name: what it returns is what counts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ima_seg.cases.check import check_label_values
from ima_seg.cases.pictures import claimed_bytes, is_picture, picture_limits, read_pixels, spacing_file
from ima_seg.cases.raw import CaseFiles, FloatArray
from ima_seg.cases.stream import require_room
from ima_seg.errors import UserError
from ima_seg.files import require_regular

#: Reader of nnU-Net that takes 2D pictures, of which one file may hold all channels.
_COLOUR = "NaturalImage2DIO"


@dataclass(frozen=True)
class ImageFile:
    """An image as a reader of nnU-Net returns it, (C, Z, Y, X); the rest as in :class:`ima_seg.cases.raw.RawCase`."""

    values: npt.NDArray[np.float32]
    properties: dict[str, Any]
    limits: FloatArray | None
    colour: bool


def one_file(plans: Any) -> bool:
    """Whether a single file may hold all channels, as pictures do; of nnU-Net's PlansManager."""
    return str(plans.image_reader_writer_class.__name__) == _COLOUR


def image_files(plans: Any, folder: Path, case: str, *, channels: int, ending: str) -> list[Path]:
    """The files of a case's image, in nnU-Net's naming, whether they exist or not."""
    files = [folder / f"{case}_{index:04d}{ending}" for index in range(channels)]
    return files[:1] if one_file(plans) and not any(file.is_file() for file in files[1:]) else files


def read_image(plans: Any, files: Sequence[Path], *, channels: int) -> ImageFile:
    """Read an image with the reader that the model's plans name.

    Raises:
        UserError: the reader does not accept a file, or returns another number of channels.
    """
    pictures = all(map(is_picture, files))
    with _reported(plans, files) as reader:
        pixels = [read_pixels(file) for file in files] if pictures else []
        values, properties = reader.read_images([str(file) for file in files])
        _spacing(properties)
    if len(values) != channels:
        remedy = "save it without its alpha channel" if len(values) == 4 else "save it with as many"
        raise UserError(
            f"{files[0]}: nnU-Net's {type(reader).__name__} reads {len(values)} channel(s), but dataset.json names "
            f"{channels}; {remedy}, or remove the case"
        )
    limits = picture_limits(pixels, channels) if pictures else None
    colour = pictures and len(files) == 1 and channels == 3
    with np.errstate(over="ignore"):  # what becomes infinite is refused by those who know the case
        return ImageFile(values.astype(np.float32, copy=False), properties, limits, colour)


def read_label(plans: Any, file: Path) -> tuple[npt.NDArray[Any], dict[str, Any]]:
    """Read a label map (1, Z, Y, X) with the reader that the model's plans name, and its properties.

    Raises:
        UserError: the reader does not accept the file, or it is in colour.
    """
    with _reported(plans, [file]) as reader:
        values, properties = reader.read_seg(str(file))
        _spacing(properties)
    if len(values) != 1:
        raise UserError(
            f"{file}: nnU-Net's {type(reader).__name__} reads {len(values)} channels, as of colours or a palette; save "
            "the label in grey, each pixel with the value of its class"
        )
    return values, properties


@contextmanager
def _reported(plans: Any, files: Sequence[Path]) -> Iterator[Any]:
    """The reader; whatever it says against ``files`` becomes the user's."""
    for file in files:
        require_regular(file)
        if not file.exists():
            raise UserError(f"{file} does not exist; add it or remove the case")
    reader = plans.image_reader_writer_class()
    try:
        for file in filter(is_picture, files):
            require_room(file, claimed_bytes(file))
        yield reader
    except Exception as error:  # imageio, tifffile, ITK, nibabel and nnU-Net's assertions have their own
        reason = " ".join(str(error).split())[-200:] or type(error).__name__
        raise UserError(
            f"nnU-Net's {type(reader).__name__} cannot read {', '.join(map(str, files))} ({reason}); correct or remove "
            "the case, for nnU-Net will not predict it either"
        ) from None


def check_pictures(
    plans: Any, files: CaseFiles, *, channels: int, labels_allowed: Collection[int], ignore: int | None = None
) -> None:
    """What :func:`ima_seg.cases.check.check_case` is for files with a header, for pictures, which have none.

    Raises:
        UserError: names file, value and remedy.
    """
    image = read_image(plans, files.images, channels=channels)
    label, properties = read_label(plans, files.label)
    if image.values.shape[1:] != label.shape[1:]:
        raise UserError(
            f"{files.images[0]} has the size {_size(image.values)}, but {files.label} has {_size(label)}; put all "
            "files of the case on one grid (labels with nearest-neighbour interpolation)"
        )
    aside = spacing_file(files.images[0]), files.label.with_suffix(".json")
    spacing, other = _spacing(image.properties), _spacing(properties)
    if all(file.is_file() for file in aside) and not np.allclose(spacing, other, rtol=1e-2):
        raise UserError(f"{aside[0]} has the spacing {spacing}, but {aside[1]} has {other}; correct one of them")
    if not all(np.isfinite(value) and value > 0 for value in spacing):
        raise UserError(f"{aside[0]} has the spacing {spacing}; give three positive numbers, in mm")
    finite = np.isfinite(image.values)
    if not finite.all():
        raise UserError(
            f"{files.images[0]}: {finite.size - np.count_nonzero(finite)} of {finite.size} pixels are NaN or infinite; "
            "replace them by the value of the background"
        )
    if image.values.min() == image.values.max():
        raise UserError(
            f"{files.images[0]}: all pixels have the value {image.values.min():g}; replace the image or remove the case"
        )
    check_label_values(files.label, label, labels_allowed, ignore, "dataset.json")


def _spacing(properties: dict[str, Any]) -> list[float]:
    return [float(value) for value in properties["spacing"]]


def _size(values: npt.NDArray[Any]) -> str:
    return " × ".join(map(str, values.shape[1:] if values.shape[1] > 1 else values.shape[2:]))
