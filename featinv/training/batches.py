"""Which rows make up which batch: a function of (seed, step), so that a resumed run sees what it would have seen.

Training data sets are indexed with a list of rows and return a whole batch. Row r of epoch e is asked for as
e * length + r, so that a data set can draw other crops and noise in each epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from featinv.data.datamodule import collate, tell_epoch
from featinv.errors import UserError


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
                rows.append(epoch * self.length + int(order[position % self.length]))
            yield rows


class BatchedRows(Dataset[dict[str, Any]]):
    """A map-style data set of images, indexed with a list of rows.

    Args:
        dataset: Its items are as in `featinv.data`; `set_epoch`, where it has one, is told the epoch of each batch.
    """

    def __init__(self, dataset: Dataset[dict[str, Any]]):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, rows: Sequence[int]) -> dict[str, Any]:
        items: list[dict[str, Any]] = []
        for epoch in sorted({row // len(self) for row in rows}):
            tell_epoch(self.dataset, epoch)
            own = [row % len(self) for row in rows if row // len(self) == epoch]
            many = getattr(self.dataset, "__getitems__", None)
            items += many(own) if many is not None else [self.dataset[row] for row in own]
        return collate(items)


class Epochs(Dataset[dict[str, Any]]):
    """The first epochs of a map-style data set, one after the other: as many random crops and flips of each image.

    Args:
        dataset: Its items are as in `featinv.data`; `set_epoch`, where it has one, is told the epoch of each item.
        epochs: At least 1.

    Raises:
        UserError: If there is no epoch.
    """

    def __init__(self, dataset: Dataset[dict[str, Any]], epochs: int):
        if epochs < 1:
            raise UserError(f"training.cache_epochs must be at least 1, not {epochs}.")
        self.dataset, self.epochs = dataset, epochs

    def __len__(self) -> int:
        return self.epochs * len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, row: int) -> dict[str, Any]:
        epoch, index = divmod(row, len(self) // self.epochs)
        tell_epoch(self.dataset, epoch)
        return self.dataset[index]
