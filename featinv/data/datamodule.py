"""Batches for Lightning from any data set, in an order that only the seed and the epoch choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from featinv.data import load_dataset
from featinv.errors import UserError
from featinv.processes import process_rank

Item = dict[str, Any]


class ImageDataModule(pl.LightningDataModule):
    """Training and validation batches.

    A batch is {"image": (N, 3, H, W), "label": (N,), "id": list of N, optional "factors": (N, F)}. Batches
    are the same for any number of workers (for streamed shards: the images are, their order is not).

    Args:
        train: Data set, or its `{target, params}` node, or a name or path for `load_dataset`.
        val: The same; None for no validation.
        batch_size: Images of a batch and process.
        num_workers: Processes that read or render images.
        seed: Of the shuffling.
    """

    def __init__(
        self,
        train: Dataset[Item] | Mapping[str, Any] | str,
        val: Dataset[Item] | Mapping[str, Any] | str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise UserError(f"batch_size must be >= 1 and num_workers >= 0, not {batch_size} and {num_workers}.")
        self.train, self.val = train, val
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed

    def setup(self, stage: str | None = None) -> None:
        """Build the data sets that are still configuration; both, since `fit` validates."""
        if not isinstance(self.train, Dataset):
            self.train = load_dataset(self.train)
        if self.val is not None and not isinstance(self.val, Dataset):
            self.val = load_dataset(self.val)

    def train_dataloader(self) -> DataLoader[Item]:
        """Return shuffled batches; the last one is dropped if it is not full (unless it is the only one)."""
        self.setup()
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Item] | list[DataLoader[Item]]:
        """Return all validation images in order; several processes may repeat a few, as the ids tell."""
        self.setup()
        return [] if self.val is None else self._loader(self.val, shuffle=False)

    def _loader(self, dataset: Any, shuffle: bool) -> DataLoader[Item]:
        options: dict[str, Any] = {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "collate_fn": collate,
            # Else the loader would draw from the global generator, and so disturb the training's noise.
            "generator": torch.Generator().manual_seed(self.seed),
        }
        if isinstance(dataset, IterableDataset):
            loader: DataLoader[Item] = DataLoader(dataset, drop_last=shuffle, **options)
            # Lightning announces epochs to the sampler, and a stream may not be given one of its own.
            loader.sampler.set_epoch = partial(tell_epoch, dataset)  # type: ignore[attr-defined]
            return loader
        sampler = EpochSampler(dataset, shuffle=shuffle, seed=self.seed)
        return DataLoader(dataset, sampler=sampler, drop_last=shuffle and len(sampler) >= self.batch_size, **options)


class EpochSampler(DistributedSampler[Item]):
    """Indices of this process, in an order fixed by (seed, epoch).

    It tells the data set the epoch, for its random crops.

    Args:
        dataset: Map-style.
        shuffle: Draw a new order each epoch.
        seed: Of that order.
    """

    def __init__(self, dataset: Dataset[Item], shuffle: bool, seed: int = 0):
        rank, world = process_rank()
        super().__init__(dataset, num_replicas=world, rank=rank, shuffle=shuffle, seed=seed)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and a training set's crops; Lightning calls this before workers start."""
        super().set_epoch(epoch)
        if self.shuffle:
            tell_epoch(self.dataset, epoch)


def collate(items: Sequence[Item]) -> Item:
    """Stack items into a batch.

    Raises:
        UserError: If images differ in size, or only some items have factors.
    """
    shapes = {tuple(item["image"].shape) for item in items}
    if len(shapes) > 1:
        raise UserError(f"images of one batch must have one size, not {sorted(shapes)}; set the data set's size.")
    batch: Item = {
        "image": torch.stack([item["image"] for item in items]),
        "label": torch.tensor([int(item["label"]) for item in items], dtype=torch.long),
        "id": [str(item["id"]) for item in items],
    }
    with_factors = sum("factors" in item for item in items)
    if with_factors == len(items):
        batch["factors"] = torch.stack([item["factors"] for item in items])
    elif with_factors:
        raise UserError(f"only {with_factors} of {len(items)} items of a batch have factors; all or none must.")
    return batch


def tell_epoch(dataset: Any, epoch: int) -> None:
    """Say which random crops come next to a data set that has any."""
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)
