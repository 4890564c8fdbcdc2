"""IMA training of other lengths, named as nnU-Net names its own."""

from ima_seg.methods.settings import IMASettings
from nnunet_trainers.ima import nnUNetTrainerIMA


class nnUNetTrainerIMA_1epoch(nnUNetTrainerIMA):
    preset = IMASettings(epochs=1)


class nnUNetTrainerIMA_5epochs(nnUNetTrainerIMA):
    preset = IMASettings(epochs=5)


class nnUNetTrainerIMA_10epochs(nnUNetTrainerIMA):
    preset = IMASettings(epochs=10)


class nnUNetTrainerIMA_20epochs(nnUNetTrainerIMA):
    preset = IMASettings(epochs=20)


class nnUNetTrainerIMA_50epochs(nnUNetTrainerIMA):
    preset = IMASettings(epochs=50)


class nnUNetTrainerIMA_100epochs(nnUNetTrainerIMA):
    preset = IMASettings(epochs=100)


class nnUNetTrainerIMA_250epochs(nnUNetTrainerIMA):
    preset = IMASettings(epochs=250)
