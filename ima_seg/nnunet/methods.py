"""What a training by one of the methods that IMA is compared with keeps beside the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from typing_extensions import override

from ima_seg.methods.base import Method
from ima_seg.methods.fixed_settings import FixedBudgetSettings
from ima_seg.methods.history import write_csv
from ima_seg.methods.ranks import gather
from ima_seg.nnunet.checkpoint import METHOD_KEY
from ima_seg.nnunet.training import Training

S = TypeVar("S", bound=FixedBudgetSettings)


class MethodTraining(Training[S]):
    """One fold's training by ``method``, which a subclass names; arguments as for :class:`Training`."""

    key = METHOD_KEY
    method_class: ClassVar[type[Method[Any]]]

    def __init__(self, settings: S, **options: Any) -> None:
        super().__init__(settings, **options)
        self.method: Method[Any] = self.method_class(
            settings, labels=self.labels, patch_voxels=self.voxels, image_channels=self.image_channels
        )
        self._epoch = 0
        self._reset()

    def _reset(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._counts = {"patches": 0, "forwards": 0, "gradients": 0, "training": 0, "dropped": 0}

    @override
    def start_epoch(self, epoch: int) -> None:
        self._epoch, self.method.progress = epoch, epoch / self.epochs

    @property
    @override
    def updates_per_batch(self) -> int:
        return self.method.updates_per_batch

    @override
    def sizes(self) -> dict[str, float]:
        return {"eps": self.method.eps}

    @override
    def step(
        self, network: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, case_ids: Sequence[str], *,
        loss: Callable[[Any], torch.Tensor], forward: Callable[[torch.nn.Module, torch.Tensor], Any],
        backward: Callable[[torch.Tensor], None], update: Callable[[], object],
    ) -> torch.Tensor:  # fmt: skip
        report = self.method.step(network, x, y, loss=loss, forward=forward, backward=backward, update=update)
        self._losses.append(report.loss)
        done = {"patches": len(x), "forwards": report.passes.forwards, "gradients": report.passes.gradients,
                "training": report.training}  # fmt: skip
        for name, count in done.items():
            self._counts[name] += count
        return report.loss

    @override
    def start_afresh(self) -> str:
        return f"no state of a {self.name} training; its history starts anew"

    @override
    def drop(self, patches: int) -> None:
        self._counts["dropped"] += patches

    @override
    def end_epoch(self, seconds: float) -> None:
        values = torch.stack(self._losses).tolist() if self._losses else []
        finite = [value for value in values if math.isfinite(value)]
        parts = gather({**self._counts, "loss": math.fsum(finite), "finite": len(finite)})
        total = {key: math.fsum(part[key] for part in parts) for key in parts[0]}
        patches = max(total["patches"], 1)
        row = {
            "epoch": self._epoch,
            "loss": total["loss"] / max(total["finite"], 1),
            "seconds": seconds,
            "passes_per_sample": (total["forwards"] + total["gradients"]) / patches,
            "forwards_per_sample": total["forwards"] / patches,
            "gradients_per_sample": total["gradients"] / patches,
            "training_passes_per_sample": total["training"] / patches,
            "dropped_patches": int(total["dropped"]),
        }
        self.history.append(row)
        self.log(
            f"{self.name}: loss {row['loss']:.4f}, {row['passes_per_sample']:.1f} passes per patch for the perturbation"
        )
        if row["dropped_patches"]:
            self.log(f"{self.name} WARNING: {row['dropped_patches']} patches with NaN or infinite voxels in this epoch")
        self._reset()

    def write_files(self, folder: Path) -> None:
        """``NAME_history.csv``."""
        write_csv(folder / f"{self.name.lower()}_history.csv", self.history)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "method": self.name, "method_state": self.method.state_dict()}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.method.load_state_dict(state["method_state"])
        super().load_state_dict(state)
        self._reset()
