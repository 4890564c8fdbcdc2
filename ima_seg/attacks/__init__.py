"""Attacks: pure functions from a :class:`Problem` (network, batch, target) and a budget to perturbed batches."""

from ima_seg.attacks.apgd import apgd
from ima_seg.attacks.boundary import BoundaryResult, SearchSettings, boundary_search
from ima_seg.attacks.goals import GOALS, UNTARGETED, Goal, appear, disappear
from ima_seg.attacks.graphs import GraphedPasses
from ima_seg.attacks.losses import Loss
from ima_seg.attacks.minimal import MinimalResult, minimal_norm
from ima_seg.attacks.noise import gaussian_noise, uniform_noise
from ima_seg.attacks.pgd import fgsm, ifgsm, pgd
from ima_seg.attacks.problem import Problem
from ima_seg.attacks.quality import class_quality
from ima_seg.attacks.result import AttackResult
from ima_seg.attacks.square import square
from ima_seg.attacks.vafa import vafa

__all__ = [
    "GOALS", "UNTARGETED", "AttackResult", "BoundaryResult", "Goal", "GraphedPasses", "Loss", "MinimalResult",
    "Problem", "SearchSettings", "apgd", "appear", "boundary_search", "class_quality", "disappear", "fgsm",
    "gaussian_noise", "ifgsm", "minimal_norm", "pgd", "square", "uniform_noise", "vafa",
]  # fmt: skip
