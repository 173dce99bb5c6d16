"""Exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from featinv.errors import UserError
from featinv.training.sharding import gathered, placed_as


class EMA:
    """Keeps averaged copies of parameters; the decay grows with the number of updates so that the start is forgotten.

    Args:
        parameters: Name -> parameter.
        decay: Largest decay, of one step.
        every: Steps between updates of the averages, each with the decay of so many: they are all of the weights to
            read and write, and hardly move from one step to the next.

    Raises:
        UserError: If the averages would never move, or away from the weights.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float = 0.999, every: int = 1):
        if not 0 <= decay < 1:
            raise UserError(f"ema_decay must lie from 0 to below 1, not {decay}.")
        if every < 1:
            raise UserError(f"ema_every must be at least 1, not {every}.")
        self.parameters, self.decay, self.every, self.updates = parameters, decay, every, 0
        self.averages = {name: p.detach().clone() for name, p in parameters.items()}

    def follow(self) -> None:
        """Put the averages beside their parameters, which a trainer has moved to its device."""
        self.averages = {name: value.to(self.parameters[name].device) for name, value in self.averages.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Count a step; where one is due, move every average towards its parameter."""
        self.updates += 1
        if self.updates % self.every:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) ** self.every
        averages, values = list(self.averages.values()), [p.detach() for p in self.parameters.values()]
        torch._foreach_lerp_(averages, values, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run with the averages in place of the weights, which come back afterwards, also after an exception."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._write(self.averages)
        try:
            yield
        finally:
            self._write(kept)

    def copy_to_parameters(self) -> None:
        """Replace the weights by the averages."""
        self._write(self.averages)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(values[name])

    def state_dict(self) -> dict[str, object]:
        """Averages and number of steps; of split weights, whole in the first process alone."""
        return {"updates": self.updates, "averages": gathered(self.averages)}

    def load_state_dict(self, state: dict) -> None:
        """Invert `state_dict`."""
        self.updates = state["updates"]
        for name, value in state["averages"].items():
            self.averages[name].copy_(placed_as(value, self.averages[name]))
