"""Scenes with known factors from which the probe learns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from featinv.image import to_uint8
from featinv.metrics.factors import FactorSpec


@dataclass(frozen=True)
class FactorTruth:
    """Originals from which the factor probe learns, and which columns of their table it reads.

    Attributes:
        images: (N, 3, H, W).
        values: (N, F).
        schema: One entry for each column.
    """

    images: Tensor
    values: Tensor
    schema: list[FactorSpec]


def rounded(images: Tensor) -> Tensor:
    """What a PNG would hold."""
    return to_uint8(images).float() / 255


def spec_column(name: str) -> int:
    """Column of a scene factor."""
    from featinv.data.scene_factors import FACTOR_INDEX

    return FACTOR_INDEX[name]


def scene_truth(count: int = 2000, seed: int = 2, size: int = 64, objects: int = 1) -> FactorTruth:
    """Render the originals from which the factor probe learns: `count` scenes of a family of their own.

    Args:
        count: Scenes.
        seed: Of the family, neither the training's nor the validation's.
        size: Side of the pictures in pixels.
        objects: How many objects' factors are read, largest first.
    """
    from featinv.data.scene_factors import FACTORS
    from featinv.data.scenes import render_scenes

    # Angles wrap and heights hide behind perspective; the factors below are what a picture shows plainly.
    kept = ("shape", "colour", "texture", "size", "image_x", "image_y")
    names = ["count", "floor_colour", "floor_texture", "sky", "light_elevation", "camera_height"]
    names += [f"object{k}_{name}" for k in range(objects) for name in kept]
    by_name = {f.name: FactorSpec(f.name, f.kind, len(f.classes)) for f in FACTORS}
    columns = [spec_column(name) for name in names]
    images, values = [], []
    for start in tqdm(range(0, count, 100), desc="scenes for the factor probe", unit="batch"):
        picture, factors, _ = render_scenes(seed, range(start, min(start + 100, count)), size)
        images.append(picture)
        values.append(factors[:, columns])
    return FactorTruth(rounded(torch.cat(images)), torch.cat(values), [by_name[name] for name in names])
