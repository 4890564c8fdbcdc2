"""A case between its files and the network: nnU-Net's preprocessing and export, and the way back for perturbations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ima_seg.attacks.network import full_precision
from ima_seg.cases.files import CaseFiles
from ima_seg.errors import UserError
from ima_seg.nnunet.folder import SegmentationModel
from ima_seg.nnunet.normalisation import ChannelScale, Renormalise, channel_scales
from ima_seg.nnunet.tiling import SlidingWindow
from ima_seg.types import Target

FloatArray = npt.NDArray[np.floating[Any]]
LabelArray = npt.NDArray[np.integer[Any] | np.bool_]


@dataclass(frozen=True)
class RawCase:
    """A case as nnU-Net's reader returns it: axes (C, Z, Y, X) in original intensities.

    Attributes:
        case: its id.
        image: (C, Z, Y, X) float32.
        properties: spacing and geometry, for the writer.
        reference: (Z, Y, X) label map.
    """

    case: str
    image: npt.NDArray[np.float32]
    properties: dict[str, Any]
    reference: LabelArray

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Along the axes of :attr:`image`."""
        z, y, x = (float(value) for value in self.properties["spacing"])
        return z, y, x


def read_case(model: SegmentationModel, case: str, images: Sequence[Path], label: Path) -> RawCase:
    """Read a case with the reader that the model's plans name.

    Raises:
        UserError: a file that this reader does not accept, although others may; different shapes.
    """
    reader = model.plans.image_reader_writer_class()
    try:
        image, properties = reader.read_images([str(file) for file in images])
        reference, _ = reader.read_seg(str(label))
    except (RuntimeError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[-200:]
        raise UserError(
            f"{case}: nnU-Net's {type(reader).__name__} cannot read {', '.join(map(str, images))} with {label} "
            f"({reason}); correct the files, for nnU-Net will not predict them either"
        ) from None
    if reference.shape[1:] != image.shape[1:]:
        raise UserError(f"{label} has the shape {reference.shape[1:]}, its image {image.shape[1:]}; they must be equal")
    return RawCase(case, image.astype(np.float32, copy=False), properties, np.rint(reference[0]).astype(np.int16))


def read_previous_stage(model: SegmentationModel, files: CaseFiles, raw: RawCase) -> LabelArray | None:
    """The (Z, Y, X) segmentation of a case by the previous stage of a cascade; ``None`` for other models.

    Raises:
        UserError: there is no file, or one of another shape.
    """
    if model.previous_stage is None or model.configuration.previous_stage_name is None:
        return None
    path = model.previous_stage / files.label.name
    if not path.is_file():
        raise UserError(f"{path} does not exist; it should be the previous stage's segmentation of {files.case}")
    segmentation, _ = model.plans.image_reader_writer_class().read_seg(str(path))
    if segmentation.shape[1:] != raw.reference.shape:
        raise UserError(f"{path} has the shape {segmentation.shape[1:]}, the image {raw.reference.shape}")
    rounded: LabelArray = np.rint(segmentation[0]).astype(np.int16)
    return rounded


@dataclass(frozen=True)
class PreparedCase:
    """A case as one model sees it.

    Attributes:
        raw: the case in its original geometry.
        model: the model.
        base: (1, C + extra, *S) clean image in network units **before** clipping, which perturbations are added to;
            then extra channels that are never perturbed. :attr:`renormalise` turns it into the network's input.
        clean: (1, C + cascade, *S) the network's input of the clean image, as nnU-Net computes it.
        image_channels: C.
        support: (1, 1, *S) bool where a perturbation may be, the nonzero region; ``None``: everywhere.
        nonzero: the nonzero region of the cropped image on its own grid; ``None`` with ``support``.
        reference: (1, 1, *S) label map on the network's grid.
        scales: normalisation per channel.
        native_range: (C,) range from the 0.5 to the 99.5 percentile, original intensities.
        offsets: see :class:`Renormalise`.
        properties: of nnU-Net's preprocessing, for the export.
        resampled: whether the network's grid is not the image's.
        previous_stage: (Z, Y, X) segmentation of the previous stage, of a cascade.
    """

    raw: RawCase
    model: SegmentationModel
    base: torch.Tensor
    clean: torch.Tensor
    image_channels: int
    support: torch.Tensor | None
    nonzero: npt.NDArray[np.bool_] | None
    reference: torch.Tensor
    scales: list[ChannelScale]
    native_range: FloatArray
    offsets: list[int]
    properties: dict[str, Any]
    resampled: bool
    previous_stage: LabelArray | None

    @property
    def scale(self) -> FloatArray:
        """(C,) original intensity units per network unit."""
        return np.array([scale.scale for scale in self.scales])

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
        """The same case with another image (a corrupted one), of the same shape."""
        return prepare_case(
            self.raw, self.model, device=self.base.device, image=image, previous_stage=self.previous_stage
        )

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

    def network(self, window: SlidingWindow, *, whole: bool) -> torch.nn.Sequential:
        """Perturbed image in the layout of :attr:`base` (or a batch of its slices) -> logits: normalisation, window."""
        renormalise = Renormalise(self.scales, self.clean, self.support, whole=whole, offsets=self.offsets)
        return torch.nn.Sequential(renormalise, window).eval()

    @torch.no_grad()
    def predict(self, window: SlidingWindow, perturbed: torch.Tensor) -> LabelArray:
        """The segmentation (Z, Y, X) in the original geometry, by nnU-Net's own resampling and export."""
        with full_precision():
            logits: torch.Tensor = self.network(window, whole=True)(perturbed)
        return self.export(logits)

    def export(self, logits: torch.Tensor) -> LabelArray:
        """Logits (1, K, *S) on the network's grid -> label map (Z, Y, X) in the original geometry."""
        from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

        threads = torch.get_num_threads()
        try:
            segmentation: LabelArray = convert_predicted_logits_to_segmentation_with_correct_shape(
                logits[0].float().cpu(),
                self.model.plans,
                self.model.configuration,
                self.model.label_manager,
                self.properties,
                num_threads_torch=threads,
            )
        finally:
            torch.set_num_threads(threads)
        return segmentation

    def delta(self, perturbed: torch.Tensor) -> torch.Tensor:
        """The perturbation (C, *S) in network units of a perturbed image in the layout of :attr:`base`."""
        return (perturbed - self.base)[0, : self.image_channels]

    def native_delta(self, delta: torch.Tensor) -> FloatArray:
        """A perturbation (C, *S) in network units -> (C, Z, Y, X) in original intensities and geometry."""
        plans, configuration = self.model.plans, self.model.configuration
        values = delta.detach().float().cpu().numpy()
        shape = tuple(int(size) for size in self.properties["shape_after_cropping_and_before_resampling"])
        if self.resampled:
            original, network = _spacings(self.model, self.properties)
            values = np.asarray(configuration.resampling_fn_data(values, shape, network, original))
            if self.nonzero is not None:
                values = values * self.nonzero  # the kernel of the resampling reaches beyond the mask
        values = values.astype(np.float64) * self.scale.reshape(-1, *(1,) * len(shape))
        full = np.zeros((len(values), *self.properties["shape_before_cropping"]))
        box = tuple(slice(low, high) for low, high in self.properties["bbox_used_for_cropping"])
        full[(slice(None), *box)] = values
        return full.transpose([0, *(axis + 1 for axis in plans.transpose_backward)])

    def from_native(self, delta: FloatArray) -> torch.Tensor:
        """The inverse of :meth:`native_delta`: original intensities and geometry -> (C, *S) in network units."""
        plans, configuration = self.model.plans, self.model.configuration
        values = delta.transpose([0, *(axis + 1 for axis in plans.transpose_forward)])
        box = tuple(slice(low, high) for low, high in self.properties["bbox_used_for_cropping"])
        values = values[(slice(None), *box)] / self.scale.reshape(-1, *(1,) * (values.ndim - 1))
        if self.resampled:
            original, network = _spacings(self.model, self.properties)
            values = np.asarray(configuration.resampling_fn_data(values, self.base.shape[2:], original, network))
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(self.base.device)


def _spacings(model: SegmentationModel, properties: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Spacing of the cropped image and of the network's grid, along the network's axes."""
    original = [float(properties["spacing"][axis]) for axis in model.plans.transpose_forward]
    network = [float(value) for value in model.configuration.spacing]
    if len(network) < len(original):
        network = [original[0], *network]
    return original, network


def prepare_case(
    raw: RawCase,
    model: SegmentationModel,
    *,
    device: torch.device | str = "cpu",
    image: npt.NDArray[np.float32] | None = None,
    previous_stage: LabelArray | None = None,
) -> PreparedCase:
    """Preprocess a case as nnU-Net's inference does.

    Args:
        raw: the case.
        model: the model.
        device: where the tensors go.
        image: replaces the case's image (a corrupted one), of the same shape.
        previous_stage: (Z, Y, X) segmentation of the previous stage, for a cascade.

    Raises:
        UserError: an image without contrast, a normalisation that is not known, a missing previous stage.
    """
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
    from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

    plans, configuration = model.plans, model.configuration
    image = raw.image if image is None else image
    cascade = configuration.previous_stage_name is not None
    if cascade and previous_stage is None:
        raise UserError(
            f"{raw.case}: the model is the second stage of a cascade; name the folder with the segmentations of "
            f"{configuration.previous_stage_name!r} with -prev_stage_predictions"
        )
    properties = dict(raw.properties)
    first_stage = previous_stage[None].astype(np.float32) if previous_stage is not None and cascade else None
    data, segmentation, properties = configuration.preprocessor_class(verbose=False).run_case_npy(
        image, first_stage, properties, plans, configuration, model.dataset_json
    )
    data, segmentation = np.asarray(data, dtype=np.float32), np.asarray(segmentation)

    forward = list(plans.transpose_forward)
    turned = image.transpose([0, *(axis + 1 for axis in forward)])
    turned_stage = None if first_stage is None else first_stage.transpose([0, *(axis + 1 for axis in forward)]).copy()
    cropped, region, box = crop_to_nonzero(turned.astype(np.float32), turned_stage)
    scales = channel_scales(
        cropped,
        region[0] >= 0,
        schemes=configuration.normalization_schemes,
        masked=configuration.use_mask_for_norm,
        properties=plans.foreground_intensity_properties_per_channel,
        case=raw.case,
    )
    resampled = data.shape[1:] != cropped.shape[1:]
    original, network = _spacings(model, properties)

    reference = raw.reference.transpose(forward)[tuple(slice(low, high) for low, high in box)][None]
    if resampled:
        reference = np.asarray(configuration.resampling_fn_seg(reference, data.shape[1:], original, network))

    base, extra, offsets = data.copy(), [], []
    for index, scale in enumerate(scales):
        if scale.bounds is None:
            continue
        unclipped = (cropped[index : index + 1] - scale.shift) / scale.scale
        if resampled:
            unclipped = np.asarray(configuration.resampling_fn_data(unclipped, data.shape[1:], original, network))
            extra.append(data[index] - np.clip(unclipped[0], *scale.bounds))
            offsets.append(index)
        base[index] = unclipped[0]
    masks = []
    if cascade:
        masks = list(convert_labelmap_to_one_hot(segmentation[0], model.label_manager.foreground_labels, data.dtype))

    def tensor(channels: Sequence[npt.NDArray[Any]]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(np.stack(channels), dtype=np.float32))[None].to(device)

    support = None
    if any(scale.masked for scale in scales):
        # Of all channels: a voxel that is not zero in one channel belongs to the mask of every channel.
        support = torch.from_numpy(segmentation[:1] >= 0)[None].to(device)
    percentiles = np.percentile(cropped.reshape(len(cropped), -1), (0.5, 99.5), axis=1)
    return PreparedCase(
        raw=raw,
        model=model,
        base=tensor([*base, *extra, *masks]),
        clean=tensor([*data, *masks]),
        image_channels=len(data),
        support=support,
        nonzero=None if support is None else region[0] >= 0,
        reference=torch.from_numpy(np.ascontiguousarray(reference.astype(np.int16)))[None].to(device),
        scales=scales,
        native_range=percentiles[1] - percentiles[0],
        offsets=offsets,
        properties=properties,
        resampled=resampled,
        previous_stage=previous_stage,
    )
