"""Activation maximisation with the diffusion prior as regulariser: what a unit wants to see in a likely picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from featinv.diffusion.controlled_unet import unconditional
from featinv.diffusion.objective_guidance import Objective, ObjectiveGuidance
from featinv.diffusion.prior import DiffusionPrior
from featinv.diffusion.samplers import sample
from featinv.image import seeded_noise
from featinv.inverters.parametrisations import shaken


@dataclass(frozen=True)
class PriorMaximum:
    """What `maximise_with_prior` found.

    Attributes:
        images: (N, 3, H, W) in [0, 1].
        skipped: Gradients of one image that were not finite and were left out.
    """

    images: Tensor
    skipped: int


@torch.no_grad()
def maximise_with_prior(
    objective: Objective,
    seeds: Sequence[int],
    prior: DiffusionPrior,
    *,
    steps: int = 30,
    strength: float = 0.2,
    iterations: int = 2,
    interval: Sequence[float] = (0.1, 1.0),
    jitter: int = 2,
    scale: float = 0.05,
    sampler: str = "ddim",
    callback: Callable[[int, Tensor], None] | None = None,
) -> PriorMaximum:
    """Draw pictures from the frozen prior that score high (plug-and-play, Nguyen et al. 2017, arXiv 1612.00005).

    A penalty such as total variation knows little of pictures; the prior keeps what it draws on its own manifold and
    `ObjectiveGuidance` moves it there. With strength 0 the prior's own samples come out.

    Args:
        objective: Images -> scores (N,); see `featinv.attribution.maximisation`.
        seeds: Of the starting noise; image i depends on its seed alone.
        prior: Frozen; it decides size and kind of the pictures.
        steps: Sampling steps.
        strength: Length of one uphill step in units of the latents' standard deviation.
        iterations: Uphill steps at each sampling step.
        interval: Noise levels where they are taken, as fractions of the training timesteps.
        jitter: Shift by up to so many pixels at every uphill step.
        scale: Resize by up to this share at every uphill step.
        sampler: A key of `featinv.diffusion.samplers.SAMPLERS`; a first-order one, since the history of the others
            mixes predictions that were moved by different amounts.
        callback: Called as callback(step, latents) after every sampling step.

    Raises:
        UserError: If an argument is out of range.
    """
    calls = count()
    guidance = ObjectiveGuidance(
        lambda images: objective(shaken(images, next(calls), jitter, scale)),
        prior.first_stage,
        prior.scheduler,
        strength,
        iterations,
        interval,
    )
    text = prior.encoder_hidden_states(1)

    def denoise(noisy_latents: Tensor, timestep: Tensor) -> Tensor:
        return guidance.shift(unconditional(prior.unet, text, noisy_latents, timestep), noisy_latents, timestep)

    noise = seeded_noise(seeds, prior.latent_shape).to(text.device)
    latents = sample(denoise, noise, prior.scheduler, sampler, steps, callback)
    return PriorMaximum(prior.first_stage.decode(latents), guidance.skipped)
