"""Slices of the worst cases as PNG data for the page."""

from __future__ import annotations

import base64
import io
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.ndimage import generate_binary_structure, maximum_filter, minimum_filter

Floats = npt.NDArray[np.floating[Any]]

#: Longest side of a picture, in pixels; small slices are enlarged to about half of it.
LONGEST = 384
#: Colours of the classes, well apart on grey, also for colour-blind readers.
CLASS_COLOURS = ((86, 180, 233), (240, 228, 66), (230, 90, 60), (0, 200, 140), (214, 126, 190), (255, 160, 50))
_MAPS = ("before", "after", "truth")
_ARRAYS = ("clean", "delta", "adversarial", *_MAPS)  # the first three may have colours along a third axis


class Picture(NamedTuple):
    """A PNG as a data address, with what it shows."""

    source: str
    caption: str
    width: int
    height: int


@dataclass(frozen=True)
class Panel:
    """The pictures of one slice."""

    pictures: list[Picture]
    index: int  # of the slice along ``axis``
    axis: int
    factor: float  # by which the perturbation was multiplied for its picture
    window: tuple[float, float]  # intensities shown as black and white
    length: int  # characters of all pictures
    colour: bool = False  # whether image and perturbation are in colour


def _round_factor(value: float) -> float:
    """The largest of 1, 2, 5, 10, ... that is not above ``value``; at least 1."""
    if value <= 1 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step for step in (5 * power, 2 * power, power) if step <= value * (1 + 1e-9))


def _picture(values: Floats, caption: str) -> Picture:
    """From grey values or colours of 0 to 255."""
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.fromarray(values.round().astype(np.uint8))
    if image.mode == "RGB":
        image = image.quantize(colors=256, dither=Image.Dither.NONE)
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Picture(f"data:image/png;base64,{data}", caption, image.width, image.height)


def _overlay(shown: Floats, filled: npt.NDArray[Any], outlined: npt.NDArray[Any]) -> Floats:
    """Prediction as a translucent area on grey or colours, truth as a white outline, two wide."""
    colour = np.repeat(shown[..., None], 3, axis=2) if shown.ndim == 2 else shown.copy()
    for label in np.unique(filled[filled > 0]):
        paint = np.array(CLASS_COLOURS[(int(label) - 1) % len(CLASS_COLOURS)], np.float32)
        colour[filled == label] = 0.5 * colour[filled == label] + 0.5 * paint
    cross = generate_binary_structure(2, 1)
    colour[maximum_filter(outlined, footprint=cross) != minimum_filter(outlined, footprint=cross)] = 255
    return colour


def _diverging(values: Floats) -> Floats:
    """-1 blue, 0 white, 1 red; colours about grey."""
    v = np.clip(np.nan_to_num(values), -1, 1)
    if v.ndim == 3:
        return np.asarray(127.5 * (v + 1))
    v = v[..., None]
    end = np.where(v < 0, np.array([33.0, 102.0, 172.0]), np.array([178.0, 24.0, 43.0]))
    # 64 steps of colour keep the file small: noise does not compress.
    colour: Floats = 247.0 + (end - 247.0) * np.round(np.abs(v) * 32) / 32
    return colour


def read_panel(path: Path) -> Panel | None:
    """Draw the slices in ``path``; None where it does not exist or is no such file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {name: np.asarray(file[name]) for name in (*_ARRAYS, "spacing", "window", "index", "axis")}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    shape, colours = data["clean"].shape[:2], data["clean"].shape[2:]
    shapes = {name: shape if name in _MAPS else (*shape, *colours) for name in _ARRAYS}
    if len(shape) != 2 or colours not in ((), (3,)) or any(data[n].shape != shapes[n] for n in _ARRAYS) or 0 in shape:
        return None
    spacing = [max(float(value), 1e-6) for value in data["spacing"].ravel()[:2]]
    mm = [n * s for n, s in zip(shape, spacing, strict=True)]
    longest = min(LONGEST, max(*shape, LONGEST // 2))
    # Nearest neighbour: the pixels shown are those of the file.
    at = np.ix_(
        *(
            np.minimum((np.arange(count) + 0.5) * n / count, n - 1).astype(int)
            for n, count in zip(shape, (max(1, round(length / max(mm) * longest)) for length in mm), strict=True)
        )
    )
    low, high = (float(value) for value in data["window"].ravel()[:2])
    width = max(high - low, 1e-6)
    clean, adversarial = (
        255 * np.clip((np.nan_to_num(data[name][at].astype(np.float32)) - low) / width, 0, 1)
        for name in ("clean", "adversarial")
    )
    delta = data["delta"].astype(np.float32)
    size = float(np.quantile(np.abs(delta), 0.995))
    factor = _round_factor(0.5 * width / size) if size > 0 else 1.0
    before, after, truth = (data[name][at] for name in _MAPS)
    pictures = [
        _picture(clean, "clean image"),
        _picture(_diverging(factor * delta[at] / (0.5 * width)), f"perturbation × {factor:g}"),
        _picture(adversarial, "adversarial image"),
        _picture(_overlay(clean.round(), before, truth), "prediction before"),
        _picture(_overlay(adversarial.round(), after, truth), "prediction after"),
    ]
    length = sum(len(picture.source) for picture in pictures)
    return Panel(pictures, int(data["index"]), int(data["axis"]), factor, (low, high), length, colour=bool(colours))
