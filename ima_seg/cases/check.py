"""Whether a case can be evaluated: headers, grids and values of its files."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ima_seg.cases.raw import CaseFiles, warn_of_padding
from ima_seg.cases.stream import nifti_voxels, reading, require_room, require_whole_stream
from ima_seg.errors import UserError
from ima_seg.files import require_regular

Array = npt.NDArray[Any]

#: Two files lie at the same place when no corner of the volume is further apart than this, or 1% of a voxel edge.
TOLERANCE_MM = 1e-3
#: How far a label may be from a whole number, which a scaling in its header (scl_slope) makes inexact.
_ROUNDING = 1e-3
#: Codes of NIfTI's units of length: unknown and mm; name of others, and what ITK multiplies them by.
_MILLIMETRES, _UNITS = (0, 2), {1: ("metre", 1e3), 3: ("micron", 1e-3)}
_LARGEST = float(np.finfo(np.float32).max)


def check_case(
    files: CaseFiles,
    *,
    labels_allowed: Collection[int],
    ignore: int | None = None,
    stacked: bool = False,
    source: str = "dataset.json",
) -> None:
    """Check that a case can be evaluated; headers first, then the voxels of one file at a time.

    Args:
        files: the case.
        labels_allowed: values that its label may have, background and ignore label among them.
        ignore: value of the ignore label, which is no foreground.
        stacked: whether an image file may hold its channels along a fourth axis.
        source: where the allowed values come from, for messages.

    Raises:
        UserError: names file, value and remedy.
    """
    label = _open(files.label)
    channels = [_open(path, stacked=stacked) for path in files.images]
    for channel in channels:
        _require_same_grid(channel, label)
    for channel in channels:
        _check_image(channel)
    check_label_values(label.path, label.read(), labels_allowed, ignore, source)


def check_read(files: CaseFiles, image: Array, spacing_mm: Sequence[float]) -> None:
    """Check what a model's own reader made of files that :func:`check_case` accepts, and warn of padding.

    Args:
        files: the case.
        image: (C, Z, Y, X) as read.
        spacing_mm: as read, in any order of axes.

    Raises:
        UserError: values that are not finite, or another spacing than in the header of a NIfTI file.
    """
    paths = files.images if len(files.images) == len(image) else files.images[:1] * len(image)
    for path, channel in zip(paths, image, strict=True):
        _require_finite(channel, f"{path}, as the model reads it")
    warn_of_padding(files.case, image)
    if not is_nifti(paths[0]):
        return
    header = _open(paths[0], stacked=True)
    if len(header.shape) < 3 or 1 in header.shape[:3]:  # slices have no third spacing
        return
    expected = np.sort(np.linalg.norm(header.affine[:3, :3], axis=0))
    if not np.allclose(np.sort(spacing_mm), expected, rtol=0.01):
        found, there = (" x ".join(f"{value:.4g}" for value in values) for values in (np.sort(spacing_mm), expected))
        raise UserError(
            f"{paths[0]}: the model reads a spacing of {found} mm, sorted, but its {header.source} has {there} mm; "
            "make pixdim and affine in its header agree"
        )


def check_prepared(case: str, image: Array) -> None:
    """Check that an image (C, ...) is finite after the pre-processing, and still one.

    Raises:
        UserError: it is not.
    """
    for index, channel in enumerate(image):
        what = f"{case}: channel {index} after the model's pre-processing"
        _require_finite(channel, what)
        if (low := channel.min()) == channel.max():
            raise UserError(
                f"{what}: all voxels have the value {low:g}, so that the model sees nothing; correct the image's "
                "intensities, which may be of another unit or too large for float32's squares"
            )


def check_segmentation(path: Path) -> None:
    """Check that a file that is no part of the case, such as a previous stage's segmentation, is whole.

    Raises:
        UserError: it cannot be read to its end.
    """
    _open(path).read()


@dataclass(frozen=True)
class _Header:
    """What the header of a file says, and the open file."""

    path: Path
    shape: tuple[int, ...]
    affine: npt.NDArray[np.float64]  # voxel index to mm
    source: str  # of the affine
    voxel_bytes: int
    handle: Any

    def read(self) -> Array:
        """All voxels, which are finite, with the header's scaling."""
        with reading(self.path):
            if is_nifti(self.path):
                values: Array = nifti_voxels(self.path, self.handle.dataobj)
            else:
                import SimpleITK

                require_whole_stream(self.path)
                values = np.asarray(SimpleITK.GetArrayFromImage(self.handle.Execute()))
        _require_finite(values, str(self.path))
        return values


def _require_finite(values: Array, what: str) -> None:
    """Refuse what is not finite in float32, which networks compute in."""
    if values.dtype.kind != "f":
        return
    if bad := values.size - np.count_nonzero(np.isfinite(values)):
        message = f"{what}: {bad} of {values.size} voxels are NaN or infinite"
        raise UserError(f"{message}; replace them by the value of the background")
    extreme = max(values.min(), values.max(), key=abs)
    if abs(extreme) > _LARGEST:
        raise UserError(
            f"{what}: the value {extreme:g} is infinite in float32, which networks compute in; replace what is beyond "
            f"{_LARGEST:.2g}, or correct the scaling (scl_slope) in its header"
        )


def is_nifti(path: Path) -> bool:
    """By the name."""
    return path.name.lower().endswith((".nii", ".nii.gz"))


def _open(path: Path, *, stacked: bool = False) -> _Header:
    """Read the header of an image and check that it is one scalar volume with a usable geometry."""
    require_regular(path)
    with reading(path):
        path.open("rb").close()
        header, kind = _open_nifti(path) if is_nifti(path) else _open_itk(path)
    if kind:
        raise UserError(f"{path} has {kind} voxels; export one scalar value per voxel, and one file per channel")
    if len(header.shape) not in ((2, 3, 4) if stacked else (2, 3)):
        raise UserError(
            f"{path} has {len(header.shape)} dimensions, shape {header.shape}; write each 3D volume to a file of its "
            "own (channels are CASE_0000, CASE_0001 and so on)"
        )
    if min(header.shape) < 1 or not np.isfinite(header.affine).all() or abs(np.linalg.det(header.affine)) < 1e-15:
        raise UserError(
            f"{path} has no usable geometry: shape {header.shape}, {header.source} "
            f"{np.round(header.affine, 4).tolist()}; correct its header or convert it anew"
        )
    with reading(path):
        require_room(path, math.prod(header.shape) * header.voxel_bytes)
    return header


def _open_nifti(path: Path) -> tuple[_Header, str]:
    import nibabel

    handle: Any = nibabel.load(path)
    if not isinstance(handle, nibabel.Nifti1Pair):
        raise ValueError(f"it is {type(handle).__name__}")
    _require_mm(path, handle.header)
    forms = [form for form in ("sform", "qform") if int(handle.header[f"{form}_code"]) > 0]
    dtype, source = handle.get_data_dtype(), forms[0] if forms else "no sform or qform"
    kind = "colour (RGB)" if dtype.fields else "complex" if dtype.kind == "c" else ""
    shape, affine = tuple(map(int, handle.shape)), np.asarray(handle.affine, np.float64)
    return _Header(path, shape, affine, source, dtype.itemsize, handle), kind


def _require_mm(path: Path, header: Any) -> None:
    """Refuse lengths that readers take differently: ITK converts them to mm, nibabel does not."""
    code = int(header["xyzt_units"]) & 7
    if code in _MILLIMETRES:
        return
    name, factor = _UNITS.get(code, (f"{code}, which is none", 1.0))
    stored = np.asarray(header.get_zooms(), np.float64)[:3]
    here, there = (" x ".join(f"{value:.4g}" for value in spacing) for spacing in (stored * factor, stored))
    raise UserError(
        f"{path}: its unit of length (xyzt_units) is {name}: to ITK the spacing is {here} mm, to nibabel {there} mm; "
        "store spacing and origin in mm and set the unit to mm"
    )


def _open_itk(path: Path) -> tuple[_Header, str]:
    import SimpleITK

    handle = SimpleITK.ImageFileReader()
    handle.SetFileName(str(path))
    handle.ReadImageInformation()
    dimension = handle.GetDimension()
    affine = np.eye(dimension + 1)
    affine[:-1, :-1] = np.reshape(handle.GetDirection(), (dimension, dimension)) * np.asarray(handle.GetSpacing())
    affine[:-1, -1] = handle.GetOrigin()
    affine[:2] *= -1  # ITK's axes point to left and back, NIfTI's to right and front
    complex_ids = (SimpleITK.sitkComplexFloat32, SimpleITK.sitkComplexFloat64)
    components = handle.GetNumberOfComponents()
    kind = "complex" if handle.GetPixelID() in complex_ids else f"{components}-component" if components > 1 else ""
    one = SimpleITK.Image([1] * dimension, handle.GetPixelID(), components)
    size, voxel_bytes = tuple(map(int, handle.GetSize())), components * one.GetSizeOfPixelComponent()
    return _Header(path, size, affine, "direction and origin", voxel_bytes, handle), kind


def _require_same_grid(image: _Header, label: _Header) -> None:
    if image.shape[:3] != label.shape:
        raise UserError(
            f"{image.path} has shape {image.shape}, but {label.path} has {label.shape}; put all files of the case on "
            "one grid (labels with nearest-neighbour interpolation)"
        )
    # A header of fewer than three spatial axes has a smaller affine in ITK, but not in NIfTI.
    axes = label.affine.shape[0] - 1
    ends = [(0, size - 1) for size in (*label.shape, 1, 1)[:axes]]
    corners = np.stack([*(axis.ravel() for axis in np.meshgrid(*ends)), np.ones(2**axes)])
    distance = float(np.linalg.norm(((image.affine - label.affine) @ corners)[:-1], axis=0).max())
    edges = np.linalg.norm(label.affine[:-1, :-1], axis=0)
    if distance > max(TOLERANCE_MM, 0.01 * float(edges.min())):
        raise UserError(
            f"{image.path} ({image.source}) and {label.path} ({label.source}) lie up to {distance:.4g} mm apart; "
            "resample one onto the other's grid, or, where the voxels do belong together, copy the header"
        )


def _check_image(image: _Header) -> None:
    values = image.read()
    low = values.min()
    if low == values.max():
        raise UserError(f"{image.path}: all voxels have the value {low:g}; replace the image or remove the case")


def check_label_values(path: Path, values: Array, allowed: Collection[int], ignore: int | None, source: str) -> None:
    """Check that a label has whole numbers, foreground, and no value that ``source`` does not name.

    Raises:
        UserError: names file, value and remedy.
    """
    if values.dtype.kind == "f":
        whole = np.rint(values)
        broken = np.abs(values - whole) > _ROUNDING
        if broken.any():
            raise UserError(
                f"{path}: {int(broken.sum())} voxels have values that are no whole numbers "
                f"({listed(np.unique(values[broken]))}); resample labels with nearest-neighbour interpolation"
            )
        # Integers of 16 bits are sorted much faster.
        values = whole.astype(np.int16) if max(-float(whole.min()), float(whole.max())) < 2**15 else whole
    present = {int(value) for value in np.unique(values)}
    unknown = sorted(present - set(allowed))
    if unknown:
        raise UserError(
            f"{path} has the value {listed(unknown)}, {source} has {listed(sorted(allowed), 20)}; correct the "
            f"file, or the labels in {source}"
        )
    if not present - {0, ignore}:
        raise UserError(
            f"{path}: the label has no foreground (values: {listed(sorted(present))}); Dice is undefined, remove "
            "the case or correct its label"
        )


def listed(values: Iterable[Any], most: int = 5) -> str:
    """The first few of some values, for messages."""
    items = [f"{value:g}" if isinstance(value, float | np.floating) else str(value) for value in values]
    shown = ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
    return shown or "nothing"
