"""Trainers for ``nnUNetv2_train -tr NAME``; nnU-Net finds every name in ``__all__`` once the package is installed."""

from nnunet_trainers.amat import nnUNetTrainerAMAT
from nnunet_trainers.fast import (
    nnUNetTrainerIMA_fast,
)
from nnunet_trainers.ima import (
    nnUNetTrainerIMA,
)
from nnunet_trainers.lengths import (
    nnUNetTrainerIMA_1epoch,
    nnUNetTrainerIMA_5epochs,
    nnUNetTrainerIMA_10epochs,
    nnUNetTrainerIMA_20epochs,
    nnUNetTrainerIMA_50epochs,
    nnUNetTrainerIMA_100epochs,
    nnUNetTrainerIMA_250epochs,
)
from nnunet_trainers.methods import (
    nnUNetTrainerFGSMAT,
    nnUNetTrainerFreeAT,
    nnUNetTrainerNoise,
    nnUNetTrainerPGDAT,
    nnUNetTrainerPGDAT_paperHeart5,
    nnUNetTrainerPGDAT_paperHeart15,
    nnUNetTrainerPGDAT_paperHeart25,
    nnUNetTrainerPGDAT_paperHippocampus1,
    nnUNetTrainerPGDAT_paperHippocampus5,
    nnUNetTrainerPGDAT_paperHippocampus10,
    nnUNetTrainerPGDAT_paperHippocampus15,
    nnUNetTrainerPGDAT_paperProstate10,
    nnUNetTrainerPGDAT_paperProstate20,
    nnUNetTrainerPGDAT_paperProstate40,
    nnUNetTrainerSegPGDAT,
    nnUNetTrainerTE,
    nnUNetTrainerTRADES,
)
from nnunet_trainers.paper import (
    nnUNetTrainerIMA_paperHeart,
    nnUNetTrainerIMA_paperHippocampus,
    nnUNetTrainerIMA_paperProstate,
)

__all__ = [
    "nnUNetTrainerAMAT",
    "nnUNetTrainerFGSMAT",
    "nnUNetTrainerFreeAT",
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
    "nnUNetTrainerNoise",
    "nnUNetTrainerPGDAT",
    "nnUNetTrainerPGDAT_paperHeart5",
    "nnUNetTrainerPGDAT_paperHeart15",
    "nnUNetTrainerPGDAT_paperHeart25",
    "nnUNetTrainerPGDAT_paperHippocampus1",
    "nnUNetTrainerPGDAT_paperHippocampus5",
    "nnUNetTrainerPGDAT_paperHippocampus10",
    "nnUNetTrainerPGDAT_paperHippocampus15",
    "nnUNetTrainerPGDAT_paperProstate10",
    "nnUNetTrainerPGDAT_paperProstate20",
    "nnUNetTrainerPGDAT_paperProstate40",
    "nnUNetTrainerSegPGDAT",
    "nnUNetTrainerTE",
    "nnUNetTrainerTRADES",
]
