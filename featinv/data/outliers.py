"""Pictures unlike those a prior has seen: noise, textures, sketches, photographs for scenes, scenes for photographs.

Photographs and textures come with scikit-image (public domain or CC0), so that nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from featinv.config import nearest
from featinv.errors import UserError
from featinv.image import resize

TEXTURES = ("brick", "grass", "gravel")
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")


def noise(index: int, size: int) -> Tensor:
    """Uniform noise, (3, size, size) in [0, 1]."""
    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(index))


def _crop(name: str, index: int, size: int) -> Tensor:
    """A random square of one of scikit-image's pictures, (3, size, size)."""
    import skimage.data

    picture = np.asarray(getattr(skimage.data, name)())
    picture = np.repeat(picture[:, :, None], 3, 2) if picture.ndim == 2 else picture[:, :, :3]
    generator = np.random.default_rng(index)
    side = int(generator.uniform(0.5, 1.0) * min(picture.shape[:2]))
    top, left = (int(generator.integers(0, length - side + 1)) for length in picture.shape[:2])
    square = torch.from_numpy(picture[top : top + side, left : left + side].copy()).permute(2, 0, 1).float() / 255
    return resize(square[None], size)[0].clamp(0, 1)


def texture(index: int, size: int) -> Tensor:
    """A crop of brick, grass or gravel."""
    return _crop(TEXTURES[index % len(TEXTURES)], index, size)


def photo(index: int, size: int) -> Tensor:
    """A crop of a photograph."""
    return _crop(PHOTOS[index % len(PHOTOS)], index, size)


def scene(index: int, size: int) -> Tensor:
    """A rendered scene of a family of its own."""
    from featinv.data.scenes import render_scenes

    return render_scenes(7, [index], size)[0][0]


OUTLIERS: dict[str, Callable[[int, int], Tensor]] = {
    "noise": noise,
    "textures": texture,
    "photos": photo,
    "scenes": scene,
}
"""Name -> function of (index, size) giving a picture (3, size, size) in [0, 1]."""


def outlier(kind: str, index: int, size: int) -> Tensor:
    """Picture number `index` of a set.

    Raises:
        UserError: If there is no such set.
    """
    if kind not in OUTLIERS:
        raise UserError(f"no set {kind!r}: {nearest(kind, list(OUTLIERS))}")
    return OUTLIERS[kind](index, size)


def sketch(image: Tensor) -> Tensor:
    """Dark lines on white where a picture (3, H, W) in [0, 1] has edges (Sobel), same shape."""
    from skimage.filters import sobel

    edges = np.max([sobel(channel) for channel in image.double().cpu().numpy()], axis=0)
    strength = np.clip(edges / max(float(np.quantile(edges, 0.98)), 1e-6), 0, 1)
    return torch.from_numpy(1 - strength).float().expand(3, -1, -1).clone()
