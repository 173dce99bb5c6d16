"""The frozen UNet with its trainable ControlNet branch (Zhang et al. 2023, arXiv 2302.05543)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ControlNetModel, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from featinv.diffusion.attention import attend_by_size
from featinv.diffusion.clean import clean_latents
from featinv.diffusion.convolution import convolve_by_size
from featinv.diffusion.half import half_arithmetic
from featinv.diffusion.light_branch import LightBranch, Residuals


@dataclass(frozen=True)
class Conditions:
    """Everything the network is told about an image, computed once per image.

    Attributes:
        embedding: Feature embedding (N, C0, h, w) on the latent grid, or None for the frozen prior alone.
        null_embedding: The embedding of dropped features, same shape.
        text: encoder_hidden_states (N, L, D) of the prompt.
        null_text: The same of the empty prompt.
        estimate: Regression estimate of the clean latents (N, c, h, w), or None.
        strength: Factor on the branch's residuals.
        residuals: What a `LightBranch` made of the embedding; `embedding` is None then.
        null_residuals: What it made of the embedding of dropped features.
    """

    embedding: Tensor | None
    null_embedding: Tensor | None
    text: Tensor
    null_text: Tensor
    estimate: Tensor | None = None
    strength: float = 1.0
    residuals: Residuals | None = None
    null_residuals: Residuals | None = None

    def without(self, drop: Sequence[str]) -> Conditions:
        """Drop some of "features", "text", "branch"."""
        null = "features" in drop
        embedding, residuals = (self.null_embedding, self.null_residuals) if null else (self.embedding, self.residuals)
        return dataclasses.replace(
            self,
            embedding=None if "branch" in drop else embedding,
            residuals=None if "branch" in drop else residuals,
            estimate=None if {"branch", "features"} & set(drop) else self.estimate,
            text=self.null_text if "text" in drop else self.text,
        )


def control_branch(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet that starts as a copy of the UNet's encoder and adds nothing (all its output convolutions are zero).

    Its own picture encoder is replaced by the identity: ours lives in `featinv.conditioning`, sees neither timestep nor
    noise, and so runs once per image instead of once per step.
    """
    branch = ControlNetModel.from_unet(unet)
    branch.controlnet_cond_embedding = nn.Identity()
    attend_by_size(branch)
    convolve_by_size(branch)
    return branch.requires_grad_(True)


class EstimateGate(nn.Module):
    """Pull the prediction of the clean latents towards the regression estimate, as much as each noise level needs.

    In pure noise the best prediction *is* the regression estimate (the posterior mean given the features); as the noise
    falls, x_t itself tells more. A branch takes long to learn this through its zero convolutions, a gate takes minutes.
    It starts at 0, so that the first step is still the frozen prior's.

    Args:
        scheduler: Owns noise levels and kind of prediction.
        channels: Of the latents; each has its own gate.
        knots: Noise levels with a value of their own, interpolated between.
    """

    # The optimizer moves a parameter by about its learning rate; a gate must cross [0, 1] within some hundred steps.
    SPEED = 10.0
    alphas: Tensor

    def __init__(self, scheduler: DDPMScheduler, channels: int, knots: int = 12):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(knots, channels))
        self.register_buffer("alphas", scheduler.alphas_cumprod.clone().float(), persistent=False)
        self.prediction_type: str = scheduler.config.prediction_type

    def forward(self, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor, estimate: Tensor) -> Tensor:
        """Corrected model_pred (N, c, h, w); `timesteps` is (N,); rows whose estimate is NaN stay as they are."""
        place = timesteps.float() / (len(self.alphas) - 1) * (len(self.values) - 1)
        low = place.floor().long().clamp(max=len(self.values) - 2)
        gates = torch.lerp(self.values[low], self.values[low + 1], (place - low)[:, None].to(self.values.dtype))
        gates = (self.SPEED * gates)[:, :, None, None]
        alphas = self.alphas[timesteps.round().long()].view(-1, 1, 1, 1)
        clean = clean_latents(noisy_latents, model_pred, alphas, self.prediction_type)
        weight = (1 - alphas).sqrt() * (1 if self.prediction_type == "v_prediction" else alphas.sqrt())
        pull = torch.where(estimate.isnan(), 0.0, estimate - clean)
        return model_pred - gates * weight * pull


class ControlledUNet(nn.Module):
    """A frozen UNet plus a branch that adds residuals to its skip connections and middle block.

    Args:
        unet: Frozen here.
        branch: From `control_branch`, or a `LightBranch`, which has run before (`Conditions.residuals`).
        num_train_timesteps: Of the schedule that the UNet was trained with.
        gate: Uses the conditions' estimate, if there is one.

    Attributes:
        halved: Whether UNet and branch multiply in bfloat16 whatever the caller's precision; predictions are float32.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        branch: ControlNetModel | LightBranch,
        num_train_timesteps: int = 1000,
        gate: EstimateGate | None = None,
    ):
        super().__init__()
        self.unet, self.branch, self.gate = unet.requires_grad_(False), branch, gate
        self.num_train_timesteps = num_train_timesteps
        self.halved = False

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Predict noise or velocity (N, C, h, w); `timesteps` is (N,) or ()."""
        timesteps = timesteps.expand(len(noisy_latents))
        with half_arithmetic(noisy_latents.device, self.halved):
            down, middle = self._added(noisy_latents, timesteps, conditions)
            model_pred = self.unet(
                noisy_latents,
                timesteps,
                encoder_hidden_states=conditions.text,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
                return_dict=False,
            )[0]
        if self.halved:
            model_pred = model_pred.float()
        if self.gate is None or conditions.estimate is None:
            return model_pred
        return self.gate(model_pred, noisy_latents, timesteps, conditions.estimate)

    def _added(self, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> tuple[Any, Any]:
        """What the branch adds to the skip connections and to the middle block; None where there is nothing."""
        if conditions.residuals is not None:
            down, middle = conditions.residuals
            return [conditions.strength * residual for residual in down], conditions.strength * middle
        if conditions.embedding is None:
            return None, None
        return self.branch(
            noisy_latents,
            timesteps,
            encoder_hidden_states=conditions.text,
            controlnet_cond=conditions.embedding,
            conditioning_scale=conditions.strength,
            return_dict=False,
        )


def unconditional(unet: UNet2DConditionModel, text: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
    """The frozen prior's own prediction (N, C, h, w) under `text` (1, L, D)."""
    hidden = text.expand(len(noisy_latents), -1, -1)
    timesteps = torch.as_tensor(timesteps).expand(len(noisy_latents))
    return unet(noisy_latents, timesteps, encoder_hidden_states=hidden, return_dict=False)[0]
