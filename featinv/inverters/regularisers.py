"""What a natural picture is expected to look like: penalties of images (N, 3, H, W), one value (N,) for each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from featinv.errors import UserError


def total_variation(images: Tensor, beta: float = 2.0, isotropic: bool = True) -> Tensor:
    """Total variation (Mahendran & Vedaldi 2015, arXiv 1412.0035, equation 3), mean over pixels.

    Args:
        images: (N, 3, H, W).
        beta: Exponent; 1 keeps edges, 2 smears them.
        isotropic: (dx^2 + dy^2)^(beta / 2); otherwise |dx|^beta + |dy|^beta.

    Returns:
        (N,)
    """
    dx = F.pad(images[..., :, 1:] - images[..., :, :-1], (0, 1))
    dy = F.pad(images[..., 1:, :] - images[..., :-1, :], (0, 0, 0, 1))
    # The root has no gradient at 0; the offset is far below one grey level.
    if isotropic:
        return (dx.square() + dy.square() + 1e-8).pow(beta / 2).mean((1, 2, 3))
    return ((dx.square() + 1e-8).pow(beta / 2) + (dy.square() + 1e-8).pow(beta / 2)).mean((1, 2, 3))


def alpha_norm(images: Tensor, alpha: float = 6.0) -> Tensor:
    """Mean of |2 x - 1|^alpha: keeps values in range (arXiv 1412.0035, equation 2); alpha 2 is the plain L2 penalty."""
    return (2 * images - 1).abs().pow(alpha).mean((1, 2, 3))


def high_frequencies(images: Tensor, power: float = 2.0) -> Tensor:
    """Energy of the spectrum, each frequency weighted by its distance from 0 to the `power` (cycles a picture / side).

    White noise is punished most, a constant picture not at all.
    """
    height, width = images.shape[-2:]
    spectrum = torch.fft.rfft2(images, norm="ortho").abs().square()
    fy = torch.fft.fftfreq(height, device=images.device)[:, None]
    fx = torch.fft.rfftfreq(width, device=images.device)
    radius = (fx.square() + fy.square()).sqrt()
    return (spectrum * radius.pow(power)).mean((1, 2, 3))


class Regulariser:
    """A weighted sum of the penalties above and of the squared distance to mid-grey.

    Args:
        tv_weight: Weight of the total variation.
        tv_beta: Its exponent.
        tv_isotropic: Its kind.
        l2_weight: Weight of mean((x - 0.5)^2).
        alpha_weight: Weight of the alpha-norm.
        alpha: Its exponent.
        frequency_weight: Weight of `high_frequencies`.
    """

    def __init__(
        self,
        tv_weight: float = 1.0,
        tv_beta: float = 2.0,
        tv_isotropic: bool = True,
        l2_weight: float = 0.02,
        alpha_weight: float = 0.0,
        alpha: float = 6.0,
        frequency_weight: float = 0.0,
    ):
        weights = (tv_weight, l2_weight, alpha_weight, frequency_weight)
        if min(weights) < 0:
            raise UserError(f"weights of regularisers must not be negative, not {min(weights)}.")
        self.tv_weight, self.tv_beta, self.tv_isotropic = tv_weight, tv_beta, tv_isotropic
        self.l2_weight, self.alpha_weight, self.alpha = l2_weight, alpha_weight, alpha
        self.frequency_weight = frequency_weight

    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> (N,)."""
        total = self.l2_weight * (images - 0.5).square().mean((1, 2, 3))
        if self.tv_weight:
            total = total + self.tv_weight * total_variation(images, self.tv_beta, self.tv_isotropic)
        if self.alpha_weight:
            total = total + self.alpha_weight * alpha_norm(images, self.alpha)
        if self.frequency_weight:
            total = total + self.frequency_weight * high_frequencies(images)
        return total
