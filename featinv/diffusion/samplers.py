"""Samplers: the step arithmetic is the diffusers scheduler's, the loop is here, the guidance is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from featinv.errors import UserError

# name -> (scheduler, arguments beyond the training schedule's own)
SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": True}),
    # As the LDM code steps: timesteps 1, 1 + T / steps, ..., so that the first is told of less noise than there is.
    "ddim_leading": (
        DDIMScheduler,
        {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "leading", "steps_offset": 1},
    ),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "unipc": (UniPCMultistepScheduler, {"solver_order": 2}),
    "euler": (EulerDiscreteScheduler, {}),
}


def sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    scheduler: DDPMScheduler,
    sampler: str = "unipc",
    num_inference_steps: int = 10,
    callback: Callable[[int, Tensor], None] | None = None,
    grad_steps: int = 0,
) -> Tensor:
    """Draw latents from noise.

    Args:
        denoise: (noisy_latents (N, C, h, w), timestep ()) -> model_pred (N, C, h, w), already guided.
        noise: Standard normal (N, C, h, w).
        scheduler: The schedule that the network was trained with.
        sampler: A key of `SAMPLERS`.
        num_inference_steps: Steps, each one call of `denoise`.
        callback: Called as callback(step, latents) after every step.
        grad_steps: How many of the last steps keep their gradient.

    Returns:
        Latents (N, C, h, w).

    Raises:
        UserError: If the sampler is unknown or the number of steps is not in [1, training timesteps].
    """
    if sampler not in SAMPLERS:
        raise UserError(f"unknown sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}.")
    if not 1 <= num_inference_steps <= scheduler.config.num_train_timesteps:
        raise UserError(f"{num_inference_steps} steps: must be 1 to {scheduler.config.num_train_timesteps}.")
    kind, extra = SAMPLERS[sampler]
    # Trailing timesteps start at pure noise, as sampling does (Lin et al. 2023, arXiv 2305.08891, section 3.3).
    stepper = kind.from_config(scheduler.config, **{"timestep_spacing": "trailing", **extra})
    stepper.set_timesteps(num_inference_steps)
    latents = noise * stepper.init_noise_sigma
    for step, timestep in enumerate(stepper.timesteps):
        with torch.set_grad_enabled(torch.is_grad_enabled() and step >= num_inference_steps - grad_steps):
            model_input = stepper.scale_model_input(latents, timestep)
            model_pred = denoise(model_input, timestep.to(latents.device))
            latents = stepper.step(model_pred, timestep, latents, return_dict=False)[0]
        if callback is not None:
            callback(step, latents)
    return latents
