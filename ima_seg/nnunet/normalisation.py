"""nnU-Net's intensity normalisation as a differentiable function of the perturbed image.

The network never sees the perturbed image itself: z-scoring subtracts the *perturbed* mean and divides by the perturbed
standard deviation, CT normalisation clips. An attack that ignores this finds perturbations that vanish, or change, as
soon as the file is written and predicted by a stock nnU-Net. Perturbations are therefore added in front of it, in units
of the clean image (one unit = ``scale`` original units), and the attack's gradient passes through it.

The unit of a channel is the standard deviation (SD) of the network's input. Z-scores and CT normalisation have 1 by
design, the first of the case, the second of the training set's foreground. Of the schemes that do not divide by an SD,
it is measured: where all cases are divided by one number, over the training set's foreground, as the plans have it,
else over each case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ima_seg.cases.raw import FloatArray, padding
from ima_seg.errors import UserError

#: As in nnU-Net's normalisation schemes.
_LEAST_STD = 1e-8
#: Schemes that divide by the same number in every case.
FIXED = {"NoNormalization": 1.0, "RGBTo01Normalization": 255.0}
#: Schemes whose shift and scale come from the image itself.
_FROM_THE_IMAGE = ("ZScoreNormalization", "RescaleTo01Normalization")
#: Those that are known here.
KNOWN_SCHEMES = ("CTNormalization", *_FROM_THE_IMAGE, *FIXED)


@dataclass(frozen=True)
class ChannelScale:
    """Normalisation of one channel of one case: network value = (original - shift) / scale * sd, clipped to bounds.

    ``scale`` are the original units, ``sd`` the network units of one SD.
    """

    scheme: str
    shift: float
    scale: float
    bounds: tuple[float, float] | None = None  # network units
    masked: bool = False
    sd: float = 1.0


def shared_sd(scheme: str, properties: Mapping[str, float]) -> float | None:
    """Network units per SD of a channel, where all cases have the same; ``None``: each case has its own.

    ``properties`` are those of the channel's foreground in the plans. Where it has no contrast, as in masks, a network
    unit stays the unit.
    """
    if scheme in ("ZScoreNormalization", "CTNormalization"):
        return 1.0
    if scheme not in FIXED:
        return None
    sd = float(properties["std"]) / FIXED[scheme]
    return sd if sd > _LEAST_STD else 1.0


def clipping(scheme: str, properties: Mapping[str, float]) -> tuple[float, float] | None:
    """Between which network values a channel is clipped; ``None`` where it is not.

    ``properties`` are those of the channel's foreground in the plans.
    """
    if scheme != "CTNormalization":
        return None
    shift, scale = float(properties["mean"]), max(float(properties["std"]), _LEAST_STD)
    return (float(properties["percentile_00_5"]) - shift) / scale, (
        float(properties["percentile_99_5"]) - shift
    ) / scale


def before_clipping(channel: FloatArray, scale: ChannelScale) -> FloatArray:
    """A ``channel`` of original intensities in network units, whose :func:`~ima_seg.cases.raw.padding` lies near.

    Padding goes as far out as no budget reaches: from 1e36 a resampling would reach into the body.
    """
    values: FloatArray = (channel - scale.shift) / scale.scale
    if scale.bounds is None or padding(channel) is None:
        return values
    low, high = scale.bounds
    return np.clip(values, low - 10 * (high - low), high + 10 * (high - low))


def channel_scales(
    original: FloatArray, inside: npt.NDArray[np.bool_], *, plans: Any, configuration: Any, case: str
) -> list[ChannelScale]:
    """The normalisation of each channel of one cropped case.

    Args:
        original: (C, *S) original intensities, cropped as nnU-Net does.
        inside: (*S) whether a voxel belongs to the nonzero region.
        plans: nnU-Net's PlansManager.
        configuration: its ConfigurationManager.
        case: for messages.

    Raises:
        UserError: a scheme that is not known here or does not take the values, or a channel without contrast.
    """
    properties = plans.foreground_intensity_properties_per_channel
    scales = []
    for index, (scheme, masked) in enumerate(
        zip(configuration.normalization_schemes, configuration.use_mask_for_norm, strict=True)
    ):
        values = original[index].astype(np.float32)
        if scheme == "ZScoreNormalization":
            values = values[inside] if masked else values
            found = ChannelScale(scheme, float(values.mean()), float(values.std()), masked=bool(masked))
        elif scheme == "CTNormalization":
            ct = properties[str(index)]
            shift, scale = float(ct["mean"]), max(float(ct["std"]), _LEAST_STD)
            found = ChannelScale(scheme, shift, scale, bounds=clipping(scheme, ct))
        elif scheme == "RescaleTo01Normalization":
            least, std = float(values.min()), float(values.std())
            found = ChannelScale(scheme, least, std, sd=std / max(float(values.max()) - least, _LEAST_STD))
        elif scheme in FIXED:
            if scheme == "RGBTo01Normalization" and not (values.min() >= 0 and values.max() <= 255):
                raise UserError(
                    f"{case}: channel {index} has values from {values.min():g} to {values.max():g}, but the plans "
                    "normalise it with rgb_to_0_1, for which nnU-Net demands 0 to 255; correct the image"
                )
            sd = shared_sd(scheme, properties.get(str(index), {}))
            assert sd is not None
            found = ChannelScale(scheme, 0.0, FIXED[scheme] * sd, sd=sd)
        else:
            raise UserError(f"normalisation scheme {scheme!r} is not known to ima-seg, so {case} has no network units")
        if found.scale <= _LEAST_STD:
            raise UserError(f"{case}: channel {index} is constant; an image without contrast cannot be normalised")
        scales.append(found)
    return scales


class Renormalise(nn.Module):
    """(B, C + extra, *S) perturbed image in units of the clean one -> network input.

    Args:
        scales: of the image channels, which come first.
        clean: (1, C, *S) network input of the clean image.
        inside: (1, 1, *S) bool, the nonzero region; ``None`` where no channel is masked.
        whole: the batch is one whole volume, so that its mean and standard deviation can be taken anew; otherwise (a
            batch of slices, attacked on their own) those of the clean volume stay.
        offsets: channels whose difference between network input and clipped value is in the extra channels right
            behind the image's: where resampling comes between normalisation and network.

    The remaining extra channels (masks of a cascade) pass through. The clean image gives ``clean``.
    """

    def __init__(
        self,
        scales: Sequence[ChannelScale],
        clean: torch.Tensor,
        inside: torch.Tensor | None,
        *,
        whole: bool,
        offsets: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.scales, self.offsets, self.inside = list(scales), list(offsets), inside
        #: Channel -> shift and width of the clean image, where they are taken anew from the perturbed one.
        self.clean_statistics = {
            i: self._statistics(clean[:, i], s) for i, s in enumerate(scales) if whole and s.scheme in _FROM_THE_IMAGE
        }

    def _statistics(self, channel: torch.Tensor, scale: ChannelScale) -> tuple[torch.Tensor, torch.Tensor]:
        """Shift and width that the scheme takes from the image itself, of one channel (1, *S)."""
        if scale.scheme == "RescaleTo01Normalization":
            least = channel.min()
            return least, channel.max() - least
        weight = self.inside[:, 0].to(channel.dtype) if scale.masked and self.inside is not None else None

        def average(values: torch.Tensor) -> torch.Tensor:
            return values.mean() if weight is None else (values * weight).sum() / weight.sum()

        mean = average(channel)
        return mean, average((channel - mean).square()).sqrt()

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        """Network input (B, C + cascade, *S)."""
        count = len(self.scales)
        plain = all(scale.bounds is None and scale.sd == 1 for scale in self.scales)
        if not self.clean_statistics and not self.offsets and plain:
            return v
        channels = []
        for index, scale in enumerate(self.scales):
            channel = v[:, index] if scale.sd == 1 else v[:, index] * scale.sd
            if scale.bounds is not None:
                channel = channel.clamp(*scale.bounds)
                if index in self.offsets:
                    channel = channel + v[:, count + self.offsets.index(index)]
            elif index in self.clean_statistics:
                mean, width = self._statistics(channel, scale)
                clean_mean, clean_width = self.clean_statistics[index]
                renewed = (channel - mean) * (clean_width / width) + clean_mean
                if scale.masked and self.inside is not None:
                    renewed = torch.where(self.inside[:, 0], renewed, channel)
                channel = renewed
            channels.append(channel)
        rest = v[:, count + len(self.offsets) :]
        return torch.cat([torch.stack(channels, 1), rest], 1)
