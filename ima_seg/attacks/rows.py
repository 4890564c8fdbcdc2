"""Working on part of a batch, asking the device at most once per step how large the part is."""

from __future__ import annotations

import math

import torch


class HostCount:
    """How many entries of a mask are True, on its way to the host.

    On CUDA the copy is queued behind the work that computes the mask, and :meth:`read` waits for that alone: what was
    queued in between keeps the device busy.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        self._count, self._event = mask.sum(), None
        self._read: int | None = None
        if mask.device.type == "cuda":
            self._count = torch.empty((), dtype=torch.int64, pin_memory=True).copy_(self._count, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(mask.device))

    def read(self) -> int:
        """The count; the device is waited for once."""
        if self._read is None:
            if self._event is not None:
                self._event.synchronize()
            self._read = int(self._count)
        return self._read


def positions(wanted: torch.Tensor, count: int, multiple_of: int) -> torch.Tensor | None:
    """Positions of the ``count`` True entries of ``wanted`` (bool), filled up to a multiple of ``multiple_of``.

    The fill are positions that are not wanted, whose results nobody may read. None where that is all of them.
    """
    size = min(math.ceil(count / multiple_of) * multiple_of, len(wanted))
    if size == len(wanted):
        return None
    # uint8, for not every device sorts booleans
    return torch.argsort(wanted.logical_not().to(torch.uint8), stable=True)[:size]


def chosen(wanted: torch.Tensor, multiple_of: int) -> torch.Tensor:
    """Rows that are ``wanted`` (bool), filled up as by :func:`positions`; waits for the device."""
    rows = positions(wanted, int(wanted.sum()), multiple_of)
    return torch.arange(len(wanted), device=wanted.device) if rows is None else rows


def assign(full: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor, value: torch.Tensor) -> None:
    """``full[rows[mask]] = value[mask]`` without asking the device how many that are."""
    shaped = mask.view(-1, *(1,) * (full.ndim - 1))
    full[rows] = torch.where(shaped, value.to(full.dtype), full[rows])
