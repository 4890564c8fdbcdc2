"""Everything that depends on the version of nnU-Net: the range supported, and its private behaviour."""

from __future__ import annotations

import importlib.metadata
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ima_seg.errors import UserError
from ima_seg.methods.registry import make_method
from ima_seg.methods.settings import TrainingSettings
from ima_seg.nnunet.training import Training
from ima_seg.types import Labels

#: The nnU-Net versions supported: from the first (inclusive) to the second (exclusive).
SUPPORTED_NNUNET = ("2.8", "2.9")


def check_nnunet_version() -> str:
    """The version of the installed nnU-Net, which is a supported one.

    Raises:
        UserError: nnU-Net is not installed, or is of a version that this package was not written for; names the
            version found and how to install a supported one.
    """
    first, end = SUPPORTED_NNUNET
    remedy = f'pip install "nnunetv2>={first},<{end}"'
    try:
        found = importlib.metadata.version("nnunetv2")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"nnU-Net v2 is not installed in this environment; {remedy}") from None
    if not _release(first) <= _release(found) < _release(end):
        raise UserError(f"nnU-Net {found} is installed, supported is >={first},<{end}; {remedy}")
    return found


def _release(version: str) -> tuple[int, int]:
    """Major and minor number; (0, 0) for a version that does not start with two numbers."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def make_training(trainer: Any, settings: TrainingSettings) -> Training:
    """The training that fits a freshly constructed nnU-Net trainer."""
    labels = trainer.label_manager
    channels = len(channel_names(trainer.dataset_json))
    voxels = channels * math.prod(trainer.configuration_manager.patch_size)
    method = make_method(
        settings,
        labels=Labels(
            outputs=labels.num_segmentation_heads, regions=labels.has_regions, ignore_label=labels.ignore_label
        ),
        patch_voxels=voxels,
        epochs=trainer.num_epochs,
        image_channels=channels,  # those that a cascade appends are never perturbed
    )
    native = shared_native_scale(trainer.plans_manager.plans, trainer.configuration_name, trainer.dataset_json)
    return Training(method, voxels=voxels, native=native, log=trainer.print_to_log_file)


def channel_names(dataset_json: Mapping[str, Any]) -> list[str]:
    """Names of the image channels in order; masks that a cascade appends are not among them."""
    names = dataset_json.get("channel_names") or dataset_json["modality"]
    return [str(names[key]) for key in sorted(names, key=int)]


def shared_native_scale(
    plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any]
) -> dict[str, float]:
    """Native intensity units per network unit of each channel whose normalisation is the same for all cases.

    That is CT normalisation (one standard deviation of the training set's foreground, in HU) and none at all. Z-scored
    channels have another scale in each case, which only the raw image tells: see :mod:`ima_seg.nnunet.intensity`.
    The keys are columns of a table, see :func:`native_columns`.
    """
    schemes = _schemes(plans, configuration)
    scale = {}
    for index, (column, scheme) in enumerate(
        zip(native_columns(plans, configuration, dataset_json), schemes, strict=True)
    ):
        if scheme == "CTNormalization":
            scale[column] = float(plans["foreground_intensity_properties_per_channel"][str(index)]["std"])
        elif scheme == "NoNormalization":
            scale[column] = 1.0
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


def require_foreground(trainer: Any, cases: Iterable[str]) -> None:
    """Refuse a fold without a single foreground voxel in its training cases.

    Raises:
        UserError: naming the folder and where to look.
    """
    from batchgenerators.utilities.file_and_folder_operations import load_pickle

    folder = Path(trainer.preprocessed_dataset_folder)
    # Also holds the location of all annotated voxels together, under a key with -1, when there is an ignore label.
    for case in cases:
        locations = load_pickle(str(folder / f"{case}.pkl")).get("class_locations", {})
        for label, voxels in locations.items():
            if len(voxels) and not (isinstance(label, tuple) and -1 in label):
                return
    raise UserError(
        f"none of the training cases in {folder} has a foreground voxel, so there is nothing to segment; check that "
        "the label files carry the values that dataset.json names, then preprocess again"
    )


def map_heads(target: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply ``function`` to a target: a tensor, or with deep supervision a list of them."""
    return [function(head) for head in target] if isinstance(target, list) else function(target)


def full_resolution_target(target: Any) -> torch.Tensor:
    """The target of the full-resolution head."""
    full: torch.Tensor = target[0] if isinstance(target, list) else target
    return full


def normalise(
    files: Sequence[Path], plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """One case as nnU-Net crops and normalises it, before resampling.

    Args:
        files: one image per channel.
        plans: contents of the plans file.
        configuration: name of the configuration.
        dataset_json: contents of dataset.json.

    Returns:
        Original and normalised values (C, X, Y, Z) and the mask (X, Y, Z) of voxels that normalisation looked at.
    """
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(dict(plans))
    chosen = manager.get_configuration(configuration)
    image, _ = manager.image_reader_writer_class().read_images([str(file) for file in files])
    cropped, segmentation, _ = crop_to_nonzero(image.astype(np.float32))
    normalised = DefaultPreprocessor(verbose=False)._normalize(
        cropped.copy(), segmentation, chosen, manager.foreground_intensity_properties_per_channel
    )
    inside = segmentation[0] >= 0 if any(chosen.use_mask_for_norm) else np.ones(cropped.shape[1:], dtype=bool)
    return cropped, normalised, inside
