"""CIFAR-10 through torchvision."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision import datasets

from featinv.data.transforms import build_transform
from featinv.errors import UserError


class CIFAR10(Dataset[dict[str, Any]]):
    """CIFAR-10 (Krizhevsky 2009), 10 classes of 32-pixel photographs.

    Args:
        root: Folder that holds (or, with `download`, will hold) `cifar-10-batches-py`.
        split: `train` (50,000) or `test` (10,000); `val` means `test`.
        size: Side of the images in pixels.
        download: Fetch the archive if it is missing.
        augment: False, True or the arguments of `TrainTransform`.

    Raises:
        UserError: If the data are missing or damaged, or the split does not exist.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        size: int = 32,
        *,
        download: bool = False,
        augment: bool | Mapping[str, Any] = False,
    ):
        if split not in ("train", "test", "val"):
            raise UserError(f"CIFAR-10 has the splits train and test, not {split!r}.")
        self.split, self.epoch = split.replace("val", "test"), 0
        self.transform = build_transform(size, augment)
        try:
            data = datasets.CIFAR10(os.fspath(root), train=self.split == "train", download=download)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"CIFAR-10 is not in {os.fspath(root)} or is damaged ({error}); "
                "put cifar-10-batches-py there or set download=true."
            ) from error
        self.pixels, self.labels, self.classes = data.data, data.targets, data.classes
        self.skipped: list[tuple[str, str]] = []  # torchvision checks the whole archive

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        item_id = f"cifar10-{self.split}-{index:05d}"
        image = torch.from_numpy(self.pixels[index]).permute(2, 0, 1).float() / 255
        image = self.transform(image, item_id=item_id, epoch=self.epoch)
        return {"image": image, "label": int(self.labels[index]), "id": item_id}

    def set_epoch(self, epoch: int) -> None:
        """Choose which random crops and flips come next."""
        self.epoch = epoch
