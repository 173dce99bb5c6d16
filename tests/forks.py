"""Processes as torchrun starts them, but forked: new interpreters would spend most of a test importing."""

import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence

from featinv.processes import process_group

FORK = multiprocessing.get_context("fork")


def in_two_processes(work: Callable[[], None], exit_codes: Sequence[int] = (0, 0)) -> None:
    """Let two joined processes work, and expect that they end as `exit_codes` says (-9: killed)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def joined(rank: int) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2", GROUP_WORLD_SIZE="1", TORCHELASTIC_RUN_ID="test")
        with process_group():
            work()

    processes = [FORK.Process(target=joined, args=(rank,)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == list(exit_codes)


def in_a_process(work: Callable[[], None], exit_code: int = 0) -> None:
    """Let one other process work, and expect how it ends (-9: killed)."""
    process = FORK.Process(target=work)
    process.start()
    process.join(600)
    assert process.exitcode == exit_code
