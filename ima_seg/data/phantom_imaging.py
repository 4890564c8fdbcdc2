"""From the phantom's anatomy to what a scanner would show: tissue contrast, bias field, streaks, noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ima_seg.data.phantom_anatomy import Abdomen, Array, smooth_field

Modality = Literal["mr", "mr2", "ct"]

CHANNELS: dict[Modality, tuple[str, ...]] = {"mr": ("MRI",), "mr2": ("T1", "T2"), "ct": ("CT",)}
"""nnU-Net's channel names; "CT" is the spelling that selects its CT normalisation."""

# Mean per tissue. MR: share of the fat signal on T1. CT: HU in the portal venous phase.
_T1 = {
    "air": 0.0, "fat": 0.95, "muscle": 0.45, "visceral": 0.8, "cortical": 0.12, "marrow": 0.62, "disc": 0.38,
    "cord": 0.3, "vessel": 0.25, "organ": 0.57, "lesion": 0.44, "kidney": 0.47, "pelvis": 0.4, "spleen": 0.49,
    "stomach": 0.36, "bowel": 0.48, "gas": 0.04, "cyst": 0.3,
}  # fmt: skip
_T2 = {
    "air": 0.0, "fat": 0.72, "muscle": 0.25, "visceral": 0.6, "cortical": 0.08, "marrow": 0.45, "disc": 0.5,
    "cord": 0.85, "vessel": 0.15, "organ": 0.38, "lesion": 0.52, "kidney": 0.6, "pelvis": 0.7, "spleen": 0.52,
    "stomach": 0.65, "bowel": 0.46, "gas": 0.03, "cyst": 0.9,
}  # fmt: skip
_CT = {
    "air": -1000.0, "fat": -100.0, "muscle": 55.0, "visceral": -85.0, "cortical": 620.0, "marrow": 210.0,
    "disc": 85.0, "cord": 35.0, "vessel": 150.0, "organ": 102.0, "lesion": 62.0, "kidney": 140.0, "pelvis": 110.0,
    "spleen": 112.0, "stomach": 25.0, "bowel": 60.0, "gas": -850.0, "cyst": 12.0,
}  # fmt: skip


@dataclass(frozen=True)
class _Contrast:
    """One channel: ``means`` per tissue and three standard deviations in the same unit.

    ``between`` patients, ``own`` between structures that draw their own mean, ``texture`` within a tissue (fatty and
    hollow tissues have twice to thrice of it).
    """

    means: dict[str, float]
    between: float
    own: float
    texture: float


_CONTRASTS: dict[str, _Contrast] = {
    "MRI": _Contrast(_T1, 0.03, 0.08, 0.025),
    "T1": _Contrast(_T1, 0.03, 0.08, 0.025),
    "T2": _Contrast(_T2, 0.03, 0.1, 0.03),
    "CT": _Contrast(_CT, 8.0, 28.0, 7.0),
}
_COARSE = {"visceral": 3.0, "bowel": 2.5, "stomach": 2.0, "marrow": 2.0, "lesion": 1.6}
_STEADY = frozenset({"air", "gas"})


def paint(
    rng: np.random.Generator, case: Abdomen, channels: Sequence[str], shape: Sequence[int]
) -> tuple[list[Array], Array, Array]:
    """Paint the structures in order: noise-free ``channels`` of ``shape``, in the units of their tables.

    Beside them the shares of each voxel that organ and lesion cover, 0..1; all float32.
    """
    grain = 0.7 * smooth_field(rng, shape, 14) + 0.7 * ndimage.gaussian_filter(
        rng.standard_normal(tuple(shape), dtype=np.float32), 0.8, truncate=2.5
    ) * np.float32(3.5)
    tables = [_CONTRASTS[name] for name in channels]
    drawn = [
        {key: value + (0 if key in _STEADY else rng.normal(0, table.between)) for key, value in table.means.items()}
        for table in tables
    ]
    images = [np.full(tuple(shape), table.means["air"], np.float32) for table in tables]
    organ, lesion = (np.zeros(tuple(shape), np.float32) for _ in range(2))
    for structure in case.structures:
        role, _, key = structure.tissue.rpartition(":")
        cover = structure.cover
        shift = rng.standard_normal() if structure.own_mean else 0.0
        for image, table, means in zip(images, tables, drawn, strict=True):
            amount = 0.0 if key in _STEADY else table.texture * _COARSE.get(key, 1.0)
            value = np.float32(means[key] + shift * table.own) + np.float32(amount) * grain
            image += cover * (value - image)
        if role != "label-free":
            for name, share in (("organ", organ), ("lesion", lesion)):
                share *= 1 - cover
                if structure.tissue == f"target:{name}":
                    share += cover
    return images, organ, lesion


def _spread(width: float, voxel_mm: Sequence[float]) -> list[float]:
    """Of the point, voxels; a thick slice has none of its own, for its sub-slices were averaged already."""
    return [width if size < 2 * min(voxel_mm) else 0.0 for size in voxel_mm]


def scan_mr(
    rng: np.random.Generator, images: Sequence[Array], voxel_mm: Sequence[float]
) -> list[npt.NDArray[np.int16]]:
    """MR magnitude images, 0..4095: point spread, coil bias field, Rician noise, an arbitrary scanner gain.

    ``images`` are noise-free channels (shares of the fat signal), float32, shape (X, Y, Z).
    """
    spread = _spread(0.5, voxel_mm)
    shape = images[0].shape
    bias = np.exp(np.float32(rng.uniform(0.12, 0.25)) * smooth_field(rng, shape, 3))
    scanned = []
    for image in images:
        signal = ndimage.gaussian_filter(image, spread, truncate=3) * bias
        noise = np.float32(rng.uniform(0.025, 0.055))
        real = signal + noise * rng.standard_normal(shape, dtype=np.float32)
        imaginary = noise * rng.standard_normal(shape, dtype=np.float32)
        magnitude = np.hypot(real, imaginary) * rng.uniform(1300, 2500)
        scanned.append(np.clip(np.rint(magnitude), 0, 4095).astype(np.int16))
    return scanned


def scan_ct(
    rng: np.random.Generator, image: Array, plane: tuple[Array, Array], voxel_mm: Sequence[float]
) -> npt.NDArray[np.int16]:
    """A CT image, -1024..3071 HU: point spread, correlated noise, faint streaks that fan out from the spine.

    ``image`` is noise-free, in HU, float32, shape (X, Y, Z); ``plane`` is the position of each voxel relative to the
    spine along x and y, in any one unit, of the same shape.
    """
    spread, shape = _spread(0.6, voxel_mm), image.shape
    soft = ndimage.gaussian_filter(image, spread, truncate=3)
    white = rng.standard_normal(shape, dtype=np.float32)
    noise = ndimage.gaussian_filter(white, [0.8 * s / 0.6 for s in spread], truncate=3)
    noise *= np.float32(rng.uniform(11, 22)) / noise.std()
    rays = 90
    fan = ndimage.gaussian_filter(rng.standard_normal((rays, shape[2])), (1.0, 1.5), mode=("wrap", "nearest"))
    fan *= rng.uniform(6, 16) / fan.std()
    turn = (np.arctan2(plane[1], plane[0]) / (2 * np.pi) % 1 * rays).astype(np.float32)
    slices = np.broadcast_to(np.arange(shape[2], dtype=np.float32), shape)
    streak = ndimage.map_coordinates(fan.astype(np.float32), [turn, slices], order=1, mode="grid-wrap")
    dense = np.clip((soft + 600) / 700, 0, 1)  # streaks fade out in air
    far = np.hypot(plane[0], plane[1])
    streak *= dense * np.exp(-far / np.float32(0.6)) * np.clip(far / np.float32(0.15), 0, 1)
    scanned: npt.NDArray[np.int16] = np.clip(np.rint(soft + noise + streak), -1024, 3071).astype(np.int16)
    return scanned
