"""Processes as torchrun starts them, but forked: new interpreters would spend most of a test importing.

They are forked from a server that has imported and done nothing else. A test process is no such thing: after some
hundred tests it has threads (progress bars, event writers, served pages) whose locks and memory a fork would cut off.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import cloudpickle
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

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


def under_torchrun(work: Callable[[], None], max_restarts: int) -> None:
    """Let two processes work under torchrun's agent, which starts both again when one dies."""
    # torch 2.15 hands restarted processes the addresses of dead ones, unless told to keep its stores apart.
    with mock.patch.dict(os.environ, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=2,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=max_restarts,
            start_method=CONTEXT.get_start_method(),
        )
        elastic_launch(config, _relayed)(cloudpickle.dumps(work))


def _relayed(parts: bytes) -> None:
    torch.set_num_threads(1)
    cloudpickle.loads(parts)()


def run_command(words: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` to its end, as subprocess.run would with its output captured."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdout", "stderr")]
        process = CONTEXT.Process(target=_command, args=(list(words), str(cwd), dict(os.environ), streams))
        process.start()
        process.join(300)
        if process.exitcode is None:
            process.kill()
        assert process.exitcode is not None, f"{words} did not end: {streams[1].read_text()[-3000:]}"
        return subprocess.CompletedProcess(words, process.exitcode, *(path.read_text() for path in streams))


def _command(words: list[str], cwd: str, environment: dict[str, str], streams: list[Path]) -> None:
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    run_here(words, cwd)


def run_here(words: Sequence[str], cwd: str | Path) -> None:
    """Become `python WORDS`."""
    os.chdir(cwd)
    module = words[0] == "-m"
    script, *arguments = words[module:]
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(cwd) if module else str(Path(script).parent.resolve()))
    if module:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(script, run_name="__main__")


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
