"""Trainers for ``nnUNetv2_train -tr NAME``; nnU-Net finds every name in ``__all__`` once the package is installed."""

from nnunet_trainers.fast import nnUNetTrainerIMA_fast
from nnunet_trainers.ima import nnUNetTrainerIMA
from nnunet_trainers.lengths import (
    nnUNetTrainerIMA_1epoch,
    nnUNetTrainerIMA_5epochs,
    nnUNetTrainerIMA_10epochs,
    nnUNetTrainerIMA_20epochs,
    nnUNetTrainerIMA_50epochs,
    nnUNetTrainerIMA_100epochs,
    nnUNetTrainerIMA_250epochs,
)
from nnunet_trainers.paper import (
    nnUNetTrainerIMA_paperHeart,
    nnUNetTrainerIMA_paperHippocampus,
    nnUNetTrainerIMA_paperProstate,
)

__all__ = [
    "nnUNetTrainerIMA",
    "nnUNetTrainerIMA_1epoch",
    "nnUNetTrainerIMA_5epochs",
    "nnUNetTrainerIMA_10epochs",
    "nnUNetTrainerIMA_20epochs",
    "nnUNetTrainerIMA_50epochs",
    "nnUNetTrainerIMA_100epochs",
    "nnUNetTrainerIMA_250epochs",
    "nnUNetTrainerIMA_fast",
    "nnUNetTrainerIMA_paperHeart",
    "nnUNetTrainerIMA_paperHippocampus",
    "nnUNetTrainerIMA_paperProstate",
]
