"""Shared types: threat model, label semantics, results.

The canonical size of a perturbation is measured **per voxel in network units**, of which one should be a standard
deviation (SD) of each channel of the network's input, as of a z-scored image (trainings and evaluations see to that):
the root mean square over channels and voxels for L2, the largest absolute value for L-infinity. One number then carries
over between 2D, 3D and patch sizes; :meth:`ThreatModel.to_total` and :meth:`ThreatModel.from_total` convert.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch

from ima_seg.errors import UserError

Norm = Literal["l2", "linf"]

#: Maps a batch (B, C, *S) to logits (B, K, *S), of classifiers (B, K), or to a list of them with the full resolution
#: first.
Network = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class ThreatModel:
    """What the adversary may change.

    Args:
        norm: ``"l2"`` or ``"linf"``; sizes are RMS per voxel or largest absolute value, in network units.
        image_channels: the first this many input channels may be perturbed, the rest (one-hot masks of a cascade)
            never are; ``None`` means all.
        bounds: of each perturbable channel, between which least and greatest value perturbed voxels stay, or ``None``
            for none; channels beyond the given ones have none. Normalisation clips CT, so that what a perturbation
            adds beyond reaches no network. A voxel that lies outside already, by augmentation, is moved no further
            out. Z-scored images have no bounds.
        masked: channels that are exactly 0 outside the body, as normalisation over a mask leaves them (nnU-Net's
            ``use_mask_for_norm``). What is outside in all of them is not perturbed, in any channel.
    """

    norm: Norm = "l2"
    image_channels: int | None = None
    bounds: tuple[tuple[float, float] | None, ...] = ()
    masked: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.norm not in ("l2", "linf"):
            raise UserError(f"norm is {self.norm!r}; the norms there are: 'l2', 'linf'")
        if self.image_channels is not None and self.image_channels < 1:
            raise UserError(f"image_channels is {self.image_channels}; at least one channel must be perturbable")
        for pair in self.bounds:
            if pair is not None and not pair[0] < pair[1]:
                raise UserError(f"bounds of a channel are {pair}; the first must be less than the second")

    @property
    def bounded(self) -> bool:
        """Whether a channel has bounds."""
        return any(pair is not None for pair in self.bounds)

    def within(self, image: torch.Tensor, perturbed: torch.Tensor) -> torch.Tensor:
        """``perturbed`` moved into the bounds; both are of the perturbable channels (B, image channels, *S)."""
        if not self.bounded:
            return perturbed
        pairs = [*self.bounds, *[None] * image.shape[1]][: image.shape[1]]
        shape = (-1, *(1,) * (image.ndim - 2))
        low, high = (
            image.new_tensor([sign * math.inf if pair is None else pair[end] for pair in pairs]).view(shape)
            for end, sign in ((0, -1), (1, 1))
        )
        return perturbed.clamp(torch.minimum(low, image), torch.maximum(high, image))

    def support(self, x: torch.Tensor) -> torch.Tensor | None:
        """Where the batch ``x`` (B, C, *S) may be perturbed, (B, 1, *S) bool; ``None`` for everywhere."""
        if not self.masked:
            return None
        if max(self.masked) >= x.shape[1]:
            raise UserError(f"masked names channel {max(self.masked)}, but the batch has {x.shape[1]} channels from 0")
        return (x[:, list(self.masked)] != 0).any(1, keepdim=True)

    def perturbable(self, x: torch.Tensor) -> torch.Tensor:
        """The view of ``x`` (B, C, *S) that may be perturbed: (B, image_channels, *S)."""
        if self.image_channels is None or self.image_channels == x.shape[1]:
            return x
        if self.image_channels > x.shape[1]:
            raise UserError(
                f"image_channels is {self.image_channels}, but the batch has {x.shape[1]} channels (B, C, *S)"
            )
        return x[:, : self.image_channels]

    def to_total(self, size: float, voxels: int) -> float:
        """Per-voxel size -> norm of the whole perturbation of ``voxels`` (channels x space) elements."""
        return size * math.sqrt(voxels) if self.norm == "l2" else size

    def from_total(self, total: float, voxels: int) -> float:
        """Norm of a whole perturbation of ``voxels`` (channels x space) elements -> per-voxel size."""
        return total / math.sqrt(voxels) if self.norm == "l2" else total


def _check_outputs(outputs: int, kind: Literal["classes", "regions", "labels"]) -> None:
    least = 2 if kind == "classes" else 1
    if outputs < least:
        raise UserError(f"outputs is {outputs}; {kind} need {least} or more")


@dataclass(frozen=True)
class Labels:
    """How the network's outputs are to be read.

    Args:
        outputs: number of output channels K. Multi-class: softmax over K, channel 0 is background. Regions: K
            overlapping foreground regions with a sigmoid each.
        regions: whether the outputs are regions.
        ignore_label: value of the label map to leave out of every loss and criterion (multi-class). With regions the
            target then carries one more channel, 1 where ignored; its value is not used.
    """

    outputs: int
    regions: bool = False
    ignore_label: int | None = None

    def __post_init__(self) -> None:
        _check_outputs(self.outputs, "regions" if self.regions else "classes")


@dataclass(frozen=True)
class Classes:
    """How a classifier's outputs (B, K) are to be read: the whole image has one answer.

    Args:
        outputs: number of logits K. One class per image: softmax over K. Multi-label: a sigmoid each.
        multilabel: whether an image has any number of the K labels.
    """

    outputs: int
    multilabel: bool = False

    #: No image is ignored.
    ignore_label: ClassVar[None] = None

    def __post_init__(self) -> None:
        _check_outputs(self.outputs, "labels" if self.multilabel else "classes")

    @property
    def regions(self) -> bool:
        """Whether outputs overlap; labels are to an image what regions are to a voxel."""
        return self.multilabel


@dataclass(frozen=True)
class Target:
    """A reference, prepared once per batch. A class or labels of an image are a segmentation of one voxel, N = 1.

    Attributes:
        reference: multi-class: (B, 1, N) over flattened space, uint8 (int16 from 255 outputs on): 0 where ignored,
            1 + class, or 1 + K where the value is that of no class. Regions: (B, K, N) bool, False where ignored.
        known: regions with an ignore label: (B, 1, N) bool, False where ignored; else ``None``.
        labels: how outputs are read.
    """

    reference: torch.Tensor
    known: torch.Tensor | None
    labels: Labels | Classes

    def __getitem__(self, rows: torch.Tensor | slice) -> Target:
        return self.map(lambda part: part[rows])

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Target:
        """``function`` applied to each tensor (B, channels, N)."""
        known = None if self.known is None else function(self.known)
        return Target(function(self.reference), known, self.labels)

    @property
    def whole_image(self) -> bool:
        """Whether it is of a classifier."""
        return isinstance(self.labels, Classes)

    @property
    def valid(self) -> torch.Tensor | None:
        """(B, 1, N) bool, or ``None`` where nothing is ignored."""
        if self.labels.regions or self.labels.ignore_label is None:
            return self.known
        return self.reference != 0

    @cached_property
    def onehot(self) -> torch.Tensor:
        """(B, K, N) bool, ignored voxels False everywhere."""
        if self.labels.regions:
            return self.reference
        classes = torch.arange(1, self.labels.outputs + 1, device=self.reference.device, dtype=self.reference.dtype)
        return self.reference == classes[:, None]

    @property
    def foreground(self) -> torch.Tensor:
        """(B, F, N) bool: the channels that count as foreground."""
        return self.onehot if self.labels.regions else self.onehot[:, 1:]

    @classmethod
    def from_raw(cls, raw: torch.Tensor, labels: Labels | Classes) -> Target:
        """From a label map (B, 1, *S) or (B, *S), or from regions (B, K[+1], *S), of any dtype.

        Of classifiers: from classes (B,) or (B, 1), or labels (B, K) of 0 and 1.

        A value outside 0..K-1 belongs to no class; it is not looked for, because that would wait for the device. An
        image without a class, though, is a mistake.

        Raises:
            UserError: a wrong number of channels; a class that does not exist.
        """
        if isinstance(labels, Classes):
            return cls(_answers(raw, labels), None, labels)
        flat = raw.flatten(2) if labels.regions or raw.shape[1] == 1 else raw.flatten(1)[:, None]
        if labels.regions:
            expected = labels.outputs + (labels.ignore_label is not None)
            if flat.shape[1] != expected:
                raise UserError(f"region target has {flat.shape[1]} channels, expected {expected} (B, K, *S)")
            known = None if labels.ignore_label is None else ~flat[:, -1:].bool()
            reference = flat[:, : labels.outputs].bool()
            return cls(reference if known is None else reference & known, known, labels)
        none = labels.outputs
        if not flat.is_floating_point():
            flat = flat.to(torch.int32)  # narrow types hold neither many classes nor a negative ignore label
        is_class = (flat >= 0) & (flat < none)
        if flat.is_floating_point():
            is_class &= flat == flat.floor()
        codes = torch.where(is_class, flat, none).to(torch.uint8 if none < 255 else torch.int16) + 1
        if labels.ignore_label is not None:
            codes = codes.masked_fill_(flat == labels.ignore_label, 0)
        return cls(codes, None, labels)


def _answers(raw: torch.Tensor, labels: Classes) -> torch.Tensor:
    """The reference of a classifier's target, (B, 1, 1) codes or (B, K, 1) bool."""
    columns = labels.outputs if labels.multilabel else 1
    rows = raw[:, None] if raw.ndim == 1 and not labels.multilabel else raw
    if rows.ndim != 2 or rows.shape[1] != columns:
        expected = f"labels (B, {columns})" if labels.multilabel else "classes (B,) or (B, 1)"
        raise UserError(f"the reference of a classifier has shape {tuple(raw.shape)}; expected {expected}")
    greatest = 1 if labels.multilabel else labels.outputs - 1
    allowed = (rows >= 0) & (rows <= greatest) & (rows == rows.long())
    if not bool(allowed.all()):
        raise UserError(
            f"the reference of a classifier holds {rows[~allowed][0].item():g}; "
            + ("labels are 0 or 1" if labels.multilabel else f"its classes are 0 to {greatest}")
        )
    if labels.multilabel:
        return rows.bool()[..., None]
    return (rows.long() + 1).to(torch.uint8 if labels.outputs < 255 else torch.int16)[..., None]


@dataclass(frozen=True)
class PassCount:
    """Network passes, counted per sample: a batch of 8 through the network once is 8 forwards."""

    forwards: int = 0
    gradients: int = 0  # forward + gradient with respect to the input

    def __add__(self, other: PassCount) -> PassCount:
        return PassCount(self.forwards + other.forwards, self.gradients + other.gradients)

    @property
    def total(self) -> int:
        """Forwards and gradients alike."""
        return self.forwards + self.gradients
