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

from ima_seg.errors import UserError
from ima_seg.methods.registry import make_method
from ima_seg.methods.settings import TrainingSettings
from ima_seg.nnunet.dataset import channel_names
from ima_seg.nnunet.intensity import shared_native_scale
from ima_seg.nnunet.training import Training
from ima_seg.types import Labels
from ima_seg.versions import check_version

#: The nnU-Net versions supported; pyproject.toml says the same.
SUPPORTED_NNUNET = ">=2.8,<2.9"


def check_nnunet_version() -> str:
    """The version of the installed nnU-Net; see :func:`ima_seg.versions.check_version`."""
    return check_version("nnunetv2", SUPPORTED_NNUNET, title="nnU-Net")


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
