"""Masked features: what stands for a value that is not given, and random masks in training.

Whoever leaves values out of a feature map, in training, in subset inversion or in a composite, does it with `masked`
and `mean_feature`, so that an inverter trained with masks meets when used what it met in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featinv.conditioning.encoders import Whitening
from featinv.errors import UserError


def mean_feature(inverter: Any, channels: int) -> Tensor:
    """What replaces a masked value, one number per channel: (C,).

    It is the mean feature of the inverter's whitening, which becomes zero after it; zeros for an inverter without.

    Args:
        inverter: Any inverter.
        channels: C of its features.
    """
    modules = inverter.modules() if isinstance(inverter, nn.Module) else ()
    for module in modules:
        if isinstance(module, Whitening) and len(module.mean) == channels:
            return module.mean.detach()
    return torch.zeros(channels)


def masked(features: Tensor, keep: Tensor, mean: Tensor) -> Tensor:
    """Features (N, C, H, W) where `keep` is true, elsewhere the mean feature (C,).

    Args:
        features: (N, C, H, W).
        keep: Bool or 0 / 1, of a shape that broadcasts to the features'.
        mean: From `mean_feature`.
    """
    return torch.where(keep.to(features.device).bool(), features, mean.to(features)[:, None, None])


class FeatureMasking:
    """Random masks of positions and channels, in each map of a batch on its own.

    Of the masked maps every share of kept values is as likely as any other. Kept positions are scattered in half of
    them; in the other half they are a rectangle or all but a rectangle.

    Args:
        p_positions: Probability that a map loses positions.
        p_channels: Probability that a map loses channels.
    """

    def __init__(self, p_positions: float = 0.0, p_channels: float = 0.0):
        if not (0 <= p_positions <= 1 and 0 <= p_channels <= 1):
            raise UserError(f"masking probabilities must be in [0, 1], not {p_positions} and {p_channels}.")
        self.p_positions, self.p_channels = p_positions, p_channels

    @property
    def active(self) -> bool:
        """Whether any map is ever masked."""
        return self.p_positions > 0 or self.p_channels > 0

    def draw(self, shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
        """What is kept of N maps of `shape` (C, H, W): bool (N, C, H, W); row i depends on seeds[i] alone."""
        return torch.stack([self._row(shape, torch.Generator().manual_seed(seed ^ 0x3A5C)) for seed in seeds])

    def __call__(self, features: Tensor, mean: Tensor, seeds: Sequence[int]) -> Tensor:
        """Mask features (N, C, H, W) with the mean feature (C,)."""
        if not self.active:
            return features
        return masked(features, self.draw(features.shape[1:], seeds), mean)

    def _row(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        channels, height, width = shape
        u = torch.rand(2, generator=generator)
        keep = torch.ones(channels, height, width, dtype=torch.bool)
        if u[0] < self.p_positions:
            keep &= _positions(height, width, generator)
        if u[1] < self.p_channels:
            share = torch.rand((), generator=generator)
            keep &= (torch.rand(channels, generator=generator) < share)[:, None, None]
        return keep


def _positions(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Kept positions (H, W): scattered, a rectangle, or all but one."""
    kind, share = torch.rand(2, generator=generator).tolist()
    if kind < 0.5:
        return torch.rand(height, width, generator=generator) < share
    inside = torch.zeros(height, width, dtype=torch.bool)
    (top, bottom), (left, right) = _interval(height, generator), _interval(width, generator)
    inside[top:bottom, left:right] = True
    return inside if kind < 0.75 else ~inside


def _interval(size: int, generator: torch.Generator) -> tuple[int, int]:
    """A random interval [first, last) within [0, size), of a length from 1 to `size`."""
    length = int(torch.randint(1, size + 1, (), generator=generator))
    first = int(torch.randint(0, size - length + 1, (), generator=generator))
    return first, first + length
