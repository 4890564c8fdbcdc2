"""Original intensities: how many native units one network unit is, per case and channel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ima_seg.errors import UserError
from ima_seg.nnunet.compat import native_columns, normalise, shared_native_scale


def native_scale(
    case: str, images: Path, *, plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any]
) -> dict[str, float]:
    """Native intensity units (HU, scanner units) per network unit of each channel of one case, by column name.

    The case is read, cropped and normalised by nnU-Net itself; the scale is the slope of the line between original and
    normalised values, so it holds for any scheme that is linear within the case.

    Args:
        case: case id.
        images: folder with ``CASE_0000.nii.gz`` and so on.
        plans: contents of the plans file.
        configuration: configuration whose normalisation is meant.
        dataset_json: contents of dataset.json.

    Raises:
        UserError: a channel's file is missing, or a channel is constant.
    """
    columns = native_columns(plans, configuration, dataset_json)
    files = [images / f"{case}_{index:04d}{dataset_json['file_ending']}" for index in range(len(columns))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} does not exist; name the folder of the training images with --images")
    # CT normalisation clips, so its slope is taken from the plans.
    scales = shared_native_scale(plans, configuration, dataset_json)
    original, normalised, inside = normalise(files, plans, configuration, dataset_json)
    for index, column in enumerate(columns):
        before, after = original[index][inside], normalised[index][inside]
        low, high = int(np.argmin(before)), int(np.argmax(before))
        if after[high] == after[low]:
            raise UserError(f"{files[index]}: all voxels have the value {before[low]:g}; such an image has no scale")
        scales.setdefault(column, float((before[high] - before[low]) / (after[high] - after[low])))
    return scales
