"""Which of four ways of computing a wide convolution is the fastest one, map by map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featinv.diffusion.half import multiplies_float_on_cpu, multiplies_half_on_cpu
from featinv.diffusion.winograd import transformed, winograd
from featinv.diffusion.winograd_float import winograd_float

SMALL, WIDE = 64, 512
"""Up to so many positions of the result, and from so many input channels on, a matrix product beats the convolution on
a CPU in bfloat16: there the kernels rearrange the weights, tens of megabytes, at every call."""

LARGE, CHANNELS = 256, 320
"""From so many positions, and so many input and output channels, on, Winograd's way beats the convolution: below, its
weights take longer to read than its products to compute, or its additions longer than what they save."""

LARGEST, FEWEST, WIDER = 1024, 128, 640
"""In float32, from so many positions on, so many channels are enough; and products need more input channels."""


class ConvolutionBySize(nn.Conv2d):
    """A convolution that pads to keep its map's size; on a CPU by matrix products where they are faster.

    In bfloat16, frozen 3 x 3 kernels on large maps of even sides in Winograd's way: six to eight tenths of the time,
    forward and backward, for 16 / 9 of the weights' memory once more. Small wide maps by one matrix product: at 1280 to
    2560 channels on 8 x 8 and 4 x 4 positions a fifth to nine tenths of the time. For that the weights must lie in
    memory in channels_last order, in which they are the product's matrix.

    In float32, 3 x 3 kernels, trained or not, on large maps whose sides are multiples of four in a way of Winograd's
    with larger blocks: a third to a half of the time. Small wide maps by a product where the kernel is trained, whose
    gradient then takes six to eight tenths of the time. Which way is taken does not depend on the batch.
    """

    _transformed: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """(N, I, H, W) -> (N, O, h, w)."""
        # Inductor (torch 2.15) writes C++ that no compiler takes where two biases have one gradient, as those of a
        # residual block's second convolution and shortcut have; of convolutions it leaves that to the library.
        if torch.compiler.is_compiling():
            return super().forward(input)
        if multiplies_half_on_cpu(input):
            if self._in_blocks(input):
                bias = None if self.bias is None else self.bias.bfloat16()
                return winograd(input.bfloat16(), self._matrices(), bias)
            if self._is_small(input, WIDE):
                return self._product(input)
        elif multiplies_float_on_cpu(input):
            if self._in_large_blocks(input):
                return winograd_float(input, self.weight, self.bias)
            if self.weight.requires_grad and self._is_small(input, WIDER):
                return self._product(input)
        return super().forward(input)

    def _in_blocks(self, images: Tensor) -> bool:
        height, width = images.shape[2:]
        fits = height * width >= LARGE and height % 2 == width % 2 == 0
        return fits and self._slides(CHANNELS) and not self.weight.requires_grad

    def _in_large_blocks(self, images: Tensor) -> bool:
        height, width = images.shape[2:]
        fits = height * width >= LARGE and height % 4 == width % 4 == 0
        return fits and self._slides(CHANNELS if height * width < LARGEST else FEWEST)

    def _slides(self, channels: int) -> bool:
        """Whether a 3 x 3 kernel goes from place to place, with so many channels on both sides."""
        plain = self.kernel_size == (3, 3) and self.stride == (1, 1)
        return plain and min(self.in_channels, self.out_channels) >= channels

    def _matrices(self) -> Tensor:
        """The kernel in Winograd's form, kept until the weights change."""
        state = (self.weight.data_ptr(), self.weight._version)
        if self._transformed is None or self._transformed[0] != state:
            with torch.inference_mode(False), torch.no_grad():  # what is kept may meet a gradient later
                self._transformed = (state, transformed(self.weight.bfloat16()))
        return self._transformed[1]

    def _is_small(self, images: Tensor, wide: int) -> bool:
        height, width = self._size(images)
        fits = height * width <= SMALL and self.in_channels >= wide
        return fits and self.weight.is_contiguous(memory_format=torch.channels_last)

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
        if type(layer) is nn.Conv2d and layer.in_channels >= FEWEST and _is_plain(layer):
            layer.__class__ = ConvolutionBySize


def convolve_plainly(network: nn.Module) -> None:
    """Undo `convolve_by_size`, to measure what it gains."""
    for layer in network.modules():
        if type(layer) is ConvolutionBySize:
            layer.__class__ = nn.Conv2d  # type: ignore[assignment]


def _is_plain(layer: nn.Conv2d) -> bool:
    (rows, columns), known = layer.kernel_size, (layer.padding, layer.dilation, layer.groups, layer.padding_mode)
    return rows % 2 == columns % 2 == 1 and known == ((rows // 2, columns // 2), (1, 1), 1, "zeros")
