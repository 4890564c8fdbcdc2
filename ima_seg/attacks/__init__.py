"""Attacks: pure functions from (network, batch, target, budget) to perturbed batches."""

from ima_seg.attacks.apgd import apgd
from ima_seg.attacks.base import UNTARGETED, AttackResult, Goal, Loss
from ima_seg.attacks.boundary import BoundaryResult, SearchSettings, boundary_search
from ima_seg.attacks.losses import GOALS, appear, disappear
from ima_seg.attacks.pgd import fgsm, ifgsm, pgd

__all__ = [
    "GOALS",
    "UNTARGETED",
    "AttackResult",
    "BoundaryResult",
    "Goal",
    "Loss",
    "SearchSettings",
    "apgd",
    "appear",
    "boundary_search",
    "disappear",
    "fgsm",
    "ifgsm",
    "pgd",
]
