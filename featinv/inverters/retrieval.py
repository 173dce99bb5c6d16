"""The nearest neighbour in feature space: the baseline that needs no model of images, only many of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset
from tqdm import tqdm

from featinv.backbones.base import Backbone
from featinv.errors import UserError
from featinv.image import resize
from featinv.processes import torchrun_layout

_BLOCK = 1024  # training images compared at a time


def free_memory() -> int:
    """Bytes that the system can still hand out (not known but on Linux), at most this process's share of its memory."""
    share = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (torchrun_layout()[1] or 1)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return min(share, next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    except (OSError, StopIteration):
        return share


class RetrievalInverter:
    """Answer features with the training image whose features have the largest cosine to them.

    The search is exact, over flattened maps. The index is computed at the first call and kept in half precision:
    C * H * W * 2 bytes for each training image. The pictures themselves are read again when they are the answer.

    Args:
        backbone: Whose features are compared.
        dataset: Training images, map-style.
        size: Side of the pictures in pixels.
        count: Search the first so many training images; None is all.
        batch_size: Images at a time (memory, not result).

    Raises:
        UserError: If the data set is a stream or has no images.
    """

    def __init__(
        self, backbone: Backbone, dataset: Any, size: int = 64, count: int | None = None, batch_size: int = 64
    ):
        if isinstance(dataset, IterableDataset):
            raise UserError("retrieval needs a data set with a length (a folder, or IndexedShards), not a stream.")
        self.backbone, self.dataset, self.size, self.batch_size = backbone, dataset, size, batch_size
        self.count = len(dataset) if count is None else min(count, len(dataset))
        if self.count < 1:
            raise UserError("retrieval needs at least one training image.")
        self._index: Tensor | None = None

    @property
    def index(self) -> Tensor:
        """Features of the training images, flattened, of length 1: (count, C H W), half precision.

        Raises:
            UserError: If it does not fit into the memory that is free.
        """
        if self._index is None:
            self._index = self._computed_index()
        return self._index

    @torch.no_grad()
    def _computed_index(self) -> Tensor:
        spec, device = self.backbone.spec, self.backbone.mean.device
        elements = spec.channels * spec.height * spec.width
        self._check_memory(2 * elements)
        index = torch.empty(self.count, elements, dtype=torch.float16)
        loader = DataLoader(
            Subset(self.dataset, range(self.count)),
            self.batch_size,
            collate_fn=lambda items: torch.stack([item["image"] for item in items]),
            generator=torch.Generator().manual_seed(0),  # else it would draw from the global one
        )
        start = 0
        for images in tqdm(loader, desc="indexing training images", unit="batch"):
            rows = F.normalize(self.backbone(images.to(device)).flatten(1)).half().cpu()
            index[start : start + len(rows)] = rows
            start += len(rows)
        return index

    def _check_memory(self, row: int) -> None:
        """Refuse an index of `row` bytes an image that does not fit; the system would end the process hours later."""
        free, size = free_memory(), self.count * row
        if size > 0.9 * free:
            fitting = int(0.8 * free / row)
            raise UserError(
                f"the index of {self.count} training images needs {size / 1e9:.1f} GB of memory and this process has "
                f"{free / 1e9:.1f} GB free; set params.retrieval={{count: {fitting}}}."
            )

    def nearest(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (N,) of the nearest training images to features (N, C, H, W), and their cosines (N,)."""
        wanted = F.normalize(features.flatten(1)).float().cpu()
        blocks = [wanted @ block.float().T for block in self.index.split(_BLOCK)]
        cosines, positions = torch.cat(blocks, 1).max(1)
        return positions, cosines

    def invert(self, features: Tensor, *, seeds: Sequence[int]) -> Tensor:
        """Features (N, C, H, W) -> training images (N, 3, size, size) in [0, 1]; the seeds change nothing."""
        positions, _ = self.nearest(features)
        images = [resize(self.dataset[i]["image"][None], self.size) for i in positions.tolist()]
        return torch.cat(images).clamp(0, 1)
