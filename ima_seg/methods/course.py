"""The course of a training by any method: sums over an epoch, its history, the log, the files, its state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ima_seg.methods.base import Method, MethodReport
from ima_seg.methods.ledger import gather


class Tally:
    """Sums of an epoch's step reports, kept on the device until the epoch ends."""

    def __init__(self, method: Method[Any, Any]) -> None:
        self._losses, self._names = len(method.losses), (*method.losses, *method.counts)
        self._sums: torch.Tensor | None = None
        self._host = dict.fromkeys(("patches", "training", "forwards", "gradients", "dropped"), 0)

    def add(self, report: MethodReport) -> None:
        """Add one step."""
        row = torch.stack([getattr(report, name).detach().float().sum() for name in self._names])
        # A batch whose loss is not finite counts in no mean.
        usable = torch.isfinite(row[: self._losses].sum())
        row[: self._losses].masked_fill_(~usable, 0.0)
        row = torch.cat([row, usable.float()[None]])
        self._sums = row if self._sums is None else self._sums + row
        done = (report.patches, report.training, report.passes.forwards, report.passes.gradients)
        for name, count in zip(self._host, done, strict=False):
            self._host[name] += count

    def drop(self, patches: int) -> None:
        """Note patches left out for NaN or infinite voxels."""
        self._host["dropped"] += patches

    def totals(self) -> dict[str, float]:
        """Sums over all steps and ranks; a collective call when ``torch.distributed`` is initialised."""
        names = (*self._names, "finite")
        sums = [0.0] * len(names) if self._sums is None else self._sums.tolist()
        mine = {**self._host, **dict(zip(names, sums, strict=True))}
        parts = gather(mine)
        return {key: math.fsum(part[key] for part in parts) for key in mine}


class Course:
    """What a training by a method keeps and tells beside the network.

    Args:
        method: the method, which knows the length of the training.
        voxels: image channels x voxels of a training patch.
        native: native intensity units per SD of each channel, where they are the same for all cases.
        log: prints a line to the log of the training.
        warn: prints what is wrong.
    """

    def __init__(
        self,
        method: Method[Any, Any],
        *,
        voxels: int = 1,
        native: Mapping[str, float],
        log: Callable[[str], object],
        warn: Callable[[str], object],
    ) -> None:
        self.method, self.voxels, self.native, self.log, self.warn = method, voxels, dict(native), log, warn
        #: A row for each epoch, see :meth:`end_epoch`.
        self.history: list[dict[str, Any]] = []
        self.tally = Tally(method)
        self._epoch = 0

    def start_epoch(self, epoch: int) -> None:
        """Begin the epoch of this number, from 0."""
        self._epoch = epoch
        self.method.start_epoch(epoch)

    def end_epoch(self, seconds: float) -> dict[str, Any]:
        """Extend the history by a row, which is returned, and log it. Collective over ranks.

        ``passes_per_sample`` counts the network passes (forwards and input gradients) that the perturbations of an
        epoch took, over all its patches, perturbed or not; ``training_passes_per_sample`` come on top.
        """
        totals = self.tally.totals()
        self.tally = Tally(self.method)
        patches, steps = max(totals["patches"], 1), max(totals["finite"], 1)
        row = {
            "epoch": self._epoch,
            **self.method.columns(totals),
            **{name: totals[name] / steps for name in self.method.losses},
            "seconds": seconds,
            "passes_per_sample": (totals["forwards"] + totals["gradients"]) / patches,
            "forwards_per_sample": totals["forwards"] / patches,
            "gradients_per_sample": totals["gradients"] / patches,
            "training_passes_per_sample": totals["training"] / patches,
            "dropped_patches": int(totals["dropped"]),
        }
        self.history.append(row)
        for line in self.method.lines(self.history):
            self.log(line)
        warnings = self.method.warnings(row)
        if row["dropped_patches"]:
            what = "NaN or infinite voxels (left out of training)"
            warnings = [*warnings, f"{row['dropped_patches']} patches with {what} in this epoch"]
        for warning in warnings:
            self.warn(warning)
        return row

    def write_files(self, folder: Path) -> None:
        """The tables and plots of the training."""
        self.method.write_files(folder, self.history, voxels=self.voxels, native=self.native)

    def described(self) -> dict[str, Any]:
        """The settings with everything automatic resolved: what makes two trainings comparable."""
        sd = self.method.channel_sd
        unit = {} if sd is None else {"channel_sd": [float(value) for value in sd]}
        return {**self.method.settings.model_dump(mode="json"), **self.method.sizes(), **unit}

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and JSON types, which ``torch.load(weights_only=True)`` reads."""
        return {
            "settings": self.described(), "history": [dict(row) for row in self.history], **self.method.saved(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`, whose settings are the caller's to compare."""
        self.method.restore(state)
        self.history = [dict(row) for row in state["history"]]
        self.tally = Tally(self.method)
