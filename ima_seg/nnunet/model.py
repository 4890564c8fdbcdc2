"""A loaded model folder: its networks and everything that nnU-Net's inference needs beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ima_seg.cases.check import check_case
from ima_seg.cases.find import listed_cases
from ima_seg.cases.raw import CaseFiles, CaseProblem
from ima_seg.errors import UserError
from ima_seg.nnunet.checkpoint import restore_ledger
from ima_seg.nnunet.dataset import allowed_labels, find_cases, ignore_value
from ima_seg.nnunet.normalisation import shared_sd
from ima_seg.nnunet.reading import check_pictures, one_file
from ima_seg.nnunet.tiling import SlidingWindow
from ima_seg.types import Labels

#: Readers of nnU-Net whose arrays can be put back into files: pictures, and stored voxels with the axes reversed.
_PICTURES = ("NaturalImage2DIO", "Tiff3DIO")
_READERS = ("SimpleITKIO", "NibabelIO", *_PICTURES)


@dataclass(frozen=True)
class LoadedFolder:
    """One model; what :class:`ima_seg.evaluate.subject.Loaded` has, and:

    Attributes:
        networks: one per fold, on the device, frozen.
        plans: nnU-Net's PlansManager.
        configuration: nnU-Net's ConfigurationManager.
        dataset_json: contents of dataset.json.
        mirror_axes: axes of test-time mirroring.
        trainer: name of the trainer class.
        folds: names of the folds.
        ima: our state in the first fold's checkpoint; ``None`` for other trainers.
        ledgers: fold -> the same of each fold that has it.
        previous_stage: folder with the previous stage's segmentations, of a cascade.
    """

    folder: Path
    networks: Sequence[nn.Module]
    plans: Any
    configuration: Any
    configuration_name: str
    dataset_json: dict[str, Any]
    labels: Labels
    classes: dict[str, tuple[int, ...]]
    channels: list[str]
    mirror_axes: list[int] | None
    trainer: str
    files: list[Path]
    folds: list[str]
    ima: dict[str, Any] | None
    ledgers: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    previous_stage: Path | None = None

    @property
    def label_manager(self) -> Any:
        """nnU-Net's LabelManager."""
        return self.plans.get_label_manager(self.dataset_json)

    @property
    def reader(self) -> str:
        """Name of nnU-Net's reader of its images."""
        return str(self.plans.image_reader_writer_class.__name__)

    @property
    def is_2d(self) -> bool:
        """Whether the network sees slices."""
        return len(self.configuration.patch_size) == 2

    @property
    def is_single_ct(self) -> bool:
        """Whether there is one channel, normalised as CT."""
        return list(self.configuration.normalization_schemes) == ["CTNormalization"]

    @property
    def sd(self) -> list[float | None]:
        """Network units per SD of each channel; ``None``: each case has its own."""
        properties = self.plans.foreground_intensity_properties_per_channel
        schemes = self.configuration.normalization_schemes
        return [shared_sd(scheme, properties.get(str(index), {})) for index, scheme in enumerate(schemes)]

    @property
    def dataset(self) -> str:
        """Name of the data set, or an empty string."""
        return str(self.plans.plans.get("dataset_name") or self.dataset_json.get("name") or "")

    def card(self) -> dict[str, Any]:
        """What :class:`ima_seg.evaluate.run.ModelInfo` says of it, beside name and files."""
        ima = None
        if self.ima is not None:
            ledger = restore_ledger(self.ima)
            margins = {case: record.margin for case, record in ledger.cases.items()}
            ima = {
                "norm": self.ima["settings"]["norm"], "delta": ledger.delta, "eps_max": ledger.eps_max,
                "margins": margins, "history": [dict(row) for row in self.ima["history"]],
            }  # fmt: skip
        return {
            "trainer": self.trainer,
            "plans": str(self.plans.plans.get("plans_name") or ""),
            "configuration": self.configuration_name,
            "folds": self.folds,
            "checkpoint": self.files[-1].name,
            "patch_size": [int(size) for size in self.configuration.patch_size],
            "spacing": [float(value) for value in self.configuration.spacing],
            "mirror_axes": self.mirror_axes,
            "parameters": sum(parameter.numel() for parameter in self.networks[0].parameters()),
            "sd": [] if self.sd == [1.0] * len(self.sd) else self.sd,
            "ima": ima,
        }

    def check_use(self, *, writing: bool = False) -> None:
        """Refuse a cascade without its previous stage; with ``writing``, a reader whose arrays cannot be put back.

        Raises:
            UserError: one of them.
        """
        if self.configuration.previous_stage_name is not None and self.previous_stage is None:
            raise self.no_previous_stage()
        if writing and self.reader not in _READERS:
            raise UserError(
                f"{self.folder} reads images with {self.reader}, for which adversarial files cannot be written; "
                f"leave --save-adversarial out (supported: {', '.join(_READERS)})"
            )

    def no_previous_stage(self) -> UserError:
        """What to say where a cascade is given nothing to start from."""
        return UserError(
            f"{self.folder} is the second stage of a cascade; name the folder with the segmentations of "
            f"{self.configuration.previous_stage_name!r} with -prev_stage_predictions"
        )

    def window(self, *, step_size: float, mirroring: bool, tile_batch: int | None = None) -> SlidingWindow:
        """The sliding window of nnU-Net's inference; ``tile_batch`` defaults to the batch size of the training."""
        return SlidingWindow(
            self.networks,
            patch_size=self.configuration.patch_size,
            step_size=step_size,
            mirror_axes=self.mirror_axes if mirroring else None,
            tile_batch=tile_batch or int(self.configuration.batch_size),
        )

    def find_cases(
        self, images: Path | None, labels: Path | None, *, limit: int | None = None
    ) -> tuple[list[CaseFiles], list[CaseProblem]]:
        """The complete and the incomplete cases of two folders, in nnU-Net's naming, or of a dataset.json.

        Without ``labels``, ``images`` is a dataset.json that names files (``dataset``); default: the model's own, whose
        relative paths start from the data set's folder in ``nnUNet_raw``.
        """
        single = one_file(self.plans)
        if labels is None:
            raw = os.environ.get("nnUNet_raw")
            root = images.parent if images else Path(raw, self.dataset) if raw else None
            source = images or self.folder / "dataset.json"
            channels = {len(self.channels)} | ({1} if single else set())
            return listed_cases(source, root, channels=channels, limit=limit)
        if images is None:
            raise UserError(f"{labels} has the labels; name the folder of the images, too, with -i")
        return find_cases(images, labels, self.dataset_json, limit=limit, one_file=single)

    def check_case(self, files: CaseFiles) -> None:
        """Refuse files that cannot be evaluated."""
        allowed, ignore = allowed_labels(self.dataset_json), ignore_value(self.dataset_json)
        if self.reader in _PICTURES:
            channels = len(self.channels)
            check_pictures(self.plans, files, channels=channels, labels_allowed=allowed, ignore=ignore)
        else:
            check_case(files, labels_allowed=allowed, ignore=ignore)
