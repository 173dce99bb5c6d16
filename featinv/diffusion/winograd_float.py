"""3 x 3 convolutions with a quarter of the multiplications, for float32: Winograd's F(4 x 4, 3 x 3).

Every 4 x 4 block of the result is a linear map of the 6 x 6 block of the input under it: 36 products for each pair of
channels instead of 144 (Lavin and Gray, Fast algorithms for convolutional neural networks, CVPR 2016, section 4.3).
Rounding is amplified too much for bfloat16, which has `winograd.py`. Kernels are transformed anew at each call, as much
memory as four of them: so they may be trained, and none is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCKS = 512
"""Blocks that are computed at a time: their transforms stay in the processor's caches, their products are still large
matrices."""
_KERNELS = 64  # output channels whose kernels are transformed at a time

_INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_KERNEL = ((1 / 4, 0, 0), (1, 1, 1), (1, -1, 1), (1, 2, 4), (1, -2, 4), (0, 0, 1))
_OUTPUT = (
    (1, 0, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6, 1 / 6),
    (1 / 24, 1 / 12, 1 / 6, 1 / 3),
    (1 / 24, -1 / 12, 1 / 6, -1 / 3),
    (0, 0, 0, 1),
)
"""B^T, G and A of the section, with the fractions of G's middle rows in A, where they cost less. In each, the
second and third rows differ by the signs of odd columns alone, and so do the fourth and fifth."""

Matrix = tuple[tuple[float, ...], ...]


def winograd_float(images: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve, padding by 1; gradients reach all three.

    Args:
        images: (N, I, H, W), H and W multiples of 4; fastest in channels_last order.
        kernel: (O, I, 3, 3); fastest in channels_last order.
        bias: (O,).

    Returns:
        (N, O, H, W) in channels_last order. In float32 its error is about three times that of the plain convolution.
    """
    return _Winograd.apply(images, kernel, bias)  # type: ignore[no-untyped-call, no-any-return]


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(images if ctx.needs_input_grad[1] else None, kernel)
        return _convolve(images, _transformed(kernel).transpose(1, 2), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        images, kernel = ctx.saved_tensors
        for_images, for_kernel, for_bias = ctx.needs_input_grad
        return (
            # The gradient's kernel is the kernel turned around, from outputs to inputs.
            _convolve(gradient, _transformed(kernel, turned=True), None) if for_images else None,
            _kernel_gradient(images, gradient, kernel) if for_kernel else None,
            gradient.sum((0, 2, 3)) if for_bias else None,
        )


def _convolve(images: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
    """With `matrices` (36, I, O)."""
    count, _, height, width = images.shape
    found = images.new_empty(count, height // 4, 4, width // 4, 4, matrices.shape[2])
    for rows, lines in _pieces(count, height // 4, width // 4):
        part = found[rows, lines]
        blocks = _input_blocks(_padded(images, rows, lines))
        products = torch.bmm(blocks.flatten(0, 1).flatten(1, 3), matrices)
        products = products.view(6, 6, *blocks.shape[2:5], -1)
        half = products.new_empty(4, *products.shape[1:])
        _gather(_OUTPUT, products, half)
        _gather(_OUTPUT, half.transpose(0, 1), part.permute(4, 2, 0, 1, 3, 5))
        if bias is not None:
            part += bias
    return found.view(count, height, width, -1).permute(0, 3, 1, 2)


def _kernel_gradient(images: Tensor, gradient: Tensor, kernel: Tensor) -> Tensor:
    """Of kernels (O, I, 3, 3), in their memory order, from images (N, I, H, W) and the result's gradient."""
    count, _, height, width = images.shape
    given = gradient.permute(0, 2, 3, 1).unflatten(2, (-1, 4)).unflatten(1, (-1, 4))  # (N, h, 4, w, 4, O)
    total = kernel.new_zeros(36, *kernel.shape[:2])
    for rows, lines in _pieces(count, height // 4, width // 4):
        blocks = _input_blocks(_padded(images, rows, lines))
        part = given[rows, lines].permute(2, 4, 0, 1, 3, 5)
        half = part.new_empty(6, *part.shape[1:])
        _spread(_OUTPUT, part, half)
        spread = part.new_empty(6, 6, *part.shape[2:])
        _spread(_OUTPUT, half.transpose(0, 1), spread.transpose(0, 1))
        outputs, inputs = (x.flatten(0, 1).flatten(1, 3) for x in (spread, blocks))
        total.baddbmm_(outputs.transpose(1, 2), inputs)
    half = total.new_empty(3, 6, *kernel.shape[:2])
    _gather(_KERNEL, total.view(6, 6, *kernel.shape[:2]), half)
    found = torch.empty_like(kernel)
    _gather(_KERNEL, half.transpose(0, 1), found.permute(3, 2, 0, 1))
    return found


def _transformed(kernel: Tensor, turned: bool = False) -> Tensor:
    """G g G^T of kernels (O, I, 3, 3), as 36 matrices (36, O, I); `turned` by half a circle first."""
    places = kernel.permute(2, 3, 0, 1)
    found = kernel.new_empty(6, 6, *kernel.shape[:2])
    for start in range(0, len(kernel), _KERNELS):
        part = places[:, :, start : start + _KERNELS]
        rows = part.new_empty(6, *part.shape[1:])
        _spread(_KERNEL, _reversed(part) if turned else part, rows)
        columns = rows.transpose(0, 1)
        out = found[:, :, start : start + _KERNELS].transpose(0, 1)
        _spread(_KERNEL, _reversed(columns) if turned else columns, out)
    return found.flatten(0, 1)


def _reversed(parts: Tensor) -> list[Tensor]:
    return list(parts.unbind(0))[::-1]


def _padded(images: Tensor, rows: slice, lines: slice) -> Tensor:
    """What lies under some lines of blocks, zeros beyond the border: (N, I, H, W) -> (n, 4 lines + 2, W + 2, I)."""
    height = images.shape[2]
    first, last = 4 * lines.start - 1, 4 * lines.stop + 1
    known = images[rows, :, max(first, 0) : min(last, height)].permute(0, 2, 3, 1)
    return F.pad(known, (0, 0, 1, 1, int(first < 0), int(last > height)))


def _input_blocks(padded: Tensor) -> Tensor:
    """B^T d B of every 6 x 6 block: (N, 4 h + 2, 4 w + 2, I) -> (6, 6, N, h, w, I)."""
    count, height, width, channels = padded.shape
    high, wide = height // 4, width // 4
    rows = padded.new_empty(6, count, high, width, channels)
    _spread(_INPUT, [padded[:, i : i + 4 * high - 3 : 4] for i in range(6)], rows)
    blocks = padded.new_empty(6, 6, count, high, wide, channels)
    _spread(_INPUT, [rows[..., i : i + 4 * wide - 3 : 4, :] for i in range(6)], blocks.transpose(0, 1))
    return blocks


def _pieces(count: int, high: int, wide: int) -> Sequence[tuple[slice, slice]]:
    """Images, and lines of their blocks, that are computed at a time."""
    together, lines = max(1, BLOCKS // (high * wide)), max(1, BLOCKS // wide)
    return [
        (slice(i, i + together), slice(j, min(j + lines, high)))
        for i in range(0, count, together)
        for j in range(0, high, lines)
    ]


def _spread(matrix: Matrix, parts: Sequence[Tensor] | Tensor, out: Tensor) -> None:
    """out[k] = sum of matrix[k][j] parts[j], for six k."""
    for row in (0, 5):
        _add_up(matrix[row], parts, out[row])
    for row in (1, 3):  # and the next one: what even columns give, plus and minus what odd ones give
        even, odd = ([c if j % 2 == i else 0.0 for j, c in enumerate(matrix[row])] for i in range(2))
        _add_up(even, parts, out[row])
        columns = [j for j, c in enumerate(odd) if c]
        rest, factor = parts[columns[0]], odd[columns[0]]
        if len(columns) > 1:
            rest, factor = torch.empty_like(out[row]), 1.0
            _add_up(odd, parts, rest)
        torch.sub(out[row], rest, alpha=factor, out=out[row + 1])
        out[row].add_(rest, alpha=factor)


def _gather(matrix: Matrix, parts: Tensor, out: Tensor) -> None:
    """out[j] = sum of matrix[k][j] parts[k], over six k: the map of `_spread` transposed."""
    sums = [parts[1] + parts[2], parts[3] + parts[4]]
    differences = [parts[1] - parts[2], parts[3] - parts[4]]
    for column in range(len(out)):
        pairs = differences if column % 2 else sums
        coefficients = [matrix[row][column] for row in (0, 1, 3, 5)]
        _add_up(coefficients, [parts[0], *pairs, parts[5]], out[column])


def _add_up(coefficients: Sequence[float], parts: Sequence[Tensor] | Tensor, out: Tensor) -> None:
    """out = sum of coefficients[j] parts[j]; a coefficient of 1 saves a pass."""
    terms = [(c, parts[j]) for j, c in enumerate(coefficients) if c]
    terms.sort(key=lambda term: term[0] != 1)
    (first, part), *rest = terms
    if first == 1 and rest:
        (second, other), *rest = rest
        torch.add(part, other, alpha=second, out=out)
    else:
        torch.mul(part, first, out=out)
    for coefficient, part in rest:
        out.add_(part, alpha=coefficient)
