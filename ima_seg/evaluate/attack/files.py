"""Adversarial files in the original geometry, and slices of them for the report."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ima_seg.errors import UserError
from ima_seg.evaluate.subject import Case
from ima_seg.files import replacing
from ima_seg.nnunet.case import FloatArray, LabelArray
from ima_seg.nnunet.folder import SegmentationModel

#: Readers of nnU-Net whose arrays are the stored voxels with the axes reversed.
_READERS = ("SimpleITKIO", "NibabelIO")
#: Integers are exact in float32 up to here.
_FLOAT32_EXACT = 2**24
#: Soft-tissue window of CT, HU.
_CT_WINDOW = (-160.0, 240.0)


def slug(name: str) -> str:
    """``name`` as part of a file name: what is not plain is replaced, and a hash keeps different names apart."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name)
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def check_writable(model: SegmentationModel) -> None:
    """Refuse a reader whose arrays cannot be put back where they came from."""
    reader = model.plans.image_reader_writer_class().__class__.__name__
    if reader not in _READERS:
        raise UserError(
            f"{model.folder} reads images with {reader}, for which adversarial files cannot be written; "
            f"leave --save-adversarial out (supported: {', '.join(_READERS)})"
        )


def save_adversarial(sources: Sequence[Path], delta: FloatArray, folder: Path) -> tuple[list[Path], list[Path]]:
    """Write the adversarial image and the difference of each channel, each in one rename.

    Geometry and header are those of the source; the data are float32, or float64 where float32 could not hold the
    source's values.

    Args:
        sources: original image of each channel, or a single one with the channels along its last axis.
        delta: (C, Z, Y, X) perturbation in original intensities.
        folder: gets ``images/NAME`` (a folder for ``nnUNetv2_predict -i``) and ``difference/NAME``, under the names of
            the sources.

    Returns:
        The images and the differences, per source.
    """
    images: list[Path] = []
    differences: list[Path] = []
    for source, change in zip(sources, delta if len(sources) > 1 else [delta], strict=True):
        for kind, collected in (("images", images), ("difference", differences)):
            path = folder / kind / source.name
            with replacing(path) as temporary:
                _write(source, change, temporary, add=kind == "images")
            collected.append(path)
    return images, differences


def _wide(stored: npt.DTypeLike, values: npt.NDArray[Any]) -> type[np.floating[Any]]:
    wide = np.dtype(stored) == np.float64 or np.abs(values).max(initial=0) >= _FLOAT32_EXACT
    return np.float64 if wide else np.float32


def _write(source: Path, change: FloatArray, path: Path, *, add: bool) -> None:
    if source.name.endswith((".nii", ".nii.gz")):
        import nibabel

        stored = nibabel.load(source)
        values = np.asanyarray(stored.dataobj)
        turned = change.transpose().reshape(values.shape)
        data = (values.astype(np.float64) + turned if add else turned).astype(_wide(stored.get_data_dtype(), values))
        header = stored.header.copy()
        header.set_data_dtype(data.dtype)
        nibabel.save(stored.__class__(data, stored.affine, header), path)
        return
    import SimpleITK

    stored = SimpleITK.ReadImage(str(source))
    values = SimpleITK.GetArrayFromImage(stored)
    turned = change.reshape(values.shape)
    data = (values.astype(np.float64) + turned if add else turned).astype(_wide(values.dtype, values))
    image = SimpleITK.GetImageFromArray(data)
    image.CopyInformation(stored)
    SimpleITK.WriteImage(image, str(path), True)


def write_panel(path: Path, case: Case, *, delta: FloatArray, before: LabelArray, after: LabelArray) -> None:
    """Store the slice that changed most, across the thickest voxel axis, for the report.

    Args:
        path: npz to write.
        case: the case.
        delta: (C, Z, Y, X) perturbation, original intensities.
        before: prediction of the clean image, see :meth:`Case.predict`.
        after: prediction of the perturbed one.
    """
    before, after = _label_map(before, case), _label_map(after, case)
    spacing = case.raw.spacing_mm
    axis = int(np.argmax(spacing))
    others = tuple(other for other in range(3) if other != axis)
    index = int(np.argmax((before != after).sum(others)))
    if (before == after).all():
        index = int(np.argmax((case.raw.reference > 0).sum(others)))

    def cut(volume: npt.NDArray[Any]) -> npt.NDArray[Any]:
        taken: npt.NDArray[Any] = np.take(volume, index, axis)
        return taken

    image = case.raw.image[0]
    window = _CT_WINDOW if case.shows_hu else tuple(float(value) for value in np.percentile(image, (0.5, 99.5)))
    clean, change = cut(image).astype(np.float32), cut(delta[0]).astype(np.float32)
    with replacing(path) as temporary:
        np.savez_compressed(
            temporary,
            clean=clean,
            delta=change,
            adversarial=clean + change,
            before=cut(before).astype(np.uint8),
            after=cut(after).astype(np.uint8),
            truth=cut(case.raw.reference).astype(np.uint8),
            spacing=np.array([spacing[other] for other in others], dtype=np.float32),
            window=np.array(window, dtype=np.float32),
            index=index,
            axis=axis,
        )


def _label_map(prediction: LabelArray, case: Case) -> LabelArray:
    """Masks of overlapping classes (classes, Z, Y, X) -> a label map to look at, small classes on top of large ones."""
    if prediction.ndim == 3:
        return prediction
    flat: LabelArray = np.zeros(prediction.shape[1:], np.int16)
    everything = [value for values in case.model.classes.values() for value in values]
    for mask, values in sorted(
        zip(prediction, case.model.classes.values(), strict=True), key=lambda item: -len(item[1])
    ):
        flat[mask] = min(values, key=everything.count)
    return flat
