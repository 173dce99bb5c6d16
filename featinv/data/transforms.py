"""Crops and flips on float images; random ones are a function of (seed, epoch, id), never of the worker."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from featinv.errors import UserError


class Transform(Protocol):
    """Makes one size of all images. `min_side` is the shorter side in pixels that its input should keep."""

    min_side: int

    def __call__(self, image: Tensor, *, item_id: str, epoch: int) -> Tensor:
        """Map (3, H, W) in [0, 1] to (3, size, size) in [0, 1]."""
        ...


class EvalTransform:
    """Resize the shorter side (bicubic, antialiased) and crop the centre.

    Args:
        size: Side of the result in pixels.
    """

    def __init__(self, size: int):
        self.size = self.min_side = _checked_size(size)

    def __call__(self, image: Tensor, *, item_id: str = "", epoch: int = 0) -> Tensor:
        """Map (3, H, W) in [0, 1] to (3, size, size) in [0, 1]; nothing in it is random."""
        height, width = image.shape[-2:]
        if (height, width) == (self.size, self.size):
            return image
        short = min(height, width)
        # A 1 x 30000 strip would grow with its length before the crop throws nearly all of it away.
        image = F.center_crop(image, [min(height, 4 * short), min(width, 4 * short)])
        image = F.resize(image, [self.size], InterpolationMode.BICUBIC, antialias=True)
        return F.center_crop(image, [self.size, self.size]).clamp(0, 1)


class TrainTransform:
    """Random resized crop (bicubic, antialiased) and flips.

    Args:
        size: Side of the result in pixels.
        scale: Smallest and largest share of the area that a crop keeps.
        ratio: Smallest and largest width / height of a crop.
        hflip: Mirror left and right, half of the time.
        vflip: Mirror top and bottom, half of the time.
        seed: Of the randomness; with the epoch and the item's id it fixes the result.
    """

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] = (0.5, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: bool = True,
        vflip: bool = False,
        seed: int = 0,
    ):
        if not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
            raise UserError(f"scale must rise within (0, 1] and ratio be positive, not {scale} and {ratio}.")
        self.size, self.seed = _checked_size(size), seed
        # The side of the smallest crop, seen from the whole image.
        self.min_side = math.ceil(size * math.sqrt(ratio[1] / scale[0]))
        crop = v2.RandomResizedCrop(size, tuple(scale), tuple(ratio), InterpolationMode.BICUBIC, antialias=True)
        self.pipeline = v2.Compose([crop, v2.RandomHorizontalFlip(hflip / 2), v2.RandomVerticalFlip(vflip / 2)])

    def __call__(self, image: Tensor, *, item_id: str, epoch: int = 0) -> Tensor:
        """Map (3, H, W) in [0, 1] to (3, size, size) in [0, 1]."""
        digest = hashlib.sha256(f"{self.seed}/{epoch}/{item_id}".encode()).digest()
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator only
            torch.default_generator.manual_seed(int.from_bytes(digest[:7], "big"))
            return self.pipeline(image).clamp(0, 1)


def build_transform(size: int, augment: bool | Mapping[str, Any] = False) -> Transform:
    """Choose the transform of a data set.

    Args:
        size: Side of the result in pixels.
        augment: False for `EvalTransform`; True or keyword arguments for `TrainTransform`.

    Raises:
        UserError: If a size or an argument makes no sense.
    """
    if isinstance(augment, bool):
        return TrainTransform(size) if augment else EvalTransform(size)
    try:
        return TrainTransform(size, **augment)
    except TypeError as error:
        raise UserError(f"augment takes scale, ratio, hflip, vflip and seed: {error}") from error


def _checked_size(size: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UserError(f"the image size must be a whole number of pixels of at least 1, not {size!r}.")
    return size
