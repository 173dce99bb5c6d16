"""A backbone and inverters whose truth is known: features are mean colours of cells, pictures are those cells again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from featinv.backbones.base import Backbone
from featinv.image import seeded_noise

SIZE = 32


class Cells(Backbone):
    """Mean colour of each cell of a G x G grid; the layers are the grids 16, 8, 4, 2 and 1."""

    def __init__(self, layer: str = "8"):
        super().__init__(layer, SIZE, (0.0,) * 3, (1.0,) * 3)
        self._cut()
        self.freeze()

    @property
    def layers(self) -> list[str]:
        return ["16", "8", "4", "2", "1"]

    def _cut(self) -> None:
        self.grid = int(self.layer)

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, self.grid)

    def logits(self, images: Tensor) -> Tensor:
        return 10 * images.mean((2, 3))


class Mosaic:
    """The exact inverse on features that are colours; what is no colour is clamped to one."""

    size = SIZE

    def invert(self, features: Tensor, *, seeds: Sequence[int]) -> Tensor:
        return F.interpolate(features, (SIZE, SIZE)).clamp(0, 1)


class Pooled(Mosaic):
    """Is told the mean of all positions only."""

    def invert(self, features: Tensor, *, seeds: Sequence[int]) -> Tensor:
        return super().invert(features.mean((2, 3), keepdim=True), seeds=seeds)


class Noisy(Mosaic):
    """The inverse plus noise whose deviation grows from left to right, 0 to 0.1."""

    spread = torch.linspace(0, 0.1, SIZE).expand(1, 1, SIZE, SIZE)

    def invert(self, features: Tensor, *, seeds: Sequence[int]) -> Tensor:
        return super().invert(features, seeds=seeds) + self.spread * seeded_noise(seeds, (3, SIZE, SIZE))
