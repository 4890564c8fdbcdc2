"""Working on part of a batch without asking the device more than once how large the part is."""

from __future__ import annotations

import math

import torch


def remaining(rows: torch.Tensor, wanted: torch.Tensor, multiple_of: int) -> torch.Tensor:
    """Those of ``rows`` that are ``wanted`` (bool over the full batch), filled up to a multiple of ``multiple_of``.

    The fill are rows that are not wanted, whose results nobody may read. Reading the count waits for the device.
    """
    going = wanted[rows]
    left = int(going.sum())
    size = min(math.ceil(left / multiple_of) * multiple_of, len(rows))
    if size == len(rows):
        return rows
    # uint8, for not every device sorts booleans
    return rows[torch.argsort(going.logical_not().to(torch.uint8), stable=True)[:size]]


def assign(full: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor, value: torch.Tensor) -> None:
    """``full[rows[mask]] = value[mask]`` without asking the device how many that are."""
    shaped = mask.view(-1, *(1,) * (full.ndim - 1))
    full[rows] = torch.where(shaped, value.to(full.dtype), full[rows])
