"""The phantom's anatomy: an abdomen in patient coordinates, drawn anew for every case.

Shapes are star-shaped bodies: an ellipsoid whose radius is modulated by spherical harmonics of degree 2 to 4 (a sum of
Legendre polynomials ``P_l(n . v)`` of random directions ``v`` is such a harmonic of degree ``l``). A smooth random warp
of the whole space bends them further. Positions are in *patient units*: RAS axes (x to the right, y to the front, z to
the head), -1..1 spanning the field of view, so that the anatomy fits every matrix; edges are computed in mm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Structure:
    """One painted structure."""

    tissue: str  # key of the tissue tables in phantom_imaging
    cover: Array  # share of each voxel that it covers, 0..1, shape of the grid
    own_mean: bool = False  # its mean intensity is drawn for it alone: bowel loops differ from each other


@dataclass
class Space:
    """The voxel grid as seen by the patient."""

    points: Array  # (3, X, Y, Z) patient coordinates of the voxel centres
    half: Vector  # (3,) half the field of view along each patient axis, mm
    edge: float  # width of the partial-volume ramp at a border, mm


def rotation(angles: Sequence[float] | Vector) -> Vector:
    """Return the 3x3 matrix that turns about x, then y, then z by ``angles`` (radians)."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def smooth_field(rng: np.random.Generator, shape: Sequence[int], knots: int) -> Array:
    """Return a smooth random field, about unit standard deviation, float32, of ``shape`` (3 axes).

    Normal values at ``knots`` control points per axis are blended by normalised Gaussian weights along each axis in
    turn, which costs three small matrix products.
    """
    values = rng.standard_normal((knots, knots, knots)).astype(np.float32)
    for size in shape:
        at = np.linspace(0, knots - 1, size, dtype=np.float32)[:, None]
        weights = np.exp(-0.5 * ((at - np.arange(knots, dtype=np.float32)[None]) / 0.7) ** 2)
        weights /= np.sqrt((weights**2).sum(1, keepdims=True))
        values = np.einsum("ka,abc->bck", weights, values)  # not BLAS: its threads fight with other workers
    return np.ascontiguousarray(values, dtype=np.float32)


@dataclass
class Blob:
    """A star-shaped body on the grid: ``ratio`` is distance over border distance, ``radius`` the distance in mm."""

    ratio: Array
    radius: Array
    edge: float

    def cover(self, scale: float = 1.0) -> Array:
        """Return the share of each voxel inside the body scaled by ``scale`` about its centre."""
        depth = self.radius * (1 - scale / self.ratio)
        share: Array = np.clip(0.5 - depth / np.float32(self.edge), 0, 1)
        return share


def blob(
    rng: np.random.Generator,
    space: Space,
    centre: Sequence[float] | Vector,
    axes: Sequence[float] | Vector,
    *,
    rough: float = 0.0,
    tilt: float = 0.0,
) -> Blob:
    """Draw one body with its ``centre`` and semi-``axes``, in patient units.

    ``rough`` is the standard deviation of the radius over directions, as a share of it; ``tilt`` that of the rotation
    about each axis, radians.
    """
    offset = space.points - np.asarray(centre, np.float32)[:, None, None, None]
    turn = rotation(rng.normal(0, 1, 3) * tilt) if tilt else np.eye(3)
    matrix = (turn.T / np.asarray(axes)[:, None]).astype(np.float32)
    local: Array = np.einsum("ij,jxyz->ixyz", matrix, offset)
    length = np.sqrt(np.einsum("ixyz,ixyz->xyz", local, local)) + np.float32(1e-4)
    border: Array = np.ones_like(length)
    if rough:
        terms = 5
        way = rng.standard_normal((terms, 3))
        way /= np.linalg.norm(way, axis=1, keepdims=True)
        height = rng.standard_normal(terms)
        height *= rough / (np.sqrt((height**2 / 6).sum()) + 1e-9)  # P_l has a mean square of 1/(2l+1), about 1/6
        cosine = np.einsum("ij,jxyz->ixyz", way.astype(np.float32), local) / length
        total = np.ones_like(length)
        for degree, weight, c in zip((2, 2, 3, 3, 4), height, cosine, strict=True):
            total += np.float32(weight) * _legendre(degree, c)
        border = np.clip(total, 0.35, 1.8)
    metric = (offset * np.asarray(space.half, np.float32)[:, None, None, None]) ** 2
    return Blob(length / border, np.sqrt(metric.sum(0)) + np.float32(1e-3), space.edge)


def _legendre(degree: int, x: Array) -> Array:
    square: Array = x * x
    value: Array
    if degree == 2:
        value = 1.5 * square - 0.5
    elif degree == 3:
        value = (2.5 * square - 1.5) * x
    else:
        value = (4.375 * square - 3.75) * square + 0.375
    return value


@dataclass
class Abdomen:
    """All structures of one case, in the order in which they are painted (a later one covers an earlier one)."""

    structures: list[Structure] = field(default_factory=list)
    spine: Vector = field(default_factory=lambda: np.zeros(2))

    def add(self, tissue: str, cover: Array, within: Array | None = None, own_mean: bool = False) -> None:
        """Paint ``tissue`` over ``cover``, cut off at ``within`` if given."""
        self.structures.append(Structure(tissue, cover if within is None else cover * within, own_mean))


def draw_abdomen(rng: np.random.Generator, space: Space, *, lesion: bool) -> Abdomen:
    """Draw one patient: body, spine, vessels, decoys that look like the targets, the organ and one to three lesions."""
    case = Abdomen()
    body = blob(rng, space, (0, 0, 0), (rng.uniform(0.82, 0.94), rng.uniform(0.66, 0.8), 2.2), rough=0.02)
    wall = 1 - rng.uniform(0.07, 0.16)
    cavity = body.cover(wall - rng.uniform(0.07, 0.11))
    case.add("fat", body.cover())
    case.add("muscle", body.cover(wall))
    case.add("visceral", cavity)
    _draw_skeleton(rng, space, case, wall)
    _draw_decoys(rng, space, case, cavity)
    _draw_targets(rng, space, case, cavity, lesion)
    return case


def _near(rng: np.random.Generator, place: Sequence[float] | Vector, spread: float) -> tuple[float, float, float]:
    x, y, z = np.asarray(place) + rng.normal(0, spread, 3)
    return float(x), float(y), float(z)


def _draw_skeleton(rng: np.random.Generator, space: Space, case: Abdomen, wall: float) -> None:
    x0, y0 = rng.normal(0, 0.02), -0.36 + rng.normal(0, 0.02)
    case.spine = np.array([x0, y0])
    for side in (-1, 1):
        muscle = blob(rng, space, (x0 + side * 0.2, y0 - 0.14, 0), (0.17, 0.15, 3), rough=0.05)
        case.add("muscle", muscle.cover())
    column = blob(rng, space, (x0, y0, 0), (rng.uniform(0.15, 0.19), rng.uniform(0.12, 0.15), 4))
    case.add("disc", column.cover(0.95))
    period, phase = rng.uniform(0.5, 0.65), rng.uniform(0, 1)
    place = np.abs((space.points[2] / period + phase) % 1 - 0.5) * period  # 0 in the middle of a vertebra
    slab = np.clip(0.5 - (place - 0.38 * period) * space.half[2] / space.edge, 0, 1).astype(np.float32)
    core = np.clip(0.5 - (place - 0.30 * period) * space.half[2] / space.edge, 0, 1).astype(np.float32)
    case.add("cortical", column.cover(), within=slab)
    case.add("marrow", column.cover(0.8), within=core)
    arch = blob(rng, space, (x0, y0 - 0.2, 0), (0.11, 0.1, 4))
    case.add("cortical", arch.cover(), within=slab)
    case.add("cortical", blob(rng, space, (x0, y0 - 0.3, 0), (0.03, 0.12, 4)).cover(), within=core)
    case.add("cord", blob(rng, space, (x0, y0 - 0.19, 0), (0.065, 0.06, 4)).cover())
    for turn in np.linspace(0.15, 0.85, 4) * np.pi + rng.normal(0, 0.05):
        for side in (-1, 1):  # ribs lie in the muscle wall and run obliquely
            x, y = side * np.sin(turn) * 0.87 * (wall - 0.04), -np.cos(turn) * 0.72 * (wall - 0.04)
            rib = blob(rng, space, (x, y, rng.uniform(-1, 1)), (0.035, 0.09, 0.16), tilt=0.3)
            case.add("cortical", rib.cover())
    for x, y, size in ((-0.06, 0.21, 0.075), (0.1, 0.2, 0.09)):
        tube = blob(rng, space, _near(rng, (x0 + x, y0 + y, 0), 0.015), (size, size * rng.uniform(0.7, 1), 4))
        case.add("vessel", tube.cover())


def _draw_decoys(rng: np.random.Generator, space: Space, case: Abdomen, cavity: Array) -> None:
    for side in (-1, 1):
        if rng.random() < 0.9:
            size = rng.uniform(0.8, 1.15)
            at = _near(rng, (side * 0.42, -0.3, -0.3), 0.05)
            kidney = blob(rng, space, at, (0.13 * size, 0.16 * size, 0.36 * size), rough=0.07, tilt=0.2)
            case.add("kidney", kidney.cover(), cavity)
            case.add("pelvis", kidney.cover(0.5), cavity)
    for _ in range(int(rng.integers(6, 12))):
        at = (rng.uniform(-0.55, 0.35), rng.uniform(-0.1, 0.5), rng.uniform(-1, 0.4))
        loop = blob(rng, space, at, rng.uniform(0.1, 0.24, 3), rough=0.12, tilt=0.8)
        case.add("bowel", loop.cover(), cavity, own_mean=True)
        if rng.random() < 0.3:
            case.add("gas", loop.cover(0.5), cavity)
    stomach = blob(rng, space, _near(rng, (-0.3, 0.26, 0.25), 0.05), (0.24, 0.2, 0.4), rough=0.12, tilt=0.3)
    case.add("bowel", stomach.cover(), cavity)
    case.add("stomach", stomach.cover(0.82), cavity, own_mean=True)
    size = rng.uniform(0.75, 1.3)
    place = _near(rng, (-0.56, -0.06, 0.15), 0.05)
    spleen = blob(rng, space, place, (0.15 * size, 0.24 * size, 0.42 * size), rough=0.1, tilt=0.25)
    case.add("spleen", spleen.cover(), cavity)
    for _ in range(int(rng.integers(0, 3))):  # lesion-like spots where no target is
        spot = blob(rng, space, _near(rng, (-0.45, -0.15, 0), 0.15), rng.uniform(0.05, 0.1, 3), rough=0.1)
        case.add("lesion" if rng.random() < 0.5 else "cyst", spot.cover(), cavity, own_mean=True)


def _draw_targets(rng: np.random.Generator, space: Space, case: Abdomen, cavity: Array, lesion: bool) -> None:
    size = rng.uniform(0.8, 1.15)
    centre = _near(rng, (0.38, 0.1, 0.1), 0.05)
    axes = np.array([0.34, 0.38, 0.6]) * size * rng.uniform(0.88, 1.12, 3)
    organ = blob(rng, space, centre, axes, rough=0.13, tilt=0.15)
    inside = organ.cover()
    case.add("target:organ", inside, cavity)
    for _ in range(int(rng.integers(2, 5))):  # vessels in the organ: another intensity, the same label
        at = _near(rng, centre, 0.1)
        tube = blob(rng, space, at, (0.035, 0.035, rng.uniform(0.25, 0.5)), rough=0.05, tilt=0.9)
        case.add("label-free:vessel", tube.cover(), cavity * organ.cover(0.85))
    if rng.random() < 0.4:
        cyst = blob(rng, space, _near(rng, centre, 0.12), np.full(3, rng.uniform(0.05, 0.09)), rough=0.05)
        case.add("label-free:cyst", cyst.cover(), cavity * organ.cover(0.9))
    if not lesion:
        return
    for number in range(int(rng.choice((1, 1, 1, 2, 2, 3)))):
        way = rng.standard_normal(3)
        way[2] *= 0.6
        way /= np.linalg.norm(way)
        spot = np.asarray(centre) + way * axes * rng.uniform(0.3, 0.85)
        reach = rng.uniform(0.15, 0.27) if number == 0 else rng.uniform(0.07, 0.14)
        mass = blob(rng, space, spot, reach * rng.uniform(0.8, 1.25, 3), rough=0.12, tilt=0.8)
        # it may bulge out of the organ, but not far, and never out of the cavity
        case.add("target:lesion", mass.cover(), cavity * organ.cover(1.18))
