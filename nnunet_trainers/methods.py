"""Trainers for the methods that IMA is compared with; each step is that of the class of this name in ima_seg.methods.

Settings as for the IMA trainer: ``preset``, a section of the plans, the file that ``IMA_CONFIG`` names.
"""

import math

from ima_seg import methods
from nnunet_trainers.base import AdversarialTrainer


class nnUNetTrainerPGDAT(AdversarialTrainer):
    """Adversarial training with PGD of a fixed budget ("SAT", Madry et al. 2018)."""

    preset = methods.PGDATSettings()


class nnUNetTrainerFGSMAT(AdversarialTrainer):
    """Adversarial training with one step from a random point (Wong et al. 2020)."""

    preset = methods.FGSMATSettings()


class nnUNetTrainerSegPGDAT(AdversarialTrainer):
    """Adversarial training with SegPGD on half of each batch (Gu et al. 2022)."""

    preset = methods.SegPGDATSettings()


class nnUNetTrainerFreeAT(AdversarialTrainer):
    """Adversarial training "for free" (Shafahi et al. 2019).

    It makes m updates from each batch, and so an m-th of nnU-Net's iterations per epoch unless their number is set.
    """

    preset = methods.FreeATSettings()


class nnUNetTrainerTRADES(AdversarialTrainer):
    """TRADES (Zhang et al. 2019)."""

    preset = methods.TRADESSettings()


class nnUNetTrainerTE(AdversarialTrainer):
    """Adversarial training with temporal ensembling (Dong et al. 2022)."""

    preset = methods.TemporalEnsemblingSettings()


class nnUNetTrainerNoise(AdversarialTrainer):
    """Training on white noise."""

    preset = methods.NoiseSettings()


def paper_noise(*, eps_l2: float, patch_values: int) -> methods.PGDATSettings:
    """Fixed-noise training as in the IMA paper's comparison: 20 steps of 4 eps / 20, 50 epochs.

    Args:
        eps_l2: L2 norm over the paper's 2D patch.
        patch_values: channels x voxels of that patch.
    """
    return methods.PGDATSettings(eps=eps_l2 / math.sqrt(patch_values), steps=20, step_factor=4.0, epochs=50)


class nnUNetTrainerPGDAT_paperHippocampus1(nnUNetTrainerPGDAT):
    preset = paper_noise(eps_l2=1, patch_values=56 * 40)


class nnUNetTrainerPGDAT_paperHippocampus5(nnUNetTrainerPGDAT):
    preset = paper_noise(eps_l2=5, patch_values=56 * 40)


class nnUNetTrainerPGDAT_paperHippocampus10(nnUNetTrainerPGDAT):
    preset = paper_noise(eps_l2=10, patch_values=56 * 40)


class nnUNetTrainerPGDAT_paperHippocampus15(nnUNetTrainerPGDAT):
    preset = paper_noise(eps_l2=15, patch_values=56 * 40)


class nnUNetTrainerPGDAT_paperHeart5(nnUNetTrainerPGDAT):
    preset = paper_noise(eps_l2=5, patch_values=320 * 256)


class nnUNetTrainerPGDAT_paperHeart15(nnUNetTrainerPGDAT):
    preset = paper_noise(eps_l2=15, patch_values=320 * 256)


class nnUNetTrainerPGDAT_paperHeart25(nnUNetTrainerPGDAT):
    preset = paper_noise(eps_l2=25, patch_values=320 * 256)


class nnUNetTrainerPGDAT_paperProstate10(nnUNetTrainerPGDAT):
    preset = paper_noise(eps_l2=10, patch_values=2 * 320 * 320)


class nnUNetTrainerPGDAT_paperProstate20(nnUNetTrainerPGDAT):
    preset = paper_noise(eps_l2=20, patch_values=2 * 320 * 320)


class nnUNetTrainerPGDAT_paperProstate40(nnUNetTrainerPGDAT):
    preset = paper_noise(eps_l2=40, patch_values=2 * 320 * 320)
