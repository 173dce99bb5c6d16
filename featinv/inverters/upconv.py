"""An up-convolutional decoder: features -> the one average picture (Dosovitskiy & Brox 2016, arXiv 1506.02753)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featinv.backbones.base import Backbone, FeatureSpec
from featinv.conditioning.encoders import Whitening
from featinv.diffusion.half import full_arithmetic
from featinv.errors import UserError
from featinv.image import resize


class UpconvInverter(nn.Module):
    """Whitened features -> convolutions, doubling the resolution until the picture's side is reached.

    Trained with squared error it draws the mean of all pictures that have the features: right colours and places, no
    sharp edges. A feature term makes it sharper and closer in the backbone it is trained on.

    Args:
        spec: The backbone's feature spec.
        size: Side of the pictures in pixels.
        backbone: Judges the feature term; frozen.
        components: Whitened directions kept.
        width: Channels at the features' resolution; halved at every doubling, but not below 32.
        pixel_weight: Weight of the squared error.
        feature_weight: Weight of 1 - cosine in the backbone; 0 leaves it out.
        feature_rows: Images of a batch that get the feature term.
    """

    prior = None

    def __init__(
        self,
        spec: FeatureSpec,
        size: int,
        backbone: Backbone | None = None,
        components: int = 384,
        width: int = 256,
        pixel_weight: float = 4.0,
        feature_weight: float = 0.0,
        feature_rows: int = 16,
    ):
        super().__init__()
        if feature_weight and backbone is None:
            raise UserError("the up-convolutional decoder needs a backbone for its feature term.")
        self.spec, self.size = spec, size
        self._backbone = [backbone]  # outside the module tree: never saved, never trained
        self.pixel_weight, self.feature_weight, self.feature_rows = pixel_weight, feature_weight, feature_rows
        self.whitening = Whitening(spec.channels, components)
        layers: list[nn.Module] = [nn.Conv2d(len(self.whitening.projection), width, 3, padding=1)]
        side = spec.height
        while side < size:
            layers += [_Doubling(width, max(32, width // 2))]
            width, side = max(32, width // 2), side * 2
        self.layers = nn.Sequential(*layers, nn.LeakyReLU(0.2), nn.Conv2d(width, 3, 3, padding=1))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def prepare(self, features: Tensor, latents: Tensor | None) -> None:
        """Fit the whitening to features (N, C, H, W)."""
        self.whitening.fit(features)

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, C, H, W) -> images (N, 3, size, size), not clamped."""
        if features.shape[1] != self.spec.channels:
            raise UserError(
                f"features of {features.shape[1]} channels do not fit this decoder, built for {self.spec.channels}."
            )
        # Pixels in fp32, also under autocast: CPUs have no half-precision gradient of an antialiased resize.
        images = self.layers(self.whitening(features)).float() + 0.5
        return resize(images, self.size)

    @torch.no_grad()
    def invert(self, features: Tensor, *, seeds: Sequence[int]) -> Tensor:
        """Features (N, C, H, W) -> images (N, 3, size, size) in [0, 1]; the seeds change nothing."""
        return self(features).clamp(0, 1)

    def training_losses(
        self, images: Tensor | None, features: Tensor, *, seeds: Sequence[int], latents: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Squared error and 1 - cosine; returns "loss" () and its parts.

        Raises:
            UserError: If there are no images: a cache of latents cannot train a decoder of pixels.
        """
        if images is None:
            raise UserError("the up-convolutional decoder is trained on images; build the cache with them.")
        again = self(features)
        pixel = (again - images).square().mean()
        losses = {"loss": self.pixel_weight * pixel, "pixel": pixel.detach()}
        backbone = self._backbone[0]
        if self.feature_weight and backbone is not None:
            with full_arithmetic(again.device):
                found = backbone(again[: self.feature_rows].clamp(0, 1)).flatten(1)
                distance = 1 - F.cosine_similarity(found, features[: self.feature_rows].flatten(1)).mean()
            losses |= {"loss": losses["loss"] + self.feature_weight * distance, "feature": distance.detach()}
        return losses

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters."""
        return self.parameters()

    def trainable_state(self) -> dict[str, Tensor]:
        """All parameters and the whitening."""
        return self.state_dict()


class _Doubling(nn.Module):
    """Nearest-neighbour doubling and two convolutions: no checkerboard, unlike a strided transposed convolution."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(F.leaky_relu(x, 0.2), scale_factor=2.0, mode="nearest")
        x = self.conv1(x)
        return x + self.conv2(F.leaky_relu(x, 0.2))
