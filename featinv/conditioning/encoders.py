"""Features -> the embedding that enters the branch, on the latent grid; runs once per image."""

from __future__ import annotations

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
        values, vectors = torch.linalg.eigh((centred.T @ centred / len(centred)).double())
        values, vectors = values.flip(0), vectors.flip(1)
        keep = len(self.projection)
        scale = values[:keep].clamp(min=floor * float(values[0])).rsqrt()
        self.mean.copy_(mean)
        self.projection.copy_((vectors[:, :keep] * scale).T)
        self.fitted.fill_(True)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, components, H, W)."""
        return torch.einsum("kc,nchw->nkhw", self.projection, features - self.mean[:, None, None])


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(16, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class SpatialEncoder(nn.Module):
    """Whitened features -> mixing at their own resolution -> the latent grid -> the embedding.

    A small head on the trunk estimates the clean latents. Trained with a plain regression loss, it tells the trunk from
    the first step what the branch will need, long before the branch's zero convolutions let a gradient through; its
    estimate is also the posterior mean that a regression inverter would draw.

    Args:
        spec: The backbone's feature spec.
        latent_shape: (c, h, w) of the latents.
        embedding_channels: Channels of the UNet's first block.
        components: Whitened directions kept.
        hidden: Width of the trunk.
        blocks: Residual blocks after the resize to the latent grid (and as many before it).
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
        super().__init__()
        self.spec, self.latent_shape = spec, latent_shape
        self.whitening = Whitening(spec.channels, components)
        width = len(self.whitening.projection)
        self.mix = nn.Sequential(nn.Conv2d(width, hidden, 3, padding=1), *(_Residual(hidden) for _ in range(blocks)))
        self.refine = nn.Sequential(*(_Residual(hidden) for _ in range(blocks)), nn.GroupNorm(16, hidden), nn.SiLU())
        self.latents_head = nn.Conv2d(hidden, latent_shape[0], 3, padding=1)
        self.embedding_head = nn.Conv2d(hidden + latent_shape[0], embedding_channels, 3, padding=1)

    def trunk(self, features: Tensor) -> Tensor:
        """Features (N, C, H, W) -> (N, hidden, h, w)."""
        _check(features, self.spec)
        mixed = self.mix(self.whitening(features))
        return self.refine(F.interpolate(mixed, self.latent_shape[1:], mode="bilinear", align_corners=False))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embedding (N, C0, h, w) and the regression estimate of the latents (N, c, h, w)."""
        trunk = self.trunk(features)
        latents = self.latents_head(trunk)
        # Detached: the estimate serves the branch, the branch does not bend the estimate.
        return self.embedding_head(torch.cat([trunk, latents.detach()], 1)), latents


class PooledEncoder(SpatialEncoder):
    """The same after averaging the features over all positions: what a non-spatial inverter is told (ablation).

    The pooled vector is copied to every position; learned position channels let it place things at all.
    """

    def trunk(self, features: Tensor) -> Tensor:
        """Features (N, C, H, W) -> (N, hidden, h, w) that depend on the spatial mean alone."""
        return super().trunk(features.mean((2, 3), keepdim=True).expand_as(features))


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

    def forward(self, features: Tensor) -> tuple[Tensor, None]:
        """Return the embedding (N, C0, h, w); there is no estimate of the latents."""
        _check(features, self.spec)
        resized = F.interpolate(features, self.latent_shape[1:], mode="bilinear", align_corners=False)
        return self.out(F.silu(self.conv2(F.silu(self.conv1(resized))))), None
