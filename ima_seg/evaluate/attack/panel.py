"""Slices of a case for the report: image, perturbation, and predictions before and after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ima_seg.cases.raw import FloatArray, LabelArray
from ima_seg.evaluate.subject import Case
from ima_seg.files import replacing

#: Soft-tissue window of CT, HU.
_CT_WINDOW = (-160.0, 240.0)


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
