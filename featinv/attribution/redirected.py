"""Gradients for silent units: a ReLU that lets them through where otherwise none would arrive."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featinv.attribution.guided import replaced_rectifiers
from featinv.backbones.base import Backbone


class _Redirected(torch.autograd.Function):
    """ReLU or ReLU6 whose gradient passes below 0 in rows that would get none (after Lucid's redirected ReLU)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, six: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.top = 6.0 if six else float("inf")
        return F.relu6(x) if six else F.relu(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        plain = gradient * ((x > 0) & (x < ctx.top))
        silent = (plain.flatten(1) == 0).all(1).view(-1, *[1] * (x.ndim - 1))
        # Not above 6: there is nothing to be gained by pushing a saturated unit further.
        return torch.where(silent & (x <= 0), gradient, plain), None


class _RedirectedReLU(nn.Module):
    def __init__(self, six: bool):
        super().__init__()
        self.six = six

    def forward(self, x: Tensor) -> Tensor:
        return _Redirected.apply(x, self.six)


def redirected_features(backbone: Backbone, images: Tensor) -> Tensor:
    """The features (N, C, H, W) themselves, with a gradient for units that a ReLU keeps silent.

    Without it, activation maximisation of a unit that the starting picture leaves silent never begins.
    """
    with replaced_rectifiers(backbone, _RedirectedReLU):
        return backbone(images)


def redirected_logits(backbone: Backbone, images: Tensor) -> Tensor:
    """The class scores (N, K) themselves, in the same way."""
    with replaced_rectifiers(backbone, _RedirectedReLU):
        return backbone.logits(images)
