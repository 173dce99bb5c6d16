"""An inverter that tells how far it is, and several pieces of work under one progress."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from featinv.applications.batches import Progress
from featinv.inverters.base import Inverter


def quiet(done: int, total: int) -> None:
    """A progress that nobody watches."""


def steps_of(inverter: Inverter) -> int:
    """How many steps one call of `invert` reports; 1 for an inverter that has none."""
    if not _has_callback(inverter):
        return 1
    name = "num_inference_steps" if hasattr(inverter, "num_inference_steps") else "steps"
    lift = getattr(inverter, "lift", None)
    return int(getattr(inverter, name, 1)) + (lift.num_inference_steps if lift is not None else 0)


def _has_callback(inverter: Inverter) -> bool:
    return "callback" in inspect.signature(inverter.invert).parameters


class Watched:
    """Takes the place of an inverter and calls progress(done, total) after every one of its steps.

    What the progress raises ends the work.

    Args:
        inverter: Any; watched step by step where its `invert` takes a callback, else call by call.
        progress: Is told.
        calls: How often `invert` will be called, for the total.
    """

    def __init__(self, inverter: Inverter, progress: Progress, calls: int = 1):
        self.inverter, self.size, self._progress = inverter, inverter.size, progress
        self._done, self._total = 0, calls * steps_of(inverter)

    def invert(self, features: Tensor, *, seeds: Sequence[int]) -> Tensor:
        """Features (N, C, H, W) and N seeds -> images (N, 3, H', W') in [0, 1]."""
        if not _has_callback(self.inverter):
            images = self.inverter.invert(features, seeds=seeds)
            self._tick()
            return images
        return self.inverter.invert(features, seeds=seeds, callback=lambda *_: self._tick())  # type: ignore[call-arg]

    def _tick(self, *_: Any) -> None:
        self._done += 1
        self._progress(self._done, self._total)


def watched(inverter: Inverter, progress: Progress, maps: int, batch_size: int) -> Watched:
    """`Watched` over as many calls as `maps` feature maps make in batches."""
    return Watched(inverter, progress, math.ceil(maps / batch_size))


def part(progress: Progress, before: int, total: int) -> Progress:
    """The progress of one of several pieces of work: `before` steps of `total` were done by others."""
    return lambda done, _: progress(before + done, total)
