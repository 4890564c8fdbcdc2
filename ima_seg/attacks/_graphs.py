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
    from ima_seg.attacks._gradient import Pass, Perturbed

_log = logging.getLogger("ima_seg.attacks")
_active: ContextVar[GraphedPasses | None] = ContextVar("ima_seg_graphs", default=None)

#: Passes on a side stream before a capture: libraries choose their algorithms and kernels are compiled meanwhile.
WARM_UP = 3
#: Graphs of one object at most: a loss that is made anew for every attack would otherwise fill the memory.
MOST_GRAPHS = 64

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
    filled_from: tuple[Any, Any]


class GraphedPasses:
    """Attacks inside ``with GraphedPasses():`` capture their passes and replay them.

    A graph is made for each network, shape of batch, kind of target, precision and loss, and lives as long as this
    object: keep one for a whole training. Weights may change in between, by an optimiser that works in place. Where a
    pass cannot be captured it runs as always, and the log says once why.
    """

    def __init__(self) -> None:
        self._captured: dict[Any, _Captured | None] = {}
        self._pool: Any = None
        self._tokens: list[Token[GraphedPasses | None]] = []
        self._said: set[str] = set()

    def __enter__(self) -> GraphedPasses:
        self._tokens.append(_active.set(self))
        return self

    def __exit__(self, *_: object) -> None:
        _active.reset(self._tokens.pop())

    def __len__(self) -> int:
        """How many graphs there are."""
        return sum(found is not None for found in self._captured.values())

    def run(
        self, batch: Perturbed, delta: torch.Tensor, target: Target, scale: torch.Tensor, progress: float
    ) -> Pass | None:
        """A pass by replay, its logits and gradient good until the next; None where there is no graph for it."""
        from ima_seg.attacks._gradient import Pass

        obstacle = self._obstacle(batch)
        if obstacle is not None:
            self._say(obstacle)
            return None
        key = _key(batch, delta, target)
        addresses = [parameter.data_ptr() for parameter in _tensors(batch.model)]
        found = self._captured.get(key)
        if key not in self._captured and len(self._captured) >= MOST_GRAPHS:
            self._say(f"there are {MOST_GRAPHS} of them already")
            return None
        if key not in self._captured or (found is not None and found.addresses != addresses):
            found = self._captured[key] = self._capture(batch, delta, target, scale, addresses)
        if found is None:
            return None
        if found.filled_from[0] is not batch.x or found.filled_from[1] is not target:
            found.batch.x.copy_(batch.x)
            found.target.reference.copy_(target.reference)
            if found.target.known is not None and target.known is not None:
                found.target.known.copy_(target.known)
            if found.batch.support is not None and batch.support is not None:
                found.batch.support.copy_(batch.support)
            found.filled_from = (batch.x, target)
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
        from ima_seg.attacks._gradient import Perturbed

        support = None if batch.support is None else batch.support.clone()
        held = Perturbed(batch.model, batch.x.clone(), batch.threat, batch.precision, batch.loss, support)
        point, reference, factor = delta.clone(), target.map(torch.clone), scale.clone()
        # 0-dim and float64, it takes part in expressions as the Python number does that it stands for.
        progress = torch.zeros((), device=delta.device, dtype=torch.float64)

        def work() -> Outputs:
            # A target of its own each time, for a target remembers what was derived from its tensors.
            here = held.begin(point, reference[:], factor, progress)
            return (here.logits, *here.loss_and_gradient())

        try:
            outputs, replay = self._record(work)
        except (RuntimeError, NotImplementedError) as error:
            self._say(f"a pass could not be captured: {str(error).strip().splitlines()[0]}")
            return None
        _log.info("captured a CUDA graph for a batch of %s", tuple(batch.x.shape))
        return _Captured(held, point, reference, factor, progress, replay, outputs, addresses, (None, None))

    def _record(self, work: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        """Outputs of ``work`` in tensors that stay, and what computes them anew from the inputs as they are then."""
        if self._pool is None:
            # Replays follow one another, so all graphs can share their memory.
            self._pool = torch.cuda.graph_pool_handle()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = work()
        return outputs, graph.replay

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
        target.labels, resolve_backend(x.device, x.dtype),
    )  # fmt: skip
