"""Stub in which nnU-Net's trainer lookup finds the IMA trainers.

nnU-Net drops from ``sys.modules`` whatever it imported from under an external trainer folder. The classes must
therefore be defined elsewhere, in the installed package ``nnunet_trainers``: there they exist once and can be pickled.
"""

from nnunet_trainers import *  # noqa: F403
