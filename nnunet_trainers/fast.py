"""IMA training with a cheaper search."""

from ima_seg.methods.settings import FAST
from nnunet_trainers.ima import nnUNetTrainerIMA


class nnUNetTrainerIMA_fast(nnUNetTrainerIMA):
    preset = FAST
