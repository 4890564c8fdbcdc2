"""A bundle's config: the parts that inference needs, built without running code of the bundle's own.

``_target_`` and ``$`` expressions can run any Python. Unless the bundle is trusted, only what inference needs is looked
at (so that no import statement runs), and built of what only computes, by :mod:`ima_seg.monai.untrusted`.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ima_seg.errors import UserError
from ima_seg.files import read_json
from ima_seg.monai.configfile import Refused, find_config, read_config, shown

#: Under which the path of the weights is resolved.
_WEIGHTS, _DEFAULT_WEIGHTS = "ima_seg_weights", "models/model.pt"
#: MONAI's wrapper around a predictor of nnU-Net, as configs write it.
_WRAPPER = re.compile(r"monai\.apps\.nnunet|get_nnunet_monai_predictor|ModelnnUNetWrapper")
_SAVERS = re.compile(r"(^|\.)(SaveImage|SaveClassification|WriteFileMapping)(d|D|Dict)?$")


@dataclass(frozen=True)
class Parts:
    """What inference needs of a bundle, as its config says."""

    network: nn.Module  # without its weights at first
    preprocessing: Any  # MONAI's Compose
    postprocessing: Any  # the same, without what saves files
    inferer: Any  # MONAI's Inferer
    weights: Path  # the file that the config loads, or models/model.pt
    config: Path  # the file that says all this


def read_metadata(root: Path) -> dict[str, Any]:
    """``configs/metadata.json`` of a bundle.

    Raises:
        UserError: there is none, or it is no JSON object.
    """
    missing = "does not exist; name the folder of a MONAI bundle, which has one"
    return read_json(root / "configs" / "metadata.json", missing=missing, remedy="correct it")


def data_format(metadata: Mapping[str, Any], side: str, name: str) -> dict[str, Any]:
    """``network_data_format`` of one input or output; empty where the metadata do not have it."""
    found: Any = metadata
    for key in ("network_data_format", side, name):
        found = found.get(key, {}) if isinstance(found, dict) else {}
    return found if isinstance(found, dict) else {}


def is_single_ct(metadata: Mapping[str, Any]) -> bool:
    """Whether the input is one channel, of CT by its modality or its format."""
    image = data_format(metadata, "inputs", "image")
    words = {str(image.get(key, "")).lower() for key in ("modality", "format")}
    return image.get("num_channels") == 1 and bool(words & {"ct", "hounsfield"})


def load_parts(root: Path, *, device: torch.device, trust: bool) -> Parts:
    """Build network, transforms and inferer of a bundle.

    In its config, ``root`` takes the place of ``bundle_root`` and ``device`` that of ``device``. If it is trusted
    (``trust``), it runs what it likes, with modules of the bundle. Savers of the post-processing are left out.

    Raises:
        UserError: a file or part is missing or cannot be built, or it would run code, write files or read others than
            its own while ``trust`` is not set.
    """
    file = find_config(root)
    with _reporting(file, "it"):
        contents = read_config(file)
    if wrapper := next((text for _, text in _items(contents) if isinstance(text, str) and _WRAPPER.search(text)), None):
        raise UserError(
            f"{file} wraps an nnU-Net model, {shown(wrapper)}, by its predictor, which computes without gradients and "
            "cannot be attacked; evaluate the nnU-Net model itself, -m with the folder that has its plans.json"
        )
    network = "network" if "network" in contents else "network_def"
    wanted = [network, "preprocessing", "postprocessing", "inferer"]
    if missing := [name for name in wanted if contents.get(name) is None]:
        raise UserError(
            f"{file} has no {', '.join(repr(name) for name in missing)}; bundles name these so, rename yours"
        )
    with _reporting(file, "it"):
        build = _by_monai(file, root, device) if trust else _by_us(file, contents, root, device)
    built = {}
    with _modules_of(root) if trust else contextlib.nullcontext():
        for name in (*wanted, _WEIGHTS):
            with _reporting(file, repr(name)):
                built[name] = build(name)
    if not isinstance(built[network], nn.Module):
        kind = type(built[network]).__name__
        raise UserError(f"{file}: {network!r} is {kind}, not a torch.nn.Module; a scripted network cannot be attacked")
    for name in ("preprocessing", "postprocessing"):
        if not hasattr(built[name], "transforms"):
            raise UserError(f"{file}: {name!r} is {type(built[name]).__name__}; it must be a Compose of transforms")
    weights = root / str(built[_WEIGHTS])
    return Parts(built[network], built["preprocessing"], built["postprocessing"], built["inferer"], weights, file)


def _by_us(file: Path, contents: Mapping[str, Any], root: Path, device: torch.device) -> Callable[[str], Any]:
    """What builds the items of a bundle that is not trusted."""
    from ima_seg.monai.allowed import leads_out
    from ima_seg.monai.untrusted import UntrustedConfig, unsaved

    for read in (file, file.with_name("metadata.json")):
        if leads_out(str(read), root):
            raise Refused(f"would read {read.resolve()} in the place of its {read.name}, by a link")
    if odd := next((key for key in contents if str(key).startswith("+") or re.search("#|::", str(key))), None):
        raise UserError(
            f"{file}: the key {shown(odd)} is for several configs in one; write it into the item that it changes"
        )
    config = UntrustedConfig(contents, root=root, device=device)
    loader = _loader(contents)

    def build(name: str) -> Any:
        if name == _WEIGHTS:
            return config.get(f"{loader}::load_path") if loader else str(root / _DEFAULT_WEIGHTS)
        built = config.get(name)
        if name != "postprocessing" and (left_out := unsaved(built)):
            raise Refused(f"would write files outside its post-processing, by {left_out[0].name}")
        return built

    return build


def _by_monai(file: Path, root: Path, device: torch.device) -> Callable[[str], Any]:
    """What builds the items of a bundle that is trusted: MONAI's parser."""
    from monai.bundle import ConfigParser

    parser = ConfigParser(globals={"os": "os"})
    parser.read_config(str(file))
    parser.resolve_macro_and_relative_ids()
    config = {**parser.get(), "bundle_root": str(root), "device": device}
    config["postprocessing"] = _without_saving(config["postprocessing"])
    loader = _loader(config)
    config[_WEIGHTS] = parser[f"{loader}::load_path"] if loader else str(root / _DEFAULT_WEIGHTS)
    parser.set(config)
    build: Callable[[str], Any] = parser.get_parsed_content
    return build


@contextlib.contextmanager
def _reporting(file: Path, part: str) -> Iterator[None]:
    """Say which part of a config could not be built; MONAI passes on whatever its components raise."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError):
            raise
        if isinstance(error, Refused):
            raise UserError(f"{file} {error}; if you trust its origin, pass --trust-checkpoint") from None
        cause: BaseException = error
        while isinstance(cause.__cause__, Exception):
            cause = cause.__cause__
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[-300:]}"
        raise UserError(f"{file}: {part} cannot be built ({reason}); does `monai.bundle run` work with it?") from None


@contextlib.contextmanager
def _modules_of(root: Path) -> Iterator[None]:
    """Let imports find the bundle's own modules, which are forgotten afterwards: other bundles have the same names."""
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))
        for name, module in list(sys.modules.items()):
            path = getattr(module, "__file__", None)
            if path and Path(path).resolve().is_relative_to(root.resolve()):
                del sys.modules[name]


def _loader(config: Mapping[str, Any]) -> str | None:
    """The id of the first CheckpointLoader with a path."""

    def loads(item: Any) -> bool:
        return isinstance(item, dict) and str(item.get("_target_")).endswith("CheckpointLoader") and "load_path" in item

    return next((ids for ids, item in _items(config) if loads(item)), None)


def _without_saving(item: Any) -> Any:
    """Transforms in a config without those that save, at any depth, and so without the folder they would write to."""
    if isinstance(item, list):
        kept = [x for x in item if not (isinstance(x, dict) and _SAVERS.search(str(x.get("_target_"))))]
        return [_without_saving(x) for x in kept]
    return {key: _without_saving(value) for key, value in item.items()} if isinstance(item, dict) else item


def _items(item: Any, ids: str = "") -> Iterator[tuple[str, Any]]:
    """``item`` and everything in it, with their ids."""
    yield ids, item
    if isinstance(item, dict | list):
        for key, inner in item.items() if isinstance(item, dict) else enumerate(item):
            yield from _items(inner, f"{ids}::{key}" if ids else str(key))
