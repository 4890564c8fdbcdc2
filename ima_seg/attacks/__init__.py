"""Attacks: pure functions from (network, batch, target, budget) to perturbed batches."""

from ima_seg.attacks.boundary import BoundaryResult, SearchSettings, boundary_search
from ima_seg.attacks.pgd import PGDResult, pgd

__all__ = ["BoundaryResult", "PGDResult", "SearchSettings", "boundary_search", "pgd"]
