"""Checks that keep a figure honest: dead channels, blank pictures, and how much a reconstruction gives away."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from featinv.backbones.base import Backbone
from featinv.errors import UserError
from featinv.metrics.distribution import identification, pooled


@dataclass(frozen=True)
class ChannelActivity:
    """How often each channel of one layer was active over a set of images.

    Attributes:
        layer: Name of the layer.
        images: Number of images.
        positions: Number of positions, images x height x width.
        active_images: (C,) images in which the channel is above the threshold anywhere.
        active_positions: (C,) positions at which it is.
        mean: (C,) float64, over all positions.
        std: (C,) float64, over all positions.
        rectified: Whether no value of any channel was below 0.
        constant: (C,) bool, a spread over all positions that is no more than rounding.
        unit_images: (C, H, W) images in which the unit, a channel at one position, is above the threshold.
    """

    layer: str
    images: int
    positions: int
    active_images: Tensor
    active_positions: Tensor
    mean: Tensor
    std: Tensor
    rectified: bool
    constant: Tensor
    unit_images: Tensor

    @property
    def dead(self) -> Tensor:
        """(C,) bool: never above the threshold after a ReLU; constant where negative values carry content too."""
        return self.active_images == 0 if self.rectified else self.constant

    @property
    def dead_count(self) -> int:
        """Number of dead channels."""
        return int(self.dead.sum())

    @property
    def inactive_units(self) -> Tensor:
        """(C, H, W) bool: units, channels at one position, that were above the threshold in no image."""
        return self.unit_images == 0

    @property
    def image_share(self) -> Tensor:
        """(C,) float64: share of images in which the channel is active anywhere."""
        return self.active_images.double() / self.images

    @property
    def position_share(self) -> Tensor:
        """(C,) float64: share of positions at which it is active."""
        return self.active_positions.double() / self.positions


@torch.no_grad()
def dead_channels(
    backbone: Backbone, batches: Iterable[Tensor], threshold: float = 0.0, tolerance: float = 1e-6
) -> ChannelActivity:
    """Count over a data set how often each channel of the feature map is active.

    Args:
        backbone: Whose layer is examined.
        batches: Images (N, 3, H, W) in [0, 1], batch by batch.
        threshold: A channel is active at a position where its value is above it.
        tolerance: A channel whose standard deviation is at most this share of the layer's root mean square is constant.

    Raises:
        UserError: If there are no images.
    """
    images = positions = 0
    low = float("inf")
    channels = backbone.spec.channels
    seen_images, seen_positions = (torch.zeros(channels, dtype=torch.int64) for _ in range(2))
    unit_images = torch.zeros(channels, backbone.spec.height, backbone.spec.width, dtype=torch.int64)
    mean, squares = (torch.zeros(channels, dtype=torch.float64) for _ in range(2))
    for batch in batches:
        if not len(batch):
            continue
        features = backbone(batch.to(backbone.mean.device)).cpu()
        unit_images += (features > threshold).sum(0)
        values = features.transpose(0, 1).flatten(2).double()  # (C, N, H * W)
        active = values > threshold
        seen_images += active.any(2).sum(1)
        seen_positions += active.sum((1, 2))
        low = min(low, float(values.min()))
        # Chan, Golub & LeVeque 1979: sums of squares about running means do not cancel as raw sums do.
        here, count = values.mean((1, 2)), values[0].numel()
        squares += (values - here[:, None, None]).square().sum((1, 2))
        squares += (here - mean).square() * (positions * count / (positions + count))
        mean += (here - mean) * (count / (positions + count))
        images, positions = images + len(batch), positions + count
    if not images:
        raise UserError("counting channels needs at least one image.")
    variance = squares / positions
    scale = (variance + mean.square()).mean().sqrt()
    return ChannelActivity(
        layer=backbone.layer,
        images=images,
        positions=positions,
        active_images=seen_images,
        active_positions=seen_positions,
        mean=mean,
        std=variance.sqrt(),
        rectified=low >= 0,
        constant=variance.sqrt() <= tolerance * scale,
        unit_images=unit_images,
    )


def blank_reconstructions(images: Tensor, threshold: float = 0.02) -> Tensor:
    """Which pictures are nearly one colour.

    Args:
        images: (N, 3, H, W) in [0, 1].
        threshold: Standard deviation over the pixels, in [0, 1] units, that at least one colour channel must exceed.

    Returns:
        (N,) bool; True for a picture with values that are not finite, too.

    Raises:
        UserError: If the images are not (N, C, H, W).
    """
    if images.ndim != 4:
        raise UserError(f"blank pictures are looked for among images (N, C, H, W), not {tuple(images.shape)}.")
    spread = images.detach().double().flatten(2).std(2, correction=0).amax(1)
    # Negated so that NaN, which is above nothing, counts as blank.
    return ~(spread > threshold)


@dataclass(frozen=True)
class LeakCheck:
    """Retrieval of originals by their reconstructions.

    Attributes:
        hits: (N,) float64: 1 where the own original is the nearest, 1 / k where it is one of k equally near, else 0.
        candidates: Number of originals that each reconstruction was compared with, its own included.
    """

    hits: Tensor
    candidates: int

    @property
    def top1(self) -> float:
        """Share of reconstructions whose nearest original is their own."""
        return float(self.hits.mean())

    @property
    def chance(self) -> float:
        """The same for reconstructions that hold nothing of their originals."""
        return 1 / self.candidates


@torch.no_grad()
def leak_check(
    originals: Tensor,
    reconstructions: Tensor,
    referee: Backbone,
    candidates: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> LeakCheck:
    """How often a reconstruction identifies its own original among candidates: `metrics.identification`.

    Nearness is the cosine of the referee's feature maps averaged over positions.

    Args:
        originals: (M, 3, H, W) in [0, 1].
        reconstructions: (N, 3, H', W') in [0, 1], N <= M, row i from original i; further originals are
            candidates only.
        referee: A network that took no part in the reconstruction.
        candidates: Originals to choose among, the own one and others drawn by `seed`; None takes all M.
        seed: Of the draw.
        batch_size: Images evaluated at a time (memory).

    Raises:
        UserError: If there are fewer originals than reconstructions, or candidates is not in 2..M.
    """
    real, fake = (
        torch.cat([pooled(referee(batch.to(referee.mean.device))).cpu() for batch in images.split(batch_size)])
        for images in (originals, reconstructions)
    )
    return LeakCheck(identification(real, fake, candidates, seed), candidates or len(real))
