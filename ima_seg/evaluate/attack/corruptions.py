"""Natural corruptions in five severities: what scanners, protocols and patients do to images.

The intensity range of an MR channel is the distance between its 0.5 and 99.5 percentiles; its signal starts at 0 (where
it has negative values, at the minimum). All voxels take part: the zero background of a skull-stripped image gets noise,
ghosts and stripes as air in a scanner would. A channel without any range comes back unchanged from the MR corruptions.

Randomness (directions, positions, signs, noise) depends on seed, case and name, not on the severity, so that only the
strength grows along the ladder. Geometry is the same for all channels; noise is drawn for each.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ima_seg.cases.raw import intensity_range, without_padding
from ima_seg.errors import UserError

Volume = npt.NDArray[np.float32]
Spacing = npt.NDArray[np.float64]
Modality = Literal["mr", "ct", "any"]
#: (C, Z, Y, X), voxel size along its axes, strength and source of randomness -> the corrupted volume.
Function = Callable[[Volume, Spacing, float, np.random.Generator], Volume]

SEVERITIES = (1, 2, 3, 4, 5)
MOTION_MM = MOTION_DEGREES = 2.0


@dataclass(frozen=True)
class Corruption:
    """One natural corruption."""

    name: str  # as on the command line and in the records
    modality: Modality  # where it happens
    levels: tuple[float, ...]  # strength at the severities 1 to 5, ascending
    unit: str  # of the levels, in words
    description: str  # one sentence
    function: Function
    #: Whether ``function`` is given the signal, zero at no signal and one intensity range wide, rather than the values.
    on_signal: bool


CORRUPTIONS: dict[str, Corruption] = {}


def _corruption(
    modality: Modality, *levels: float, unit: str, on_signal: bool = False
) -> Callable[[Function], Function]:
    """Register a function; the first sentence of its docstring is the description."""

    def register(function: Function) -> Function:
        name = function.__name__.removeprefix("_")
        text = " ".join((function.__doc__ or "").partition("\n\n")[0].split())
        CORRUPTIONS[name] = Corruption(name, modality, levels, unit, text, function, on_signal)
        return function

    return register


def default_corruptions(modality: Modality) -> list[str]:
    """Names of the corruptions that happen to images of a modality, in the order of ``CORRUPTIONS``.

    Photographs and other pictures are ``any``: what belongs to scanners does not happen to them.
    """
    return [name for name, corruption in CORRUPTIONS.items() if corruption.modality in ("any", modality)]


def corrupt(image: Volume, spacing_mm: Sequence[float], name: str, severity: int, seed: int, case: str) -> Volume:
    """Corrupt one case; equal arguments give equal voxels, and the input stays as it is.

    Args:
        image: (C, Z, Y, X) in original intensities, HU for CT.
        spacing_mm: voxel size along Z, Y and X.
        name: key of ``CORRUPTIONS``.
        severity: 1 to 5.
        seed: of the run.
        case: case id; different cases get different draws.

    Raises:
        UserError: no such corruption or severity, or TorchIO is missing.
    """
    if name not in CORRUPTIONS:
        raise UserError(f"corruption {name!r} is unknown: use {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise UserError(f"severity {severity!r} of corruption {name}: give 1 to 5")
    digest = hashlib.sha256(f"{seed}\0{name}\0{case}".encode("utf-8", "surrogateescape")).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "big"))
    corruption, spacing, image = CORRUPTIONS[name], np.asarray(spacing_mm, np.float64), np.array(image, np.float32)
    level, values = corruption.levels[severity - 1], np.concatenate([without_padding(part[None])[0] for part in image])
    padded = values != image
    change = partial(_on_signal, corruption) if corruption.on_signal else corruption.function
    corrupted = np.asarray(change(values, spacing, level, rng), np.float32)
    corrupted[padded] = image[padded]  # no scanner corrupts what stands for "no image here"
    return corrupted


def _on_signal(
    corruption: Corruption, image: Volume, spacing: Spacing, level: float, rng: np.random.Generator
) -> Volume:
    """A corruption of the signal: zero at no signal and one intensity range wide."""
    flat = image.reshape(len(image), -1)
    ranges = intensity_range(image)
    width: Volume = np.where(ranges > 0, ranges, np.ptp(flat, axis=1)).astype(np.float32)
    zero = np.minimum(flat.min(axis=1), 0).astype(np.float32)
    usable = width > 0
    if not usable.any():
        return image
    cut = (slice(None), None, None, None)
    zero, width = zero[usable][cut], width[usable][cut]
    image[usable] = corruption.function((image[usable] - zero) / width, spacing, level, rng) * width + zero
    return image


def _apply(transform: str, volume: Volume, spacing: Spacing, **options: Any) -> Volume:
    """Apply one of TorchIO's transforms to (C, *S); the state of torch's generator stays as it is."""
    import torch

    try:
        torchio: Any = importlib.import_module("torchio")
    except ImportError as error:
        raise UserError(f'corruptions need TorchIO ({error}): pip install "torchio>=0.21.4,<2"') from None
    # TorchIO turns about the origin, so that is put into the centre.
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -spacing * (np.asarray(volume.shape[1:]) - 1) / 2
    subject = torchio.ScalarImage(tensor=torch.from_numpy(np.ascontiguousarray(volume)), affine=affine)
    with torch.random.fork_rng(devices=[]):
        result = getattr(torchio, transform)(**options)(subject)
    return np.asarray(result.data.numpy(), np.float32)


def _resize(volume: Volume, shape: Iterable[int], *, align_corners: bool = False) -> Volume:
    """Interpolate (C, *S) linearly to another number of voxels."""
    import torch
    from torch.nn.functional import interpolate

    size = [int(length) for length in shape]
    result = interpolate(torch.from_numpy(volume)[None], size=size, mode="trilinear", align_corners=align_corners)
    return np.asarray(result[0].numpy(), np.float32)


def _in_plane(spacing: Spacing, shape: Sequence[int]) -> list[int]:
    """Axes that can be a phase-encoding direction: not the slice axis of an anisotropic volume, nor an axis of one."""
    axes = [axis for axis in range(3) if spacing[axis] <= 1.5 * spacing.min() and shape[axis] > 1]
    return axes or [int(np.argmax(shape))]


def _direction(rng: np.random.Generator, allowed: npt.NDArray[np.bool_]) -> Spacing:
    """A random unit vector along the allowed axes; zero where there is none."""
    vector: Spacing = rng.normal(size=3) * allowed
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


@_corruption(
    "mr", 0.02, 0.04, 0.06, 0.09, 0.13, unit="standard deviation, share of the intensity range", on_signal=True
)
def _rician_noise(signal: Volume, spacing: Spacing, level: float, rng: np.random.Generator) -> Volume:
    """Noise of a magnitude image: Gaussian in both parts of the complex signal."""
    real = signal + np.float32(level) * rng.standard_normal(signal.shape, np.float32)
    imaginary = np.float32(level) * rng.standard_normal(signal.shape, np.float32)
    return np.asarray(np.hypot(real, imaginary), np.float32)


@_corruption("mr", 1.2, 1.4, 1.7, 2.1, 2.7, unit="largest gain (the smallest is its inverse)", on_signal=True)
def _bias_field(signal: Volume, spacing: Spacing, level: float, rng: np.random.Generator) -> Volume:
    """Smooth gain of the receive coils, the exponential of a cubic polynomial."""
    order = 3
    terms = [(i, j, k) for i in range(order + 1) for j in range(order + 1 - i) for k in range(order + 1 - i - j)]
    coefficients = [float(value) for value in rng.uniform(-0.5, 0.5, len(terms))]
    # A cubic is smooth: TorchIO's slow polynomial is evaluated on a coarse grid with the same corners.
    ones = np.ones((1, *np.minimum(signal.shape[1:], 32)), np.float32)
    small = np.log(_apply("BiasField", ones, spacing, coefficients=coefficients, order=order))
    field = _resize(small, signal.shape[1:], align_corners=True)
    field -= (field.max() + field.min()) / 2
    field *= np.float32(np.log(level) / max(float(field.max()), 1e-6))
    return np.asarray(signal * np.exp(field), np.float32)


@_corruption("mr", 0.06, 0.12, 0.18, 0.25, 0.33, unit="amplitude of a ghost, share of the image's", on_signal=True)
def _ghosting(signal: Volume, spacing: Spacing, level: float, rng: np.random.Generator) -> Volume:
    """Shifted copies along the phase-encoding direction, from periodic motion such as breathing or pulsation."""
    count = int(rng.integers(2, 4))
    axis = int(rng.choice(_in_plane(spacing, signal.shape[1:])))
    # Every count-th line weakened by a share makes ghosts of that share / count.
    ghosts = _apply("Ghosting", signal, spacing, num_ghosts=count, axis=axis, intensity=level * count, restore=None)
    return np.abs(ghosts)  # a magnitude image, as in motion and spikes


@_corruption("mr", 0.4, 0.55, 0.7, 0.8, 0.9, unit="share of k-space acquired in another position", on_signal=True)
def _motion(signal: Volume, spacing: Spacing, level: float, rng: np.random.Generator) -> Volume:
    """Four sudden movements of the patient, each by 2 mm and 2 degrees; the centre of k-space is unmoved."""
    shape = np.asarray(signal.shape[1:])
    phase = int(rng.choice(_in_plane(spacing, signal.shape[1:])))
    early, late = rng.uniform(0.05, 0.18), rng.uniform(0.82, 0.95)
    # The lines around the centre of k-space are those of the unmoved patient, or the label would no longer fit. With
    # the severity the positions stay and only take over more lines, so that the damage cannot shrink.
    lines = int(shape[phase])
    before = min(level / 2, max((lines // 2 - 0.5) / lines, 0.01))
    after = max(1 - level / 2, min((lines // 2 + 1.5) / lines, 0.99))
    times = np.asarray([min(early, before), before, after, max(late, after)])
    movable = shape > 1
    turns = np.flatnonzero(~movable)
    turnable = movable if not len(turns) else np.arange(3) == turns[0]  # a single slice turns about its normal
    degrees = np.stack([_direction(rng, turnable) for _ in times]) * MOTION_DEGREES
    shifts = np.stack([_direction(rng, movable) for _ in times]) * MOTION_MM
    # TorchIO's phase-encoding direction is the last axis.
    to_last = [axis for axis in range(3) if axis != phase] + [phase]
    back = [int(place) + 1 for place in np.argsort(to_last)]
    moved = _apply(
        "Motion", signal.transpose(0, *(axis + 1 for axis in to_last)), spacing[to_last],
        degrees=degrees[:, to_last], translation=shifts[:, to_last], times=times, image_interpolation="linear",
    )  # fmt: skip
    return np.abs(moved.transpose(0, *back))


@_corruption(
    "mr", 0.02, 0.04, 0.07, 0.1, 0.14, unit="amplitude of the stripes, share of the intensity range", on_signal=True
)
def _spikes(signal: Volume, spacing: Spacing, level: float, rng: np.random.Generator) -> Volume:
    """Stripes from two spikes in k-space (herringbone artefact)."""
    shape = np.asarray(signal.shape[1:])
    usable = shape > 1
    positions = np.stack([0.5 + _direction(rng, usable) * rng.uniform(0.12, 0.4) for _ in range(2)])

    def spiked(channel: Volume) -> Volume:
        # TorchIO's unit is the largest value of the spectrum: the sum of the voxels, since none is negative.
        intensity = level / float(channel.mean(dtype=np.float64))
        return _apply("Spike", channel, spacing, spikes_positions=positions, intensity=intensity)

    result: Volume = np.abs(np.concatenate([spiked(channel) for channel in signal[:, None]]))
    return result


@_corruption("any", 0.5, 0.7, 0.9, 1.2, 1.6, unit="standard deviation, edges of the finest voxel axis")
def _blur(image: Volume, spacing: Spacing, level: float, rng: np.random.Generator) -> Volume:
    """Gaussian point spread, equally wide in all directions: soft reconstruction kernel or filter."""
    width = float(level * spacing.min())
    return _apply("Blur", image, spacing, std=(width, width, width))


@_corruption("any", 1.5, 2, 2.5, 3, 3.5, unit="voxel size, edges of the finest voxel axis")
def _low_resolution(image: Volume, spacing: Spacing, level: float, rng: np.random.Generator) -> Volume:
    """Acquired with larger voxels (axes that are coarser already stay) and interpolated back to the grid."""
    shape = np.asarray(image.shape[1:])
    coarse = np.maximum(1, np.round(shape * spacing / np.maximum(spacing, level * spacing.min()))).astype(int)
    widths = tuple(float(width) for width in spacing * (shape / coarse - 1) / 2)  # usual filter against aliasing
    small = _resize(_apply("Blur", image, spacing, std=widths), coarse)
    return _resize(small, image.shape[1:])


@_corruption("mr", 0.1, 0.2, 0.32, 0.46, 0.65, unit="absolute natural logarithm of the exponent", on_signal=True)
def _gamma(signal: Volume, spacing: Spacing, level: float, rng: np.random.Generator) -> Volume:
    """Other contrast: the signal to a power above or below 1, with zero and 99.5 percentile kept."""
    exponent = float(np.exp(level * rng.choice((-1.0, 1.0))))
    high = np.percentile(signal.reshape(len(signal), -1), 99.5, axis=1).astype(np.float32)[:, None, None, None]
    high[high <= 0] = 1
    return _apply("Gamma", signal / high, spacing, gamma=exponent) * high


@_corruption("ct", 8, 15, 25, 40, 60, unit="standard deviation, HU")
def _dose_noise(image: Volume, spacing: Spacing, level: float, rng: np.random.Generator) -> Volume:
    """Image noise of a lower dose: Gaussian, correlated between neighbours within a slice, alike everywhere.

    A model in the image domain: stationary, independent between slices (along the coarsest axis) and channels; within
    a slice smoothed by a Gaussian of 0.7 voxels and rescaled to the standard deviation asked for, which gives the grain
    of a soft-tissue kernel. It does not depend on attenuation.
    """
    from scipy.ndimage import gaussian_filter

    grain = [0.0, 0.7, 0.7, 0.7]
    grain[1 + int(np.argmax(spacing))] = 0.0
    noise = gaussian_filter(rng.standard_normal(image.shape, np.float32), grain, mode="wrap")
    noise *= np.float32(level / max(float(noise.std()), 1e-6))
    return np.asarray(image + noise, np.float32)


@_corruption("ct", 5, 10, 20, 35, 60, unit="HU")
def _hu_shift(image: Volume, spacing: Spacing, level: float, rng: np.random.Generator) -> Volume:
    """Calibration error: all values too high or too low by the same amount."""
    return image + np.float32(level * rng.choice((-1.0, 1.0)))
