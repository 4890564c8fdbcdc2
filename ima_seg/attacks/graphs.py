"""Network passes of attacks as CUDA graphs: captured once per shape, then replayed without a launch from the host.

In 2D, launching the kernels of a small network takes longer than running them. Graphs are optional, for they keep the
memory of a pass for as long as they live.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ima_seg.ops import resolve_backend
from ima_seg.types import Target

if TYPE_CHECKING:
    from ima_seg.attacks.passes import Pass, Perturbed

_log = logging.getLogger("ima_seg.attacks")
_active: ContextVar[GraphedPasses | None] = ContextVar("ima_seg_graphs", default=None)

#: Passes on a side stream before a capture: libraries choose their algorithms and kernels are compiled meanwhile.
WARM_UP = 3
#: Captures of one object at most.
MOST_CAPTURES = 64

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def active_graphs() -> GraphedPasses | None:
    """The graphs to use here, if any."""
    return _active.get()


@dataclass
class _Captured:
    """One graph and the tensors it reads and writes; outputs hold until the next replay of any graph of the pool."""

    batch: Perturbed
    delta: torch.Tensor
    target: Target
    scale: torch.Tensor
    progress: torch.Tensor
    replay: Callable[[], None]
    outputs: Outputs
    addresses: list[int]


class GraphedPasses:
    """Attacks inside ``with GraphedPasses():`` capture their passes and replay them.

    A graph is made for each network, shape of batch, kind of target, precision and loss (the same function, not one
    made anew), and lives as long as this object, as does the network: keep one for a whole training. Weights may change
    in between, by an optimiser that works in place; what the network's own settings are (deep supervision, hooks) may
    not. Where a pass cannot be captured it runs as always, and the log says once why. For one thread.
    """

    def __init__(self) -> None:
        self._captured: dict[Any, _Captured | None] = {}
        self._captures = 0
        self._pools: dict[torch.device, Any] = {}
        self._tokens: list[Token[GraphedPasses | None]] = []
        self._said: set[str] = set()

    def __enter__(self) -> GraphedPasses:
        self._tokens.append(_active.set(self))
        return self

    def __exit__(self, *_: object) -> None:
        _active.reset(self._tokens.pop())

    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        """How many graphs there are."""
        return sum(found is not None for found in self._captured.values())

    def run(
        self, batch: Perturbed, delta: torch.Tensor, target: Target, scale: torch.Tensor, progress: float
    ) -> Pass | None:
        """A pass by replay, its logits and gradient good until the next; None where there is no graph for it."""
        from ima_seg.attacks.passes import Pass

        obstacle = self._obstacle(batch)
        if obstacle is not None:
            self._say(obstacle)
            return None
        key = _key(batch, delta, target)
        addresses = [parameter.data_ptr() for parameter in _tensors(batch.model)]
        found = self._captured.get(key)
        if key not in self._captured or (found is not None and found.addresses != addresses):
            # A loss made anew for each attack, or weights that come and go, would capture without end.
            if self._captures == MOST_CAPTURES:
                self._say(f"{MOST_CAPTURES} have been captured, and there seems to be no end to them")
                return None
            self._captures += 1
            found = self._captured[key] = self._capture(batch, delta, target, scale, addresses)
        if found is None:
            return None
        # All of it, each time: whoever works with graphs changes tensors in place, which their identity does not tell.
        found.batch.x.copy_(batch.x)
        found.target.reference.copy_(target.reference)
        if found.target.known is not None and target.known is not None:
            found.target.known.copy_(target.known)
        if found.batch.support is not None and batch.support is not None:
            found.batch.support.copy_(batch.support)
        found.delta.copy_(delta)
        found.scale.copy_(scale)
        found.progress.fill_(progress)
        found.replay()
        logits, loss, gradient = found.outputs
        return Pass(logits, lambda: (loss, gradient))

    def _obstacle(self, batch: Perturbed) -> str | None:
        if batch.x.device.type != "cuda":
            return f"the batch is on {batch.x.device.type!r}; CUDA graphs need a CUDA device"
        if not isinstance(batch.model, nn.Module):
            return "the network is a function, not a module, so that nobody knows when its weights are exchanged"
        return None

    def _capture(
        self, batch: Perturbed, delta: torch.Tensor, target: Target, scale: torch.Tensor, addresses: list[int]
    ) -> _Captured | None:
        from ima_seg.attacks.passes import Perturbed

        support = None if batch.support is None else batch.support.clone()
        held = Perturbed(batch.model, batch.x.clone(), batch.threat, batch.precision, batch.loss, support)
        point, reference, factor = delta.clone(), target.map(torch.clone), scale.clone()
        progress = torch.zeros((), device=delta.device)

        def work() -> Outputs:
            # A target of its own each time, for a target remembers what was derived from its tensors.
            here = held.begin(point, reference[:], factor, progress)
            return (here.logits, *here.loss_and_gradient())

        try:
            outputs, replay = self._record(work, batch.x.device)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            self._say(f"a pass could not be captured: {str(error).strip().splitlines()[0]}")
            return None
        _log.info("captured a CUDA graph for a batch of %s", tuple(batch.x.shape))
        return _Captured(held, point, reference, factor, progress, replay, outputs, addresses)

    def _record(self, work: Callable[[], Outputs], device: torch.device) -> tuple[Outputs, Callable[[], None]]:
        """Outputs of ``work`` in tensors that stay, and what computes them anew from the inputs as they are then."""
        with torch.cuda.device(device):
            before = torch.cuda.current_stream()
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(before)
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    work()
            before.wait_stream(side)
            # Replays follow one another, so all graphs of a device can share their memory.
            pool = self._pools.setdefault(device, torch.cuda.graph_pool_handle())
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads pin the memory of the next batches meanwhile.
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    outputs = work()
            except BaseException:
                # Not all releases leave the stream of a capture that failed.
                torch.cuda.set_stream(before)
                del self._pools[device]
                raise

        def replay() -> None:
            with torch.cuda.device(device):
                graph.replay()

        return outputs, replay

    def _say(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            _log.warning("attack passes run without CUDA graphs: %s", why)


def _tensors(model: Any) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _key(batch: Perturbed, delta: torch.Tensor, target: Target) -> Any:
    """What a graph is good for."""
    x, reference = batch.x, target.reference
    support = None if batch.support is None else tuple(batch.support.shape)
    return (
        batch.model, tuple(x.shape), x.stride(), x.dtype, x.device, tuple(delta.shape), delta.dtype, support,
        batch.dtype, batch.loss, batch.threat, tuple(reference.shape), reference.dtype, target.known is None,
        target.labels, resolve_backend(x.device, x.dtype), torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.deterministic,
    )  # fmt: skip
