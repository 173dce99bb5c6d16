"""A small data set held in memory as bytes, read batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from featinv.image import to_uint8


class InMemoryImages(Dataset[dict[str, Tensor]]):
    """All images of a data set as uint8; indexed with a list of rows it returns {"image": (N, 3, H, W) in [0, 1]}.

    Args:
        dataset: Map-style, all pictures of one size.
        num_workers: Processes that read or render.
    """

    def __init__(self, dataset: Dataset[dict[str, Any]], num_workers: int = 0):
        loader: DataLoader[Any] = DataLoader(dataset, batch_size=64, num_workers=num_workers, collate_fn=_bytes)
        parts = list(tqdm(loader, desc="reading images", unit="batch"))
        self.images = torch.cat(parts)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        return {"image": self.images[[row % len(self) for row in rows]].float() / 255}


def _bytes(items: list[dict[str, Any]]) -> Tensor:
    return to_uint8(torch.stack([item["image"] for item in items]))
