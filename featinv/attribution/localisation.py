"""Whether a heat map lies on the object: on rendered scenes the object's true mask is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from featinv.data.scene_factors import sample_scenes
from featinv.data.scenes import render_scenes
from featinv.errors import UserError


@dataclass(frozen=True)
class Localisation:
    """How much of each map lies inside its mask.

    Attributes:
        inside: (N,) share of the map's mass inside the mask; 0 for an empty map.
        area: (N,) share of the picture that the mask covers: what a uniform map would have inside.
    """

    inside: Tensor
    area: Tensor

    @property
    def found(self) -> Tensor:
        """(N,) bool: more of the map inside than chance puts there."""
        return self.inside > self.area


def localisation(maps: Tensor, masks: Tensor) -> Localisation:
    """Compare heat maps with masks.

    Args:
        maps: (N, 1, H, W), at least 0.
        masks: (N, 1, H, W) in [0, 1], the share of each pixel that shows the object.

    Raises:
        UserError: If the shapes differ or a map is negative.
    """
    if maps.shape != masks.shape or maps.ndim != 4 or maps.shape[1] != 1 or float(maps.min()) < 0:
        raise UserError(
            f"localisation needs maps >= 0 and masks of one shape (N, 1, H, W), not {tuple(maps.shape)} and "
            f"{tuple(masks.shape)}."
        )
    values, weights = maps.double().flatten(1), masks.to(maps.device).double().flatten(1)
    mass = values.sum(1)
    inside = torch.where(mass > 0, (values * weights).sum(1) / mass.clamp(min=1e-300), 0.0)
    return Localisation(inside, weights.mean(1))


def single_object_scenes(count: int, size: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """The first scenes of a family that hold one object.

    Args:
        count: How many.
        size: Side of the pictures in pixels.
        seed: Of the family; 0 trains, 1 validates.

    Returns:
        Images (count, 3, size, size) in [0, 1] and masks (count, 1, size, size) in [0, 1].
    """
    indices: list[int] = []
    start = 0
    while len(indices) < count:
        counts = sample_scenes(seed, range(start, start + 100)).values["count"]
        indices += [start + i for i in range(100) if int(counts[i]) == 0]  # class 0 is one object
        start += 100
    images, _, masks = render_scenes(seed, indices[:count], size)
    return images, masks.sum(1, keepdim=True).clamp(0, 1)
