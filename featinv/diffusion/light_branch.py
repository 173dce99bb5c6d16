"""A light branch: runs once per image, not once per sampling step, because it sees neither noise nor timestep."""

from __future__ import annotations

from diffusers import T2IAdapter, UNet2DConditionModel
from torch import Tensor, nn

Residuals = tuple[tuple[Tensor, ...], Tensor]
"""What a branch adds: to each skip connection, and to the middle block."""


class LightBranch(nn.Module):
    """The trunk of a T2I-Adapter (Mou et al. 2023, arXiv 2302.08453, section 3.2) in the place of a ControlNet.

    Its features of each resolution go through zero convolutions to the same places that a ControlNet adds to, so that
    it starts as the prior and fits any UNet.

    Args:
        unet: The prior's; gives channels and numbers of skip connections.
        kind: diffusers' kind of adapter: "full_adapter", or "light_adapter" with a quarter of the width inside.
    """

    def __init__(self, unet: UNet2DConditionModel, kind: str = "full_adapter"):
        super().__init__()
        channels = list(unet.config.block_out_channels)
        self.trunk = T2IAdapter(channels[0], channels, downscale_factor=1, adapter_type=kind)
        self._levels, outputs = [], []
        for level, width in _skips(channels, unet.config.layers_per_block):
            self._levels.append(level)
            outputs.append(_zero_convolution(channels[level], width))
        self.down, self.middle = nn.ModuleList(outputs), _zero_convolution(channels[-1], channels[-1])

    def forward(self, embedding: Tensor) -> Residuals:
        """Embedding (N, C0, h, w) -> residuals for the skip connections and the middle block."""
        levels = self.trunk(embedding)
        down = tuple(convolution(levels[i]) for i, convolution in zip(self._levels, self.down, strict=True))
        return down, self.middle(levels[-1])


def _skips(channels: list[int], layers: int) -> list[tuple[int, int]]:
    """(resolution level, channels) of each skip connection: the first convolution, each block, each downsampling."""
    skips = [(0, channels[0])]
    for level, width in enumerate(channels):
        skips += [(level, width)] * layers
        if level < len(channels) - 1:
            skips.append((level + 1, width))
    return skips


def _zero_convolution(inputs: int, outputs: int) -> nn.Conv2d:
    convolution = nn.Conv2d(inputs, outputs, 1)
    nn.init.zeros_(convolution.weight)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return convolution
