"""A synthetic data set in nnU-Net's raw format whose difficulty is real.

An abdomen with an organ (label 1) and lesions in it (label 2), among decoys with the same intensities that are
background: spleen, kidneys, bowel, spots. Intensities of neighbouring tissues overlap; MR images have a coil bias field
and Rician noise, CT images are in HU with correlated noise and streaks; borders have partial volume; the pose, size,
form and number of structures vary and one case in five has no lesion. The volumes are oblique, with true affines.

One file: a data set's arguments, its cases and its folder are checked and made together.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt

from ima_seg.data.naming import dataset_folder_name, folders_with_id, make_folder
from ima_seg.data.phantom_anatomy import Array, Space, Vector, draw_abdomen, rotation, smooth_field
from ima_seg.data.phantom_imaging import CHANNELS, Modality, paint, scan_ct, scan_mr
from ima_seg.errors import UserError
from ima_seg.files import building_folder

SpacingPreset = Literal["isotropic", "anisotropic"]

PRESETS: dict[str, tuple[tuple[float, float, float], tuple[int, int, int]]] = {
    "isotropic": ((1.0, 1.0, 1.0), (48, 48, 48)),
    "anisotropic": ((1.0, 1.0, 4.0), (64, 64, 16)),
}
"""Spacing (mm) and matrix per preset; axes are (left-right, front-back, head-foot)."""

SMALLEST_AXIS = 16
_MARK = "ima_seg_phantom"
_MAX_VOXELS = 512**3


@dataclass(frozen=True)
class PhantomCase:
    """One case in memory.

    Attributes:
        images: one int16 array per channel, shape (X, Y, Z).
        label: dense annotation, uint8, same shape: 0 background, 1 organ, 2 lesion.
        annotated: True where a sparse annotator looked, bool, same shape.
        affine: voxel index to RAS mm, float64, shape (4, 4).
    """

    images: list[npt.NDArray[np.int16]]
    label: npt.NDArray[np.uint8]
    annotated: npt.NDArray[np.bool_]
    affine: npt.NDArray[np.float64]


def draw_case(
    index: int,
    *,
    seed: int = 0,
    test: bool = False,
    modality: Modality = "mr",
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    shape: tuple[int, int, int] = (48, 48, 48),
) -> PhantomCase:
    """Draw one case; the same arguments give the same voxels, whatever other cases exist.

    Args:
        index: number of the case, from 0.
        seed: seed of the data set, from 0.
        test: draw from the stream of test cases, which shares nothing with that of the training cases.
        modality: "mr" (one channel), "mr2" (T1 and T2) or "ct" (HU).
        spacing: voxel size, mm.
        shape: voxels per axis.
    """
    rng = np.random.default_rng(np.random.SeedSequence(entropy=seed, spawn_key=(int(test), index)))
    affine = _draw_affine(rng, spacing, shape)
    thin = _sub_slices(spacing)
    space = _patient_space(rng, affine, spacing, shape, thin)
    case = draw_abdomen(rng, space, lesion=not _is_spared(index, seed, test))
    fine_shape = space.points.shape[1:]
    images, *targets = paint(rng, case, CHANNELS[modality], fine_shape)
    images = [_merge_slices(image, thin) for image in images]
    organ, lesion = (_merge_slices(target, thin) for target in targets)
    label = np.where(organ + lesion > 0.5, np.where(lesion >= organ, 2, 1), 0).astype(np.uint8)
    if modality == "ct":
        spine = (space.points[i] - np.float32(case.spine[i]) for i in (0, 1))
        x, y = (_merge_slices(np.ascontiguousarray(axis), thin) for axis in spine)
        scanned = [scan_ct(rng, images[0], (x, y), spacing)]
    else:
        scanned = scan_mr(rng, images, spacing)
    return PhantomCase(scanned, label, _draw_annotated(rng, label), affine)


def write_phantom_dataset(
    root: Path,
    *,
    dataset_id: int,
    name: str = "Phantom",
    cases: int = 20,
    test_cases: int = 0,
    seed: int = 0,
    modality: Modality = "mr",
    spacing: tuple[float, float, float] | SpacingPreset = "isotropic",
    shape: tuple[int, int, int] | None = None,
    regions: bool = False,
    ignore_label: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a phantom data set in nnU-Net's raw format.

    Images are int16 (MR 0..4095, CT in HU), labels uint8, both NIfTI with one oblique RAS- or LPS-stored affine per
    case. Test cases get dense labels in ``labelsTs``, also with ``ignore_label``.

    Args:
        root: folder of raw data sets, usually ``nnUNet_raw``; made if missing.
        dataset_id: 1..999.
        name: letters, digits, single ``_`` and ``-``; the folder is ``Dataset<id>_<name>``.
        cases: number of training cases, at least 1; nnU-Net's five folds need 5.
        test_cases: number of test cases, written to ``imagesTs`` and ``labelsTs``.
        seed: not negative. Case ``i`` depends on ``(seed, i)`` only, not on the number of cases.
        modality: "mr" (channel "MRI"), "mr2" ("T1", "T2") or "ct" ("CT", which selects nnU-Net's CT normalisation).
        spacing: voxel size in mm along left-right, front-back and head-foot, or a preset with its own matrix:
            "isotropic" (1, 1, 1) or "anisotropic" (1, 1, 4).
        shape: voxels per axis, each at least 16; default: the preset's, else (48, 48, 48).
        regions: declare nested regions, organ = (1, 2) and lesion = 2, with ``regions_class_order``.
        ignore_label: annotate the training cases sparsely: everything outside some slices or one block is "ignore" (3).
        overwrite: replace an existing phantom data set of this name.

    Returns:
        The data set's folder.

    Raises:
        UserError: an argument is out of range, the id or the folder is taken, or the folder is not a phantom's.
    """
    spacing_mm, matrix = _resolve_grid(spacing, shape)
    _check_numbers(cases=cases, test_cases=test_cases, seed=seed, modality=modality)
    target = root / dataset_folder_name(dataset_id, name)
    make_folder(root, "folder of raw data sets")
    _check_target(root, target, dataset_id, overwrite)
    setting: dict[str, Any] = {
        "modality": modality, "spacing": list(spacing_mm), "shape": list(matrix), "seed": seed, "cases": cases,
        "test_cases": test_cases, "regions": regions, "ignore_label": ignore_label,
    }  # fmt: skip
    with building_folder(target, replace=overwrite) as folder:
        for part in ("imagesTr", "labelsTr") + (("imagesTs", "labelsTs") if test_cases else ()):
            (folder / part).mkdir()
        for test, count in ((False, cases), (True, test_cases)):
            end = "Ts" if test else "Tr"
            for index in range(count):
                case = draw_case(index, seed=seed, test=test, modality=modality, spacing=spacing_mm, shape=matrix)
                case_id = f"{name}_{'test_' if test else ''}{index:03d}"
                for channel, image in enumerate(case.images):
                    _save(image, case.affine, folder / f"images{end}" / f"{case_id}_{channel:04d}.nii.gz")
                label = case.label
                if ignore_label and not test:
                    label = np.where(case.annotated, label, 3).astype(np.uint8)
                _save(label, case.affine, folder / f"labels{end}" / f"{case_id}.nii.gz")
        description = _describe(name, CHANNELS[modality], cases, regions, ignore_label) | {_MARK: setting}
        (folder / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return target


def _describe(name: str, channels: Sequence[str], cases: int, regions: bool, ignore_label: bool) -> dict[str, Any]:
    labels: dict[str, Any] = {"background": 0, "organ": [1, 2] if regions else 1, "lesion": 2}
    if ignore_label:
        labels["ignore"] = 3
    content: dict[str, Any] = {
        "name": name,
        "description": "Synthetic abdomen: an organ and its lesions among look-alikes",
        "licence": "CC0-1.0",
        "channel_names": {str(i): channel for i, channel in enumerate(channels)},
        "labels": labels,
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    if regions:
        content["regions_class_order"] = [1, 2]
    return content


def _save(array: npt.NDArray[Any], affine: npt.NDArray[np.float64], path: Path) -> None:
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    nib.save(image, path)


def _resolve_grid(
    spacing: tuple[float, float, float] | str, shape: tuple[int, int, int] | None
) -> tuple[tuple[float, float, float], tuple[int, int, int]]:
    matrix: Sequence[int] = (48, 48, 48)
    if isinstance(spacing, str):
        if spacing not in PRESETS:
            raise UserError(f"spacing {spacing!r} is unknown: use {' or '.join(PRESETS)}, or three numbers in mm")
        spacing, matrix = PRESETS[spacing]
    matrix = matrix if shape is None else shape
    if len(spacing) != 3 or not all(0.05 <= value <= 50 for value in spacing):
        raise UserError(f"spacing {tuple(spacing)} is not usable: give three values from 0.05 to 50 mm")
    if len(matrix) != 3 or any(int(size) != size or size < SMALLEST_AXIS for size in matrix):
        raise UserError(f"shape {tuple(matrix)} is too small: give three axes of at least {SMALLEST_AXIS} voxels")
    if np.prod([float(size) for size in matrix]) > _MAX_VOXELS:
        raise UserError(f"shape {tuple(matrix)} is too large: at most {_MAX_VOXELS} voxels per case")
    x, y, z = (float(value) for value in spacing)
    nx, ny, nz = (int(size) for size in matrix)
    return (x, y, z), (nx, ny, nz)


def _check_numbers(*, cases: int, test_cases: int, seed: int, modality: str) -> None:
    if cases < 1:
        raise UserError(f"number of training cases {cases}: give at least 1 (5 for nnU-Net's five folds)")
    for what, number in (("number of test cases", test_cases), ("seed", seed)):
        if number < 0:
            raise UserError(f"{what} {number}: give 0 or more")
    if modality not in CHANNELS:
        raise UserError(f"modality {modality!r} is unknown: use one of {', '.join(CHANNELS)}")


def _check_target(root: Path, target: Path, dataset_id: int, overwrite: bool) -> None:
    others = [path for path in folders_with_id(dataset_id, root) if path != target]
    if others:
        raise UserError(f"dataset id {dataset_id} is taken by {others[0]}: choose another id")
    if not target.exists():
        return
    if not overwrite:
        raise UserError(f"{target} exists already: allow overwriting, or choose another id or name")
    try:
        known = _MARK in json.loads((target / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = False
    if not known:
        raise UserError(f"{target} is not a phantom data set and is left alone: choose another id or remove it")


def _is_spared(index: int, seed: int, test: bool) -> bool:
    """Return whether this case has no lesion: one, drawn at random, in each run of five cases."""
    block, place = divmod(index, 5)
    stream = np.random.SeedSequence(entropy=seed, spawn_key=(2 + int(test), block))
    return int(np.random.default_rng(stream).integers(5)) == place


def _draw_affine(rng: np.random.Generator, spacing: Sequence[float], shape: Sequence[int]) -> npt.NDArray[np.float64]:
    """Draw an oblique orientation (up to 12 degrees), RAS or LPS storage order, and an origin."""
    turn = rotation(np.deg2rad(np.clip(rng.normal(0, 5, 3), -12, 12)))
    sign = (1.0, 1.0, 1.0) if rng.random() < 0.6 else (-1.0, -1.0, 1.0)
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(sign) @ np.diag(spacing)
    isocentre = rng.normal(0, (15, 25, 120))
    affine[:3, 3] = isocentre - affine[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    return affine.astype(np.float32).astype(np.float64)  # what the NIfTI header will hold


def _sub_slices(spacing: Sequence[float]) -> list[int]:
    """How many sub-slices per voxel model the partial volume of thick slices, per axis."""
    return [int(np.clip(np.floor(size / min(spacing) + 0.5), 1, 4)) for size in spacing]


def _merge_slices(array: Array, thin: Sequence[int]) -> Array:
    if max(thin) == 1:
        return array
    x, y, z = (size // count for size, count in zip(array.shape, thin, strict=True))
    merged: Array = array.reshape(x, thin[0], y, thin[1], z, thin[2]).mean(axis=(1, 3, 5), dtype=np.float32)
    return merged


def _patient_space(
    rng: np.random.Generator,
    affine: npt.NDArray[np.float64],
    spacing: Sequence[float],
    shape: Sequence[int],
    thin: Sequence[int],
) -> Space:
    """The grid in patient units: the affine's orientation, a random pose and size, and a smooth warp."""
    fine = [size * count for size, count in zip(shape, thin, strict=True)]
    axes = [(np.arange(n) + 0.5) / count - 0.5 - (n // count - 1) / 2 for n, count in zip(fine, thin, strict=True)]
    half: Vector = np.asarray(shape) * np.asarray(spacing) / 2
    to_patient = rotation(np.deg2rad(rng.normal(0, 3, 3))) @ affine[:3, :3] / half[:, None]
    points = np.zeros((3, *fine), np.float32)
    for column, values, cut in zip(to_patient.T, axes, ((-1, 1, 1), (1, -1, 1), (1, 1, -1)), strict=True):
        points += column.astype(np.float32)[:, None, None, None] * values.astype(np.float32).reshape(cut)
    points /= np.float32(rng.uniform(0.92, 1.05))
    points += rng.normal(0, (0.03, 0.03, 0.12)).astype(np.float32)[:, None, None, None]
    for axis in range(3):
        points[axis] += np.float32(0.03) * smooth_field(rng, fine, 5)
    return Space(points, half, edge=1.3 * min(spacing))


def _draw_annotated(rng: np.random.Generator, label: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Draw what a sparse annotator looked at: about a third of the slices, or one block around part of the organ."""
    seen = np.zeros(label.shape, bool)
    where = np.argwhere(label > 0)
    centre = where[rng.integers(len(where))] if len(where) else np.asarray(label.shape) // 2
    if rng.random() < 0.6:
        step = int(rng.integers(3, 5))
        seen[:, :, centre[2] % step :: step] = True
        return seen
    box = []
    for middle, size in zip(centre, label.shape, strict=True):
        width = int(np.ceil(size * rng.uniform(0.55, 0.75)))
        start = int(np.clip(middle - width // 2, 0, size - width))
        box.append(slice(start, start + width))
    seen[tuple(box)] = True
    return seen
