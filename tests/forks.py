"""Processes as torchrun starts them, but forked: new interpreters would spend most of a test importing.

They are forked from a server that has imported and done nothing else. A test process is no such thing: after some
hundred tests it has threads (progress bars, event writers, served pages) whose locks and memory a fork would cut off.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence

import cloudpickle
import torch

from featinv.processes import process_group

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["featinv.training.runner", "featinv.metrics.benchmark"])


def in_two_processes(work: Callable[[], None], exit_codes: Sequence[int] = (0, 0)) -> None:
    """Let two joined processes work, and expect that they end as `exit_codes` says (-9: killed)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    joined = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_WORLD_SIZE": 1, "TORCHELASTIC_RUN_ID": "test"}
    joined |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    _run(work, [{**joined, "RANK": rank, "LOCAL_RANK": rank} for rank in (0, 1)], exit_codes)


def in_a_process(work: Callable[[], None], exit_code: int = 0) -> None:
    """Let one other process work, and expect how it ends (-9: killed)."""
    _run(work, [{}], [exit_code])


def _run(work: Callable[[], None], environments: Sequence[dict[str, object]], exit_codes: Sequence[int]) -> None:
    parts = cloudpickle.dumps(work)  # tests hand over what they define inside, which pickle does not know
    processes = [CONTEXT.Process(target=_work, args=(parts, environment)) for environment in environments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == list(exit_codes)


def _work(parts: bytes, environment: dict[str, object]) -> None:
    torch.set_num_threads(1)
    os.environ.update({name: str(value) for name, value in environment.items()})
    with process_group():
        cloudpickle.loads(parts)()
