"""Files of torch, read without running code that they carry, and found whole."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ima_seg.errors import UserError
from ima_seg.files import require_regular


def load_tensors(path: Path, *, trust: bool = False, allowed: Sequence[Any] = ()) -> Any:
    """What :func:`torch.save` wrote, on the CPU.

    ``trust`` unpickles it fully, which runs whatever code it carries. ``allowed`` are classes and functions that it may
    hold beside tensors and plain values, for torch's ``safe_globals``.

    Raises:
        UserError: it cannot be read, is damaged, holds a tensor that no training wrote (complex, NaN, infinite), or
            would run code while ``trust`` is not set.
    """
    require_regular(path)
    try:
        _check_sums(path)
        with torch.serialization.safe_globals(list(allowed)):
            contents = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = next((line for line in lines if "Unsupported" in line), "unsupported contents")
        raise UserError(
            f"{path} holds more than tensors and plain values ({reason[:300]}); reading it would run code from the "
            "file. If you trust its origin, pass --trust-checkpoint"
        ) from None
    except Exception as error:  # a pickle is a program: a damaged one ends with anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} cannot be read ({reason[:300]}); it may be truncated or damaged, or a scripted model, which "
            "cannot be used"
        ) from None
    _check_tensors(contents, path)
    return contents


def _check_sums(path: Path) -> None:
    """Compare the sums of a file that is a zip archive, which torch does not; those of older formats have none.

    Raises:
        ValueError: a member is damaged, or unpacks to more than there is.
        zipfile.BadZipFile: it is cut short.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        # torch stores, it does not compress.
        if (claimed := sum(member.file_size for member in members)) > path.stat().st_size:
            raise ValueError(f"its {path.stat().st_size} bytes claim to hold {claimed}")
        # Without a single sum: torch.serialization.set_crc32_options(False).
        if any(member.CRC for member in members) and (damaged := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {damaged} differs")


def _check_tensors(contents: Any, path: Path) -> None:
    for name, tensor in _tensors(contents):
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_complex():
            wrong = "a complex, sparse, quantised or empty tensor"
        elif tensor.numel() * tensor.element_size() > path.stat().st_size:
            wrong = f"a tensor of {tensor.numel()} values, more than the file has"
        elif tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():  # as the network computes
            wrong = "NaN or infinite values"
        else:
            continue
        raise UserError(
            f"{path}: {name} holds {wrong}, as no sound training writes; use an earlier checkpoint, or another copy"
        )


def _tensors(contents: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested dicts and lists with their names, each container once, whatever refers to it."""
    waiting, seen = [("", contents)], {id(contents)}
    while waiting:
        name, item = waiting.pop()
        if isinstance(item, torch.Tensor):
            yield name or "the tensor", item
        elif isinstance(item, Mapping | list | tuple):
            parts = item.items() if isinstance(item, Mapping) else enumerate(item)
            for key, part in parts:
                if id(part) not in seen:
                    seen.add(id(part))
                    waiting.append((f"{name}.{key}"[-200:].lstrip("."), part))


def strip_prefixes(state: Mapping[str, Any]) -> dict[str, Any]:
    """Weights by the names that the bare network has for them.

    ``DataParallel`` and ``DistributedDataParallel`` put ``module.`` before every name, ``torch.compile`` puts
    ``_orig_mod.`` before those of what it compiled. Where names would become equal, they are left as they are.
    """
    names = [str(name).replace("_orig_mod.", "") for name in state]
    while names and all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    return dict(zip(names if len(set(names)) == len(names) else state, state.values(), strict=True))


def misfit(network: nn.Module, state: Mapping[str, torch.Tensor]) -> str:
    """How ``state`` differs from the weights of ``network`` in names, shapes and kinds; empty if it fits."""
    expected = network.state_dict()
    shapes = [
        f"{name} has the shape {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    missing, unknown = (
        [name for name in expected if name not in state],
        [name for name in state if name not in expected],
    )
    whole = [
        f"{name} is {state[name].dtype} instead of {value.dtype}"
        for name, value in expected.items()
        if name in state and value.is_floating_point() and not state[name].is_floating_point()
    ]
    found = [("missing", missing), ("not of this network", unknown)]
    found += [("of another shape", shapes), ("of whole numbers", whole)]
    return "; ".join(f"{len(names)} weights {what}, first {str(names[0])[:200]}" for what, names in found if names)
