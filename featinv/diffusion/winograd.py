"""3 x 3 convolutions with less than half of the multiplications: Winograd's F(2 x 2, 3 x 3).

Every 2 x 2 block of the result is a linear map of the 4 x 4 block of the input under it: 16 products for each pair of
channels instead of 36 (Lavin and Gray, Fast algorithms for convolutional neural networks, CVPR 2016, equation 8). Over
all blocks that is one matrix product for each of the 16 places, with 16 / 9 as many weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_FORWARD = (0, 1, 2, 3)
_BACKWARD = (3, 1, 2, 0)
"""Where the places of a kernel's transform lie in that of the kernel turned around."""


def transformed(kernel: Tensor) -> Tensor:
    """G g G^T of kernels (O, I, 3, 3), as sixteen matrices (16, I, O) in the kernels' format."""
    left = kernel.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float32)
    matrices = torch.einsum("ai,oxij,bj->abxo", left, kernel.float(), left)
    return matrices.flatten(0, 1).to(kernel.dtype).contiguous()


def winograd(images: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve with a frozen kernel, padding by 1; gradients reach the images alone.

    Args:
        images: (N, I, H, W), H and W even; fastest in channels_last order.
        matrices: (16, I, O), the kernel's `transformed`, in the images' format.
        bias: (O,), in the images' format.

    Returns:
        (N, O, H, W) in channels_last order. In bfloat16 its error is about four times that of rounding the result once.
    """
    return _Winograd.apply(images, matrices, bias)  # type: ignore[no-untyped-call, no-any-return]


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(matrices)
        return _convolve(images, matrices, bias, _FORWARD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (matrices,) = ctx.saved_tensors
        # The gradient's kernel is the kernel turned around, from outputs to inputs.
        return _convolve(gradient, matrices.transpose(1, 2), None, _BACKWARD), None, None


def _convolve(images: Tensor, matrices: Tensor, bias: Tensor | None, order: Sequence[int]) -> Tensor:
    """`order`: the place at which each place of the blocks' transform finds its matrix."""
    count, _, height, width = images.shape
    blocks = _blocks(images.permute(0, 2, 3, 1), order)
    products = torch.bmm(blocks.flatten(0, 1).flatten(1, 3), matrices)
    found = _joined(products.view(4, 4, count, height // 2, width // 2, -1), bias, order)
    return found.view(count, height, width, -1).permute(0, 3, 1, 2)


def _blocks(images: Tensor, order: Sequence[int]) -> Tensor:
    """B^T d B of every 4 x 4 block: (N, H, W, C) -> (4, 4, N, H / 2, W / 2, C)."""
    count, height, width, channels = images.shape
    padded = F.pad(images, (0, 0, 1, 1, 1, 1))
    rows = padded.new_empty(4, count, height // 2, width + 2, channels)
    _differences(rows, [padded[:, i : i + height - 1 : 2] for i in range(4)], order)
    blocks = padded.new_empty(4, 4, count, height // 2, width // 2, channels)
    _differences(blocks.transpose(0, 1), [rows[..., i : i + width - 1 : 2, :] for i in range(4)], order)
    return blocks


def _differences(out: Tensor, d: Sequence[Tensor], order: Sequence[int]) -> None:
    torch.sub(d[0], d[2], out=out[order[0]])
    torch.add(d[1], d[2], out=out[order[1]])
    torch.sub(d[2], d[1], out=out[order[2]])
    torch.sub(d[1], d[3], out=out[order[3]])


def _joined(products: Tensor, bias: Tensor | None, order: Sequence[int]) -> Tensor:
    """A^T m A of every block, and the bias: (4, 4, N, h, w, O) -> (N, h, 2, w, 2, O)."""
    _, _, count, height, width, channels = products.shape
    found = products.new_empty(count, height, 2, width, 2, channels)
    m0, m1, m2, m3 = (products[order[i]] for i in range(4))
    for i, rows in enumerate(((m1 + m2).add_(m0), (m1 - m2).sub_(m3))):
        r0, r1, r2, r3 = (rows[order[j]] for j in range(4))
        left, right = (r1 + r2, r1 - r2)
        if bias is not None:
            left, right = left.add_(bias), right.add_(bias)
        torch.add(left, r0, out=found[:, :, i, :, 0])
        torch.sub(right, r3, out=found[:, :, i, :, 1])
    return found
