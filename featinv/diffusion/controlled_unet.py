"""The frozen UNet with its trainable ControlNet branch (Zhang et al. 2023, arXiv 2302.05543)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn


@dataclass(frozen=True)
class Conditions:
    """Everything the network is told about an image, computed once per image.

    Attributes:
        embedding: Feature embedding (N, C0, h, w) on the latent grid, or None for the frozen prior alone.
        null_embedding: The embedding of dropped features, same shape.
        text: encoder_hidden_states (N, L, D) of the prompt.
        null_text: The same of the empty prompt.
        strength: Factor on the branch's residuals.
    """

    embedding: Tensor | None
    null_embedding: Tensor | None
    text: Tensor
    null_text: Tensor
    strength: float = 1.0

    def without(self, drop: Sequence[str]) -> Conditions:
        """Drop some of "features", "text", "branch"."""
        embedding = self.null_embedding if "features" in drop else self.embedding
        return dataclasses.replace(
            self,
            embedding=None if "branch" in drop else embedding,
            text=self.null_text if "text" in drop else self.text,
        )


def control_branch(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet that starts as a copy of the UNet's encoder and adds nothing (all its output convolutions are zero).

    Its own picture encoder is replaced by the identity: ours lives in `featinv.conditioning`, sees neither timestep nor
    noise, and so runs once per image instead of once per step.
    """
    branch = ControlNetModel.from_unet(unet)
    branch.controlnet_cond_embedding = nn.Identity()
    return branch.requires_grad_(True)


class ControlledUNet(nn.Module):
    """A frozen UNet plus a branch that adds residuals to its skip connections and middle block.

    Args:
        unet: Frozen here.
        branch: From `control_branch`.
        num_train_timesteps: Of the schedule that the UNet was trained with.
    """

    def __init__(self, unet: UNet2DConditionModel, branch: ControlNetModel, num_train_timesteps: int = 1000):
        super().__init__()
        self.unet, self.branch = unet.requires_grad_(False), branch
        self.num_train_timesteps = num_train_timesteps

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Predict noise or velocity (N, C, h, w); `timesteps` is (N,) or ()."""
        timesteps = timesteps.expand(len(noisy_latents))
        down, middle = None, None
        if conditions.embedding is not None:
            down, middle = self.branch(
                noisy_latents,
                timesteps,
                encoder_hidden_states=conditions.text,
                controlnet_cond=conditions.embedding,
                conditioning_scale=conditions.strength,
                return_dict=False,
            )
        return self.unet(
            noisy_latents,
            timesteps,
            encoder_hidden_states=conditions.text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]


def unconditional(unet: UNet2DConditionModel, text: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
    """The frozen prior's own prediction (N, C, h, w) under `text` (1, L, D)."""
    hidden = text.expand(len(noisy_latents), -1, -1)
    timesteps = torch.as_tensor(timesteps).expand(len(noisy_latents))
    return unet(noisy_latents, timesteps, encoder_hidden_states=hidden, return_dict=False)[0]
