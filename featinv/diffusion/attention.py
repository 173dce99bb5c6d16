"""Which of diffusers' two ways of computing attention is the faster one, map by map."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor

SMALL = 2**17
"""Scores (queries x keys) of a head below which two matrix products beat the flash kernel on a CPU in bfloat16."""


class AttentionBySize:
    """Small maps by plain matrix products on a CPU in bfloat16, everything else by PyTorch's own kernel.

    There the layers of a 16 x 16 map, and those that look at 77 tokens of text, take two thirds to three quarters of
    the time forward and backward; in float32 nothing is gained.
    """

    def __init__(self) -> None:
        self.plain, self.kernel = AttnProcessor(), AttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend from `hidden_states` (N, L, D) to `encoder_hidden_states` (N, S, E), or to themselves."""
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        small = hidden_states.shape[1] * keys.shape[1] < SMALL
        way: Any = self.plain if small and _half_on_cpu(hidden_states) else self.kernel
        return way(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def attend_by_size(network: UNet2DConditionModel | ControlNetModel) -> None:
    """Let the attention layers of the network choose, but for those that attend in a way of their own."""
    chosen = AttentionBySize()
    known = network.attn_processors
    network.set_attn_processor({k: chosen if type(v) is AttnProcessor2_0 else v for k, v in known.items()})


def _half_on_cpu(hidden_states: Tensor) -> bool:
    return hidden_states.device.type == "cpu" and torch.is_autocast_enabled("cpu")
