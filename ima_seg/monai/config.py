"""A bundle's config: the parts that inference needs, built without running code of the bundle's own.

``_target_`` and ``$`` expressions can run any Python. Unless the bundle is trusted, only what inference needs is looked
at (so that no import statement runs): targets must be networks, transforms or inferers of ``monai`` or layers of
``torch.nn``, and expressions of the few plain kinds that bundles are full of, such as ``$@network_def.to(@device)``.
"""

from __future__ import annotations

import ast
import contextlib
import pydoc
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ima_seg.errors import UserError
from ima_seg.files import read_json

_CONFIGS = ("inference.json", "inference.yaml", "inference.yml")
_FUNCTIONS = {"abs", "bool", "dict", "float", "int", "len", "list", "max", "min", "range", "round", "str", "sum",
              "tuple"}  # fmt: skip
_LIBRARY_FUNCTIONS = {"torch.device", "torch.cuda.is_available", "os.path.join"}
_METHODS = {"eval", "to"}
_PLAIN = (
    ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.List, ast.Tuple, ast.Dict,
    ast.Subscript, ast.Slice, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context,
)  # fmt: skip
#: Stands for an ``@reference`` in a parsed expression; the name under which the weights' path is resolved.
_REFERENCE, _WEIGHTS = "ima_seg_reference", "ima_seg_weights"


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
    (``trust``), it runs what it likes, with modules of the bundle.

    Raises:
        UserError: a file or part is missing or cannot be built, or it would run code while ``trust`` is not set.
    """
    from monai.bundle import ConfigParser

    file = next((found for name in _CONFIGS if (found := root / "configs" / name).is_file()), None)
    if file is None:
        raise UserError(f"{root} has no configs/{', '.join(_CONFIGS)}; name the folder of a MONAI bundle")
    with _reporting(file, "it"):
        parser = ConfigParser(globals={"os": "os"})
        parser.read_config(str(file))
        parser.resolve_macro_and_relative_ids()
        config = dict(parser.get())
    config |= {"bundle_root": str(root.resolve()), "device": device, _WEIGHTS: _weights_item(config, root)}
    network = "network" if "network" in config else "network_def"
    wanted = [network, "preprocessing", "postprocessing", "inferer", _WEIGHTS]
    if missing := [name for name in wanted if config.get(name) is None]:
        raise UserError(
            f"{file} has no {', '.join(repr(name) for name in missing)}; bundles name these so, rename yours"
        )
    config["postprocessing"] = _without_saving(config["postprocessing"])
    if not trust:
        config = {name: config[name] for name in _reachable(config, wanted) if name in config}
        for part in config.values():
            _refuse_code(part, parser, file)
    parser.set(config)
    built = {}
    with _modules_of(root) if trust else contextlib.nullcontext():
        for name in wanted:
            with _reporting(file, repr(name)):
                built[name] = parser.get_parsed_content(name)
    if not isinstance(built[network], nn.Module):
        kind = type(built[network]).__name__
        raise UserError(f"{file}: {network!r} is {kind}, not a torch.nn.Module; a scripted network cannot be attacked")
    for name in ("preprocessing", "postprocessing"):
        if not hasattr(built[name], "transforms"):
            raise UserError(f"{file}: {name!r} is {type(built[name]).__name__}; it must be a Compose of transforms")
    weights = root.resolve() / str(built[_WEIGHTS])
    return Parts(built[network], built["preprocessing"], built["postprocessing"], built["inferer"], weights, file)


@contextlib.contextmanager
def _reporting(file: Path, part: str) -> Iterator[None]:
    """Say which part of a config could not be built; MONAI passes on whatever its components raise."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
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


def _is_named(item: Any, *names: str) -> bool:
    """Whether an item of a config is a component of one of these names."""
    return isinstance(item, dict) and str(item.get("_target_", "")).endswith(names)


def _weights_item(config: Any, root: Path) -> Any:
    """The path that the first CheckpointLoader of a config loads, not yet evaluated."""
    loader = next((item for item in _items(config) if _is_named(item, "CheckpointLoader")), None)
    return str(root / "models" / "model.pt") if loader is None else loader.get("load_path")


def _without_saving(compose: Any) -> Any:
    """A Compose in a config without SaveImaged, and so without the folder that it would write to."""
    if not isinstance(compose, dict) or not isinstance(compose.get("transforms"), list):
        return compose
    kept = [item for item in compose["transforms"] if not _is_named(item, "SaveImaged", "SaveImageD")]
    return {**compose, "transforms": kept}


def _items(config: Any) -> Iterator[Any]:
    """``config`` and everything in it."""
    yield config
    if isinstance(config, dict | list):
        for value in config.values() if isinstance(config, dict) else config:
            yield from _items(value)


def _reachable(config: Mapping[str, Any], wanted: list[str]) -> list[str]:
    """The ids at the top of ``config`` that ``wanted`` need."""
    from monai.bundle.reference_resolver import ReferenceResolver

    found = list(wanted)
    for name in found:  # which grows
        for item in _items(config.get(name)):
            references = ReferenceResolver.match_refs_pattern(item) if isinstance(item, str) else ()
            needed = dict.fromkeys(ReferenceResolver.split_id(reference)[0] for reference in references)
            found += [other for other in needed if other not in found]
    return found


def _refuse_code(part: Any, parser: Any, file: Path) -> None:
    for item in _items(part):
        code, plain = item, True
        if isinstance(item, str) and item.startswith("$"):
            plain = _is_plain_expression(item)
        elif isinstance(item, dict) and "_target_" in item:
            code, mode = item["_target_"], item.get("_mode_", "default")
            plain = mode in ("default", "callable") and _names_no_code(item) and _is_trusted_target(code, parser)
        if not plain:
            raise UserError(
                f"{file} would run code beyond the networks, transforms and inferers of monai and torch: {code!r}; if "
                "you trust its origin, pass --trust-checkpoint"
            )


def _names_no_code(item: Mapping[str, Any]) -> bool:
    """Whether the readers of a transform are MONAI's: it would call whatever else has that name, with any arguments."""
    from monai.transforms.io.array import SUPPORTED_READERS

    reader = item.get("reader")
    readers = reader if isinstance(reader, list) else [] if reader is None else [reader]
    known = all(isinstance(name, str) and name.lower() in SUPPORTED_READERS for name in readers)
    return known and not {"writer", "merger_cls"} & set(item)


def _is_trusted_target(target: Any, parser: Any) -> bool:
    """Whether a ``_target_`` is a network, transform or inferer of MONAI, or a layer of torch.

    Where a class is defined counts, not where it is found. Other modules of MONAI, such as losses, run downloaded code.
    """
    from monai.inferers import Inferer
    from monai.transforms import Transform

    if not isinstance(target, str):
        return False
    module = parser.locator.get_component_module_name(target)
    module = module[0] if isinstance(module, list) else module
    name = f"{module}.{target}" if module else target
    if not name.startswith(("monai.", "torch.nn.")):
        return False
    found = pydoc.locate(name)
    kinds = {"networks": nn.Module, "transforms": Transform, "inferers": Inferer}
    places = {"torch.nn.": nn.Module, **{f"monai.{package}.": kind for package, kind in kinds.items()}}
    return isinstance(found, type) and any(
        issubclass(found, kind) and found.__module__.startswith(place) for place, kind in places.items()
    )


def _is_plain_expression(text: str) -> bool:
    from monai.bundle.reference_resolver import ReferenceResolver

    source = ReferenceResolver.id_matcher.sub(_REFERENCE, ReferenceResolver.normalize_id(text[1:])).strip()
    try:
        return _is_plain(ast.parse(source, mode="eval").body)
    except (SyntaxError, RecursionError):
        return False


def _is_plain(node: ast.AST) -> bool:
    """Arithmetic on constants and references, a data type, or a call of one of a few harmless functions."""
    if isinstance(node, ast.Name):
        return node.id == _REFERENCE
    if isinstance(node, ast.Constant):
        # MONAI puts references into strings too, with quotes of its own.
        return not (isinstance(node.value, str) and _REFERENCE in node.value)
    if isinstance(node, ast.Attribute):
        library, _, name = ast.unparse(node).partition(".")
        if library in ("np", "numpy"):
            found = getattr(np, name, None)
            return isinstance(found, type) and issubclass(found, np.generic)
        return library == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
    if isinstance(node, ast.Call):
        function = ast.unparse(node.func)
        known = function in _FUNCTIONS | _LIBRARY_FUNCTIONS | {f"{_REFERENCE}.{name}" for name in _METHODS}
        return known and all(map(_is_plain, [*node.args, *(keyword.value for keyword in node.keywords)]))
    return isinstance(node, _PLAIN) and all(map(_is_plain, ast.iter_child_nodes(node)))
