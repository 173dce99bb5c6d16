"""Guidance: how predictions under several conditions become one; it names what it drops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from featinv.diffusion.controlled_unet import Conditions, ControlledUNet
from featinv.errors import UserError

DROPPABLE = ("features", "text", "branch")


class Guidance(Protocol):
    """What a sampler needs: one guided prediction."""

    def denoise(self, unet: ControlledUNet, noisy_latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """Return model_pred (N, C, h, w)."""
        ...


class NoGuidance:
    """The conditional prediction itself: one evaluation a step."""

    def denoise(self, unet: ControlledUNet, noisy_latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """Return the conditional model_pred (N, C, h, w)."""
        return unet(noisy_latents, timestep, conditions)


class ClassifierFreeGuidance:
    """Move away from the prediction without some conditions (Ho & Salimans 2022, arXiv 2207.12598).

    model_pred = dropped + scale * (conditional - dropped), within a timestep interval (Kynkaanniemi et al. 2024, arXiv
    2404.07724), and the conditional prediction alone outside it.

    Args:
        scale: 1 is the conditional prediction, 0 the one without the dropped conditions.
        drop: What the second prediction goes without: "features" (the learned empty embedding; train with feature
            dropout), "text" (the empty prompt), "branch" (the frozen prior alone, which needs no dropout in training
            and costs no branch evaluation).
        interval: Noise levels where guidance is on, as fractions of the training timesteps; (0, 1) is everywhere.
    """

    def __init__(self, scale: float = 1.5, drop: Sequence[str] = ("branch",), interval: Sequence[float] = (0.0, 1.0)):
        unknown = [name for name in drop if name not in DROPPABLE]
        if unknown or not drop:
            raise UserError(f"guidance can drop {', '.join(DROPPABLE)}, not {unknown or 'nothing'}.")
        if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
            raise UserError(f"the guidance interval {list(interval)} must be two rising numbers in [0, 1].")
        self.scale, self.drop, self.interval = scale, tuple(drop), tuple(interval)

    def denoise(self, unet: ControlledUNet, noisy_latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """Return the guided model_pred (N, C, h, w)."""
        level = float(timestep.flatten()[0]) / unet.num_train_timesteps
        if self.scale == 1 or not self.interval[0] <= level <= self.interval[1]:
            return unet(noisy_latents, timestep, conditions)
        conditional = unet(noisy_latents, timestep, conditions)
        dropped = unet(noisy_latents, timestep, conditions.without(self.drop))
        return dropped + self.scale * (conditional - dropped)
