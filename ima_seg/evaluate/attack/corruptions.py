"""Natural corruptions in five severities: what scanners, protocols and patients do to images.

Levels of severities 1 to 5 (``CORRUPTIONS`` holds the same numbers):

================ ======== ================================= ===================================================
name             modality levels                            unit
================ ======== ================================= ===================================================
rician_noise     mr       0.02, 0.04, 0.06, 0.09, 0.13      standard deviation, share of the intensity range
bias_field       mr       1.20, 1.40, 1.70, 2.10, 2.70      largest gain of the coil field (smallest: 1 / this)
ghosting         mr       0.06, 0.12, 0.18, 0.25, 0.33      amplitude of a ghost, share of the image's
motion           mr       0.40, 0.55, 0.70, 0.80, 0.90      share of k-space acquired in another position
spikes           mr       0.02, 0.04, 0.07, 0.10, 0.14      amplitude of the stripes, share of the range
gamma            mr       0.10, 0.20, 0.32, 0.46, 0.65      absolute natural logarithm of the exponent
blur             any      0.50, 0.70, 0.90, 1.20, 1.60      standard deviation, edges of the finest voxel axis
low_resolution   any      1.50, 2.00, 2.50, 3.00, 3.50      voxel size, edges of the finest voxel axis
dose_noise       ct       8, 15, 25, 40, 60                 standard deviation, HU
hu_shift         ct       5, 10, 20, 35, 60                 HU
================ ======== ================================= ===================================================

The intensity range of an MR channel is the distance between its 0.5 and 99.5 percentiles; its signal starts at 0 (where
it has negative values, at the minimum). All voxels take part: the zero background of a skull-stripped image gets noise,
ghosts and stripes as air in a scanner would. A channel without any range comes back unchanged from the MR corruptions.

Randomness (directions, positions, signs, noise) depends on seed, case and name, not on the severity, so that only the
strength grows along the ladder. Geometry is the same for all channels; noise is drawn for each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ima_seg.errors import UserError

Volume = npt.NDArray[np.float32]
Modality = Literal["mr", "ct", "any"]

SEVERITIES = (1, 2, 3, 4, 5)
MOTION_MM = MOTION_DEGREES = 2.0
_NEEDS = "torchio>=0.21.4,<2"


@dataclass(frozen=True)
class Corruption:
    """One natural corruption.

    Attributes:
        name: as on the command line and in the records.
        modality: "mr", "ct" or "any": where it happens.
        levels: strength at the severities 1 to 5, ascending, in ``unit``.
        unit: of the levels, in words.
        description: one sentence.
    """

    name: str
    modality: Modality
    levels: tuple[float, float, float, float, float]
    unit: str
    description: str


CORRUPTIONS: dict[str, Corruption] = {
    corruption.name: corruption
    for corruption in (
        Corruption(
            "rician_noise", "mr", (0.02, 0.04, 0.06, 0.09, 0.13), "standard deviation, share of the intensity range",
            "Noise of a magnitude image: Gaussian in both parts of the complex signal.",
        ),
        Corruption(
            "bias_field", "mr", (1.20, 1.40, 1.70, 2.10, 2.70), "largest gain (the smallest is its inverse)",
            "Smooth gain of the receive coils, the exponential of a cubic polynomial.",
        ),
        Corruption(
            "ghosting", "mr", (0.06, 0.12, 0.18, 0.25, 0.33), "amplitude of a ghost, share of the image's",
            "Shifted copies along the phase-encoding direction, from periodic motion such as breathing or pulsation.",
        ),
        Corruption(
            "motion", "mr", (0.40, 0.55, 0.70, 0.80, 0.90), "share of k-space acquired in another position",
            "Four sudden movements of the patient, each by 2 mm and 2 degrees; the centre of k-space is unmoved.",
        ),
        Corruption(
            "spikes", "mr", (0.02, 0.04, 0.07, 0.10, 0.14), "amplitude of the stripes, share of the intensity range",
            "Stripes from two spikes in k-space (herringbone artefact).",
        ),
        Corruption(
            "blur", "any", (0.50, 0.70, 0.90, 1.20, 1.60), "standard deviation, edges of the finest voxel axis",
            "Gaussian point spread, equally wide in all directions: soft reconstruction kernel or filter.",
        ),
        Corruption(
            "low_resolution", "any", (1.5, 2.0, 2.5, 3.0, 3.5), "voxel size, edges of the finest voxel axis",
            "Acquired with larger voxels (axes that are coarser already stay) and interpolated back to the grid.",
        ),
        Corruption(
            "gamma", "mr", (0.10, 0.20, 0.32, 0.46, 0.65), "absolute natural logarithm of the exponent",
            "Other contrast: the signal to a power above or below 1, with zero and 99.5 percentile kept.",
        ),
        Corruption(
            "dose_noise", "ct", (8.0, 15.0, 25.0, 40.0, 60.0), "standard deviation, HU",
            "Image noise of a lower dose: Gaussian, correlated between neighbours within a slice, alike everywhere.",
        ),
        Corruption(
            "hu_shift", "ct", (5.0, 10.0, 20.0, 35.0, 60.0), "HU",
            "Calibration error: all values too high or too low by the same amount.",
        ),
    )
}  # fmt: skip


def default_corruptions(modality_is_ct: bool) -> list[str]:
    """Names of the corruptions that happen to CT, or to all other modalities, in the order of ``CORRUPTIONS``."""
    fitting = ("any", "ct") if modality_is_ct else ("any", "mr")
    return [name for name, corruption in CORRUPTIONS.items() if corruption.modality in fitting]


def corrupt(image: Volume, spacing_mm: Sequence[float], name: str, severity: int, seed: int, case: str) -> Volume:
    """Corrupt one case; equal arguments give equal voxels, and the input stays as it is.

    ``dose_noise`` is a model in the image domain: stationary Gaussian noise in HU, independent between slices (along
    the coarsest axis) and between channels, and within a slice smoothed by a Gaussian of 0.7 voxels and rescaled to the
    standard deviation asked for, which gives the grain of a soft-tissue kernel. It does not depend on attenuation.

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
    spacing = np.asarray(spacing_mm, np.float64)
    level = CORRUPTIONS[name].levels[severity - 1]
    rng = _generator(seed, case, name)
    image = np.array(image, np.float32)
    if name in _NATIVE:
        return np.asarray(_NATIVE[name](image, spacing, level, rng), np.float32)
    zero, width = _signal(image)
    usable = width > 0
    if not usable.any():
        return image
    cut = (slice(None), None, None, None)
    signal = (image[usable] - zero[usable][cut]) / width[usable][cut]
    image[usable] = _ON_SIGNAL[name](signal, spacing, level, rng) * width[usable][cut] + zero[usable][cut]
    return image


def _generator(seed: int, case: str, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}\0{name}\0{case}".encode("utf-8", "surrogateescape")).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def _signal(image: Volume) -> tuple[Volume, Volume]:
    """Zero of the signal and width of the intensity range, per channel (C,)."""
    flat = image.reshape(len(image), -1)
    low, high = np.percentile(flat, (0.5, 99.5), axis=1)
    width = np.where(high > low, high - low, flat.max(axis=1) - flat.min(axis=1))
    return np.minimum(flat.min(axis=1), 0).astype(np.float32), width.astype(np.float32)


def _torchio() -> Any:
    try:
        import torchio
    except ImportError as error:
        raise UserError(f'corruptions need TorchIO ({error}): pip install "{_NEEDS}"') from None
    return torchio


def _apply(make: Callable[[Any], Any], volume: Volume, spacing: npt.NDArray[np.float64]) -> Volume:
    """Apply the TorchIO transform that ``make`` builds to (C, *S); the state of torch's generator stays as it is."""
    import torch

    torchio = _torchio()
    # TorchIO turns about the origin, so that is put into the centre.
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -spacing * (np.asarray(volume.shape[1:]) - 1) / 2
    subject = torchio.ScalarImage(tensor=torch.from_numpy(np.ascontiguousarray(volume)), affine=affine)
    with torch.random.fork_rng(devices=[]):
        result = make(torchio)(subject)
    return np.asarray(result.data.numpy(), np.float32)


def _resize(volume: Volume, shape: Iterable[int], *, align_corners: bool = False) -> Volume:
    """Interpolate (C, *S) linearly to another number of voxels."""
    import torch
    from torch.nn.functional import interpolate

    size = [int(length) for length in shape]
    result = interpolate(torch.from_numpy(volume)[None], size=size, mode="trilinear", align_corners=align_corners)
    return np.asarray(result[0].numpy(), np.float32)


def _in_plane(spacing: npt.NDArray[np.float64], shape: Sequence[int]) -> list[int]:
    """Axes that can be a phase-encoding direction: not the slice axis of an anisotropic volume, nor an axis of one."""
    axes = [axis for axis in range(3) if spacing[axis] <= 1.5 * spacing.min() and shape[axis] > 1]
    return axes or [int(np.argmax(shape))]


def _direction(rng: np.random.Generator, allowed: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """A random unit vector along the allowed axes; zero where there is none."""
    vector: npt.NDArray[np.float64] = rng.normal(size=3) * allowed
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


# Corruptions of the signal: (C, Z, Y, X), zero at no signal, one intensity range wide. Levels as in the table.


def _rician_noise(signal: Volume, spacing: npt.NDArray[np.float64], level: float, rng: np.random.Generator) -> Volume:
    real = signal + np.float32(level) * rng.standard_normal(signal.shape, np.float32)
    imaginary = np.float32(level) * rng.standard_normal(signal.shape, np.float32)
    return np.asarray(np.hypot(real, imaginary), np.float32)


def _bias_field(signal: Volume, spacing: npt.NDArray[np.float64], level: float, rng: np.random.Generator) -> Volume:
    order = 3
    terms = [(i, j, k) for i in range(order + 1) for j in range(order + 1 - i) for k in range(order + 1 - i - j)]
    coefficients = [float(value) for value in rng.uniform(-0.5, 0.5, len(terms))]
    # A cubic is smooth: TorchIO's slow polynomial is evaluated on a coarse grid with the same corners.
    ones = np.ones((1, *np.minimum(signal.shape[1:], 32)), np.float32)
    small = np.log(_apply(lambda tio: tio.BiasField(coefficients=coefficients, order=order), ones, spacing))
    field = _resize(small, signal.shape[1:], align_corners=True)
    field -= (field.max() + field.min()) / 2
    field *= np.float32(np.log(level) / max(float(field.max()), 1e-6))
    return np.asarray(signal * np.exp(field), np.float32)


def _ghosting(signal: Volume, spacing: npt.NDArray[np.float64], level: float, rng: np.random.Generator) -> Volume:
    count = int(rng.integers(2, 4))
    axis = int(rng.choice(_in_plane(spacing, signal.shape[1:])))
    # Every count-th line weakened by a share makes ghosts of that share / count.
    ghosts = _apply(
        lambda tio: tio.Ghosting(num_ghosts=count, axis=axis, intensity=level * count, restore=None), signal, spacing
    )
    return np.abs(ghosts)  # a magnitude image, as in motion and spikes


def _motion(signal: Volume, spacing: npt.NDArray[np.float64], level: float, rng: np.random.Generator) -> Volume:
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
        lambda tio: tio.Motion(
            degrees=degrees[:, to_last], translation=shifts[:, to_last], times=times, image_interpolation="linear"
        ),
        signal.transpose(0, *(axis + 1 for axis in to_last)),
        spacing[to_last],
    )
    return np.abs(moved.transpose(0, *back))


def _spikes(signal: Volume, spacing: npt.NDArray[np.float64], level: float, rng: np.random.Generator) -> Volume:
    shape = np.asarray(signal.shape[1:])
    usable = shape > 1
    positions = np.stack([0.5 + _direction(rng, usable) * rng.uniform(0.12, 0.4) for _ in range(2)])
    # TorchIO's unit is the largest value of the spectrum: the sum of the voxels, since none is negative.
    result = []
    for channel in signal[:, None]:
        intensity = level / float(channel.mean(dtype=np.float64))
        make = partial(_spike, positions=positions, intensity=intensity)
        result.append(_apply(make, channel, spacing))
    return np.abs(np.concatenate(result))


def _spike(torchio: Any, positions: npt.NDArray[np.float64], intensity: float) -> Any:
    return torchio.Spike(spikes_positions=positions, intensity=intensity)


def _gamma(signal: Volume, spacing: npt.NDArray[np.float64], level: float, rng: np.random.Generator) -> Volume:
    exponent = float(np.exp(level * rng.choice((-1.0, 1.0))))
    high = np.percentile(signal.reshape(len(signal), -1), 99.5, axis=1).astype(np.float32)[:, None, None, None]
    high[high <= 0] = 1
    return _apply(lambda tio: tio.Gamma(gamma=exponent), signal / high, spacing) * high


# Corruptions of the values as they are.


def _blur(image: Volume, spacing: npt.NDArray[np.float64], level: float, rng: np.random.Generator) -> Volume:
    width = float(level * spacing.min())
    return _apply(lambda tio: tio.Blur(std=(width, width, width)), image, spacing)


def _low_resolution(image: Volume, spacing: npt.NDArray[np.float64], level: float, rng: np.random.Generator) -> Volume:
    shape = np.asarray(image.shape[1:])
    coarse = np.maximum(1, np.round(shape * spacing / np.maximum(spacing, level * spacing.min()))).astype(int)
    widths = tuple(float(width) for width in spacing * (shape / coarse - 1) / 2)  # usual filter against aliasing
    small = _resize(_apply(lambda tio: tio.Blur(std=widths), image, spacing), coarse)
    return _resize(small, image.shape[1:])


def _dose_noise(image: Volume, spacing: npt.NDArray[np.float64], level: float, rng: np.random.Generator) -> Volume:
    from scipy.ndimage import gaussian_filter

    grain = [0.0, 0.7, 0.7, 0.7]
    grain[1 + int(np.argmax(spacing))] = 0.0
    noise = gaussian_filter(rng.standard_normal(image.shape, np.float32), grain, mode="wrap")
    noise *= np.float32(level / max(float(noise.std()), 1e-6))
    return np.asarray(image + noise, np.float32)


def _hu_shift(image: Volume, spacing: npt.NDArray[np.float64], level: float, rng: np.random.Generator) -> Volume:
    return image + np.float32(level * rng.choice((-1.0, 1.0)))


_Function = Callable[[Volume, npt.NDArray[np.float64], float, np.random.Generator], Volume]
_ON_SIGNAL: dict[str, _Function] = {
    "rician_noise": _rician_noise,
    "bias_field": _bias_field,
    "ghosting": _ghosting,
    "motion": _motion,
    "spikes": _spikes,
    "gamma": _gamma,
}
_NATIVE: dict[str, _Function] = {
    "blur": _blur,
    "low_resolution": _low_resolution,
    "dose_noise": _dose_noise,
    "hu_shift": _hu_shift,
}
