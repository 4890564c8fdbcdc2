"""AMAT: IMA with a margin defined by the loss."""

from ima_seg.methods.settings import AMAT
from nnunet_trainers.ima import nnUNetTrainerIMA


class nnUNetTrainerAMAT(nnUNetTrainerIMA):
    """Adaptive-margin adversarial training (Ma & Liang, arXiv 2206.01736), the successor of IMA.

    A patch has crossed when its Dice + CE rises above the threshold ``tau``, to be taken from the validation of a
    standard model; E <- E + delta while a visit of the epoch holds, else E stays (rule ``grow``).
    """

    preset = AMAT
