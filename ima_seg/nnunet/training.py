"""A fold's adversarial training: what of its course is nnU-Net's, the guard of its folder and the echo of settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from ima_seg.attacks.network import resolve_precision
from ima_seg.errors import UserError
from ima_seg.files import remove_stale, write_text
from ima_seg.methods.base import Method
from ima_seg.methods.course import Course
from ima_seg.methods.settings import differences
from ima_seg.nnunet.checkpoint import KEY, METHOD_KEY
from ima_seg.ops import describe_backend


class Training(Course):
    """One fold's training; arguments as for :class:`~ima_seg.methods.course.Course`, but warnings go to the log."""

    def __init__(self, method: Method[Any, Any], *, log: Callable[[str], object], **given: Any) -> None:
        super().__init__(method, log=log, warn=lambda text: log(f"{method.name} WARNING: {text}"), **given)
        #: Of its state in a checkpoint. That of IMA has one of its own, as it always had.
        self.key = KEY if method.settings.section == KEY else METHOD_KEY
        self.resumed_settings: Mapping[str, Any] | None = None

    def enter_cases(self, cases: Iterable[str]) -> None:
        """Meet the fold's training cases."""
        for note in self.method.enter_cases(cases):
            self.log(f"{self.method.name}: {note}")

    @override
    def described(self) -> dict[str, Any]:
        return {**super().described(), "epochs": self.method.epochs, "unit": "voxel"}

    def log_settings(self, device: torch.device) -> None:
        """Echo the settings, one per line, sizes with other views of them, and what they come to on ``device``."""
        name, threat = self.method.name, self.method.threat
        self.log(f"{name} settings:")
        for key, value in self.described().items():
            view = ""
            if key in self.method.sizes():
                view = f" SD per voxel = {threat.to_total(value, self.voxels):.4g} as the {threat.norm} "
                view += f"norm of a patch of {self.voxels} values"
                view += "".join(f" = {value * scale:.4g} {column}" for column, scale in self.native.items())
            if key == "channel_sd":
                view = " network units of each channel are 1 SD"
            self.log(f"  {key}: {value if not isinstance(value, float) else f'{value:.6g}'}{view}")
        dtype = resolve_precision(self.method.settings.precision, device)
        computed = str(dtype or torch.float32).removeprefix("torch.")
        self.log(f"{name} search: passes in {computed}, ops by {describe_backend(device)}")

    def guard(self, folder: Path) -> None:
        """Refuse to continue, or to overwrite, a training made with other settings; then store ours in ``folder``.

        What killed trainings left half written there is removed.

        Raises:
            UserError: naming the settings that differ.
        """
        remove_stale(folder)
        mine, name, before = self.described(), self.method.name, self.resumed_settings
        file = folder / f"{name.lower()}_settings.json"
        found = f"the checkpoint in {folder} was trained"
        remedy = "; continue with its settings, or start anew in another folder (other plans name with -p, or other "
        remedy += "nnUNet_results)"
        if before is None and file.is_file() and any(folder.glob("checkpoint_*.pth")):
            before, found = json.loads(file.read_text(encoding="utf-8")), f"{folder} holds a training"
            remedy = ", which this one would overwrite; give this one plans of another name (`ima-seg plans`, then "
            remedy += "-p), another nnUNet_results, or move the folder away"
        if before is not None and (changed := differences(before, mine)):
            raise UserError(f"{found} with other {name} settings ({changed}){remedy}")
        write_text(file, json.dumps(mine, indent=2) + "\n")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "voxels": self.voxels}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.resumed_settings = state["settings"]
        self.method.channel_sd = state["settings"].get("channel_sd")
