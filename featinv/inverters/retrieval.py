"""The nearest neighbour in feature space: the baseline that needs no model of images, only many of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset
from tqdm import tqdm

from featinv.backbones.base import Backbone
from featinv.errors import UserError
from featinv.image import resize

_BLOCK = 1024  # training images compared at a time


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
        """Features of the training images, flattened, of length 1: (count, C H W), half precision."""
        if self._index is None:
            self._index = self._computed_index()
        return self._index

    @torch.no_grad()
    def _computed_index(self) -> Tensor:
        spec, device = self.backbone.spec, self.backbone.mean.device
        index = torch.empty(self.count, spec.channels * spec.height * spec.width, dtype=torch.float16)
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
