"""Network passes of attacks as CUDA graphs: captured once per shape, then replayed without a launch from the host.

In 2D, launching the kernels of a small network takes longer than running them. Graphs are optional, for they keep the
memory of a pass for as long as they live.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextvars import Token
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ima_seg.attacks.passes import Pass, Replays, begin, replays
from ima_seg.attacks.problem import Problem
from ima_seg.ops import resolve_backend

_log = logging.getLogger("ima_seg.attacks")

#: Passes on a side stream before a capture: libraries choose their algorithms and kernels are compiled meanwhile.
WARM_UP = 3
#: Captures of one object at most.
MOST_CAPTURES = 64

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class _Captured:
    """One graph and the tensors it reads and writes; outputs hold until the next replay of any graph of the pool."""

    problem: Problem
    delta: torch.Tensor
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
        self._tokens: list[Token[Replays | None]] = []
        self._said: set[str] = set()

    def __enter__(self) -> GraphedPasses:
        self._tokens.append(replays.set(self))
        return self

    def __exit__(self, *_: object) -> None:
        replays.reset(self._tokens.pop())

    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        """How many graphs there are."""
        return sum(found is not None for found in self._captured.values())

    def run(self, problem: Problem, delta: torch.Tensor, scale: torch.Tensor, progress: float) -> Pass | None:
        """A pass by replay, its logits and gradient good until the next; None where there is no graph for it."""
        obstacle = self._obstacle(problem)
        if obstacle is not None:
            self._say(obstacle)
            return None
        network: Any = problem.network
        addresses = [tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())]
        key = _key(problem, delta)
        found = self._captured.get(key)
        if key not in self._captured or (found is not None and found.addresses != addresses):
            # A loss made anew for each attack, or weights that come and go, would capture without end.
            if self._captures == MOST_CAPTURES:
                self._say(f"{MOST_CAPTURES} have been captured, and there seems to be no end to them")
                return None
            self._captures += 1
            found = self._captured[key] = self._capture(problem, delta, scale, addresses)
        if found is None:
            return None
        # All of it, each time: whoever works with graphs changes tensors in place, which their identity does not tell.
        for held, given in zip(_tensors(found.problem), _tensors(problem), strict=True):
            held.copy_(given)
        found.delta.copy_(delta)
        found.scale.copy_(scale)
        found.progress.fill_(progress)
        found.replay()
        logits, loss, gradient = found.outputs
        return Pass(logits, lambda: (loss, gradient))

    def _obstacle(self, problem: Problem) -> str | None:
        if problem.x.device.type != "cuda":
            return f"the batch is on {problem.x.device.type!r}; CUDA graphs need a CUDA device"
        if not isinstance(problem.network, nn.Module):
            return "the network is a function, not a module, so that nobody knows when its weights are exchanged"
        return None

    def _capture(
        self, problem: Problem, delta: torch.Tensor, scale: torch.Tensor, addresses: list[int]
    ) -> _Captured | None:
        x, support = problem.x, problem.support
        held = replace(
            problem, x=x.clone(), target=problem.target.map(torch.clone),
            support=None if support is None else support.clone(),
        )  # fmt: skip
        point, factor, progress = delta.clone(), scale.clone(), torch.zeros((), device=delta.device)

        def work() -> Outputs:
            # A target of its own each time, for a target remembers what was derived from its tensors.
            here = begin(replace(held, target=held.target[:]), point, factor, progress)
            return (here.logits, *here.loss_and_gradient())

        try:
            outputs, replay = self._record(work, x.device)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            self._say(f"a pass could not be captured: {str(error).strip().splitlines()[0]}")
            return None
        _log.info("captured a CUDA graph for a batch of %s", tuple(x.shape))
        return _Captured(held, point, factor, progress, replay, outputs, addresses)

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


def _tensors(problem: Problem) -> list[torch.Tensor]:
    """What a pass reads of a problem."""
    known, support = problem.target.known, problem.support
    return [tensor for tensor in (problem.x, problem.target.reference, known, support) if tensor is not None]


def _key(problem: Problem, delta: torch.Tensor) -> Any:
    """What a graph is good for."""
    x, target = problem.x, problem.target
    return (
        problem.network, x.stride(), problem.dtype, problem.goal.loss, problem.threat, target.labels,
        *((tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in (delta, *_tensors(problem))),
        target.known is None, problem.support is None, resolve_backend(x.device, x.dtype),
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.deterministic,
    )  # fmt: skip
