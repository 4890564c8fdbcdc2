"""What a training keeps beside the network: settings, margins, history, and the files made of them."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from typing_extensions import override

from ima_seg.attacks.network import resolve_precision
from ima_seg.errors import UserError
from ima_seg.files import write_text
from ima_seg.methods.history import EpochTally, epoch_line, epoch_warnings, history_row, write_course
from ima_seg.methods.ima import IMA
from ima_seg.methods.settings import BEFORE, IMASettings, TrainingSettings, differences
from ima_seg.nnunet.checkpoint import KEY
from ima_seg.ops import describe_backend
from ima_seg.types import Labels, ThreatModel

S = TypeVar("S", bound=TrainingSettings)


class Training(ABC, Generic[S]):
    """One fold's adversarial training, as the trainers see it.

    Args:
        settings: of the training.
        labels: how the network's outputs are read.
        patch_size: voxels of a training patch per axis.
        image_channels: input channels that are images; channels after them (cascade) are never perturbed.
        epochs: length of the training.
        native: native intensity units per network unit of each channel, where all cases share them (CT).
        log: prints a line to the training log.
    """

    #: How the log, and the names of the files, call it.
    name: ClassVar[str]
    #: Of its state in a checkpoint; stock nnU-Net ignores keys that it does not know.
    key: ClassVar[str]

    def __init__(
        self,
        settings: S,
        *,
        labels: Labels,
        patch_size: Iterable[int],
        image_channels: int,
        epochs: int,
        native: Mapping[str, float],
        log: Callable[[str], None],
    ) -> None:
        self.settings, self.epochs, self.log, self.native = settings, epochs, log, dict(native)
        self.labels, self.image_channels = labels, image_channels
        self.voxels = image_channels * math.prod(patch_size)
        self.history: list[dict[str, Any]] = []
        self.resumed_settings: dict[str, Any] | None = None

    @abstractmethod
    def sizes(self) -> dict[str, float]:
        """The settings that are sizes, per voxel in network units."""

    @abstractmethod
    def step(
        self,
        network: torch.nn.Module,
        x: torch.Tensor,
        y: torch.Tensor,
        case_ids: Sequence[str],
        *,
        loss: Callable[[Any], torch.Tensor],
        forward: Callable[[torch.nn.Module, torch.Tensor], Any],
        backward: Callable[[torch.Tensor], None],
        update: Callable[[], object],
    ) -> torch.Tensor:
        """Accumulate the gradient of one step in ``p.grad``; returns the loss, 0-dim. Arguments as for a method."""

    @abstractmethod
    def start_afresh(self) -> str:
        """What it means that a checkpoint holds no state of this training, for the log."""

    @abstractmethod
    def drop(self, patches: int) -> None:
        """Note patches left out for NaN or infinite voxels."""

    @abstractmethod
    def end_epoch(self, seconds: float) -> None:
        """Extend the history, log a summary. Collective over ranks."""

    @abstractmethod
    def write_files(self, folder: Path) -> None:
        """The tables and plots of the training."""

    def enter_cases(self, training_cases: Iterable[str]) -> None:
        """Meet the fold's training cases."""

    def start_epoch(self, epoch: int) -> None:
        """Begin the epoch of this number, from 0."""

    @property
    def updates_per_batch(self) -> int:
        """How often a batch is used."""
        return 1

    # --- settings --------------------------------------------------------------------------------------------------

    @classmethod
    def settings_file(cls) -> str:
        """The name of the file that tells with which settings a folder was trained."""
        return f"{cls.name.lower()}_settings.json"

    def described(self) -> dict[str, Any]:
        """The settings with everything automatic resolved: what makes two trainings comparable."""
        return {**self.settings.model_dump(), "epochs": self.epochs, **self.sizes(), "unit": "voxel"}

    def _before(self) -> dict[str, Any]:
        """What a training did whose settings do not tell."""
        return {name: value for name, value in BEFORE.items() if name in type(self.settings).model_fields}

    def log_settings(self, device: torch.device) -> None:
        """Echo the settings, one per line, sizes with their L2 view, and what they come to on ``device``."""
        self.log(f"{self.name} settings:")
        threat = ThreatModel(self.settings.norm)
        for name, value in self.described().items():
            view = ""
            if name in self.sizes():
                view = f" SD per voxel = {threat.to_total(value, self.voxels):.4g} as the {self.settings.norm} "
                view += f"norm of a patch of {self.voxels} values"
            self.log(f"  {name}: {value if not isinstance(value, float) else f'{value:.6g}'}{view}")
        dtype = resolve_precision(self.settings.precision, device)
        computed = str(dtype or torch.float32).removeprefix("torch.")
        self.log(f"{self.name} search: passes in {computed}, ops by {describe_backend(device)}")

    def guard(self, folder: Path) -> None:
        """Refuse to continue, or to overwrite, a training made with other settings; then store ours in ``folder``.

        Raises:
            UserError: naming the settings that differ.
        """
        mine = json.loads(json.dumps(self.described()))
        file = folder / self.settings_file()
        if self.resumed_settings is not None:
            changed = differences(self.resumed_settings, mine)
            if changed:
                raise UserError(
                    f"the checkpoint in {folder} was trained with other {self.name} settings ({changed}); continue "
                    "with its settings, or start anew in another folder (other plans name with -p, or other "
                    "nnUNet_results)"
                )
        elif file.is_file() and any(folder.glob("checkpoint_*.pth")):
            stored = json.loads(file.read_text(encoding="utf-8"))
            changed = differences({**self._before(), **stored}, mine)
            if changed:
                raise UserError(
                    f"{folder} holds a training with other {self.name} settings ({changed}), which this one would "
                    "overwrite; give this one plans of another name (`ima-seg plans`, then -p), another "
                    "nnUNet_results, or move the folder away"
                )
        write_text(file, json.dumps(mine, indent=2) + "\n")

    # --- checkpoint ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and JSON types."""
        return {"settings": self.described(), "voxels": self.voxels, "history": [dict(row) for row in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; settings are compared by :meth:`guard`, when training goes on."""
        self.history = [dict(row) for row in state["history"]]
        self.resumed_settings = {**self._before(), **json.loads(json.dumps(state["settings"]))}


class IMATraining(Training[IMASettings]):
    """One fold's IMA training; arguments as for :class:`Training`."""

    name, key = "IMA", KEY

    def __init__(self, settings: IMASettings, **options: Any) -> None:
        super().__init__(settings, **options)
        self.ima = IMA.from_settings(
            settings, labels=self.labels, patch_voxels=self.voxels, epochs=self.epochs,
            image_channels=self.image_channels,
        )  # fmt: skip
        self.tally = EpochTally()

    @override
    def sizes(self) -> dict[str, float]:
        return {"delta": self.ima.ledger.delta, "eps_max": self.ima.ledger.eps_max}

    @override
    def step(
        self, network: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, case_ids: Sequence[str], *,
        loss: Callable[[Any], torch.Tensor], forward: Callable[[torch.nn.Module, torch.Tensor], Any],
        backward: Callable[[torch.Tensor], None], update: Callable[[], object],
    ) -> torch.Tensor:  # fmt: skip
        report = self.ima.step(network, x, y, case_ids, loss=loss, forward=forward, backward=backward)
        self.tally.add(report)
        return report.loss

    @override
    def start_afresh(self) -> str:
        return f"no margin ledger; all margins start anew at {self.ima.ledger.delta:.4g}"

    @override
    def drop(self, patches: int) -> None:
        self.tally.drop(patches)

    # --- cases -----------------------------------------------------------------------------------------------------

    def enter_cases(self, training_cases: Iterable[str]) -> None:
        """Enter the fold's training cases; report those that are new to a resumed ledger, or gone from the fold."""
        ledger = self.ima.ledger
        current = {str(case) for case in training_cases}
        known = set(ledger.cases)
        if known and current - known:
            self.log(
                f"IMA: {len(current - known)} cases are new to the margin ledger; they start at {ledger.delta:.4g}"
            )
        if known - current:
            gone = sorted(known - current)
            self.log(f"IMA: {len(gone)} cases of the margin ledger are not in this fold ({', '.join(gone[:5])}"
                     f"{', ...' if len(gone) > 5 else ''}); their margins are kept")  # fmt: skip
        ledger.register(sorted(current))

    # --- epochs ----------------------------------------------------------------------------------------------------

    def end_epoch(self, seconds: float) -> None:
        """Move the margins, extend the history, log a summary. Collective over ranks."""
        totals = self.tally.totals()
        self.tally = EpochTally()
        summary = self.ima.end_epoch()
        row = history_row(summary, totals, seconds)
        self.history.append(row)
        self.log(f"IMA margins: {epoch_line(summary, row)}")
        if summary.equilibrium and not any(earlier["equilibrium"] for earlier in self.history[:-1]):
            self.log("IMA equilibrium: the median margin has stopped growing")
        for warning in epoch_warnings(row, self.settings, self.epochs):
            self.log(f"IMA WARNING: {warning}")

    def write_files(self, folder: Path) -> None:
        """``ima_margins.csv``, ``ima_history.csv`` and ``ima_progress.png``."""
        write_course(
            folder, self.history, self.ima.ledger, norm=self.settings.norm, voxels=self.voxels, native=self.native
        )

    # --- checkpoint ------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "ledger": self.ima.ledger.state_dict()}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ima.ledger.load_state_dict(state["ledger"])
        super().load_state_dict(state)
