"""Which cases are whose: parts of a job array, and ranks of ``torchrun``."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout

from ima_seg.errors import UserError
from ima_seg.files import naming, write_text

#: Ranks wait for the slowest at the end of an evaluation, which may take days.
_PATIENCE = datetime.timedelta(days=14)


@dataclass(frozen=True)
class Share:
    """One process's share of the cases: every ``count``-th from ``index`` on, over all parts and ranks of all calls.

    ``rank`` of ``world`` are those of this ``torchrun``.
    """

    index: int
    count: int
    rank: int
    world: int

    @property
    def suffix(self) -> str:
        """Of the names of this process's files."""
        return "" if self.count == 1 else f".part-{self.index + 1}-of-{self.count}"

    @property
    def lock(self) -> str:
        """Name of the file that one process at a time holds for this share."""
        return f".evaluation{self.suffix}.lock"

    def wait(self) -> None:
        """For all ranks of this ``torchrun``."""
        if self.world > 1:
            dist.barrier()


@contextlib.contextmanager
def locked(folder: Path, share: Share) -> Iterator[None]:
    """Keep other processes from computing the same in ``folder``.

    The lock is the system's (``flock``, over NFS, too), which ends with the process, however that ends. Where a file
    system has none, it is a file, which filelock takes over from a dead process of the same machine.

    Raises:
        UserError: another process holds this share, or one of another number of parts; says who.
    """

    def take(path: Path) -> FileLock:
        lock, holder = FileLock(path), path.with_suffix(".txt")
        try:
            with naming(path):
                lock.acquire(timeout=0)
        except Timeout:
            who = holder.read_text(encoding="utf-8").strip() if holder.is_file() else "another process"
            raise UserError(
                f"{folder} is being evaluated by {who}; wait for it, or end it and go on with --resume (it holds "
                f"{path.name})"
            ) from None
        return lock

    mine = folder / share.lock
    lock, holder = take(mine), mine.with_suffix(".txt")
    try:
        for path in folder.glob(".evaluation*.lock"):
            if path != mine and not (share.count > 1 and path.name.endswith(f"-of-{share.count}.lock")):
                take(path).release()
        now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        write_text(holder, f"process {os.getpid()} on {platform.node()} since {now}\n")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def share_out(num_parts: int, part_id: int) -> Iterator[Share]:
    """The share of this process, from the command line and the variables that ``torchrun`` sets.

    Raises:
        UserError: a part that does not exist.
    """
    if num_parts < 1 or not 0 <= part_id < num_parts:
        raise UserError(f"part_id is {part_id} of num_parts {num_parts}; parts are numbered from 0 to num_parts - 1")
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    share = Share(part_id + num_parts * rank, num_parts * world, rank, world)
    if world == 1:
        yield share
        return
    # Only to wait for each other: gloo, whatever device the networks are on.
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield share
    finally:
        dist.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """``cpu``, ``cuda`` (under ``torchrun`` the one of the local rank) or ``mps``.

    Raises:
        UserError: a device that is not there.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name not in there:
        raise UserError(f"device {name!r} does not exist; use cpu, cuda or mps (which GPU: CUDA_VISIBLE_DEVICES)")
    if not there[name]:
        raise UserError(f"there is no {name.upper()} device here; use -device cpu")
    if name != "cuda":
        return torch.device(name)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
