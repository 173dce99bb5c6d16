"""The app's pictures: examples to start from, uploads, and the way to arrays and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from featinv.attribution.saliency import overlay
from featinv.data.reading import read_image
from featinv.data.scenes import render_scenes
from featinv.data.transforms import EvalTransform
from featinv.errors import UserError
from featinv.image import to_uint8

SCENE = "scene"
PHOTOGRAPHS = {"astronaut": "astronaut", "cat": "chelsea", "coffee": "coffee", "rocket": "rocket"}
"""Public-domain and CC0 photographs of scikit-image, by the function that reads each."""
SCENE_SEED = 5
SIDE = 256
SMALLEST = 16


def square(image: Tensor, size: int = SIDE) -> Tensor:
    """The centre square (3, size, size) of a picture (3, H, W) in [0, 1]; a square one is only resized."""
    return EvalTransform(size)(image).clamp(0, 1)


def example(name: str, number: int = 0) -> Tensor:
    """A picture (3, S, S) to start from.

    Args:
        name: "scene" or one of `PHOTOGRAPHS`.
        number: Which scene.

    Raises:
        UserError: If there is no such picture.
    """
    if name == SCENE:
        if number < 0:
            raise UserError(f"scenes are numbered from 0, not {number}.")
        return render_scenes(SCENE_SEED, [number], SIDE // 2)[0][0]
    if name not in PHOTOGRAPHS:
        raise UserError(f"there is no example {name!r}; choose {SCENE} or one of {', '.join(PHOTOGRAPHS)}.")
    from skimage import data

    return square(from_array(getattr(data, PHOTOGRAPHS[name])()))


def uploaded(path: str | Path) -> Tensor:
    """The centre square (3, SIDE, SIDE) of an uploaded file.

    Raises:
        UserError: If it is no picture or too small to be one.
    """
    image = read_image(path, name=Path(path).name, min_side=SIDE)
    if min(image.shape[1:]) < SMALLEST:
        height, width = image.shape[1:]
        raise UserError(f"{Path(path).name} is {width} x {height} pixels; upload one of at least {SMALLEST} a side.")
    return square(image)


def to_array(image: Tensor) -> np.ndarray:
    """A picture (3, H, W) in [0, 1] -> (H, W, 3) uint8."""
    return to_uint8(image.detach()).permute(1, 2, 0).cpu().numpy()


def from_array(array: np.ndarray | None) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) in [0, 1].

    Raises:
        UserError: If there is no picture.
    """
    if array is None:
        raise UserError("choose an example or upload a picture first.")
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1).float() / 255


def heat(values: Tensor) -> Tensor:
    """A map (1, H, W), at least 0, as colours (3, H, W): black is 0, the brightest its own largest value."""
    scaled = values / values.amax().clamp(min=1e-9)
    return overlay(torch.zeros(1, 3, *values.shape[1:]), scaled[None], alpha=1.0)[0]


def with_box(image: Tensor, box: tuple[float, float, float, float]) -> Tensor:
    """A picture (3, H, W) with a region (left, top, right, bottom; fractions of the picture) outlined."""
    drawn = Image.fromarray(to_array(image))
    width, height = drawn.size
    left, top, right, bottom = box
    corners = [left * width, top * height, max(left, right) * width - 1, max(top, bottom) * height - 1]
    corners[2:] = [max(corners[2], corners[0]), max(corners[3], corners[1])]
    ImageDraw.Draw(drawn).rectangle(corners, outline=(255, 0, 90), width=max(1, width // 64))
    return from_array(np.array(drawn))
