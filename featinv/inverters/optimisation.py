"""Inversion by optimisation (Mahendran & Vedaldi 2015, arXiv 1412.0035): the classic baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from featinv.backbones.base import Backbone
from featinv.errors import UserError
from featinv.image import seeded_noise


def total_variation(images: Tensor, beta: float = 2.0) -> Tensor:
    """Isotropic total variation of each image: mean over pixels of (dx^2 + dy^2)^(beta / 2), shape (N,)."""
    dx = F.pad(images[..., :, 1:] - images[..., :, :-1], (0, 1))
    dy = F.pad(images[..., 1:, :] - images[..., :-1, :], (0, 0, 0, 1))
    # The root has no gradient at 0; the offset is far below one grey level.
    return (dx.square() + dy.square() + 1e-8).pow(beta / 2).mean((1, 2, 3))


class OptimizationInverter:
    """Gradient descent on the pixels until their features match.

    Minimises ||phi(x) - phi_0||^2 / ||phi_0||^2 + tv_weight * TV(x) + l2_weight * mean((x - 0.5)^2) with Adam, every
    image on its own: neither batch size nor order changes a result.

    Args:
        backbone: Whose features are matched; differentiable in the image.
        size: Side of the pictures in pixels.
        steps: Gradient steps.
        learning_rate: Adam's, in pixel units.
        tv_weight: Weight of the total variation.
        tv_beta: Its exponent.
        l2_weight: Pull towards mid-grey.
        batch_size: Images optimised at a time (memory, not result).
    """

    def __init__(
        self,
        backbone: Backbone,
        size: int = 64,
        steps: int = 500,
        learning_rate: float = 0.03,
        tv_weight: float = 1.0,
        tv_beta: float = 2.0,
        l2_weight: float = 0.02,
        batch_size: int = 32,
    ):
        if steps < 1 or size < 1 or batch_size < 1:
            raise UserError("the optimisation inverter needs steps, size and batch_size of at least 1.")
        self.backbone, self.size, self.steps, self.learning_rate = backbone, size, steps, learning_rate
        self.tv_weight, self.tv_beta, self.l2_weight, self.batch_size = (
            tv_weight,
            tv_beta,
            l2_weight,
            batch_size,
        )

    def invert(
        self, features: Tensor, *, seeds: Sequence[int], callback: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """Find one image for each row of features.

        Args:
            features: (N, C, H, W) from the same backbone.
            seeds: N seeds of the starting noise.
            callback: Called as callback(step, images) after every step.

        Returns:
            Images (N, 3, size, size) in [0, 1].
        """
        if len(seeds) != len(features):
            raise UserError(f"{len(features)} feature maps need as many seeds, not {len(seeds)}.")
        parts = [
            self._invert(features[i : i + self.batch_size], seeds[i : i + self.batch_size], callback)
            for i in range(0, len(features), self.batch_size)
        ]
        return torch.cat(parts)

    def _invert(self, features: Tensor, seeds: Sequence[int], callback: Callable[[int, Tensor], None] | None) -> Tensor:
        start = 0.5 + 0.1 * seeded_noise(seeds, (3, self.size, self.size))
        images = start.to(features).requires_grad_(True)
        optimizer = torch.optim.Adam([images], lr=self.learning_rate)
        energy = features.square().flatten(1).sum(1).clamp(min=1e-12)
        with torch.enable_grad():
            for step in range(self.steps):
                distance = (self.backbone(images) - features).square().flatten(1).sum(1) / energy
                smooth = self.tv_weight * total_variation(images, self.tv_beta)
                grey = self.l2_weight * (images - 0.5).square().mean((1, 2, 3))
                optimizer.zero_grad()
                # A sum, not a mean: Adam's step on one image must not depend on how many others there are.
                (distance + smooth + grey).sum().backward()
                optimizer.step()
                with torch.no_grad():
                    images.clamp_(0, 1)
                if callback is not None:
                    callback(step, images.detach())
        return images.detach()
