"""A case between its files and a bundle's network: the bundle's own transforms, and the way back for perturbations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from torch import nn

from ima_seg.attacks.network import Scale
from ima_seg.attacks.passes import predicted
from ima_seg.cases.check import check_prepared, check_read
from ima_seg.cases.raw import CaseFiles, FloatArray, LabelArray, RawCase, only_turned, same_grid, shifted
from ima_seg.errors import UserError
from ima_seg.monai.model import LoadedBundle
from ima_seg.monai.units import channel_sd, native_units, onto
from ima_seg.monai.window import Cut, Frame
from ima_seg.types import Target

_PREDICTION = "pred"


@dataclass(frozen=True)
class BundleCase:
    """A case as a bundle sees it; what :class:`ima_seg.evaluate.subject.Case` has, and:

    Perturbations are added to the pre-processed image, where it is image: what the pre-processing padded is in no file.
    Their unit is the standard deviation (SD) of the pre-processed image, of each channel of the case.

    Attributes:
        loaded: what the bundle's LoadImaged returned.
        data: what its pre-processing returned, with the image's MetaTensor.
        padded: (1, C, *P) the pre-processed image, the input of the inferer.
        box: where the image lies in it; :attr:`base` (1, C, *S) is the image without its padding, in SDs.
        sd: (C,) network units per SD.
        reference: (1, 1, *S) label map on the same grid.
        affine: (4, 4) voxels of the original image to mm.
        resampled: whether the network's grid is not the image's, cropped, padded or turned.
    """

    raw: RawCase
    model: LoadedBundle
    loaded: dict[str, Any]
    data: dict[str, Any]
    padded: torch.Tensor
    box: tuple[slice, ...]
    base: torch.Tensor
    sd: list[float]
    reference: torch.Tensor
    affine: FloatArray
    scale: FloatArray | None
    native_range: FloatArray
    resampled: bool
    image_voxels: int

    @property
    def image_channels(self) -> int:
        """C."""
        return self.base.shape[1]

    @property
    def support(self) -> None:
        """Perturbations may be anywhere."""

    @property
    def slice_axis(self) -> int:
        """Across the thickest slices, of (Z, Y, X)."""
        return int(np.argmax(self.raw.spacing_mm))

    @property
    def shows_hu(self) -> bool:
        """Whether the image is CT."""
        return self.model.is_single_ct

    def target(self, *, slices: bool = False) -> Target:
        """The reference of the whole volume."""
        model, reference = self.model, self.reference
        masks = [torch.isin(reference, reference.new_tensor(values)) for values in model.classes.values()]
        if model.labels.regions:
            return Target.from_raw(torch.cat(masks, 1), model.labels)
        channels = torch.zeros_like(reference)
        for channel, mask in enumerate(masks, 1):
            channels[mask] = channel
        return Target.from_raw(channels, model.labels)

    def network(self, window: nn.Module, *, whole: bool) -> nn.Sequential:
        """(1, C, *S) -> logits (1, K, *S) through the padded image; a part of it (not ``whole``) as it is."""
        if not whole:
            return nn.Sequential(Scale(self.sd, self.base), window).eval()
        return nn.Sequential(self._frame(), window, Cut(self.padded, self.box)).eval()

    def _frame(self) -> nn.Sequential:
        return nn.Sequential(Scale(self.sd, self.base), Frame(self.padded, self.box))

    @torch.no_grad()
    def predict(self, window: nn.Module, perturbed: torch.Tensor) -> LabelArray:
        """What the bundle's post-processing would write: (Z, Y, X) label map, or a mask per class (classes, Z, Y, X).

        Raises:
            UserError: the post-processing fails, leaves another grid, or leaves no labels.
        """
        model, image = self.model, self.data[self.model.image_key]
        logits = predicted(window, self._frame()(perturbed), f"{self.raw.case}: {model.folder}")
        meta, applied = deepcopy(image.meta), deepcopy(image.applied_operations)
        prediction = MetaTensor(logits[0], meta=meta, applied_operations=applied)
        with _reporting(model, self.raw.case, "post"):
            result = model.postprocessing({**self.data, _PREDICTION: prediction})[_PREDICTION]
        values = np.asarray(torch.as_tensor(result).detach().cpu())
        values = values.transpose(0, *range(values.ndim - 1, 0, -1))
        grid = result.affine if isinstance(result, MetaTensor) else self.affine
        shape = self.raw.reference.shape
        if values.shape[1:] != shape or not same_grid(grid, self.affine, shape[::-1]):
            raise UserError(
                f"{self.raw.case}: the post-processing of {model.folder} leaves {values.shape[1:]} voxels (Z, Y, X) "
                f"on another grid than the label, {shape}; let Invertd undo the pre-processing"
            )
        return self._labels(values)

    def _labels(self, values: npt.NDArray[Any]) -> LabelArray:
        """Channels (K or 1, Z, Y, X) that the post-processing left -> label map, or masks of overlapping classes."""
        labels, classes = self.model.labels, self.model.classes
        discrete = bool((values == np.rint(values)).all())
        codes = np.array([0, *(value[0] for value in classes.values())], np.int16)
        found: LabelArray
        if labels.regions and len(values) == len(classes) and discrete:
            found = values > 0
            return found if len(found) > 1 else found[0] * codes[1]
        if not labels.regions and len(values) == labels.outputs:
            found = codes[values.argmax(0)]
            return found
        if len(values) == 1 and discrete:
            found = values[0].astype(np.int16)
            return found
        raise UserError(
            f"{self.raw.case}: the post-processing of {self.model.folder} leaves {len(values)} channels with "
            f"{'whole numbers' if discrete else 'fractions'}, which are no segmentation; it should end in AsDiscreted"
        )

    def delta(self, perturbed: torch.Tensor) -> torch.Tensor:
        """The perturbation (C, *S) in SDs."""
        return (perturbed - self.base)[0]

    def native_delta(self, delta: torch.Tensor) -> FloatArray:
        """A perturbation (C, *S) in SDs -> (C, Z, Y, X) in original intensities and geometry."""
        assert self.scale is not None
        shape = self.raw.reference.shape[::-1]
        values = onto(delta.detach().float().cpu(), self._affine(), self.affine, shape)
        return values.numpy().transpose(0, 3, 2, 1) * self.scale.reshape(-1, 1, 1, 1)

    def within(self, perturbed: torch.Tensor) -> torch.Tensor:
        """Adversarial files of bundles hold any number."""
        return perturbed

    def from_native(self, delta: FloatArray) -> torch.Tensor:
        """The inverse of :meth:`native_delta`: original intensities and geometry -> (C, *S) in SDs."""
        assert self.scale is not None
        values = torch.from_numpy((delta / self.scale.reshape(-1, 1, 1, 1)).transpose(0, 3, 2, 1).astype(np.float32))
        return onto(values, self.affine, self._affine(), self.base.shape[2:]).to(self.base.device)

    def _affine(self) -> FloatArray:
        """Voxels of :attr:`base` to mm."""
        return shifted(np.asarray(self.data[self.model.image_key].affine, np.float64), self.box)

    def altered(self, image: npt.NDArray[np.float32]) -> BundleCase:
        """The same case with another image (C, Z, Y, X) in original intensities."""
        key = self.model.image_key
        before = self.loaded[key]
        stored = _from_channels_first(image.transpose(0, 3, 2, 1), before.shape, self.raw.reference.shape[::-1])
        changed = MetaTensor(torch.from_numpy(stored.copy()).to(before), meta=deepcopy(before.meta))
        return _prepare(self.model, self.raw, {**self.loaded, key: changed}, self.affine)


def prepare_case(model: LoadedBundle, files: CaseFiles) -> BundleCase:
    """Read a case by the bundle's LoadImaged and pre-process it.

    Raises:
        UserError: a file or transform fails, or the image is not what the bundle is for.
    """
    names = [str(file) for file in files.images]
    loaded = _run(model, files.case, {model.image_key: names if len(names) > 1 else names[0]}, 0, 1)
    image = loaded[model.image_key]
    if not isinstance(image, MetaTensor):
        raise UserError(
            f"{model.folder}: LoadImaged of 'preprocessing' returns no MetaTensor; leave its options at default"
        )
    label = nibabel.load(files.label)
    reference = np.rint(np.asanyarray(label.dataobj)).astype(np.int16)
    if reference.ndim != 3:
        raise UserError(f"{files.label} has the shape {reference.shape}; bundles are evaluated on volumes (X, Y, Z)")
    channels = _channels_first(image.numpy(), reference.shape, files)
    if len(channels) != len(model.channels):
        raise UserError(
            f"{files.case}: the image has {len(channels)} channels, the bundle {len(model.channels)} "
            f"({', '.join(model.channels)}); give it all of them, or correct num_channels in its metadata"
        )
    affine = np.asarray(label.affine, np.float64)
    # The reader that the bundle names may take its header differently.
    check_read(files, channels, np.linalg.norm(np.asarray(image.affine, np.float64)[:3, :3], axis=0).tolist())
    raw = RawCase(
        files.case,
        np.ascontiguousarray(channels.transpose(0, 3, 2, 1), np.float32),
        {"spacing": np.linalg.norm(affine[:3, :3], axis=0)[::-1].tolist()},
        np.ascontiguousarray(reference.transpose(2, 1, 0)),
    )
    return _prepare(model, raw, loaded, affine)


def _prepare(model: LoadedBundle, raw: RawCase, loaded: dict[str, Any], affine: FloatArray) -> BundleCase:
    """The rest of the pre-processing, behind the loader."""
    # Transforms may write into what they are given.
    data = _run(model, raw.case, {**loaded, model.image_key: loaded[model.image_key].clone()}, 1, None)
    image = data.get(model.image_key)
    if not isinstance(image, MetaTensor) or image.ndim != 4 or len(image) != len(model.channels):
        found = tuple(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
        raise UserError(
            f"{raw.case}: the pre-processing of {model.folder} gives {found}; expected a MetaTensor "
            f"({len(model.channels)}, X, Y, Z), whose first axis EnsureChannelFirstd makes"
        )
    device = next((parameter.device for parameter in model.network.parameters()), torch.device("cpu"))
    grid, original = np.asarray(image.affine, np.float64), raw.reference.shape[::-1]
    turned = torch.from_numpy(np.ascontiguousarray(raw.reference.transpose(2, 1, 0)))[None]
    inside = onto(torch.ones(1, *original), affine, grid, image.shape[1:], mode="nearest")[0] > 0.5
    if not inside.any():
        raise UserError(f"{raw.case}: nothing of the image is left after the pre-processing of {model.folder}")
    box = tuple(slice(int(found.min()), int(found.max()) + 1) for found in inside.nonzero().T)
    shape = [side.stop - side.start for side in box]
    reference = onto(turned.float(), affine, shifted(grid, box), shape, mode="nearest").round().to(torch.int16)
    plain = torch.as_tensor(image.as_tensor()).detach().float()
    check_prepared(raw.case, plain.cpu().numpy())
    scale, native_range, image_voxels = native_units(plain.cpu(), raw.image, affine, grid)
    shown = plain[(slice(None), *box)][None].contiguous()
    sd = channel_sd(shown[0])
    each = np.array(sd)
    return BundleCase(
        raw=raw,
        model=model,
        loaded=loaded,
        data=data,
        padded=plain[None].contiguous().to(device),
        box=box,
        base=shown.to(device) / shown.new_tensor(sd, device=device).view(-1, 1, 1, 1),
        sd=sd,
        reference=reference[None].to(device),
        affine=affine,
        scale=None if scale is None else scale * each,
        native_range=native_range / each if scale is None else native_range,
        resampled=not only_turned(np.linalg.inv(affine) @ grid),
        image_voxels=image_voxels,
    )


def _run(model: LoadedBundle, case: str, data: dict[str, Any], start: int, end: int | None) -> dict[str, Any]:
    with _reporting(model, case, "pre"):
        result: dict[str, Any] = model.preprocessing(data, start=start, end=end)
    return result


@contextmanager
def _reporting(model: LoadedBundle, case: str, which: str) -> Iterator[None]:
    """Say which transforms failed; MONAI passes on whatever they raise."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[-300:]
        raise UserError(f"{case}: the {which}-processing of {model.folder} failed ({reason})") from error


def _channels_first(image: npt.NDArray[Any], space: tuple[int, ...], files: CaseFiles) -> npt.NDArray[Any]:
    """What LoadImaged returned -> (C, X, Y, Z)."""
    if image.shape == space:
        return image[None]
    if image.shape[1:] == space:
        return image
    if image.shape[:-1] == space:
        return np.moveaxis(image, -1, 0)
    raise UserError(
        f"{files.images[0]} was read with the shape {image.shape}, its label has {space}; they must be equal"
    )


def _from_channels_first(image: npt.NDArray[Any], shape: torch.Size, space: tuple[int, ...]) -> npt.NDArray[Any]:
    """The inverse of :func:`_channels_first`, for a stored ``shape``."""
    if len(shape) == 3:
        return np.asarray(image[0])
    return image if tuple(shape[1:]) == space else np.moveaxis(image, 0, -1)
