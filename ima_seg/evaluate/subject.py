"""What an evaluation needs of a model and of a case: nnU-Net's model folders and MONAI's bundles have it alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from ima_seg.cases.raw import CaseFiles, CaseProblem, FloatArray, LabelArray, RawCase
from ima_seg.types import Labels, Target


class Window(Protocol):
    """(B, C, *S) network input -> logits (B, K, *S) of the whole, with exact gradients."""

    tile_batch: int  # how many tiles the network sees at once; halved when the memory does not suffice

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        """Logits in float32."""


class Loaded(Protocol):
    """A trained model with the inference that it was made for."""

    @property
    def folder(self) -> Path: ...
    @property
    def files(self) -> list[Path]: ...  # those that define it
    @property
    def labels(self) -> Labels: ...  # how outputs are read
    @property
    def classes(self) -> dict[str, tuple[int, ...]]: ...  # foreground -> label values, in the order of the outputs
    @property
    def channels(self) -> list[str]: ...  # names of the image channels
    @property
    def dataset(self) -> str: ...  # name of the data set that it was trained for; may be empty
    @property
    def is_2d(self) -> bool: ...  # whether a volume is a stack of independent slices to it
    @property
    def is_single_ct(self) -> bool: ...  # whether there is one channel, in HU

    def window(self, *, step_size: float, mirroring: bool, tile_batch: int | None = None) -> Any:
        """Its :class:`Window`."""

    def card(self) -> dict[str, Any]:
        """Fields of :class:`ima_seg.evaluate.run.ModelInfo`, beside name, folder and hashes."""

    def check_use(self, *, writing: bool = False) -> None:
        """Refuse what cannot be evaluated as it was loaded, or (``writing``) whose adversarial files cannot be."""

    def find_cases(
        self, images: Path | None, labels: Path | None, *, limit: int | None = None
    ) -> tuple[list[CaseFiles], list[CaseProblem]]:
        """The complete and the incomplete cases of two folders, or (no ``labels``) of a dataset.json."""

    def check_case(self, files: CaseFiles) -> None:
        """Refuse files that cannot be evaluated."""


class Case(Protocol):
    """A case as one model sees it."""

    @property
    def raw(self) -> RawCase: ...  # in its original geometry
    @property
    def model(self) -> Loaded: ...
    @property
    def base(self) -> torch.Tensor: ...  # (1, C + extra, *S) in SDs; extra channels are never perturbed
    @property
    def image_channels(self) -> int: ...  # C
    @property
    def support(self) -> torch.Tensor | None: ...  # (1, 1, *S) bool where a perturbation may be; None: everywhere
    @property
    def scale(self) -> FloatArray | None: ...  # (C,) original units per SD; None: no line connects them
    @property
    def sd(self) -> list[float]: ...  # (C,) network units per SD of the channel's network input
    @property
    def native_range(self) -> FloatArray: ...  # (C,) 0.5 to 99.5 percentile, original units; without a scale, SDs
    @property
    def resampled(self) -> bool: ...  # whether the network's grid is not the image's
    @property
    def image_voxels(self) -> int: ...  # of the image, per channel, that the network's grid covers
    @property
    def slice_axis(self) -> int: ...  # slice direction of the per-slice Dice, an axis of (Z, Y, X)
    @property
    def shows_hu(self) -> bool: ...  # whether the first channel is in HU

    def target(self, *, slices: bool = False) -> Target:
        """The reference on the network's grid; with ``slices`` those along the first axis as a batch."""

    def network(self, window: Any, *, whole: bool) -> torch.nn.Sequential:
        """Perturbed image in the layout of :attr:`base` -> input of the network -> logits."""

    def predict(self, window: Any, perturbed: torch.Tensor) -> LabelArray:
        """The segmentation in the original geometry: (Z, Y, X) label map, or one mask per class (classes, Z, Y, X)."""

    def delta(self, perturbed: torch.Tensor) -> torch.Tensor:
        """The perturbation (C, *S) in SDs of an image in the layout of :attr:`base`."""

    def native_delta(self, delta: torch.Tensor) -> FloatArray:
        """A perturbation (C, *S) in SDs -> (C, Z, Y, X) in original intensities; needs a scale."""

    def from_native(self, delta: FloatArray) -> torch.Tensor:
        """The inverse of :meth:`native_delta`."""

    def within(self, perturbed: torch.Tensor) -> torch.Tensor:
        """A perturbed image in the layout of :attr:`base`, its values as far as a file of its kind can hold them."""

    def altered(self, image: Any) -> Case:
        """The same case with another image (C, Z, Y, X) float32, original intensities: a corrupted one."""


class Model(Loaded, Protocol):
    """The same, and it prepares cases."""

    def prepare(self, files: CaseFiles, *, device: torch.device | str = "cpu") -> Case:
        """Read and pre-process a case."""

    def training_cases(self, images: Path) -> dict[str, str] | None:
        """Case id -> how it is known to the training, ``images`` being evaluated; ``None`` where nothing tells."""
