"""What a frozen backbone offers: images in [0, 1] -> a spatial feature map (N, C, H, W)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featinv.errors import UserError


@dataclass(frozen=True)
class FeatureSpec:
    """Shape of one layer's feature map, found by a dry forward."""

    channels: int
    height: int
    width: int
    layer: str


class Backbone(nn.Module):
    """A frozen network with its own preprocessing; differentiable in the image.

    Args:
        layer: Name of the layer whose map it returns.
        input_size: Pictures are resized to this side before the network.
        mean: Per channel, in [0, 1] units.
        std: Per channel, in [0, 1] units.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, layer: str, input_size: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.layer, self.input_size = layer, input_size
        self.register_buffer("mean", torch.tensor(list(mean)).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).view(1, 3, 1, 1))
        self._spec: FeatureSpec | None = None

    def freeze(self) -> Backbone:
        """Stop gradients to the weights and every change of mode."""
        self.requires_grad_(False).eval()
        # Convolutions are a quarter faster this way, on CPUs and GPUs alike.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: batch statistics must never enter a feature map."""
        return super().train(False)

    def preprocess(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1], any H and W -> the network's input.

        Raises:
            UserError: If the images are not float (N, 3, H, W).
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise UserError(
                f"a backbone needs float images (N, 3, H, W) in [0, 1], not {images.dtype} {tuple(images.shape)}."
            )
        size = (self.input_size, self.input_size)
        if tuple(images.shape[-2:]) != size:
            # Bicubic resizing has no half precision on CPUs.
            images = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False)
        return (images - self.mean) / self.std

    @property
    def spec(self) -> FeatureSpec:
        """Channels, height and width of the map."""
        if self._spec is None:
            with torch.no_grad():
                shape = self(torch.zeros(1, 3, self.input_size, self.input_size, device=self.mean.device)).shape
            self._spec = FeatureSpec(shape[1], shape[2], shape[3], self.layer)
        return self._spec

    @property
    def layers(self) -> list[str]:
        """Names of the layers worth inverting, first to last."""
        return [self.layer]

    def at(self, layer: str) -> Backbone:
        """The same network, sharing its weights, cut at another layer.

        Raises:
            UserError: If there is no such layer, naming the nearest.
        """
        other = copy.copy(self)
        other.layer, other._spec = layer, None
        other._cut()
        return other

    def _cut(self) -> None:
        """Prepare the forward to `self.layer`."""
        raise UserError(f"{type(self).__name__} has one layer only.")

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> features (N, C, H, W)."""
        raise NotImplementedError

    def maps(self, images: Tensor, layers: Sequence[str]) -> list[Tensor]:
        """Maps (N, C, H, W) of the same images at several layers, in one pass where the network allows it.

        Raises:
            UserError: As `at`.
        """
        return [self.at(layer)(images) for layer in layers]

    def final_from(self, features: Tensor) -> Tensor:
        """The network's last map of images whose map at this layer is `features` (N, C, H, W).

        Raises:
            UserError: If this layer's map does not determine it.
        """
        if self.layer == "final":
            return features
        raise UserError(f"{type(self).__name__} cannot go on from layer {self.layer!r} to the last map.")

    def logits_from(self, features: Tensor) -> Tensor:
        """Class scores (N, K) from a feature map (N, C, H, W).

        Raises:
            UserError: If this layer does not determine them.
        """
        raise UserError(f"{type(self).__name__} has no class scores from layer {self.layer!r}; use layer=final.")

    def logits(self, images: Tensor) -> Tensor:
        """Class scores (N, K) of images (N, 3, H, W) in [0, 1]."""
        raise UserError(f"{type(self).__name__} has no classifier.")
