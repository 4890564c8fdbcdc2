"""Cases for an evaluation: finding images and labels in nnU-Net's naming, and checking them before they are used."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ima_seg.errors import UserError
from ima_seg.nnunet.compat import channel_names

Array = npt.NDArray[Any]

#: Two files lie at the same place when no corner of the volume is further apart than this, or 1% of a voxel edge.
TOLERANCE_MM = 1e-3
_SHOWN = 5


@dataclass(frozen=True)
class CaseFiles:
    """One case on disk: one image per channel, in the order of the channels, and the label."""

    case: str
    images: tuple[Path, ...]
    label: Path


@dataclass(frozen=True)
class CaseProblem:
    """A case that cannot be evaluated because files are missing or too many."""

    case: str
    message: str


def check_limit(limit: int | None) -> None:
    """Refuse a number of cases that is none."""
    if limit is not None and limit < 1:
        raise UserError(f"limit of cases {limit}: give at least 1, or none for all cases")


def find_cases(
    images: Path, labels: Path, dataset_json: Mapping[str, Any], *, limit: int | None = None
) -> tuple[list[CaseFiles], list[CaseProblem]]:
    """Find the cases of two folders: ``CASE_0000.nii.gz`` and so on, and ``CASE.nii.gz``.

    Args:
        images: folder such as ``imagesTs``.
        labels: folder such as ``labelsTs``.
        dataset_json: contents of dataset.json.
        limit: stop, in the order of the names, after so many complete cases.

    Returns:
        The complete cases and the incomplete ones, both sorted by name.

    Raises:
        UserError: a folder is missing or unreadable, or there is not a single complete case.
    """
    check_limit(limit)
    ending = dataset_json.get("file_ending")
    if not isinstance(ending, str) or not ending:
        raise UserError('dataset.json has no "file_ending"; add it, for example "file_ending": ".nii.gz"')
    channels = len(channel_names(dataset_json))
    image_files, label_files = list_files(images, "images"), list_files(labels, "labels")
    pattern = re.compile(rf"(.+)_(\d{{4}}){re.escape(ending)}", re.DOTALL)
    channels_of: dict[str, set[int]] = {}
    for name in image_files:
        if match := pattern.fullmatch(name):
            channels_of.setdefault(match[1], set()).add(int(match[2]))
    labelled = {name[: -len(ending)] for name in label_files if name.endswith(ending) and len(name) > len(ending)}
    found: list[CaseFiles] = []
    problems: list[CaseProblem] = []
    for case in sorted(channels_of.keys() | labelled):
        if limit is not None and len(found) == limit:
            break
        files = CaseFiles(
            case, tuple(images / f"{case}_{index:04d}{ending}" for index in range(channels)), labels / f"{case}{ending}"
        )
        message = _incomplete(files, channels_of.get(case, set()), case in labelled, ending)
        if message is None:
            found.append(files)
        else:
            problems.append(CaseProblem(case, message))
    if not found:
        last = f"_{channels - 1:04d}" if channels > 1 else ""
        raise UserError(
            f"no case with images and label: expected CASE_0000{ending}{f' to CASE{last}{ending}' if last else ''} in "
            f"{images} (found: {some(image_files)}) and CASE{ending} in {labels} (found: {some(label_files)}); check "
            "the folders, the names of the files, and file_ending and channel_names in dataset.json"
        )
    return found, problems


def allowed_labels(dataset_json: Mapping[str, Any]) -> set[int]:
    """All values a label file may have: background, classes, members of regions and the ignore label."""
    values = {0}
    for value in dataset_json["labels"].values():
        values.update(int(member) for member in (value if isinstance(value, list | tuple) else [value]))
    return values


def ignore_value(dataset_json: Mapping[str, Any]) -> int | None:
    """Value of the ignore label; None when the data set has none."""
    value = dataset_json["labels"].get("ignore")
    return None if value is None else int(value)


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
        labels_allowed: values that its label may have, see :func:`allowed_labels`.
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
    _check_label(label, labels_allowed, ignore, source)


@dataclass(frozen=True)
class _Header:
    """What the header of a file says, and the open file."""

    path: Path
    shape: tuple[int, ...]
    affine: npt.NDArray[np.float64]  # voxel index to mm
    source: str  # of the affine
    handle: Any

    def read(self) -> Array:
        """All voxels, with the header's scaling."""
        try:
            if _is_nifti(self.path):
                return np.asanyarray(self.handle.dataobj)
            import SimpleITK

            return np.asarray(SimpleITK.GetArrayFromImage(self.handle.Execute()))
        except Exception as error:  # zlib, gzip, numpy and ITK have their own
            raise _unreadable(self.path, error) from None


def list_files(folder: Path, content: str) -> list[str]:
    """Sorted names of the files in ``folder`` without hidden ones.

    Raises:
        UserError: ``folder``, which should hold ``content``, is missing or cannot be listed.
    """
    try:
        return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".") and not entry.is_dir())
    except FileNotFoundError:
        raise UserError(f"{folder} does not exist; name the folder with the {content}") from None
    except NotADirectoryError:
        raise UserError(f"{folder} is a file; name the folder with the {content}") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be listed ({error.strerror}); give yourself permission to read it") from None


def some(names: Collection[str]) -> str:
    """The first few names, for messages."""
    shown = ", ".join(list(names)[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown or "nothing"


def _incomplete(files: CaseFiles, present: set[int], labelled: bool, ending: str) -> str | None:
    """What is missing of a case; None when it is complete."""
    if not present:
        return f"{files.label} has no image: {files.images[0]} does not exist; add it or remove the label"
    missing = [path for index, path in enumerate(files.images) if index not in present]
    if missing:
        return f"channel file {', '.join(map(str, missing))} does not exist; add it or remove the case"
    extra = [f"{files.case}_{index:04d}{ending}" for index in sorted(present) if index >= len(files.images)]
    if extra:
        return (
            f"{files.images[0].parent} has {', '.join(extra)}, but dataset.json names {len(files.images)} channel(s); "
            "remove the file or correct channel_names"
        )
    if not labelled:
        return f"{files.images[0]} has no label: {files.label} does not exist; add it or remove the image"
    return None


def _is_nifti(path: Path) -> bool:
    return path.name.endswith((".nii", ".nii.gz"))


def _unreadable(path: Path, error: Exception) -> UserError:
    if isinstance(error, PermissionError):
        return UserError(f"{path} may not be read ({error.strerror}); give yourself permission, chmod u+r")
    if isinstance(error, FileNotFoundError) or not path.exists():
        return UserError(f"{path} does not exist; add it or remove the case")
    if isinstance(error, MemoryError):
        return UserError(f"{path} does not fit into memory; use a machine with more")
    detail = " ".join(str(error).split()) or type(error).__name__
    size = path.stat().st_size
    return UserError(
        f"{path} ({size} bytes) cannot be read, it is truncated or not of the format its name says ({detail[-200:]}); "
        "copy it again from its source or convert it anew"
    )


def _open(path: Path, *, stacked: bool = False) -> _Header:
    """Read the header of an image and check that it is one scalar volume with a usable geometry."""
    try:
        with path.open("rb"):
            pass
        header, kind = _open_nifti(path) if _is_nifti(path) else _open_itk(path)
    except Exception as error:  # as above
        raise _unreadable(path, error) from None
    if kind:
        raise UserError(f"{path} has {kind} voxels; export one scalar value per voxel, and one file per channel")
    if len(header.shape) not in ((2, 3, 4) if stacked else (2, 3)):
        raise UserError(
            f"{path} has {len(header.shape)} dimensions, shape {header.shape}; write each 3D volume to a file of its "
            "own (channels are CASE_0000, CASE_0001 and so on)"
        )
    if 0 in header.shape or not np.isfinite(header.affine).all() or abs(np.linalg.det(header.affine)) < 1e-15:
        raise UserError(
            f"{path} has no usable geometry: shape {header.shape}, {header.source} "
            f"{np.round(header.affine, 4).tolist()}; correct its header or convert it anew"
        )
    return header


def _open_nifti(path: Path) -> tuple[_Header, str]:
    import nibabel

    handle: Any = nibabel.load(path)
    if not isinstance(handle, nibabel.Nifti1Pair):
        raise ValueError(f"it is {type(handle).__name__}")
    names = [name for name, code in (("sform", "sform_code"), ("qform", "qform_code")) if int(handle.header[code]) > 0]
    dtype = handle.get_data_dtype()
    kind = "colour (RGB)" if dtype.fields else "complex" if dtype.kind == "c" else ""
    affine = np.asarray(handle.affine, np.float64)
    return _Header(
        path, tuple(map(int, handle.shape)), affine, names[0] if names else "no sform or qform", handle
    ), kind


def _open_itk(path: Path) -> tuple[_Header, str]:
    import SimpleITK

    handle = SimpleITK.ImageFileReader()
    handle.SetFileName(str(path))
    handle.ReadImageInformation()
    dimension = handle.GetDimension()
    affine = np.eye(dimension + 1)
    affine[:-1, :-1] = np.reshape(handle.GetDirection(), (dimension, dimension)) * np.asarray(handle.GetSpacing())
    affine[:-1, -1] = handle.GetOrigin()
    complex_ids = (SimpleITK.sitkComplexFloat32, SimpleITK.sitkComplexFloat64)
    components = handle.GetNumberOfComponents()
    kind = "complex" if handle.GetPixelID() in complex_ids else f"{components}-component" if components > 1 else ""
    return _Header(path, tuple(map(int, handle.GetSize())), affine, "direction and origin", handle), kind


def _require_same_grid(image: _Header, label: _Header) -> None:
    if (image.shape[:3] if len(image.shape) == 4 else image.shape) != label.shape:
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
    if values.dtype.kind == "f":
        _refuse_not_finite(image.path, values)
    low, high = values.min(), values.max()
    if low == high:
        raise UserError(f"{image.path}: all voxels have the value {low:g}; replace the image or remove the case")


def _refuse_not_finite(path: Path, values: Array) -> None:
    bad = int(values.size - np.count_nonzero(np.isfinite(values)))
    if bad:
        raise UserError(
            f"{path}: {bad} of {values.size} voxels are NaN or infinite; replace them by the value of the background"
        )


def _check_label(label: _Header, allowed: Collection[int], ignore: int | None, source: str) -> None:
    values = label.read()
    if values.dtype.kind == "f":
        _refuse_not_finite(label.path, values)
        broken = values != np.rint(values)
        if broken.any():
            raise UserError(
                f"{label.path}: {int(broken.sum())} voxels have values that are no whole numbers "
                f"({_list(np.unique(values[broken]))}); resample labels with nearest-neighbour interpolation"
            )
        if max(-float(values.min()), float(values.max())) < 2**15:
            values = values.astype(np.int16)  # sorted much faster
    present = {int(value) for value in np.unique(values)}
    unknown = sorted(present - set(allowed))
    if unknown:
        raise UserError(
            f"{label.path} has the value {_list(unknown)}, {source} has {_list(sorted(allowed), 20)}; correct the "
            f"file, or the labels in {source}"
        )
    if not present - {0, ignore}:
        raise UserError(
            f"{label.path}: the label has no foreground (values: {_list(sorted(present))}); Dice is undefined, remove "
            "the case or correct its label"
        )


def _list(values: Iterable[Any], most: int = _SHOWN) -> str:
    items = [f"{value:g}" if isinstance(value, float | np.floating) else str(value) for value in values]
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
