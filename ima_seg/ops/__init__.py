"""Tensor operations of an attack. :mod:`ima_seg.ops.reference` is their specification in plain torch."""

from ima_seg.ops.reference import (
    gradient_step,
    hard_dice,
    per_row,
    perturbation_size,
    project,
    random_start,
)

__all__ = ["gradient_step", "hard_dice", "per_row", "perturbation_size", "project", "random_start"]
