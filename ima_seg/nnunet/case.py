"""A case between its files and the network: nnU-Net's preprocessing and export, and the way back for perturbations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ima_seg.attacks.passes import predicted
from ima_seg.attacks.tiling import Tiling
from ima_seg.cases.check import check_prepared, check_read, check_segmentation
from ima_seg.cases.raw import CaseFiles, FloatArray, LabelArray, RawCase, intensity_range
from ima_seg.errors import UserError
from ima_seg.nnunet.limits import Within, network_limits
from ima_seg.nnunet.model import LoadedFolder
from ima_seg.nnunet.normalisation import ChannelScale, Renormalise, before_clipping, channel_scales
from ima_seg.nnunet.reading import read_image, read_label
from ima_seg.types import Target


def read_case(model: LoadedFolder, case: str, images: Sequence[Path], label: Path) -> RawCase:
    """Read a case with the reader that the model's plans name.

    Raises:
        UserError: a file that this reader does not accept, although others may; different shapes.
    """
    image = read_image(model.plans, images, channels=len(model.channels))
    reference, _ = read_label(model.plans, label)
    shape, spacing = image.values.shape[1:], image.properties["spacing"]
    if reference.shape[1:] != shape:
        raise UserError(f"{label} has the shape {reference.shape[1:]}, its image {shape}; they must be equal")
    check_read(CaseFiles(case, tuple(images), label), image.values, spacing)
    _require_usual_spacing(model, images[0], spacing)
    found: LabelArray = np.rint(reference[0]).astype(np.int16)
    return RawCase(case, image.values, image.properties, found, limits=image.limits, colour=image.colour)


def _require_usual_spacing(model: LoadedFolder, file: Path, spacing: Sequence[float]) -> None:
    """Refuse lengths in another unit than those of the training, where no header says so."""
    network = [float(value) for value in model.configuration.spacing]
    own = [float(spacing[axis]) for axis in model.plans.transpose_forward][-len(network) :]
    # No volume has voxels so many times larger or smaller than those of the training.
    if not 1e-5 < np.prod(own) / np.prod(network) < 1e5:
        found, there = (" x ".join(f"{value:.4g}" for value in values) for values in (own, network))
        raise UserError(
            f"{file}: the spacing is {found}, that of {model.folder} {there} mm; is it in another unit? store it in mm"
        )


def read_previous_stage(model: LoadedFolder, files: CaseFiles, raw: RawCase) -> LabelArray | None:
    """The (Z, Y, X) segmentation of a case by the previous stage of a cascade; ``None`` for other models.

    Raises:
        UserError: there is no file, or one of another shape.
    """
    if model.previous_stage is None or model.configuration.previous_stage_name is None:
        return None
    path = model.previous_stage / f"{files.case}{model.dataset_json['file_ending']}"
    if not path.is_file():
        raise UserError(f"{path} does not exist; it should be the previous stage's segmentation of {files.case}")
    check_segmentation(path)
    segmentation, _ = read_label(model.plans, path)
    if segmentation.shape[1:] != raw.reference.shape:
        raise UserError(f"{path} has the shape {segmentation.shape[1:]}, the image {raw.reference.shape}")
    return np.asarray(np.rint(segmentation[0]), np.int16)


@dataclass(frozen=True)
class PreparedCase:
    """A case as nnU-Net sees it; what :class:`ima_seg.evaluate.subject.Case` has, and:

    Attributes:
        base: the clean image **before** clipping, in SDs; :class:`Renormalise` turns it into the network's input.
        clean: (1, C + cascade, *S) the network's input of the clean image, as nnU-Net computes it.
        support: the nonzero region, where a channel is normalised over it alone.
        nonzero: that region of the cropped image on its own grid; ``None`` with ``support``.
        reference: (1, 1, *S) label map on the network's grid.
        scales: normalisation per channel.
        limits: (2, C) lowest and highest value of a perturbed image, in SDs; ``None``: any.
        offsets: see :class:`Renormalise`.
        properties: of nnU-Net's preprocessing, for the export.
        previous_stage: (Z, Y, X) segmentation of the previous stage, of a cascade.
    """

    raw: RawCase
    model: LoadedFolder
    base: torch.Tensor
    clean: torch.Tensor
    image_channels: int
    support: torch.Tensor | None
    nonzero: npt.NDArray[np.bool_] | None
    reference: torch.Tensor
    scales: list[ChannelScale]
    limits: torch.Tensor | None
    native_range: FloatArray
    offsets: list[int]
    properties: dict[str, Any]
    resampled: bool
    previous_stage: LabelArray | None

    @property
    def scale(self) -> FloatArray:
        """(C,) original intensity units per SD."""
        return np.array([scale.scale for scale in self.scales])

    @property
    def sd(self) -> list[float]:
        """(C,) network units per SD."""
        return [scale.sd for scale in self.scales]

    @property
    def image_voxels(self) -> int:
        """Voxels of the cropped image, before resampling."""
        return int(np.prod(self.properties["shape_after_cropping_and_before_resampling"]))

    @property
    def slice_axis(self) -> int:
        """The network's slices lie along the first axis after nnU-Net's transposition."""
        return int(self.model.plans.transpose_forward[0])

    @property
    def shows_hu(self) -> bool:
        """Whether the first channel is normalised as CT."""
        return self.scales[0].scheme == "CTNormalization"

    def altered(self, image: npt.NDArray[np.float32]) -> PreparedCase:
        """The same case with another image (a corrupted one), of the same shape, as far as its files can hold it."""
        if self.raw.limits is not None:
            low, high = self.raw.limits.T.reshape(2, -1, 1, 1, 1)
            image = np.clip(image, low, high).astype(np.float32)
        device, previous = self.base.device, self.previous_stage
        return prepare_case(self.raw, self.model, device=device, image=image, previous_stage=previous)

    def target(self, *, slices: bool = False) -> Target:
        """The reference of the whole volume, or of its slices along the first axis as a batch."""
        reference = self.reference[0].movedim(1, 0) if slices else self.reference
        labels = self.model.labels
        if not labels.regions:
            return Target.from_raw(reference, labels)
        parts = [torch.isin(reference, reference.new_tensor(values)) for values in self.model.classes.values()]
        if labels.ignore_label is not None:
            parts.append(reference == labels.ignore_label)
        return Target.from_raw(torch.cat(parts, 1), labels)

    def network(self, window: Tiling, *, whole: bool) -> torch.nn.Sequential:
        """Perturbed image in the layout of :attr:`base` (or a batch of its slices) -> logits: normalisation, window."""
        normalise: torch.nn.Module = Renormalise(
            self.scales, self.clean, self.support, whole=whole, offsets=self.offsets
        )
        if self.limits is not None:
            normalise = torch.nn.Sequential(Within(self.limits), normalise)
        return torch.nn.Sequential(normalise, window).eval()

    def within(self, perturbed: torch.Tensor) -> torch.Tensor:
        """The perturbed image, its values as far as its files can hold them."""
        return perturbed if self.limits is None else Within(self.limits)(perturbed)

    @torch.no_grad()
    def predict(self, window: Tiling, perturbed: torch.Tensor) -> LabelArray:
        """The segmentation (Z, Y, X) in the original geometry, by nnU-Net's own resampling and export."""
        from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

        model, threads = self.model, torch.get_num_threads()
        logits = predicted(self.network(window, whole=True), perturbed, f"{self.raw.case}: {model.folder}")
        try:
            segmentation: LabelArray = convert_predicted_logits_to_segmentation_with_correct_shape(
                logits[0].float().cpu(), model.plans, model.configuration, model.label_manager, self.properties,
                num_threads_torch=threads,
            )  # fmt: skip
        finally:
            torch.set_num_threads(threads)
        return segmentation

    def delta(self, perturbed: torch.Tensor) -> torch.Tensor:
        """The perturbation (C, *S) in SDs of a perturbed image in the layout of :attr:`base`."""
        return (perturbed - self.base)[0, : self.image_channels]

    def native_delta(self, delta: torch.Tensor) -> FloatArray:
        """A perturbation (C, *S) in SDs -> (C, Z, Y, X) in original intensities and geometry."""
        values = delta.detach().float().cpu().numpy()
        if self.resampled:
            shape = tuple(int(size) for size in self.properties["shape_after_cropping_and_before_resampling"])
            values = _resample(self.model, self.properties, values, shape, back=True)
            if self.nonzero is not None:
                values = values * self.nonzero  # the kernel of the resampling reaches beyond the mask
        values = values.astype(np.float64) * self.scale.reshape(-1, 1, 1, 1)
        full = np.zeros((len(values), *self.properties["shape_before_cropping"]))
        full[(slice(None), *_box(self.properties["bbox_used_for_cropping"]))] = values
        return _turned(full, self.model.plans.transpose_backward)

    def from_native(self, delta: FloatArray) -> torch.Tensor:
        """The inverse of :meth:`native_delta`: original intensities and geometry -> (C, *S) in SDs."""
        values = _turned(delta, self.model.plans.transpose_forward)
        values = values[(slice(None), *_box(self.properties["bbox_used_for_cropping"]))]
        values = values / self.scale.reshape(-1, 1, 1, 1)
        if self.resampled:
            values = _resample(self.model, self.properties, values, self.base.shape[2:])
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(self.base.device)


def _turned(volume: npt.NDArray[Any], axes: Sequence[int]) -> npt.NDArray[Any]:
    """(C, *S) with its spatial axes in another order."""
    return volume.transpose([0, *(axis + 1 for axis in axes)])


def _box(bounds: Sequence[Sequence[int]]) -> tuple[slice, ...]:
    return tuple(slice(low, high) for low, high in bounds)


def _resample(
    model: LoadedFolder, properties: dict[str, Any], values: npt.NDArray[Any], shape: Sequence[int], *,
    back: bool = False, labels: bool = False,
) -> npt.NDArray[Any]:  # fmt: skip
    """(C, *S) of the cropped image, in the network's order of axes, on the network's grid; or ``back``."""
    original = [float(properties["spacing"][axis]) for axis in model.plans.transpose_forward]
    network = [float(value) for value in model.configuration.spacing]
    network = [*original[: len(original) - len(network)], *network]  # slices of a 2D model stay as they are
    resample = model.configuration.resampling_fn_seg if labels else model.configuration.resampling_fn_data
    return np.asarray(resample(values, shape, *((network, original) if back else (original, network))))


def prepare_case(
    raw: RawCase,
    model: LoadedFolder,
    *,
    device: torch.device | str = "cpu",
    image: npt.NDArray[np.float32] | None = None,
    previous_stage: LabelArray | None = None,
) -> PreparedCase:
    """Preprocess a case as nnU-Net's inference does, or with another ``image`` of its shape (a corrupted one).

    Raises:
        UserError: an image without contrast or out of range, a normalisation that is not known, a missing previous
            stage.
    """
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
    from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

    plans, configuration, forward = model.plans, model.configuration, model.plans.transpose_forward
    image, first_stage = (raw.image if image is None else image), None
    if configuration.previous_stage_name is not None:
        if previous_stage is None:
            raise model.no_previous_stage()
        first_stage = previous_stage[None].astype(np.float32)
    earlier = None if first_stage is None else _turned(first_stage, forward).copy()
    cropped, region, box = crop_to_nonzero(_turned(image, forward).astype(np.float32), earlier)
    nonzero, masks = region[0] >= 0, []
    scales = channel_scales(cropped, nonzero, plans=plans, configuration=configuration, case=raw.case)
    data, segmentation, properties = configuration.preprocessor_class(verbose=False).run_case_npy(
        image, first_stage, dict(raw.properties), plans, configuration, model.dataset_json
    )
    data, segmentation = np.asarray(data, dtype=np.float32), np.asarray(segmentation)
    check_prepared(raw.case, data)
    resampled = data.shape[1:] != cropped.shape[1:]
    reference = _turned(raw.reference[None], forward)[(slice(None), *_box(box))]
    if resampled:
        reference = _resample(model, properties, reference, data.shape[1:], labels=True)
    base, extra, offsets = data.copy(), [], []
    for index, scale in enumerate(scales):
        base[index] /= scale.sd
        if scale.bounds is None:
            continue
        unclipped = before_clipping(cropped[index : index + 1], scale)
        if resampled:
            unclipped = _resample(model, properties, unclipped, data.shape[1:])
            extra.append(data[index] - np.clip(unclipped[0], *scale.bounds))
            offsets.append(index)
        base[index] = unclipped[0]
    check_prepared(raw.case, base)
    limits = network_limits(raw.limits, scales, base)
    if first_stage is not None:
        masks = list(convert_labelmap_to_one_hot(segmentation[0], model.label_manager.foreground_labels, data.dtype))

    def tensor(channels: Any, dtype: type = np.float32) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(np.stack(channels), dtype=dtype))[None].to(device)

    # Of all channels: a voxel that is not zero in one channel belongs to the mask of every channel.
    masked = any(scale.masked for scale in scales)
    return PreparedCase(
        raw=raw,
        model=model,
        base=tensor([*base, *extra, *masks]),
        clean=tensor([*data, *masks]),
        image_channels=len(data),
        support=tensor(segmentation[:1] >= 0, np.bool_) if masked else None,
        nonzero=nonzero if masked else None,
        reference=tensor(reference, np.int16),
        scales=scales,
        limits=None if limits is None else torch.from_numpy(limits).to(device),
        native_range=intensity_range(cropped),
        offsets=offsets,
        properties=properties,
        resampled=resampled,
        previous_stage=previous_stage,
    )
