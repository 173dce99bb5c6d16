"""Common corruptions at five severities, by the formulas of ImageNet-C (Hendrycks & Dietterich 2019, arXiv 1903.12261).

By SciPy, scikit-image and Pillow: the package `imagecorruptions` (last release 2020) needs pkg_resources and np.float_,
which are gone; its forks draw from NumPy's global generator, need OpenCV, and mean pictures of 224 pixels. Here lengths
are in proportion to the picture's side and every picture has a seed. Two formulas differ: glass blur moves every pixel
by a fraction where the original swaps whole neighbours one after another, and blurs have kernels of fractional radius.
Frost is left out: it pastes photographs of frost.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage import color, util
from torch import Tensor

from featinv.config import nearest
from featinv.errors import UserError

Array = NDArray[np.float64]
Generator = np.random.Generator
_SIDE = 224  # of the pictures that the parameters are meant for


def _scale(x: Array) -> float:
    return min(x.shape[:2]) / _SIDE


def gaussian_noise(x: Array, strength: float, generator: Generator) -> Array:
    """Additive noise of the given standard deviation."""
    return x + generator.normal(scale=strength, size=x.shape)


def shot_noise(x: Array, photons: float, generator: Generator) -> Array:
    """Poisson noise of so many photons at white."""
    return generator.poisson(np.clip(x, 0, 1) * photons) / photons


def impulse_noise(x: Array, amount: float, generator: Generator) -> Array:
    """That share of the values becomes 0 or 1."""
    return util.random_noise(x, mode="s&p", amount=amount, rng=generator)


def _blurred(x: Array, sigma: float) -> Array:
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def defocus_blur(x: Array, parameters: tuple[float, float], generator: Generator) -> Array:
    """Mean over a disk; its edge is soft by the second parameter."""
    radius, softness = (value * _scale(x) for value in parameters)
    reach = int(np.ceil(radius + 1))
    axis = np.arange(-reach, reach + 1)
    distance = np.hypot(axis[:, None], axis[None, :])
    kernel = ndimage.gaussian_filter(np.clip(radius + 0.5 - distance, 0, 1), softness)
    return ndimage.convolve(x, (kernel / kernel.sum())[:, :, None], mode="nearest")


def _looked_up(x: Array, places: Array, mode: str) -> Array:
    """Colours at fractional places (2, H, W)."""
    channels = [ndimage.map_coordinates(x[:, :, c], places, order=1, mode=mode) for c in range(x.shape[2])]
    return np.stack(channels, -1)


def glass_blur(x: Array, parameters: tuple[float, int, int], generator: Generator) -> Array:
    """Blur, move every pixel at random by up to `reach`, `times` over, and blur again."""
    times = parameters[2]
    sigma, reach = parameters[0] * _scale(x), parameters[1] * _scale(x)
    x = _blurred(x, sigma)
    for _ in range(times):
        places = np.indices(x.shape[:2]) + generator.uniform(-reach, reach, (2, *x.shape[:2]))
        x = _looked_up(x, places, "nearest")
    return _blurred(x, sigma)


def _motion(x: Array, radius: float, sigma: float, angle: float) -> Array:
    """One-sided Gaussian mean along a line; lengths in pixels of this picture, angle in degrees."""
    offsets = np.linspace(0, 2 * radius, int(np.ceil(2 * radius)) + 2)
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    direction = np.sin(np.deg2rad(angle)), np.cos(np.deg2rad(angle))
    moved = [
        w * ndimage.shift(x, (direction[0] * o, direction[1] * o, 0)[: x.ndim], order=1, mode="nearest")
        for o, w in zip(offsets, weights / weights.sum(), strict=True)
    ]
    return np.sum(moved, axis=0)


def motion_blur(x: Array, parameters: tuple[float, float], generator: Generator) -> Array:
    """Blur along a random direction."""
    radius, sigma = (value * _scale(x) for value in parameters)
    return _motion(x, radius, sigma, generator.uniform(-45, 45))


def _zoomed(x: Array, factor: float) -> Array:
    """Enlarged about the centre, at the same size."""
    matrix = np.array([1 / factor, 1 / factor, 1.0][: x.ndim])
    centre = (np.array(x.shape) - 1) / 2
    return ndimage.affine_transform(x, matrix, centre - matrix * centre, order=1, mode="nearest")


def zoom_blur(x: Array, parameters: tuple[float, float], generator: Generator) -> Array:
    """Mean of enlargements from 1 to `largest` in steps."""
    largest, step = parameters
    factors = np.arange(1, largest, step)
    return (x + np.sum([_zoomed(x, factor) for factor in factors], axis=0)) / (len(factors) + 1)


def snow(x: Array, parameters: tuple[float, ...], generator: Generator) -> Array:
    """Streaks of bright flakes over a whitened picture."""
    mean, deviation, zoom, threshold, radius, sigma, mix = parameters
    layer = _zoomed(generator.normal(mean, deviation, x.shape[:2]), zoom)
    layer[layer < threshold] = 0
    layer = _motion(np.clip(layer, 0, 1), radius * _scale(x), sigma * _scale(x), generator.uniform(-135, -45))[
        :, :, None
    ]
    whitened = np.maximum(x, color.rgb2gray(np.clip(x, 0, 1))[:, :, None] * 1.5 + 0.5)
    return mix * x + (1 - mix) * whitened + layer + layer[::-1, ::-1]


def _plasma(side: int, decay: float, generator: Generator) -> Array:
    """Fractal noise in [0, 1] by diamonds and squares; `side` is a power of two, the noise wraps around.

    The amplitude falls by decay² at each halving: the original multiplies its noise by `strength` twice.
    """
    field, step, strength = np.zeros((side, side)), side, 100.0
    while step >= 2:
        half = step // 2
        corners = field[::step, ::step]
        squares = (corners + np.roll(corners, -1, 0) + np.roll(corners, -1, 1) + np.roll(corners, (-1, -1), (0, 1))) / 4
        field[half::step, half::step] = squares + generator.uniform(-(strength**2), strength**2, squares.shape)
        middles = field[half::step, half::step]
        for axis in (0, 1):  # the diamonds between corners along the other axis
            near = (middles + np.roll(middles, 1, axis) + corners + np.roll(corners, -1, 1 - axis)) / 4
            places = (slice(None, None, step), slice(half, None, step))[:: 1 - 2 * axis]
            field[places] = near + generator.uniform(-(strength**2), strength**2, near.shape)
        step, strength = half, strength / decay
    field -= field.min()
    return field / field.max()


def fog(x: Array, parameters: tuple[float, float], generator: Generator) -> Array:
    """Fractal brightness added, then the range restored."""
    strength, decay = parameters
    side = 2 ** int(np.ceil(np.log2(max(x.shape[:2]))))
    layer = _plasma(side, decay, generator)[: x.shape[0], : x.shape[1], None]
    return (x + strength * layer) * x.max() / (x.max() + strength)


def brightness(x: Array, amount: float, generator: Generator) -> Array:
    """Value of HSV raised."""
    hsv = color.rgb2hsv(np.clip(x, 0, 1))
    hsv[:, :, 2] = np.clip(hsv[:, :, 2] + amount, 0, 1)
    return color.hsv2rgb(hsv)


def contrast(x: Array, factor: float, generator: Generator) -> Array:
    """Distance from each channel's mean shrunk."""
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * factor + mean


def elastic_transform(x: Array, parameters: tuple[float, float, float], generator: Generator) -> Array:
    """A random affine map, then a smooth random displacement; lengths are shares of the side."""
    side = min(x.shape[:2])
    alpha, sigma, corner = (value * side * 244 / _SIDE for value in parameters)
    centre, third = np.array(x.shape[:2]) // 2, side // 3
    before = np.array([centre + third, [centre[0] + third, centre[1] - third], centre - third], dtype=float)
    after = before + generator.uniform(-corner, corner, before.shape)
    linear = np.linalg.solve(np.c_[after, np.ones(3)], before)  # output position -> input position
    grid = np.moveaxis(np.indices(x.shape[:2]), 0, -1).astype(float)
    grid = grid @ linear[:2] + linear[2]
    noise = generator.uniform(-1, 1, (2, *x.shape[:2]))
    shift = np.stack([ndimage.gaussian_filter(n, sigma, mode="reflect", truncate=3) * alpha for n in noise])
    return _looked_up(x, np.moveaxis(grid, -1, 0) + shift, "reflect")


def _as_picture(x: Array) -> Image.Image:
    return Image.fromarray((np.clip(x, 0, 1) * 255).round().astype(np.uint8))


def pixelate(x: Array, share: float, generator: Generator) -> Array:
    """Fewer pixels, each a block."""
    height, width = x.shape[:2]
    small = _as_picture(x).resize((max(1, int(width * share)), max(1, int(height * share))), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.NEAREST)) / 255


def jpeg_compression(x: Array, quality: int, generator: Generator) -> Array:
    """Stored as JPEG of that quality."""
    buffer = io.BytesIO()
    _as_picture(x).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer)) / 255


CORRUPTIONS: dict[str, tuple[Callable[[Array, Any, Generator], Array], tuple[Any, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "glass_blur": (glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": (motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": (zoom_blur, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))),
    "snow": (
        snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "fog": (fog, ((1.5, 2), (2.0, 2), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))),
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": (
        elastic_transform,
        ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    ),
    "pixelate": (pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (jpeg_compression, (25, 18, 15, 10, 7)),
}
"""Name -> function of (H, W, 3), parameter and generator, and its parameters at severities 1 to 5."""


def corrupt(image: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    """Corrupt one picture.

    Args:
        image: (3, H, W) in [0, 1].
        name: A name in `CORRUPTIONS`.
        severity: 1 to 5.
        seed: Of what is random in it.

    Returns:
        (3, H, W) in [0, 1].

    Raises:
        UserError: If the name or the severity does not exist.
    """
    if name not in CORRUPTIONS:
        raise UserError(f"no corruption {name!r}: {nearest(name, list(CORRUPTIONS))}")
    function, parameters = CORRUPTIONS[name]
    if severity not in range(1, len(parameters) + 1):
        raise UserError(f"severity must be 1 to {len(parameters)}, not {severity}.")
    pixels = image.permute(1, 2, 0).double().cpu().numpy()
    changed = function(pixels, parameters[severity - 1], np.random.default_rng(seed))
    return torch.from_numpy(np.clip(changed, 0, 1)).permute(2, 0, 1).float()
