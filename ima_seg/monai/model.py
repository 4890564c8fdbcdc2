"""A loaded bundle: network, inferer, pre- and post-processing, and what its outputs mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ima_seg.cases.check import check_case
from ima_seg.cases.find import find_cases, listed_cases
from ima_seg.cases.raw import CaseFiles, CaseProblem
from ima_seg.errors import UserError
from ima_seg.monai.config import Parts
from ima_seg.types import Labels


@dataclass(frozen=True)
class LoadedBundle(Parts):
    """One bundle with its weights; what :class:`ima_seg.evaluate.subject.Loaded` has, and:

    Bundles are attacked as a whole, also where their inferer cuts slices (``is_2d``), and do not name their data set.

    Attributes:
        network: on the device, frozen.
        title: name and version.
        image_key: of the image in the dictionaries of the transforms.
    """

    folder: Path
    title: str
    image_key: str
    labels: Labels
    classes: dict[str, tuple[int, ...]]
    channels: list[str]
    is_single_ct: bool
    is_2d: bool = False
    dataset: str = ""

    @property
    def files(self) -> list[Path]:
        """Those that define it."""
        return [self.config, self.folder / "configs" / "metadata.json", self.weights]

    def card(self) -> dict[str, Any]:
        """What :class:`ima_seg.evaluate.run.ModelInfo` says of it, beside name and files."""
        from ima_seg.monai.window import patch_size

        return {
            "bundle": self.title,
            "configuration": type(self.inferer).__name__,
            "checkpoint": self.weights.name,
            "patch_size": patch_size(self.inferer),
            "sd": [None] * len(self.channels),
            "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
        }

    def check_use(self, *, writing: bool = False) -> None:
        """Nothing to refuse before there is a case."""

    def window(self, *, step_size: float = 0.5, mirroring: bool = False, tile_batch: int | None = None) -> nn.Module:
        """The inferer as a differentiable network; ``step_size`` and ``mirroring`` are nnU-Net's alone."""
        from ima_seg.monai.window import make_window

        return make_window(self.network, self.inferer, outputs=self.labels.outputs, tile_batch=tile_batch)

    def find_cases(
        self, images: Path | None, labels: Path | None, *, limit: int | None = None
    ) -> tuple[list[CaseFiles], list[CaseProblem]]:
        """The complete and the incomplete cases of two folders, or of a dataset.json in place of ``images``."""
        if images is None:
            raise UserError(f"{self.folder} is a bundle, which names no files; name images and labels with -i and -gt")
        if labels is None:
            return listed_cases(images, images.parent, channels={1, len(self.channels)}, limit=limit)
        return find_cases(
            images, labels, channels=len(self.channels), endings=(".nii.gz", ".nii"), one_name=True, limit=limit
        )

    def check_case(self, files: CaseFiles) -> None:
        """Refuse files that cannot be evaluated."""
        allowed = {0}.union(*self.classes.values())
        check_case(files, labels_allowed=allowed, stacked=True, source="the bundle (metadata.json or --bundle-labels)")
