"""Pictures. One convention everywhere: float tensors (N, 3, H, W) with values in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from featinv.errors import UserError
from featinv.files import atomic_write


def to_uint8(images: Tensor) -> Tensor:
    """Float [0, 1] -> uint8, rounded."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def resize(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Bilinear with antialiasing; (N, C, H, W) -> (N, C, *size)."""
    size = (size, size) if isinstance(size, int) else size
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise (N, *shape), drawn on the CPU, row i from seeds[i] alone."""
    rows = [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return torch.stack(rows)


def save_png(path: str | Path, image: Tensor) -> None:
    """Write one image (3, H, W) in [0, 1], losslessly and atomically."""
    array = to_uint8(image).permute(1, 2, 0).cpu().numpy()
    with atomic_write(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG")


def load_png(path: str | Path) -> Tensor:
    """Read what `save_png` wrote: (3, H, W) in [0, 1].

    Raises:
        UserError: If the file is missing or damaged.
    """
    try:
        with Image.open(path) as file:
            array = np.array(file.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise UserError(f"{path} is not a readable picture ({error}).") from error
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255


def make_grid(
    rows: Sequence[Tensor], labels: Sequence[str] = (), scale: int = 2, pad: int = 2, label_width: int = 110
) -> Tensor:
    """Lay out rows of pictures with a label before each row.

    Args:
        rows: One tensor (K, 3, H, W) in [0, 1] for each row.
        labels: One text for each row, or none.
        scale: Nearest-neighbour enlargement, so that small pictures can be looked at.
        pad: White pixels between pictures.
        label_width: Least pixels for the labels, which get as many as the longest needs; unused without labels.

    Returns:
        One picture (3, H', W') in [0, 1].
    """
    strips, label_width = [], max([label_width, *map(_text_width, labels)])
    for number, row in enumerate(rows):
        big = F.interpolate(row.detach().cpu().float(), scale_factor=scale, mode="nearest")
        big = F.pad(big, (0, pad, 0, pad), value=1.0)
        strip = big.permute(1, 2, 0, 3).flatten(2)
        if labels:
            strip = torch.cat([_label(labels[number], strip.shape[1], label_width), strip], 2)
        strips.append(strip)
    width = max(strip.shape[2] for strip in strips)
    return torch.cat([F.pad(strip, (0, width - strip.shape[2]), value=1.0) for strip in strips], 1)


def _text_width(text: str) -> int:
    left, _, right, _ = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((4, 0), text)
    return math.ceil(right + left)


def _label(text: str, height: int, width: int) -> Tensor:
    picture = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(picture).multiline_text((4, height // 2 - 8), text, fill="black")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
