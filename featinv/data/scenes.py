"""Rendered scenes with known factors: the data set that needs no download and whose truth is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from featinv.data.scene_factors import FACTORS, MAX_OBJECTS, Factor, factor_table, sample_scenes
from featinv.data.scene_renderer import render
from featinv.errors import UserError


def render_scenes(seed: int, indices: Sequence[int], size: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Render the scenes (seed, i) for i in `indices`.

    Args:
        seed: Which family of scenes.
        indices: Which scenes; scene i never depends on the others.
        size: Side of the picture in pixels.

    Returns:
        Images (N, 3, size, size) in [0, 1]; factors (N, F) by the columns of `FACTORS`; masks
        (N, MAX_OBJECTS, size, size) in [0, 1], the share of each pixel that shows object k.
    """
    scenes = sample_scenes(seed, indices)
    images, coverage = render(scenes, size)
    masks = coverage[:, :MAX_OBJECTS]
    area = masks.sum((2, 3))
    axis = (torch.arange(size) + 0.5) / size
    image_x = (masks.sum(2) * axis).sum(-1) / area  # NaN where nothing shows
    image_y = (masks.sum(3) * axis).sum(-1) / area
    factors, order = factor_table(scenes, image_x, image_y, area / size**2)
    masks = masks.gather(1, order[:, :, None, None].expand_as(masks))
    return images, factors, masks


class ScenesDataset(Dataset[dict[str, Any]]):
    """Scenes (seed, 0 .. length - 1), rendered when asked for; batched by `__getitems__`, which DataLoader uses.

    Args:
        length: Number of scenes.
        seed: Which family of scenes; training and validation use different ones.
        size: Side of the picture in pixels.
    """

    factors: tuple[Factor, ...] = FACTORS

    def __init__(self, length: int = 20_000, seed: int = 0, size: int = 64):
        if length < 1 or size < 1 or seed < 0:
            raise UserError(f"scenes need length >= 1, size >= 1 and seed >= 0, not {length}, {size}, {seed}.")
        self.length, self.seed, self.size = length, seed, size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Render several scenes at once: items with image, label (the largest object's shape), id and factors."""
        for index in indices:
            if not 0 <= index < self.length:
                raise IndexError(f"scene {index} of {self.length}")
        images, factors, _ = render_scenes(self.seed, indices, self.size)
        label = factors[:, [f.name for f in FACTORS].index("object0_shape")].long()
        return [
            {"image": images[i], "label": int(label[i]), "id": f"scene-{self.seed}-{index:07d}", "factors": factors[i]}
            for i, index in enumerate(indices)
        ]
