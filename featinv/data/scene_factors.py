"""The factors of a rendered scene: one typed schema, and how a scene is drawn from (seed, index).

Every value that the renderer uses is a column of one `(N, F)` tensor, so that "what did this layer keep?" has a right
answer. Columns of absent objects are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MAX_OBJECTS = 4
SHAPES = ("sphere", "box", "cylinder", "cone")
TEXTURES = ("plain", "striped", "checkered", "noisy")
COLOURS = {
    "red": (0.85, 0.12, 0.12),
    "orange": (0.93, 0.50, 0.08),
    "yellow": (0.92, 0.84, 0.15),
    "green": (0.15, 0.62, 0.20),
    "cyan": (0.15, 0.70, 0.75),
    "blue": (0.15, 0.28, 0.82),
    "purple": (0.55, 0.20, 0.70),
    "white": (0.92, 0.92, 0.90),
}
FLOOR_COLOURS = {
    "grey": (0.52, 0.52, 0.52),
    "sand": (0.70, 0.60, 0.42),
    "grass": (0.34, 0.50, 0.28),
    "brick": (0.55, 0.33, 0.27),
    "slate": (0.30, 0.34, 0.42),
}
SKY_COLOURS = {
    "noon": (0.45, 0.66, 0.95),
    "overcast": (0.78, 0.80, 0.82),
    "dusk": (0.92, 0.62, 0.45),
    "night": (0.10, 0.12, 0.25),
}


@dataclass(frozen=True)
class Factor:
    """One column of the factor table.

    Attributes:
        name: Column name; object columns start with `object{k}_`, k = 0 for the object with most visible pixels.
        kind: "categorical" (value = class index) or "continuous".
        classes: Class names of a categorical factor, empty otherwise.
        low: Smallest value of a continuous factor.
        high: Largest value of a continuous factor.
    """

    name: str
    kind: str
    classes: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 1.0


def _categorical(name: str, classes: Sequence[str]) -> Factor:
    return Factor(name, "categorical", tuple(classes), 0.0, len(classes) - 1.0)


def _continuous(name: str, low: float, high: float) -> Factor:
    return Factor(name, "continuous", (), low, high)


SCENE_FACTORS = (
    _categorical("count", [str(k + 1) for k in range(MAX_OBJECTS)]),
    _categorical("floor_colour", tuple(FLOOR_COLOURS)),
    _categorical("floor_texture", TEXTURES),
    _categorical("sky", tuple(SKY_COLOURS)),
    _continuous("light_azimuth", -math.pi, math.pi),
    _continuous("light_elevation", 0.6, 1.3),
    _continuous("camera_height", 1.6, 4.0),
    _continuous("camera_distance", 4.6, 5.8),
    _continuous("camera_azimuth", -math.pi, math.pi),
)
OBJECT_FACTORS = (
    _categorical("shape", SHAPES),
    _categorical("colour", tuple(COLOURS)),
    _categorical("texture", TEXTURES),
    _continuous("size", 0.5, 1.1),
    _continuous("height", 0.45, 1.3),
    _continuous("yaw", 0.0, math.pi / 2),
    _continuous("world_x", -1.9, 1.9),
    _continuous("world_z", -1.9, 1.9),
)
# Known only after rendering: where the object is in the picture (fractions of its side) and how much of it shows.
RENDERED_FACTORS = (
    _continuous("image_x", 0.0, 1.0),
    _continuous("image_y", 0.0, 1.0),
    _continuous("visible_area", 0.0, 1.0),
)
FACTORS: tuple[Factor, ...] = SCENE_FACTORS + tuple(
    Factor(f"object{k}_{f.name}", f.kind, f.classes, f.low, f.high)
    for k in range(MAX_OBJECTS)
    for f in OBJECT_FACTORS + RENDERED_FACTORS
)
FACTOR_INDEX = {factor.name: column for column, factor in enumerate(FACTORS)}

_CANDIDATES = 12  # places tried for each object before the one with the widest gap is taken
_UNIFORMS = len(SCENE_FACTORS) + MAX_OBJECTS * (len(OBJECT_FACTORS) + 2 * _CANDIDATES)


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes before rendering.

    Attributes:
        values: Scene factors by name, each (N,).
        objects: Object factors by name, each (N, MAX_OBJECTS).
        present: (N, MAX_OBJECTS) bool.
    """

    values: dict[str, Tensor]
    objects: dict[str, Tensor]
    present: Tensor


def _uniforms(seed: int, indices: Sequence[int]) -> Tensor:
    """Draw (N, _UNIFORMS) numbers in [0, 1), row i from the counter-based stream (seed, indices[i])."""
    rows = [np.random.Generator(np.random.Philox(key=[seed, int(i)])).random(_UNIFORMS) for i in indices]
    return torch.from_numpy(np.stack(rows)).float()


def _from_uniform(factor: Factor, u: Tensor) -> Tensor:
    if factor.kind == "categorical":
        return (u * len(factor.classes)).floor().clamp(max=len(factor.classes) - 1)
    return factor.low + (factor.high - factor.low) * u


def _place(size: Tensor, present: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Choose floor positions without overlap.

    For each object in turn, the first of `_CANDIDATES` random places that touches no earlier object, or else the one
    with the widest gap.

    Args:
        size: (N, K) footprint radii.
        present: (N, K) bool.
        u: (N, K, _CANDIDATES, 2) uniforms.

    Returns:
        x and z, each (N, K).
    """
    n, count = len(size), present.sum(1)
    spread = 0.35 + 0.38 * count.float()  # few objects stay near the centre and fill the frame
    places = (2 * u - 1) * spread[:, None, None, None]
    chosen = places[:, :, 0].clone()
    rows = torch.arange(n)
    for k in range(1, MAX_OBJECTS):
        distance = (places[:, k, :, None] - chosen[:, None, :k]).norm(dim=-1)  # (N, _CANDIDATES, k)
        gap = (distance - 1.05 * (size[:, k, None, None] + size[:, None, :k])).amin(-1)
        free = gap >= 0
        best = torch.where(free.any(1), free.float().argmax(1), gap.argmax(1))
        chosen[:, k] = places[rows, k, best]
    return chosen[..., 0], chosen[..., 1]


def sample_scenes(seed: int, indices: Sequence[int]) -> Scenes:
    """Draw the scenes (seed, i) for i in `indices`; scene i never depends on the others."""
    u = _uniforms(seed, indices)
    values = {f.name: _from_uniform(f, u[:, c]) for c, f in enumerate(SCENE_FACTORS)}
    u = u[:, len(SCENE_FACTORS) :].reshape(len(u), MAX_OBJECTS, -1)
    objects = {f.name: _from_uniform(f, u[:, :, c]) for c, f in enumerate(OBJECT_FACTORS)}
    present = torch.arange(MAX_OBJECTS) <= values["count"][:, None]
    # Four big objects would hide each other, one small one would leave the frame empty.
    objects["size"] = (objects["size"] * (1.12 - 0.14 * values["count"])[:, None]).clamp(min=0.45)
    objects["height"] = torch.where(objects["shape"] == 0, objects["size"], objects["height"])
    places = u[:, :, len(OBJECT_FACTORS) :].reshape(len(u), MAX_OBJECTS, _CANDIDATES, 2)
    objects["world_x"], objects["world_z"] = _place(objects["size"], present, places)
    return Scenes(values, objects, present)


def factor_table(scenes: Scenes, image_x: Tensor, image_y: Tensor, visible_area: Tensor) -> tuple[Tensor, Tensor]:
    """Collect the `FACTORS` columns, objects sorted by visible area.

    Args:
        scenes: N scenes.
        image_x: (N, MAX_OBJECTS) centroid of the visible pixels, fraction of the width; NaN if none.
        image_y: (N, MAX_OBJECTS) the same from the top.
        visible_area: (N, MAX_OBJECTS) share of the picture's pixels.

    Returns:
        The (N, F) table and the (N, MAX_OBJECTS) order: `order[i, k]` is the drawn slot of object k.
    """
    rank = torch.where(scenes.present, visible_area, torch.full_like(visible_area, -1.0))
    order = rank.argsort(dim=1, descending=True, stable=True)
    columns = [scenes.values[f.name] for f in SCENE_FACTORS]
    objects = scenes.objects | {"image_x": image_x, "image_y": image_y, "visible_area": visible_area}
    present = scenes.present.gather(1, order)
    by_name = {name: v.gather(1, order).masked_fill(~present, torch.nan) for name, v in objects.items()}
    for k in range(MAX_OBJECTS):
        columns += [by_name[f.name][:, k] for f in OBJECT_FACTORS + RENDERED_FACTORS]
    return torch.stack(columns, dim=1), order
