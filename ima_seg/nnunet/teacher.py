"""The teacher of a training in nnU-Net: a trained model of the same fold, data and labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ima_seg.errors import UserError
from ima_seg.nnunet.folder import load_model
from ima_seg.types import Labels


def load_teacher(
    folder: str, *, fold: int | str, labels: Labels, configuration: Any, device: torch.device | str
) -> nn.Module:
    """The network of a model folder's ``fold``, frozen.

    Its activation, size and trainer may be others than the student's; what goes in and comes out must be the same.

    Args:
        folder: ``TRAINER__PLANS__CONFIGURATION`` in nnUNet_results.
        fold: of the training. Another fold's model has seen the cases that this one is validated on.
        labels: of the training.
        configuration: its ConfigurationManager.
        device: of the training.

    Raises:
        UserError: no such model or fold, or one for other images or labels.
    """
    try:
        model = load_model(Path(folder), folds=[str(fold)], device=device)
    except UserError as error:
        raise UserError(f"teacher: {error}") from None
    theirs = model.configuration
    pairs = {
        "labels": (model.labels, labels),
        "normalisation": (list(theirs.normalization_schemes), list(configuration.normalization_schemes)),
        "spacing": (list(map(float, theirs.spacing)), list(map(float, configuration.spacing))),
        "axes": (len(theirs.patch_size), len(configuration.patch_size)),
    }
    for what, (found, wanted) in pairs.items():
        if found != wanted:
            raise UserError(
                f"teacher {folder}: its {what} are {found}, those of this training {wanted}; name a standard model of "
                "the same data set and configuration"
            )
    return model.networks[0]
