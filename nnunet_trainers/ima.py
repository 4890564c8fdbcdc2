"""Trainers by increasing-margin adversarial training, with its settings, and AMAT."""

import math

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import nnUNetTrainerDA5
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import (
    nnUNetTrainerNoMirroring,
)

from ima_seg.methods.ima_settings import AMAT, AME, FAST, IMASettings
from nnunet_trainers.base import AdversarialMixin


class IMAMixin(AdversarialMixin):
    """Makes a trainer of nnU-Net's one by increasing-margin adversarial training (arXiv 2005.09147).

    ``class nnUNetTrainerOurs(IMAMixin, nnUNetTrainerDA5): pass``. Settings: the defaults of
    :class:`ima_seg.IMASettings`, overridden by ``preset`` (subclasses), by a section ``ima`` in the plans, by the file
    that ``IMA_CONFIG`` names, in this order.
    """

    preset = IMASettings()


class nnUNetTrainerIMA(IMAMixin, nnUNetTrainer):
    """nnU-Net's trainer with increasing-margin adversarial training."""


class nnUNetTrainerIMA_DA5(IMAMixin, nnUNetTrainerDA5):
    """The same with nnU-Net's strongest augmentation, of resolution, contrast, gradients of brightness and more."""


class nnUNetTrainerIMA_NoMirroring(IMAMixin, nnUNetTrainerNoMirroring):
    """The same without mirroring, for structures that are left or right."""


class nnUNetTrainerIMA_fast(nnUNetTrainerIMA):
    """A cheaper search."""

    preset = FAST


class nnUNetTrainerAMAT(nnUNetTrainerIMA):
    """Adaptive-margin adversarial training (Ma & Liang, arXiv 2206.01736), the successor of IMA.

    A patch has crossed when its Dice + CE rises above the threshold ``tau``, to be taken from the validation of a
    standard model; E <- E + delta while a visit of the epoch holds, else E stays (rule ``grow``).
    """

    preset = AMAT


class nnUNetTrainerAME(nnUNetTrainerIMA):
    """Adaptive Margin Evolution (Ma et al., Neurocomputing 551:126524, 2023): no cap, a step that shrinks."""

    preset = AME


# --- other lengths, named as nnU-Net names its own -------------------------------------------------------------------


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


# --- the segmentation experiments of the IMA paper, on three decathlon tasks -----------------------------------------


def paper_settings(*, eps_max_l2: float, delta_l2: float, patch_values: int) -> IMASettings:
    """The paper's settings with cap and step converted to RMS per voxel.

    The paper gives both as the L2 norm over one 2D patch. Divided by the square root of that patch's number of values,
    the same size per voxel holds for any patch size, and in 3D.

    Args:
        eps_max_l2: cap on margins, L2 norm over the patch.
        delta_l2: expansion step, L2 norm over the patch.
        patch_values: channels x voxels of the paper's 2D patch.
    """
    return IMASettings(
        eps_max=eps_max_l2 / math.sqrt(patch_values),
        delta=delta_l2 / math.sqrt(patch_values),
        criterion="dice",
        tau=0.6,
        share=1.0,
        beta=0.5,
        steps=20,
        step_factor=4.0,
        start="random",
        refine="bisection",
        refine_steps=10,
        refine_tolerance=0.0,
        rule="paper",
        epochs=50,
    )


class nnUNetTrainerIMA_paperHeart(nnUNetTrainerIMA):
    preset = paper_settings(eps_max_l2=25, delta_l2=5, patch_values=320 * 256)


class nnUNetTrainerIMA_paperHippocampus(nnUNetTrainerIMA):
    preset = paper_settings(eps_max_l2=15, delta_l2=2, patch_values=56 * 40)


class nnUNetTrainerIMA_paperProstate(nnUNetTrainerIMA):
    preset = paper_settings(eps_max_l2=40, delta_l2=10, patch_values=2 * 320 * 320)
