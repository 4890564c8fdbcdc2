"""The values of a bundle's inferer, looked at before a case is: MONAI notices what cannot be only when it is called."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

from monai.inferers import SliceInferer, SlidingWindowInferer
from monai.utils import PytorchPadMode
from torch import nn

from ima_seg.errors import UserError
from ima_seg.monai.config import Parts
from ima_seg.monai.configfile import shown

#: Voxels of a tile along an axis, or tiles at once; no inferer comes near.
_MOST = 2**16


def check_inferer(parts: Parts) -> None:
    """Refuse values that MONAI's SlidingWindowInferer, or what is derived from it, cannot work with.

    Raises:
        UserError: naming the config, the key and its value.
    """
    inferer = parts.inferer
    if not isinstance(inferer, SlidingWindowInferer):
        return

    def require(key: str, valid: bool, expected: str) -> None:
        if not valid:
            value = shown(getattr(inferer, key))
            raise UserError(f"{parts.config}: inferer.{key} is {value}; it is {expected}, correct it")

    is_slices = isinstance(inferer, SliceInferer)
    roi = inferer.orig_roi_size if is_slices else inferer.roi_size
    size = f"a whole number up to {_MOST}, or one for each axis; -1 stands for the whole axis"
    require("roi_size", _each(roi, lambda x: x is None or (_is_whole(x) and x <= _MOST)), size)
    require("sw_batch_size", _is_whole(inferer.sw_batch_size) and 1 <= inferer.sw_batch_size <= _MOST,
            f"a whole number from 1 to {_MOST}")  # fmt: skip
    overlap = "a number from 0 on and below 1, or one for each axis"
    require("overlap", _each(inferer.overlap, lambda x: _is_number(x) and 0 <= x < 1), overlap)
    if isinstance(roi, Sequence) and isinstance(inferer.overlap, Sequence):
        require("overlap", len(inferer.overlap) == len(roi) + is_slices, overlap)
    require("sigma_scale", _each(inferer.sigma_scale, lambda x: _is_number(x) and 0 < x < math.inf),
            "a number above 0, or one for each axis")  # fmt: skip
    modes = [mode.value for mode in PytorchPadMode]
    require("padding_mode", getattr(inferer.padding_mode, "value", inferer.padding_mode) in modes,
            f"one of {', '.join(modes)}")  # fmt: skip
    require("cval", _is_number(inferer.cval) and math.isfinite(inferer.cval), "a finite number")
    if is_slices:
        require("roi_size", len(roi) == 2, "two numbers for a SliceInferer, which cuts slices")
        require("spatial_dim", _is_whole(inferer.spatial_dim) and 0 <= inferer.spatial_dim <= 2, "0, 1 or 2")
        network, convolutions = parts.network, _convolutions(parts.network)
        if type(network).__module__.startswith("monai.") and convolutions == {nn.Conv3d}:
            raise UserError(
                f"{parts.config}: inferer is SliceInferer, which gives slices to the network, but "
                f"{type(network).__name__} is for three dimensions; use SlidingWindowInferer, or spatial_dims 2"
            )


def _each(value: Any, valid: Callable[[Any], bool]) -> bool:
    """Whether a value, or each of a sequence of them, is valid."""
    value = value.tolist() if hasattr(value, "tolist") else value  # an array
    if isinstance(value, list | tuple):
        return len(value) > 0 and all(valid(item) for item in value)
    return valid(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _convolutions(network: nn.Module) -> set[type]:
    return {type(module) for module in network.modules() if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)}
