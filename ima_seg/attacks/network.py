"""Network access for attacks: full-resolution logits, frozen flags, reduced precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ima_seg.errors import UserError
from ima_seg.types import Network

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def inner_module(model: Network) -> Network:
    """The module inside a DistributedDataParallel wrapper, whose forward cannot be used with ``autograd.grad``."""
    return cast(Network, model.module) if isinstance(model, DistributedDataParallel) else model


def full_resolution(output: Any) -> torch.Tensor:
    """The full-resolution logits of a network's output: itself, or the first of its (deep-supervision) heads.

    The loss over all heads points elsewhere than the loss of the prediction, and attacks it less well.
    """
    if isinstance(output, (list, tuple)):
        output = output[0]
    if not isinstance(output, torch.Tensor) or output.ndim < 2:
        kind = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise UserError(
            f"the network returned {kind}; expected logits (B, K, *S), of a classifier (B, K), or a list with the "
            "largest first"
        )
    return output


def mode_matters(model: Network) -> bool:
    """Whether a network answers otherwise in training than in evaluation mode: batch norm, dropout, dropped paths."""
    if not isinstance(model, nn.Module):
        return True  # who knows
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        or getattr(module, "track_running_stats", False)
        or ("drop" in type(module).__name__.lower() and any(_rates(module)))
        or (isinstance(module, nn.MultiheadAttention) and module.dropout > 0)
        for module in model.modules()
    )


def _rates(module: nn.Module) -> list[float]:
    """How much a module drops, under whatever name; 1 where it does not say."""
    names = ("p", "drop_prob", "drop_rate", "drop_path_rate")
    return [float(getattr(module, name) or 0) for name in names if hasattr(module, name)] or [1.0]


class Scale(nn.Module):
    """(B, C, *S) in standard deviations (SD) of each channel -> network units.

    Args:
        sd: network units per SD of the first channels; the others pass through.
        like: a batch of that kind.

    Raises:
        UserError: more values than channels.
    """

    factor: torch.Tensor

    def __init__(self, sd: Sequence[float], like: torch.Tensor) -> None:
        super().__init__()
        if len(sd) > like.shape[1]:
            raise UserError(f"there are {len(sd)} standard deviations for the {like.shape[1]} channels of a batch")
        values = [*sd, *[1.0] * (like.shape[1] - len(sd))]
        self.register_buffer("factor", like.new_tensor(values).view(-1, *(1,) * (like.ndim - 2)), persistent=False)

    def fits(self, x: torch.Tensor) -> bool:
        """Whether ``x`` has its channels, dimensions, dtype and device."""
        same = self.factor.shape == (x.shape[1], *(1,) * (x.ndim - 2))
        return same and (self.factor.dtype, self.factor.device) == (x.dtype, x.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Network units."""
        return x * self.factor


class Scaled(nn.Module):
    """A network of batches in SDs."""

    def __init__(self, network: Network, scale: Scale) -> None:
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, x: torch.Tensor) -> Any:
        """What the network returns."""
        return self.network(self.scale(x))


def _writing_views(model: nn.Module) -> list[nn.Module]:
    """The in-place activations that directly follow an instance norm in a sequence."""
    pairs = (pair for block in model.modules() if isinstance(block, nn.Sequential) for pair in pairwise(block))
    norms = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    return [after for norm, after in pairs if isinstance(norm, norms) and getattr(after, "inplace", None) is True]


@contextlib.contextmanager
def frozen(model: Network, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside the block; every flag is as before afterwards.

    Batch-norm statistics, dropout and ``p.grad`` are thereby left alone. Callables that are no module pass through.

    Where the passes are under autocast to a ``dtype``, activations do not write into the output of an instance norm.
    That is a view, and writing into it makes the backward pass copy its gradient three times. Elsewhere the time saved
    is not worth the activations that stay in memory.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    flags: list[tuple[Any, str]] = [(module, "training") for module in model.modules() if module.training]
    flags += [(parameter, "requires_grad") for parameter in model.parameters() if parameter.requires_grad]
    flags += [(activation, "inplace") for activation in ([] if dtype is None else _writing_views(model))]
    try:
        for owner, flag in flags:
            setattr(owner, flag, False)
        yield
    finally:
        for owner, flag in flags:
            setattr(owner, flag, True)


def _cpu_has_bf16() -> bool:
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe is not None and probe())


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The autocast dtype for the search, ``None`` for float32.

    ``auto``: bfloat16 where the device computes in it natively (its exponent range rules out underflow of input
    gradients), else float16 on CUDA, else float32.

    Raises:
        UserError: an explicit precision that this device does not have. It is never replaced in silence.
    """
    if precision == "fp32":
        return None
    cuda, cpu = device.type == "cuda", device.type == "cpu"
    native = torch.cuda.get_device_capability(device) >= (8, 0) if cuda else cpu and _cpu_has_bf16()
    if precision == "auto":
        return torch.bfloat16 if native else torch.float16 if cuda else None
    if precision == "bf16" and (native or cpu):
        return torch.bfloat16
    if precision == "fp16" and cuda:
        return torch.float16
    if precision == "bf16" and cuda:
        raise UserError(f"search precision 'bf16' is not native to {torch.cuda.get_device_name(device)}; use 'fp16'")
    raise UserError(f"search precision {precision!r} does not exist on device {device.type!r}; use 'fp32' or 'auto'")


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions in float32 inside the block, not in TF32, which CUDA uses by default."""
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def autocast(dtype: torch.dtype | None, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast to ``dtype`` on ``device``; for ``None`` none, whatever is in force outside."""
    if dtype is not None:
        return torch.autocast(device.type, dtype=dtype)
    # MPS refuses even a disabled autocast, hence the null context.
    return torch.autocast(device.type, enabled=False) if device.type in ("cpu", "cuda") else contextlib.nullcontext()


#: Kinds of passes (training, validation, search with and without gradient) times batch sizes that a search may use.
RECOMPILE_LIMIT = 64


def allow_recompiles() -> None:
    """Let torch.compile keep a graph for each kind of pass and each size of the working batch.

    Its default of 8 is reached by them, and the network would then silently run uncompiled.
    """
    import torch._dynamo.config as config

    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, name, max(getattr(config, name), RECOMPILE_LIMIT))
