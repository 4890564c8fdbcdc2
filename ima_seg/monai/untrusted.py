"""The items of a config that is not trusted, built one by one where they are needed.

MONAI's own parser instantiates and evaluates whatever it finds. Here every class and every argument is looked at when
it is used, with the values that references and expressions have then, so that no way of writing them gets around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.bundle.reference_resolver import ReferenceResolver
from monai.transforms import Compose
from torch import nn

from ima_seg.monai.allowed import Unsaved, check_arguments, find_class, is_saver, leads_out
from ima_seg.monai.configfile import DEEPEST, MOST_ITEMS, Refused, shown
from ima_seg.monai.expressions import evaluate
from ima_seg.weights import load_tensors

#: Weights that a network may have whatever the bundle's files hold: few enough to find out when they are read.
_FEW_WEIGHTS = 2**26
#: What says how a component is made, not what it gets.
_WORDS = ("_target_", "_disabled_", "_requires_", "_desc_", "_mode_")


class UntrustedConfig:
    """A config in the folder ``root`` of a bundle, see the module.

    Args:
        contents: of the config, by MONAI's rules for ids, references, ``%`` macros of its own and expressions.
        root: with all links resolved, in the place of ``bundle_root``.
        device: in the place of ``device``, and of every ``torch.device`` that the config makes.
    """

    def __init__(self, contents: Mapping[str, Any], *, root: Path, device: torch.device) -> None:
        self.contents, self.root = contents, root
        self._functions = {"torch.device": lambda *_, **__: device, "torch.load": self._load}
        self._built: dict[str, Any] = {"bundle_root": str(root), "device": device}
        self._open: list[str] = []
        self._items = self._weights = 0

    def get(self, ids: str) -> Any:
        """The item with this id, such as ``preprocessing::transforms::0``, built.

        Raises:
            Refused: it would do more than compute; or it is larger than anything meant.
            Exception: whatever the component raises.
        """
        ids = ids.replace("#", "::")
        return self._built[ids] if ids in self._built else self._build(ids, self._find(ids))

    def _find(self, ids: str) -> Any:
        """The item with this id, as it is written."""
        found: Any = self.contents
        parts = ids.split("::")
        for level, part in enumerate(parts):
            found = self._expanded(found, "::".join(parts[:level]))
            if isinstance(found, dict) and part in found:
                found = found[part]
            elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
                found = found[int(part)]
            else:
                raise KeyError(f"the config has no item {ids}")
        return found

    def _expanded(self, item: Any, ids: str) -> Any:
        """What a macro stands for; other items as they are."""
        for _ in range(DEEPEST):
            if not isinstance(item, str) or not (name := ConfigParser.resolve_relative_ids(ids, item)).startswith("%"):
                return item
            path, name = ConfigParser.split_path_id(name[1:])
            if path:
                raise Refused(f"would read another file, by {shown(item)}")
            self._count()
            item = self._find(name)
        raise Refused(f"refers to itself, by {shown(item)}")

    def _count(self) -> None:
        self._items += 1
        if self._items > MOST_ITEMS:
            raise Refused(f"would make more than {MOST_ITEMS} items of its references and macros")

    def _build(self, ids: str, item: Any) -> Any:
        if ids in self._built:
            return self._built[ids]
        self._count()
        if ids in self._open or len(self._open) >= 2 * DEEPEST:
            raise Refused(f"refers to itself, or too deep, by {shown('@' + ids)}")
        self._open.append(ids)
        self._built[ids] = self._value(ids, self._expanded(item, ids))
        self._open.pop()
        return self._built[ids]

    def _value(self, ids: str, item: Any) -> Any:
        if isinstance(item, dict):
            return self._component(ids, item) if "_target_" in item else self._inside(ids, item)
        if isinstance(item, list):
            return list(self._inside(ids, dict(enumerate(item))).values())
        if not isinstance(item, str):
            return item
        text = ConfigParser.resolve_relative_ids(ids, item)
        if text.startswith("$"):
            return evaluate(text[1:], self.get, self._functions)
        return self.get(text[1:]) if ReferenceResolver.id_matcher.fullmatch(text) else text

    def _inside(self, ids: str, items: Mapping[Any, Any]) -> dict[Any, Any]:
        """The items within one, without components that are disabled."""
        built = {key: self._build(f"{ids}::{key}", item) for key, item in items.items()}
        return {key: value for key, value in built.items() if value is not None or not _is_component(items[key])}

    def _component(self, ids: str, item: Mapping[str, Any]) -> Any:
        kind = find_class(item["_target_"])
        if is_saver(kind):
            return Unsaved(f"{item['_target_']} ({shown(ids)[1:-1]})")
        if item.get("_mode_", "default") != "default":
            raise Refused(f"would pass on or debug {kind.__name__}, by _mode_={shown(item['_mode_'])}")
        words = self._inside(ids, {key: item[key] for key in ("_disabled_", "_requires_") if key in item})
        disabled = words.get("_disabled_", False)
        if disabled.strip().lower() == "true" if isinstance(disabled, str) else disabled:
            return None
        arguments = self._inside(ids, {key: value for key, value in item.items() if key not in _WORDS})
        check_arguments(kind, arguments, self.root)
        if issubclass(kind, nn.Module):
            self._check_weights(kind, arguments)
        return kind(**arguments)

    def _check_weights(self, kind: type[nn.Module], arguments: Mapping[str, Any]) -> None:
        """Refuse a network that no file of the bundle can hold the weights of, from a sketch without memory."""
        sketch = None
        # Some networks compute with numbers while they are built; what is wrong with others is told as they are built.
        with suppress(Exception):
            copied = deepcopy(arguments)
            with torch.device("meta"):
                sketch = kind(**copied)
        files = [path for path in (self.root / "models").rglob("*") if path.is_file()]
        if sketch is None or not files:
            return
        # Parts that it was given have memory, and have been counted.
        tensors = [*sketch.parameters(), *sketch.buffers()]
        self._weights += sum(tensor.numel() for tensor in tensors if tensor.is_meta)
        largest = max(files, key=lambda path: path.stat().st_size)
        if self._weights > max(_FEW_WEIGHTS, largest.stat().st_size):
            raise Refused(
                f"would make a network, with {kind.__name__}, that has {self._weights} weights, more than {largest} "
                f"of {largest.stat().st_size} bytes can hold"
            )

    def _load(self, path: str, **_: Any) -> Any:
        """``torch.load`` of a file of the bundle, such as a searched architecture: tensors, without code."""
        if leads_out(path, self.root):
            raise Refused(f"would read a file outside the bundle: {shown(path)}")
        return load_tensors(self.root / path, allowed=_array_parts())


def _array_parts() -> list[Any]:
    """What arrays in a file of torch are made of; numpy 2 renamed the module."""
    core = getattr(np, "_core", None) or np.core
    kinds = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.uint8, np.bool_)]
    made = [
        (core.multiarray._reconstruct, f"{module}.multiarray._reconstruct") for module in ("numpy.core", "numpy._core")
    ]
    return [np.ndarray, np.dtype, *kinds, *made]


def _is_component(item: Any) -> bool:
    return isinstance(item, dict) and "_target_" in item


def unsaved(part: Any) -> list[Unsaved]:
    """The savers that were left out of a transform, or of what it is composed of."""
    if isinstance(part, Unsaved):
        return [part]
    return [found for step in part.transforms for found in unsaved(step)] if isinstance(part, Compose) else []
