"""The training objective of the prior and of the branch: noise, timestep weighting and target in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from featinv.diffusion.clean import clean_latents
from featinv.diffusion.samplers import ends_in_noise
from featinv.errors import UserError
from featinv.image import seeded_noise

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(noisy_latents, timesteps) -> model_pred, each (N, C, h, w) and (N,)."""


class DiffusionLoss:
    """Mean squared error of the predicted noise or velocity, min-SNR weighted.

    The weight is min(SNR, gamma) / SNR for noise prediction and min(SNR, gamma) / (SNR + 1) for velocity prediction
    (Hang et al. 2023, arXiv 2303.09556, section 3.4); without gamma every timestep weighs 1. Mind that the velocity's
    weight falls to 0 with the SNR: the noisiest timesteps, where layout is decided, are then hardly trained.

    Args:
        scheduler: Owns betas, number of timesteps and the kind of prediction.
        snr_gamma: Gamma, or None for the plain loss.

    Raises:
        UserError: If another kind is predicted, or noise although the schedule ends in nothing else.
    """

    def __init__(self, scheduler: DDPMScheduler, snr_gamma: float | None = 5.0):
        if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(f"prediction type {scheduler.config.prediction_type!r} is not epsilon or v_prediction.")
        if scheduler.config.prediction_type == "epsilon" and ends_in_noise(scheduler):
            raise UserError(
                "the schedule's betas have zero terminal SNR: at its last timestep the noise is all there is, and its "
                "prediction says nothing of the picture; set prediction_type: v_prediction."
            )
        self.scheduler, self.snr_gamma = scheduler, snr_gamma

    def draw(self, latents: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Noise (N, C, h, w) and timesteps (N,); row i depends on seeds[i] alone."""
        noise = seeded_noise(seeds, latents.shape[1:]).to(latents)
        steps = self.scheduler.config.num_train_timesteps
        draws = [int(torch.randint(steps, (), generator=torch.Generator().manual_seed(s ^ 0x5EED))) for s in seeds]
        return noise, torch.tensor(draws, device=latents.device)

    def weights(self, timesteps: Tensor) -> Tensor:
        """The min-SNR weight of each timestep, (N,)."""
        if self.snr_gamma is None:
            return torch.ones(len(timesteps), device=timesteps.device)
        alphas = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps].double()
        snr = alphas / (1 - alphas)
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        return (snr.clamp(max=self.snr_gamma) / (snr + 1 if velocity else snr)).float()

    def __call__(self, denoiser: Denoiser, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the loss of each image.

        Args:
            denoiser: The controlled UNet with its conditions bound.
            latents: Clean latents (N, C, h, w).
            noise: Standard normal noise (N, C, h, w).
            timesteps: (N,).

        Returns:
            The weighted loss (N,) and the one-step estimate of the clean latents (N, C, h, w).
        """
        noisy_latents = self.scheduler.add_noise(latents, noise, timesteps)
        model_pred = denoiser(noisy_latents, timesteps)
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        loss = (model_pred.float() - target.float()).square().flatten(1).mean(1) * self.weights(timesteps)
        alphas = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        return loss, clean_latents(noisy_latents, model_pred, alphas, self.scheduler.config.prediction_type)
