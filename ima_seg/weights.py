"""Files of torch, read without running code that they carry."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ima_seg.errors import UserError
from ima_seg.files import require_regular


def load_tensors(path: Path, *, trust: bool = False, allowed: Sequence[Any] = ()) -> Any:
    """What :func:`torch.save` wrote, on the CPU.

    ``trust`` unpickles it fully, which runs whatever code it carries. ``allowed`` are classes and functions that it may
    hold beside tensors and plain values, for torch's ``safe_globals``.

    Raises:
        UserError: it cannot be read, or would run code while ``trust`` is not set.
    """
    require_regular(path)
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = next((line for line in lines if "Unsupported" in line), "unsupported contents")
        raise UserError(
            f"{path} holds more than tensors and plain values ({reason}); reading it would run code from the file. If "
            "you trust its origin, pass --trust-checkpoint"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} cannot be read ({reason}); it may be truncated, or a scripted model, which cannot be used"
        ) from None


def strip_prefixes(state: Mapping[str, Any]) -> dict[str, Any]:
    """Weights by the names that the bare network has for them.

    ``DataParallel`` and ``DistributedDataParallel`` put ``module.`` before every name, ``torch.compile`` puts
    ``_orig_mod.`` before those of what it compiled. Where names would become equal, they are left as they are.
    """
    names = [str(name).replace("_orig_mod.", "") for name in state]
    while names and all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    return dict(zip(names if len(set(names)) == len(names) else state, state.values(), strict=True))
