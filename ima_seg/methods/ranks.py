"""What the ranks of a distributed training tell each other."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gather(mine: T) -> list[T]:
    """Every rank's ``mine``, in the order of ranks, on all of them; ``[mine]`` in a training of one process.

    A collective call when ``torch.distributed`` is initialised. ``mine`` must be picklable.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [mine]
    parts: list[T] = [mine] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return parts
