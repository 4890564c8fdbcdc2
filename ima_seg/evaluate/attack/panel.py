"""Slices of a case for the report: image, perturbation, and predictions before and after it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ima_seg.cases.raw import FloatArray, LabelArray, intensities
from ima_seg.evaluate.subject import Case
from ima_seg.files import replacing

#: Soft-tissue window of CT, HU.
_CT_WINDOW = (-160.0, 240.0)
#: Colours of 8 bits are shown as they are.
_COLOURS = (0.0, 255.0)


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
    spacing, reference = case.raw.spacing_mm, case.raw.reference
    # Colours come last, as in pictures.
    colour, both = case.raw.colour, (case.raw.image, delta)
    image, change = (values.transpose(1, 2, 3, 0) if colour else values[0] for values in both)
    axis = int(np.argmax(spacing))
    others = tuple(other for other in range(3) if other != axis)
    shown = before != after
    index = int(np.argmax((shown if shown.any() else reference > 0).sum(others)))
    clean, change, *maps = (np.take(volume, index, axis) for volume in (image, change, before, after, reference))
    clean, change = clean.astype(np.float32), change.astype(np.float32)
    window = _CT_WINDOW if case.shows_hu else tuple(map(float, np.percentile(intensities(image), (0.5, 99.5))))
    if colour and case.raw.limits is not None and (case.raw.limits == _COLOURS).all():
        window = _COLOURS
    with replacing(path) as temporary:
        np.savez_compressed(
            temporary,
            clean=clean,
            delta=change,
            adversarial=clean + change,
            **{name: flat.astype(np.uint8) for name, flat in zip(("before", "after", "truth"), maps, strict=True)},
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
    classes = case.model.classes.values()
    everything = [value for values in classes for value in values]
    for mask, values in sorted(zip(prediction, classes, strict=True), key=lambda item: -len(item[1])):
        flat[mask] = min(values, key=everything.count)
    return flat
