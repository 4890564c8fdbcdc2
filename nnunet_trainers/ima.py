"""The IMA trainer."""

from ima_seg.methods.settings import IMASettings
from ima_seg.nnunet.training import IMATraining
from nnunet_trainers.base import AdversarialTrainer


class nnUNetTrainerIMA(AdversarialTrainer):
    """nnU-Net's trainer with increasing-margin adversarial training (arXiv 2005.09147).

    Settings: the defaults of :class:`ima_seg.IMASettings`, overridden by ``preset`` (subclasses), by a section ``ima``
    in the plans, by the file that ``IMA_CONFIG`` names, in this order.
    """

    preset = IMASettings()
    kind = IMATraining
