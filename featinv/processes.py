"""Work shared by the processes that torchrun starts, and what is set for each; without torchrun there is one process.

torchrun --nproc-per-node 4 -m eval.benchmark ...

Training joins its processes through Lightning; everything else through `process_group`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
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


@contextlib.contextmanager
def settled_objects() -> Iterator[None]:
    """Within the block, spare the objects that there are now from every search for garbage.

    The libraries and a network are half a million, and a training step makes so many new ones that all of them were
    searched every few steps.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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
    if mallopt is None or not (mallopt(trim_threshold, -1) and mallopt(mmap_max, 0)):
        return False
    _grow_in_huge_pages()
    return True


def _grow_in_huge_pages() -> None:
    """Advise the system to back what the heap grows by with huge pages; none is touched here.

    Gigabytes of weights are walked through several times in a training step, which larger pages make a little faster.
    """
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4 * 3
    malloc, free, madvise = (_of_libc(name) for name in ("malloc", "free", "madvise"))
    if malloc is None or free is None or madvise is None:
        return
    malloc.restype = ctypes.c_void_p  # type: ignore[attr-defined]
    block = malloc(ctypes.c_size_t(size))
    if block is None:
        return
    huge_page, advice = 2**21, 14  # MADV_HUGEPAGE of mman.h
    start = -(-block // huge_page) * huge_page
    madvise(ctypes.c_void_p(start), ctypes.c_size_t(block + size - start), advice)
    free(ctypes.c_void_p(block))


def return_freed_memory() -> None:
    """Give the system back what `keep_freed_memory` kept, once."""
    if (trim := _of_libc("malloc_trim")) is not None:
        trim(0)
        _grow_in_huge_pages()  # the advice was for what is given back


def _of_libc(name: str) -> Callable[..., int] | None:
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):
        return None
    return function
