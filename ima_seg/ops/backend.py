"""Which implementation of the ops runs: the reference in plain torch, or the Triton kernels.

Automatically the kernels run on CUDA devices where Triton is installed, the reference everywhere else. A backend that
is asked for by name (:func:`use_backend`, or the environment variable ``IMA_OPS``) runs or raises; it never gives way
to the other.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal, get_args

import torch

from ima_seg.errors import UserError

Backend = Literal["auto", "reference", "triton"]

#: Names the backend for a whole process.
ENVIRONMENT_VARIABLE = "IMA_OPS"
#: Triton's kernels need this compute capability.
LEAST_CAPABILITY = (7, 0)

_log = logging.getLogger("ima_seg.ops")
_requested: ContextVar[Backend | None] = ContextVar("ima_seg_ops_backend", default=None)


def requested_backend() -> Backend:
    """What was asked for: by :func:`use_backend`, else by the environment variable, else ``"auto"``."""
    name = _requested.get() or os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if name not in get_args(Backend):
        raise UserError(f"{ENVIRONMENT_VARIABLE} is {name!r}; the backends there are: {', '.join(get_args(Backend))}")
    return name  # type: ignore[return-value]


@contextlib.contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Run the ops inside the block on the backend ``name``.

    Raises:
        UserError: there is no backend of that name, or it is not installed.
    """
    if name not in get_args(Backend):
        raise UserError(f"backend {name!r} does not exist; there are: {', '.join(get_args(Backend))}")
    if name == "triton" and not _triton_installed():
        raise UserError(_ABSENT)
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


_ABSENT = "the backend 'triton' was asked for but Triton is not installed; pip install triton, or ask for 'auto'"


def resolve_backend(device: torch.device, dtype: torch.dtype = torch.float32) -> Literal["reference", "triton"]:
    """The backend that runs on ``device`` for tensors of ``dtype``.

    Raises:
        UserError: a backend was asked for that cannot run there.
    """
    wanted = requested_backend()
    chosen: Literal["reference", "triton"] = "reference"
    why = "automatic" if wanted == "auto" else "asked for"
    if wanted == "triton" or (wanted == "auto" and device.type == "cuda"):
        obstacle = _obstacle(device, dtype)
        if obstacle is None:
            chosen = "triton"
        elif wanted == "triton":
            raise UserError(obstacle)
        else:
            why = f"automatic: {obstacle}"
    if not torch.compiler.is_compiling():
        _note(chosen, str(device), why)
    return chosen


def describe_backend(device: torch.device) -> str:
    """For logs and reports: ``triton 3.6.0`` or ``reference (torch 2.11.0)``."""
    if resolve_backend(device) == "triton":
        import triton

        return f"triton {triton.__version__}"
    return f"reference (torch {torch.__version__})"


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton's kernels cannot run there; None when they can."""
    if not _triton_installed():
        return _ABSENT
    if dtype == torch.float64:
        return "the backend 'triton' computes in float32; float64 tensors need 'reference' (or 'auto')"
    if device.type == "cpu" and interpreted():
        return None
    if device.type != "cuda":
        return f"the backend 'triton' runs on CUDA devices, not on {device.type!r}; ask for 'reference' or 'auto'"
    if _capability(device.index or 0) < LEAST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"the backend 'triton' needs compute capability 7.0; {name} has less; ask for 'reference' or 'auto'"
    return None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _note(backend: str, device: str, why: str) -> None:
    """Log a choice once."""
    _log.info("attack ops on %s: %s (%s)", device, backend, why)
