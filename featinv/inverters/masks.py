"""Which part of a feature map counts: some channels, the strongest channels, a region."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from featinv.errors import UserError


def channel_mask(features: Tensor, channels: Sequence[int]) -> Tensor:
    """1 for the given channels of features (N, C, H, W), else 0; shape (1, C, 1, 1).

    Raises:
        UserError: If a channel does not exist.
    """
    count = features.shape[1]
    wrong = [c for c in channels if not 0 <= c < count]
    if wrong or not len(channels):
        raise UserError(f"channels must be 0 to {count - 1}, not {wrong or 'none'}.")
    mask = torch.zeros(1, count, 1, 1, device=features.device)
    mask[:, list(channels)] = 1
    return mask


def top_channels(features: Tensor, n: int) -> Tensor:
    """1 for each image's n channels of largest energy, else 0; (N, C, 1, 1).

    Raises:
        UserError: If n is not in [1, C].
    """
    if not 1 <= n <= features.shape[1]:
        raise UserError(f"n must be 1 to {features.shape[1]}, not {n}.")
    energy = features.square().sum((2, 3))
    mask = torch.zeros_like(energy).scatter_(1, energy.topk(n, 1).indices, 1.0)
    return mask[:, :, None, None]


def region_mask(features: Tensor, box: Sequence[float]) -> Tensor:
    """1 for positions whose centre lies in a box, else 0; (1, 1, H, W).

    Args:
        features: (N, C, H, W).
        box: (left, top, right, bottom) as fractions of the picture.

    Raises:
        UserError: If the box is not one, or holds no position.
    """
    if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise UserError(f"a region is (left, top, right, bottom) with rising numbers in [0, 1], not {list(box)}.")
    height, width = features.shape[2:]
    y = (torch.arange(height, device=features.device) + 0.5) / height
    x = (torch.arange(width, device=features.device) + 0.5) / width
    inside = ((y >= box[1]) & (y <= box[3]))[:, None] & ((x >= box[0]) & (x <= box[2]))
    if not inside.any():
        raise UserError(f"the region {list(box)} holds no position of a {height} x {width} map; make it larger.")
    return inside.to(features.dtype)[None, None]
