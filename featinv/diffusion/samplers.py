"""Samplers: the step arithmetic is the diffusers scheduler's, the loop is here, the guidance is not."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from fractions import Fraction
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


class _DDIM(DDIMScheduler):  # type: ignore[misc]
    """DDIM whose steps end where the next ones begin; diffusers' go down by the whole part of T / steps."""

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **settings: Any) -> Any:
        later = self.timesteps[self.timesteps < timestep]
        down = int(timestep - later[0]) if len(later) else int(timestep) + 1
        self.num_inference_steps = Fraction(self.config.num_train_timesteps, down)  # diffusers divides T by it
        return super().step(model_output, timestep, sample, **settings)


# name -> (scheduler, arguments beyond the training schedule's own); `make_stepper` says what a scheduler must be.
SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (_DDIM, {"clip_sample": False, "set_alpha_to_one": True}),
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
        UserError: As of `make_stepper`.
    """
    stepper = make_stepper(scheduler, sampler, num_inference_steps)
    latents = noise * stepper.init_noise_sigma
    for step, timestep in enumerate(stepper.timesteps):
        with torch.set_grad_enabled(torch.is_grad_enabled() and step >= num_inference_steps - grad_steps):
            model_input = stepper.scale_model_input(latents, timestep)
            model_pred = denoise(model_input, timestep.to(latents.device))
            latents = stepper.step(model_pred, timestep, latents, return_dict=False)[0]
        if callback is not None:
            callback(step, latents)
    return latents


def ends_in_noise(scheduler: DDPMScheduler) -> bool:
    """Whether no signal is left at the last timestep: betas of zero terminal SNR."""
    last = scheduler.alphas_cumprod[-1]
    return not last.is_meta and float(last) == 0  # a dry run's schedule has no values


def make_stepper(scheduler: DDPMScheduler, sampler: str, num_inference_steps: int) -> Any:
    """Return diffusers' scheduler of that sampler, with exactly so many timesteps.

    Args:
        scheduler: The schedule that the network was trained with.
        sampler: A key of `SAMPLERS`.
        num_inference_steps: Steps.

    Raises:
        UserError: If the sampler is unknown or the number of steps is not in [1, training timesteps], of
            "ddim_leading" in [1, half of them]; if the scheduler evaluates the network more than once a step, or
            draws noise while it steps, since a sample depends on its seed alone.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"unknown sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}.")
    most = scheduler.config.num_train_timesteps
    if sampler == "ddim_leading":
        most //= 2  # with more it would go by single timesteps, from one far below pure noise
    if not 1 <= num_inference_steps <= most:
        raise UserError(f"{num_inference_steps} steps of {sampler}: must be 1 to {most}.")
    kind, extra = SAMPLERS[sampler]
    # Trailing timesteps start at pure noise, as sampling does (Lin et al. 2023, arXiv 2305.08891, section 3.3). If the
    # schedule ends in it, too, diffusers must be told, or its first sigma is infinite; such betas stay what they are.
    own = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": ends_in_noise(scheduler)}
    stepper = kind.from_config(scheduler.config, **{**own, **extra})
    stepper.set_timesteps(num_inference_steps)
    # diffusers counts down in floats, which for some numbers (61 of 1000) gives one more, at timestep -1. Any other
    # surplus is a second evaluation of some steps (Heun, PNDM), and a cut would stop it midway.
    if (stepper.timesteps[num_inference_steps:] >= 0).any():
        raise UserError(
            f"the sampler {sampler} ({kind.__name__}) has {len(stepper.timesteps)} timesteps for {num_inference_steps} "
            "steps; only schedulers that evaluate the network once a step can be samplers."
        )
    stepper.timesteps = stepper.timesteps[:num_inference_steps]
    if hasattr(stepper, "sigmas"):
        stepper.sigmas = torch.cat([stepper.sigmas[:num_inference_steps], stepper.sigmas[-1:]])
    if _draws_noise(stepper):
        raise UserError(
            f"the sampler {sampler} ({kind.__name__}) draws fresh noise at every step; only deterministic schedulers "
            "can be samplers, so that a sample depends on its seed alone."
        )
    return stepper


def _draws_noise(stepper: Any) -> bool:
    """Try the first step; diffusers' schedulers with noise of their own draw it from the generator given to `step`."""
    if "generator" not in inspect.signature(stepper.step).parameters:
        return False
    stepper, generator = copy.deepcopy(stepper), torch.Generator()
    before, timestep = generator.get_state(), stepper.timesteps[0]
    latents = stepper.scale_model_input(torch.zeros(1, 1, 1, 1, device="cpu"), timestep)
    stepper.step(torch.zeros_like(latents), timestep, latents, generator=generator)
    return not torch.equal(before, generator.get_state())
