"""Features <-> pictures in batches, with a progress that a terminal, an app or a test can listen to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featinv.backbones.base import Backbone
from featinv.errors import UserError
from featinv.inverters.base import Inverter
from featinv.inverters.reconstruct import sample_seed

Progress = Callable[[int, int], None]
"""Called as progress(done, total) after every batch; what it raises ends the work (cancel)."""


def seeds_of(seed: int, count: int) -> list[int]:
    """Seeds of `count` samples; sample k follows from (seed, k)."""
    return [sample_seed(seed, "applications", k) for k in range(count)]


def decode(
    inverter: Inverter,
    features: Tensor,
    seeds: Sequence[int],
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Tensor:
    """Invert features (N, C, H, W) with N seeds; images (N, 3, H', W') on the CPU.

    Raises:
        UserError: If there are not as many seeds as maps.
    """
    if len(seeds) != len(features):
        raise UserError(f"{len(features)} feature maps need as many seeds, not {len(seeds)}.")
    device, parts = device_of(inverter), []
    for start in range(0, len(features), batch_size):
        rows = slice(start, start + batch_size)
        parts.append(inverter.invert(features[rows].to(device), seeds=list(seeds[rows])).detach().cpu())
        if progress is not None:
            progress(min(start + batch_size, len(features)), len(features))
    return torch.cat(parts)


@torch.no_grad()
def encode(backbone: Backbone, images: Tensor, batch_size: int = 64) -> Tensor:
    """Features (N, C, H, W) of images (N, 3, H', W') in [0, 1], on the CPU."""
    return torch.cat([backbone(part.to(backbone.mean.device)).cpu() for part in images.split(batch_size)])


def small_maps(backbone: Backbone, images: Tensor, grid: int = 2, batch_size: int = 64) -> Tensor:
    """Features averaged to a small grid, (N, C grid^2), batch by batch: early maps are large."""
    parts = images.split(batch_size)
    return torch.cat([F.adaptive_avg_pool2d(encode(backbone, part), grid).flatten(1) for part in parts])


@torch.no_grad()
def probabilities(backbone: Backbone, images: Tensor, batch_size: int = 64) -> Tensor | None:
    """Class probabilities (N, K) of images (N, 3, H, W), None for a backbone without a classifier."""
    try:
        parts = [backbone.logits(part.to(backbone.mean.device)) for part in images.split(batch_size)]
    except UserError:
        return None
    return torch.cat(parts).softmax(1).cpu()


def device_of(inverter: Any) -> torch.device:
    """Where an inverter works: its weights' device, else that of the inverter or backbone it is built on."""
    if isinstance(inverter, nn.Module):
        for parameter in inverter.parameters():
            return parameter.device
    for name in ("inverter", "backbone"):
        if getattr(inverter, name, None) is not None:
            return device_of(getattr(inverter, name))
    return torch.device("cpu")
