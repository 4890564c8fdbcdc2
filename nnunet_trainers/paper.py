"""The settings of the IMA paper's segmentation experiments (arXiv 2005.09147), for its three decathlon tasks.

The paper gives cap and step as the L2 norm over one 2D patch. They are divided by the square root of that patch's
number of values, so that the same size per voxel holds for any patch size, and in 3D.
"""

import math

from ima_seg.methods.settings import IMASettings
from nnunet_trainers.ima import nnUNetTrainerIMA


def paper_settings(*, eps_max_l2: float, delta_l2: float, patch_values: int) -> IMASettings:
    """The paper's settings with cap and step converted to RMS per voxel.

    Args:
        eps_max_l2: cap on margins, L2 norm over the patch.
        delta_l2: expansion step, L2 norm over the patch.
        patch_values: channels x voxels of the paper's 2D patch.
    """
    return IMASettings(
        eps_max=eps_max_l2 / math.sqrt(patch_values),
        delta=delta_l2 / math.sqrt(patch_values),
        tau=0.6,
        beta=0.5,
        steps=20,
        step_factor=4.0,
        start="random",
        refine="bisection",
        refine_steps=10,
        refine_tolerance=0.0,
        steady_interval=1,
        rule="paper",
        epochs=50,
    )


class nnUNetTrainerIMA_paperHeart(nnUNetTrainerIMA):
    preset = paper_settings(eps_max_l2=25, delta_l2=5, patch_values=320 * 256)


class nnUNetTrainerIMA_paperHippocampus(nnUNetTrainerIMA):
    preset = paper_settings(eps_max_l2=15, delta_l2=2, patch_values=56 * 40)


class nnUNetTrainerIMA_paperProstate(nnUNetTrainerIMA):
    preset = paper_settings(eps_max_l2=40, delta_l2=10, patch_values=2 * 320 * 320)
