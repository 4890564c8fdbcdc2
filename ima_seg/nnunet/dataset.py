"""What dataset.json says: channels, labels, and the names of the cases' files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ima_seg.cases import find
from ima_seg.cases.raw import CaseFiles, CaseProblem
from ima_seg.errors import UserError


def channel_names(dataset_json: Mapping[str, Any]) -> list[str]:
    """Names of the image channels in order; masks that a cascade appends are not among them."""
    names = dataset_json.get("channel_names") or dataset_json["modality"]
    return [str(names[key]) for key in sorted(names, key=int)]


def label_values(dataset_json: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> values in the label files, several for a region; background and ignore label are among them."""
    return {
        str(name): tuple(int(v) for v in (value if isinstance(value, list | tuple) else [value]))
        for name, value in dataset_json["labels"].items()
    }


def allowed_labels(dataset_json: Mapping[str, Any]) -> set[int]:
    """All values a label file may have: background, classes, members of regions and the ignore label."""
    return {0}.union(*label_values(dataset_json).values())


def ignore_value(dataset_json: Mapping[str, Any]) -> int | None:
    """Value of the ignore label; ``None`` when the data set has none."""
    return label_values(dataset_json).get("ignore", (None,))[0]


def foreground_classes(dataset_json: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Foreground names -> label values in the order of the network's outputs, as nnU-Net's LabelManager has it."""
    values = label_values(dataset_json)
    classes = {name: value for name, value in values.items() if name != "ignore" and value != (0,)}
    if any(len(value) > 1 for value in classes.values()):
        return classes
    return dict(sorted(classes.items(), key=lambda item: item[1]))


def find_cases(
    images: Path, labels: Path, dataset_json: Mapping[str, Any], *, limit: int | None = None, one_file: bool = False
) -> tuple[list[CaseFiles], list[CaseProblem]]:
    """:func:`ima_seg.cases.find.find_cases` in the naming of a data set."""
    ending = dataset_json.get("file_ending")
    if not isinstance(ending, str) or not ending:
        raise UserError('dataset.json has no "file_ending"; add it, for example "file_ending": ".nii.gz"')
    channels = len(channel_names(dataset_json))
    return find.find_cases(images, labels, channels=channels, endings=[ending], one_file=one_file, limit=limit)
