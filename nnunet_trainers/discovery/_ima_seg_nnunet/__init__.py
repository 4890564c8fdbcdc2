"""Tells nnU-Net where the stub of the IMA trainers lies; imported at interpreter start through a ``.pth`` line.

nnU-Net v2 looks for a trainer in its own package and then in every folder that the environment variable
``nnUNet_extTrainer`` names. This module appends its subfolder ``trainers`` to that variable. What the user put there
stays, and stays first. It runs at every start of Python, so it imports nothing but ``os`` and never raises.
"""

import os

VARIABLE = "nnUNet_extTrainer"


def register() -> None:
    """Append the stub's folder to ``nnUNet_extTrainer`` unless the variable already names it."""
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "trainers")
    known = [entry for entry in os.environ.get(VARIABLE, "").split(os.pathsep) if entry.strip()]
    if folder not in known:
        os.environ[VARIABLE] = os.pathsep.join([*known, folder])


# A failure here would print a traceback at each start of Python in this environment, nnU-Net or not. `ima-seg doctor`
# is the place that reports a trainer which cannot be found.
try:
    register()
except Exception:
    pass
