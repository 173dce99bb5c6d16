"""Which of two ways of computing a wide convolution is the faster one, map by map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featinv.diffusion.half import multiplies_half_on_cpu

SMALL, WIDE = 64, 512
"""Up to so many positions of the result, and from so many input channels on, a matrix product beats the convolution on
a CPU in bfloat16: there the kernels rearrange the weights, tens of megabytes, at every call."""


class ConvolutionBySize(nn.Conv2d):
    """A convolution that pads to keep its map's size; small wide maps by one matrix product on a CPU in bfloat16.

    At 1280 to 2560 channels on 8 x 8 and 4 x 4 positions that takes a fifth to nine tenths of the time, forward and
    backward. The weights must lie in memory in channels_last order, in which they are the product's matrix.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, I, H, W) -> (N, O, h, w)."""
        return self._product(input) if self._faster(input) else super().forward(input)

    def _faster(self, images: Tensor) -> bool:
        # Inductor (torch 2.15) writes C++ that no compiler takes where two biases have one gradient, as those of a
        # residual block's second convolution and shortcut have; of convolutions it leaves that to the library.
        if torch.compiler.is_compiling() or not multiplies_half_on_cpu(images):
            return False
        height, width = self._size(images)
        return height * width <= SMALL and self.weight.is_contiguous(memory_format=torch.channels_last)

    def _size(self, images: Tensor) -> tuple[int, int]:
        """Height and width of the result: padding keeps them, a stride divides them."""
        return (images.shape[2] - 1) // self.stride[0] + 1, (images.shape[3] - 1) // self.stride[1] + 1

    def _product(self, images: Tensor) -> Tensor:
        (height, width), (down, right), (rows, columns) = self._size(images), self.stride, self.kernel_size
        padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, columns // 2, columns // 2, rows // 2, rows // 2))
        places = [
            padded[:, i : i + down * (height - 1) + 1 : down, j : j + right * (width - 1) + 1 : right]
            for i in range(rows)
            for j in range(columns)
        ]
        matrix = self.weight.permute(0, 2, 3, 1).flatten(1)  # (O, rows columns I), a view
        return F.linear(torch.cat(places, -1), matrix, self.bias).permute(0, 3, 1, 2)


def convolve_by_size(network: nn.Module) -> None:
    """Let the wide convolutions of the network choose, in place; weights and their names stay what they are."""
    for layer in network.modules():
        if type(layer) is nn.Conv2d and layer.in_channels >= WIDE and _is_plain(layer):
            layer.__class__ = ConvolutionBySize


def _is_plain(layer: nn.Conv2d) -> bool:
    (rows, columns), known = layer.kernel_size, (layer.padding, layer.dilation, layer.groups, layer.padding_mode)
    return rows % 2 == columns % 2 == 1 and known == ((rows // 2, columns // 2), (1, 1), 1, "zeros")
