"""Which rows make up which batch: a function of (seed, step), so that a resumed run sees what it would have seen."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class StepBatches(Sampler[list[int]]):
    """Batches of steps `start` to `stop` - 1; every epoch is a fresh permutation of the rows.

    Args:
        length: Rows of the data set.
        batch_size: Rows of a batch, over all processes.
        stop: Number of batches of the whole run.
        start: First batch; a resumed run starts at its checkpoint's.
        seed: Of the permutations.
        rank: This process; it gets rows rank, rank + world_size, ... of each batch.
        world_size: Number of processes.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        stop: int,
        start: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.length, self.batch_size, self.start, self.stop, self.seed = length, batch_size, start, stop, seed
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        """Batches of the whole run: Lightning counts a resumed run's batches from its checkpoint's, not from zero."""
        return self.stop

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        for step in range(self.start, self.stop):
            rows = []
            for position in range(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world_size):
                if position // self.length != epoch:
                    epoch = position // self.length
                    generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
                    order = torch.randperm(self.length, generator=generator)
                rows.append(int(order[position % self.length]))
            yield rows
