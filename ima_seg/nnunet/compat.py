"""What is private to nnU-Net: the versions supported, attributes of its trainers, pickled files of its preprocessing.

``nnunetv2`` is imported in :mod:`ima_seg.nnunet` and ``nnunet_trainers`` alone. What is public in it (managers of plans
and labels, readers, preprocessors, keys of checkpoints) is used there where it is needed, what is private is read here.
``tests/test_nnunet_versions.py`` lists all of it, and checks it with the oldest version supported, too.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ima_seg.errors import UserError
from ima_seg.methods.registry import make_method
from ima_seg.methods.settings import TrainingSettings
from ima_seg.nnunet.dataset import channel_names
from ima_seg.nnunet.intensity import shared_native_scale
from ima_seg.nnunet.normalisation import clipping, shared_sd
from ima_seg.nnunet.training import Training
from ima_seg.types import Labels
from ima_seg.versions import check_version

#: The standard deviation of a channel is the mean over so many training cases.
MEASURED_CASES = 20
#: The nnU-Net versions supported; pyproject.toml says the same.
SUPPORTED_NNUNET = ">=2.8,<2.9"


def check_nnunet_version() -> str:
    """The version of the installed nnU-Net; see :func:`ima_seg.versions.check_version`."""
    return check_version("nnunetv2", SUPPORTED_NNUNET, title="nnU-Net")


def trainer_labels(trainer: Any) -> Labels:
    """How the outputs of a trainer's network are read."""
    labels = trainer.label_manager
    return Labels(outputs=labels.num_segmentation_heads, regions=labels.has_regions, ignore_label=labels.ignore_label)


def make_training(trainer: Any, settings: TrainingSettings, teacher: nn.Module | None = None) -> Training:
    """The training that fits a freshly constructed nnU-Net trainer."""
    channels = len(channel_names(trainer.dataset_json))
    configuration = trainer.configuration_manager
    voxels = channels * math.prod(configuration.patch_size)
    method = make_method(
        settings,
        labels=trainer_labels(trainer),
        patch_voxels=voxels,
        epochs=trainer.num_epochs,
        image_channels=channels,  # those that a cascade appends are never perturbed
        bounds=_bounds(trainer),
        # nnU-Net's augmentation keeps the outside of these at 0.
        masked=[index for index, masked in enumerate(configuration.use_mask_for_norm) if masked],
        teacher=teacher,
    )
    return Training(method, voxels=voxels, native={}, log=trainer.print_to_log_file)


def _bounds(trainer: Any) -> list[tuple[float, float] | None]:
    """Of each channel, between which values its normalisation clips, in network units."""
    properties = trainer.plans_manager.foreground_intensity_properties_per_channel
    schemes = trainer.configuration_manager.normalization_schemes
    return [clipping(scheme, properties.get(str(index), {})) for index, scheme in enumerate(schemes)]


def set_unit(trainer: Any, cases: Iterable[str]) -> None:
    """Let the sizes of a training be in standard deviations (SD) of each channel of the network's input.

    Those that no plan knows are measured, as the mean over the first of the training ``cases``. A training that goes on
    keeps the unit that its margins are in.
    """
    training, manager = trainer.training, trainer.plans_manager
    sd = _channel_sd(trainer, sorted(cases)[:MEASURED_CASES])
    if training.resumed_settings is None:
        training.method.channel_sd = sd
    elif sd is not None and training.method.channel_sd is None:
        training.warn(f"sizes stay in network units, as this training began, of which {sd} are 1 SD of each channel")
    training.native = shared_native_scale(
        manager.plans, trainer.configuration_name, trainer.dataset_json, training.method.channel_sd
    )


def _channel_sd(trainer: Any, cases: list[str]) -> list[float] | None:
    """Network units per SD of each channel; ``None`` where all are 1."""
    configuration = trainer.configuration_manager
    properties = trainer.plans_manager.foreground_intensity_properties_per_channel
    schemes = configuration.normalization_schemes
    planned = [shared_sd(scheme, properties.get(str(index), {})) for index, scheme in enumerate(schemes)]
    measured = [1.0] * len(planned)
    if None in planned:
        data_set = trainer.dataset_class(trainer.preprocessed_dataset_folder, cases)
        images = (np.asarray(data_set.load_case(case)[0][:]) for case in cases)
        measured = np.mean([[channel.std(dtype=np.float64) for channel in i] for i in images], axis=0).tolist()
    found = [(sd or 1.0) if known is None else known for known, sd in zip(planned, measured, strict=True)]
    return None if found == [1.0] * len(found) else found


def find_trainer(name: str) -> Any:
    """nnU-Net's own lookup of a trainer by name, without what it prints.

    Raises:
        RuntimeError: there is none.
    """
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    with contextlib.redirect_stdout(io.StringIO()):
        return recursive_find_trainer_class_by_name(name)


def trainer_class(name: str) -> Any:
    """The same, or ``None`` where there is none, or something else of that name."""
    try:
        return find_trainer(name)
    except (RuntimeError, TypeError, AssertionError):
        return None


def find_part(folder: str, name: str, *, package: str = "nnunetv2") -> Any:
    """nnU-Net's own lookup of a class or function by name in a folder of a package; ``None`` where there is none."""
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    where = importlib.import_module(package).__path__[0]
    return recursive_find_python_class(str(Path(where, *folder.split("."))), name, f"{package}.{folder}")


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
        if any(len(v) and not (isinstance(label, tuple) and -1 in label) for label, v in locations.items()):
            return
    raise UserError(
        f"none of the training cases in {folder} has a foreground voxel, so there is nothing to segment; check that "
        "the label files carry the values that dataset.json names, then preprocess again"
    )
