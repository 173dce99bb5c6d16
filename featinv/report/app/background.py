"""Work in a thread that reports every step and stops between two of them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from featinv.applications.batches import Progress

T = TypeVar("T")


class Cancelled(Exception):
    """The work was stopped on request."""


class Job(Generic[T]):
    """One piece of work, run by `steps`.

    Args:
        work: Called as work(progress) in a thread of its own; it calls progress(done, total) after every step.
        turn: Held while it works, so that jobs which share it take turns.
    """

    def __init__(self, work: Callable[[Progress], T], turn: threading.Lock | None = None):
        self._work, self._turn = work, turn or threading.Lock()
        self._stop = threading.Event()
        self._reports: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()

    def cancel(self) -> None:
        """Stop at the next step, or before the first if it is still waiting for its turn."""
        self._stop.set()

    def steps(self) -> Generator[tuple[int, int], None, T]:
        """Yield (done, total) after every step; the generator's value is what the work returns.

        Leaving the generator early stops the work too.

        Raises:
            Cancelled: If it was stopped.
            Exception: Whatever the work raises.
        """
        pool = ThreadPoolExecutor(1)
        try:
            future = pool.submit(self._run)
            future.add_done_callback(lambda _: self._reports.put(None))
            while (report := self._reports.get()) is not None:
                yield report
            return future.result()
        finally:
            self._stop.set()
            pool.shutdown(wait=False)  # the thread ends at its next step; nobody need wait for it

    def _run(self) -> T:
        while not self._turn.acquire(timeout=0.1):
            self._check()
        try:
            self._check()
            return self._work(self._progress)
        finally:
            self._turn.release()

    def _progress(self, done: int, total: int) -> None:
        self._check()
        self._reports.put((done, total))

    def _check(self) -> None:
        if self._stop.is_set():
            raise Cancelled
