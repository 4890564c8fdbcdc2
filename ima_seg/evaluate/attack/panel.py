"""Slices of a case for the report: image, perturbation, and predictions before and after it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ima_seg.cases.raw import FloatArray, LabelArray, intensities
from ima_seg.cases.write import slug
from ima_seg.evaluate.records import Record
from ima_seg.evaluate.subject import Case
from ima_seg.files import replacing

#: What identifies a condition within a run: attack, eps, severity.
Key = tuple[Any, ...]
#: Soft-tissue window of CT, HU.
_CT_WINDOW = (-160.0, 240.0)
#: Colours of 8 bits are shown as they are.
_COLOURS = (0.0, 255.0)


def panel_name(case: str, model: str, attack: str) -> str:
    """The file of a white-box attack at the middle budget, relative to the output folder; only the worst has one."""
    return f"panels/{'__'.join(map(slug, (case, model, attack)))}.npz"


def with_panels(records: Iterable[Record], case: str, model: str) -> list[Record]:
    """The records of a case and model that have a panel, or had one until a worse attack was found."""
    return [record for record in records if record.key[:2] == (case, model) and record.panel is not None]


def is_worst(dice: float | None, key: Key, others: Sequence[Record], order: Sequence[Key]) -> bool:
    """Whether the condition ``key`` leaves no more Dice than ``others``.

    The ``order`` of the conditions settles a tie, so that an evaluation that was interrupted keeps the same panels.
    """
    found = [(r.dice, order.index(r.key[2:])) for r in others if r.dice is not None and r.key[2:] in order]
    return dice is not None and all((dice, order.index(key)) <= other for other in found)


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
