"""Original intensities: how many native units the unit of sizes is, one SD, per case and channel."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ima_seg.errors import UserError
from ima_seg.nnunet.dataset import channel_names
from ima_seg.nnunet.normalisation import FIXED, channel_scales
from ima_seg.nnunet.reading import image_files, read_image


def native_scale(
    case: str,
    images: Path,
    *,
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
    channel_sd: Sequence[float] | None = None,
) -> dict[str, float]:
    """Native intensity units (HU, scanner units) per SD of each channel of one case, by column name.

    Args:
        case: case id.
        images: folder with ``CASE_0000.nii.gz`` and so on, or pictures in colour.
        plans: contents of the plans file.
        configuration: whose normalisation is meant.
        dataset_json: contents of dataset.json.
        channel_sd: network units per SD of each channel, of a training; None: 1.

    Raises:
        UserError: a channel's file is missing or cannot be read, or a channel is constant.
    """
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    columns, manager = native_columns(plans, configuration, dataset_json), PlansManager(dict(plans))
    files = image_files(manager, images, case, channels=len(columns), ending=dataset_json["file_ending"])
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} does not exist; name the folder of the training images with --images")
    image = read_image(manager, files, channels=len(columns))
    cropped, region, _ = crop_to_nonzero(image.values)
    chosen = manager.get_configuration(configuration)
    scales = channel_scales(cropped, region[0] >= 0, plans=manager, configuration=chosen, case=case)
    factors = channel_sd or [1.0] * len(columns)
    return {c: scale.scale / scale.sd * sd for c, scale, sd in zip(columns, scales, factors, strict=True)}


def shared_native_scale(
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
    channel_sd: Sequence[float] | None = None,
) -> dict[str, float]:
    """:func:`native_scale` of each channel whose normalisation is the same for all cases.

    That is CT normalisation (one standard deviation of the training set's foreground, in HU), that of RGB, and none at
    all. Channels that are z-scored or rescaled have another scale in each case, which only the raw image tells.
    """
    columns = native_columns(plans, configuration, dataset_json)
    properties = plans["foreground_intensity_properties_per_channel"]
    scale = {}
    for index, (column, scheme) in enumerate(zip(columns, _schemes(plans, configuration), strict=True)):
        per_network_unit = float(properties[str(index)]["std"]) if scheme == "CTNormalization" else FIXED.get(scheme)
        if per_network_unit is not None:
            scale[column] = per_network_unit * (channel_sd[index] if channel_sd else 1.0)
    return scale


def native_columns(plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any]) -> list[str]:
    """A column name per channel for sizes in native units: ``hu`` for a single CT, else ``CHANNEL_native``.

    Channels that share a name get their index: ``CT_0_native``, ``CT_1_native``.
    """
    names = [re.sub(r"[^A-Za-z0-9]+", "_", name) for name in channel_names(dataset_json)]
    if _schemes(plans, configuration) == ["CTNormalization"]:
        return ["hu"]
    return [f"{n}_{i}_native" if names.count(n) > 1 else f"{n}_native" for i, n in enumerate(names)]


def _schemes(plans: Mapping[str, Any], configuration: str) -> list[str]:
    values = plans["configurations"][configuration]
    while "normalization_schemes" not in values:
        values = plans["configurations"][values["inherits_from"]]
    return list(values["normalization_schemes"])
