"""Slices of the worst cases as PNG data for the page."""

from __future__ import annotations

import base64
import io
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

#: Longest side of a picture, in pixels; small slices are enlarged to about half of it.
LONGEST = 384
#: Colours of the classes, well apart on grey, also for colour-blind readers.
CLASS_COLOURS = ((86, 180, 233), (240, 228, 66), (230, 90, 60), (0, 200, 140), (214, 126, 190), (255, 160, 50))
_ARRAYS = ("clean", "delta", "adversarial", "before", "after", "truth")


@dataclass(frozen=True)
class Picture:
    """A PNG as a data address, with what it shows."""

    source: str
    caption: str
    width: int
    height: int


@dataclass(frozen=True)
class Panel:
    """The pictures of one slice.

    Attributes:
        index: number of the slice along ``axis``.
        factor: by which the perturbation was multiplied for its picture.
        window: intensities shown as black and white.
        length: characters of all pictures.
    """

    pictures: list[Picture]
    index: int
    axis: int
    factor: float
    window: tuple[float, float]
    length: int


def _round_factor(value: float) -> float:
    """The largest of 1, 2, 5, 10, ... that is not above ``value``; at least 1."""
    if value <= 1 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step for step in (5 * power, 2 * power, power) if step <= value * (1 + 1e-9))


def _picture(pixels: npt.NDArray[np.uint8], caption: str) -> Picture:
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if image.mode == "RGB":
        image = image.quantize(colors=256, dither=Image.Dither.NONE)
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Picture(f"data:image/png;base64,{data}", caption, image.width, image.height)


def _outline(labels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Pixels of a label beside another, two wide."""
    edge = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        change = np.diff(labels, axis=axis) != 0
        for side in (slice(None, -1), slice(1, None)):
            index: list[slice] = [slice(None), slice(None)]
            index[axis] = side
            edge[tuple(index)] |= change
    return edge


def _overlay(
    grey: npt.NDArray[np.uint8], filled: npt.NDArray[Any], outlined: npt.NDArray[Any]
) -> npt.NDArray[np.uint8]:
    """Prediction as a translucent area, truth as a white outline."""
    colour = np.repeat(grey[..., None], 3, axis=2).astype(np.float32)
    for label in np.unique(filled[filled > 0]):
        area = filled == label
        paint = np.array(CLASS_COLOURS[(int(label) - 1) % len(CLASS_COLOURS)], np.float32)
        colour[area] = 0.5 * colour[area] + 0.5 * paint
    colour[_outline(outlined)] = 255
    return colour.round().astype(np.uint8)


def _diverging(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """-1 blue, 0 white, 1 red."""
    v = np.clip(np.nan_to_num(values), -1, 1)[..., None]
    white = np.array([247.0, 247.0, 247.0])
    end = np.where(v < 0, np.array([33.0, 102.0, 172.0]), np.array([178.0, 24.0, 43.0]))
    # 64 steps of colour keep the file small: noise does not compress.
    share = np.round(np.abs(v) * 32) / 32
    pixels: npt.NDArray[np.uint8] = (white + (end - white) * share).round().astype(np.uint8)
    return pixels


def read_panel(path: Path) -> Panel | None:
    """Draw the slices in ``path``; None where it does not exist or is no such file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {name: np.asarray(file[name]) for name in (*_ARRAYS, "spacing", "window", "index", "axis")}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    shape = data["clean"].shape
    if len(shape) != 2 or any(data[name].shape != shape for name in _ARRAYS) or 0 in shape:
        return None
    spacing = [max(float(value), 1e-6) for value in data["spacing"].ravel()[:2]]
    mm = [n * s for n, s in zip(shape, spacing, strict=True)]
    longest = min(LONGEST, max(*shape, LONGEST // 2))
    rows, columns = (max(1, round(length / max(mm) * longest)) for length in mm)
    # Nearest neighbour: the pixels shown are those of the file.
    at = np.ix_(
        np.minimum((np.arange(rows) + 0.5) * shape[0] / rows, shape[0] - 1).astype(int),
        np.minimum((np.arange(columns) + 0.5) * shape[1] / columns, shape[1] - 1).astype(int),
    )
    low, high = (float(value) for value in data["window"].ravel()[:2])
    width = max(high - low, 1e-6)

    def grey(name: str) -> npt.NDArray[np.uint8]:
        values = (np.nan_to_num(data[name][at].astype(np.float32)) - low) / width
        pixels: npt.NDArray[np.uint8] = (np.clip(values, 0, 1) * 255).round().astype(np.uint8)
        return pixels

    delta = data["delta"].astype(np.float32)
    size = float(np.quantile(np.abs(delta), 0.995)) if delta.size else 0.0
    factor = _round_factor(0.5 * width / size) if size > 0 else 1.0
    labels = {name: data[name][at] for name in ("before", "after", "truth")}
    clean, adversarial = grey("clean"), grey("adversarial")
    pictures = [
        _picture(clean, "clean image"),
        _picture(_diverging(factor * delta[at] / (0.5 * width)), f"perturbation × {factor:g}"),
        _picture(adversarial, "adversarial image"),
        _picture(_overlay(clean, labels["before"], labels["truth"]), "prediction before"),
        _picture(_overlay(adversarial, labels["after"], labels["truth"]), "prediction after"),
    ]
    return Panel(
        pictures, int(data["index"]), int(data["axis"]), factor, (low, high), sum(len(p.source) for p in pictures)
    )
