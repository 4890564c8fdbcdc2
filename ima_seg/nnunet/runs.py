"""nnU-Net's own trainings: where their results lie, and one of another length."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ima_seg.data.naming import folders_with_id
from ima_seg.errors import UserError


def model_folder(dataset: str, configuration: str, trainer: str, plans: str) -> Path:
    """The folder of a model in ``nnUNet_results``, as nnU-Net names it; whether it is there or not.

    The id of a data set is looked up there, so that nnUNet_raw is not needed.

    Raises:
        UserError: the variable is not set, or there is not one data set of that id.
    """
    root = os.environ.get("nnUNet_results")
    if not root:
        raise UserError("-d needs the variable nnUNet_results; set it, or name the folder with -m")
    from nnunetv2.utilities.file_path_utilities import get_output_folder

    if dataset.isdigit():
        found = folders_with_id(int(dataset), Path(root))
        if len(found) != 1:
            there = ", ".join(folder.name for folder in found) or "none"
            raise UserError(f"data set {dataset}: {root} holds {there} of that id; name the folder")
        dataset = found[0].name
    return Path(get_output_folder(dataset, trainer, plans, configuration))


def train_standard(
    dataset: str, configuration: str, plans: str, *, epochs: int, iterations: int, validation: int, device: str
) -> Path:
    """Train fold 0 as ``nnUNetv2_train -tr nnUNetTrainer`` does, but shorter; returns the fold's folder.

    nnU-Net's command line has no option for the number of ``iterations`` of an epoch and batches of its
    ``validation``, so its trainer is driven from here.
    """
    from nnunetv2.run.run_training import get_trainer_from_args

    trainer: Any = get_trainer_from_args(dataset, configuration, 0, "nnUNetTrainer", plans, device=torch.device(device))
    trainer.num_epochs, trainer.num_iterations_per_epoch = epochs, iterations
    trainer.num_val_iterations_per_epoch = validation
    trainer.run_training()
    return Path(trainer.output_folder)
