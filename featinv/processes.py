"""Work shared by the processes that torchrun starts, and what is set for each; without torchrun there is one process.

torchrun --nproc-per-node 4 -m eval.benchmark ...

Training joins its processes through Lightning; everything else through `process_group`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def process_rank() -> tuple[int, int]:
    """Return the rank of this process and the number of processes, (0, 1) outside distributed runs."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    # A DataLoader worker that was spawned rather than forked knows only the launcher's variables.
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_first_process() -> bool:
    """Whether this is the first process of all machines, also before it has joined the others.

    Known from torchrun's variable, Lightning's (which starts processes itself on one machine) or SLURM's.
    """
    ranks = (os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ)
    return int(next(ranks, "0")) == 0


def torchrun_layout() -> tuple[int, int | None]:
    """Return the number of machines and of processes on each, (1, None) if torchrun did not start this process."""
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    return int(os.environ.get("GROUP_WORLD_SIZE", 1)), int(processes) if processes else None


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes of torchrun for the length of the block."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    # Only small objects travel, so gloo does on GPUs too; one process may wait long for another's pictures.
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield
    finally:
        dist.destroy_process_group()


def own_device() -> torch.device:
    """Return the GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def own_share(parts: Sequence[T]) -> list[T]:
    """Every so manieth part, beginning at this process's rank: together the processes have each part once."""
    rank, world = process_rank()
    return list(parts[rank::world])


def first_does(work: Callable[[], T]) -> T:
    """Let the first process do something while the others wait; all get its result, or its error."""
    if not dist.is_available() or not dist.is_initialized():
        return work()
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [work()]
        except Exception as error:  # raised below, in every process
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def wait_for_all() -> None:
    """Return when every process has come here."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next buffers, instead of getting it from the system page by page.

    On a CPU a step through full-size networks takes and frees buffers of a hundred megabytes; faulting in their pages
    was a sixth of its time (docs/results.md, "Speed at full size"). The peak rises a little, by the holes between kept
    buffers; memory is returned at the end only.

    Returns:
        Whether the C library has such settings (glibc, that is Linux).
    """
    trim_threshold, mmap_max = -1, -4  # malloc.h
    mallopt = _of_libc("mallopt")
    return mallopt is not None and bool(mallopt(trim_threshold, -1)) and bool(mallopt(mmap_max, 0))


def return_freed_memory() -> None:
    """Give the system back what `keep_freed_memory` kept, once."""
    if (trim := _of_libc("malloc_trim")) is not None:
        trim(0)


def _of_libc(name: str) -> Callable[..., int] | None:
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):
        return None
    return function
