"""Features -> the embedding that enters the branch, on the latent grid; runs once per image."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featinv.backbones.base import FeatureSpec
from featinv.errors import UserError


def _check(features: Tensor, spec: FeatureSpec) -> None:
    if features.ndim != 4 or features.shape[1] != spec.channels:
        raise UserError(
            f"features of shape {tuple(features.shape)} do not fit this inverter, which was built for "
            f"(N, {spec.channels}, {spec.height}, {spec.width}) of layer {spec.layer!r}."
        )


class Whitening(nn.Module):
    """Decorrelate channels: subtract the mean, project on the leading principal components, scale to unit variance.

    Few directions carry most of the variance of a deep feature map; without whitening a convolution hears only those.

    Args:
        channels: C of the features.
        components: How many directions are kept.
    """

    mean: Tensor
    projection: Tensor
    fitted: Tensor

    def __init__(self, channels: int, components: int):
        super().__init__()
        components = min(components, channels)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("projection", torch.eye(channels)[:components].clone())
        self.register_buffer("fitted", torch.tensor(False))

    @torch.no_grad()
    def fit(self, features: Tensor, floor: float = 1e-3) -> None:
        """Fit on features (N, C, H, W); directions below `floor` of the largest variance are not blown up further."""
        columns = features.float().permute(0, 2, 3, 1).flatten(0, 2)  # (N H W, C)
        mean = columns.mean(0)
        centred = columns - mean
        # Of a covariance without full rank float32 may find eigenvectors that are NaN.
        values, vectors = torch.linalg.eigh((centred.T @ centred / len(centred)).double())
        values, vectors = values.flip(0), vectors.flip(1)
        keep = len(self.projection)
        # A single vector, as of one pooled map, varies in no direction, and none is scaled.
        least = floor * float(values[0]) if values[0] > 0 else 1.0
        scale = values[:keep].clamp(min=least).rsqrt()
        self.mean.copy_(mean)
        self.projection.copy_((vectors[:, :keep] * scale).T)
        self.fitted.fill_(True)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, components, H, W)."""
        return torch.einsum("kc,nchw->nkhw", self.projection, features - self.mean[:, None, None])


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(16, channels), channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class _Resize(nn.Module):
    """Bilinear resize, convolution to another width, one residual block."""

    def __init__(self, grid: tuple[int, int], channels_in: int, channels_out: int):
        super().__init__()
        self.grid = grid
        self.conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.block = _Residual(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.conv(F.interpolate(x, self.grid, mode="bilinear", align_corners=False)))


def _grids(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """Grids on the way from `start` (exclusive) to `end`, doubling as long as that stays below half of `end`."""
    grids = []
    while start[0] * 4 <= end[0] and start[1] * 4 <= end[1]:
        start = (start[0] * 2, start[1] * 2)
        grids.append(start)
    return [*grids, end]


class RidgeEstimate(nn.Module):
    """A linear estimate of the latents, solved in closed form before training and fixed from then on.

    Each feature position sees its 3 x 3 neighbourhood and predicts the block of latent positions that lies over it.

    Args:
        channels: Of the whitened features.
        grid: (height, width) of the features.
        latent_shape: (c, h, w) of the latents.
    """

    weight: Tensor

    def __init__(self, channels: int, grid: tuple[int, int], latent_shape: tuple[int, int, int]):
        super().__init__()
        c, h, w = latent_shape
        fits = h % grid[0] == 0 and w % grid[1] == 0 and h // grid[0] == w // grid[1]
        self.block = h // grid[0] if fits else 1
        self.grid = (h // self.block, w // self.block)
        self.register_buffer("weight", torch.zeros(c * self.block**2, 9 * channels + 1))

    def _columns(self, whitened: Tensor) -> Tensor:
        """(N, K, H, W) -> (N, 9 K + 1, positions); the last row is the bias."""
        if tuple(whitened.shape[2:]) != self.grid:
            whitened = F.adaptive_avg_pool2d(whitened, self.grid)
        columns = F.unfold(whitened, 3, padding=1)
        return torch.cat([columns, torch.ones_like(columns[:, :1])], 1)

    @torch.no_grad()
    def fit(self, whitened: Tensor, latents: Tensor, ridge: float = 0.03) -> None:
        """Solve for whitened features (N, K, H, W) and latents (N, c, h, w); `ridge` is the penalty per row."""
        size = self.weight.shape[1]
        gram, cross, rows = torch.zeros(size, size), torch.zeros(size, self.weight.shape[0]), 0
        for x, y in zip(whitened.split(256), latents.split(256), strict=True):
            columns = self._columns(x).transpose(1, 2).flatten(0, 1)
            targets = F.pixel_unshuffle(y, self.block).flatten(2).transpose(1, 2).flatten(0, 1)
            gram, cross, rows = gram.addmm_(columns.T, columns), cross.addmm_(columns.T, targets), rows + len(columns)
        gram.diagonal()[:-1].add_(ridge * rows)
        self.weight.copy_(torch.linalg.solve(gram, cross).T)

    def forward(self, whitened: Tensor) -> Tensor:
        """(N, K, H, W) -> (N, c, h, w)."""
        blocks = (self.weight @ self._columns(whitened)).unflatten(2, self.grid)
        return F.pixel_shuffle(blocks, self.block)


class SpatialEncoder(nn.Module):
    """Whitened features -> mixing at their own resolution -> doubled up to the latent grid -> the embedding.

    Beside the embedding it estimates the clean latents: a small head on the trunk, trained with a regression loss,
    if wanted on top of a closed-form linear estimate. So the branch is told early roughly where to go, long before its
    zero convolutions let a gradient through; the estimate is also the posterior mean that a regression inverter would
    draw.

    Args:
        spec: The backbone's feature spec.
        latent_shape: (c, h, w) of the latents.
        embedding_channels: Channels of the UNet's first block.
        components: Whitened directions kept.
        hidden: Width of the trunk; on the latent grid, where it costs most, half of it.
        blocks: Residual blocks at the features' own resolution; each doubling on the way up has one.
        linear: Whether the closed-form estimate is used. Needs far more images than 9 x components: fitted to a few
            thousand it is better on them than on new ones, and what is trained on top learns to trust it too much.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        latent_shape: tuple[int, int, int],
        embedding_channels: int,
        components: int = 384,
        hidden: int = 192,
        blocks: int = 2,
        linear: bool = False,
    ):
        super().__init__()
        self.spec, self.latent_shape = spec, latent_shape
        self.whitening = Whitening(spec.channels, components)
        width = len(self.whitening.projection)
        self.linear = RidgeEstimate(width, (spec.height, spec.width), latent_shape) if linear else None
        self.mix = nn.Sequential(nn.Conv2d(width, hidden, 3, padding=1), *(_Residual(hidden) for _ in range(blocks)))
        grids, fine = _grids((spec.height, spec.width), (latent_shape[1], latent_shape[2])), hidden // 2
        widths = [hidden] * len(grids) + [fine]
        resizes = (_Resize(grid, *pair) for grid, pair in zip(grids, pairwise(widths), strict=True))
        self.refine = nn.Sequential(*resizes, nn.GroupNorm(math.gcd(16, fine), fine), nn.SiLU())
        self.latents_head = nn.Conv2d(fine, latent_shape[0], 3, padding=1)
        nn.init.zeros_(self.latents_head.weight)
        self.embedding_head = nn.Conv2d(fine + latent_shape[0], embedding_channels, 3, padding=1)

    def _whitened(self, features: Tensor) -> Tensor:
        _check(features, self.spec)
        return self.whitening(features)

    @torch.no_grad()
    def fit(self, features: Tensor, latents: Tensor) -> None:
        """Set whitening and linear estimate from features (N, C, H, W) and latents (N, c, h, w), before training."""
        self.whitening.fit(features)
        if self.linear is not None:
            self.linear.fit(self._whitened(features), latents)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embedding (N, C0, h, w) and the regression estimate of the latents (N, c, h, w)."""
        whitened = self._whitened(features)
        trunk = self.refine(self.mix(whitened))
        latents = self.latents_head(trunk)
        if self.linear is not None:
            latents = latents + self.linear(whitened)
        # Detached: the estimate serves the branch, the branch does not bend the estimate.
        return self.embedding_head(torch.cat([trunk, latents.detach()], 1)), latents


class PooledEncoder(SpatialEncoder):
    """The same after averaging the features over all positions: what a non-spatial inverter is told (ablation).

    The pooled vector is copied to every position beside learned position channels, so that it can place things at all;
    the linear estimate, which could not, is left out.

    Args:
        spec: The backbone's feature spec.
        latent_shape: (c, h, w) of the latents.
        embedding_channels: Channels of the UNet's first block.
        components: Whitened directions kept.
        hidden: Width of the trunk.
        blocks: As of `SpatialEncoder`.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        latent_shape: tuple[int, int, int],
        embedding_channels: int,
        components: int = 384,
        hidden: int = 192,
        blocks: int = 2,
    ):
        super().__init__(spec, latent_shape, embedding_channels, components, hidden, blocks, linear=False)
        width = len(self.whitening.projection)
        self.position = nn.Parameter(torch.randn(1, width, spec.height, spec.width))

    def _whitened(self, features: Tensor) -> Tensor:
        pooled = super()._whitened(features).mean((2, 3), keepdim=True)
        return pooled.expand(-1, -1, *self.position.shape[2:]) + self.position

    @torch.no_grad()
    def fit(self, features: Tensor, latents: Tensor) -> None:
        """Set the whitening from the averages of features (N, C, H, W)."""
        self.whitening.fit(features.mean((2, 3), keepdim=True))


class PublishedEncoder(nn.Module):
    """The published hint encoder (arXiv 2505.21032): bilinear resize, conv, SiLU, conv, SiLU, zero convolution.

    Args:
        spec: The backbone's feature spec.
        latent_shape: (c, h, w) of the latents.
        embedding_channels: Channels of the UNet's first block.
        hidden: Width of the two convolutions.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        latent_shape: tuple[int, int, int],
        embedding_channels: int,
        hidden: int = 512,
    ):
        super().__init__()
        self.spec, self.latent_shape = spec, latent_shape
        self.conv1 = nn.Conv2d(spec.channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.out = nn.Conv2d(hidden, embedding_channels, 3, padding=1)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def fit(self, features: Tensor, latents: Tensor) -> None:
        """Nothing is set before training."""

    def forward(self, features: Tensor) -> tuple[Tensor, None]:
        """Return the embedding (N, C0, h, w); there is no estimate of the latents."""
        _check(features, self.spec)
        resized = F.interpolate(features, self.latent_shape[1:], mode="bilinear", align_corners=False)
        return self.out(F.silu(self.conv2(F.silu(self.conv1(resized))))), None
