"""Which of two ways of computing attention is the faster one, map by map."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from featinv.diffusion.half import multiplies_half_on_cpu

SMALL = 2**20
"""Scores (queries x keys) of a head up to which two matrix products beat the flash kernel on a CPU in bfloat16; those
of a 32 x 32 map still fit into memory for a batch."""


class AttentionBySize:
    """Small maps by plain matrix products on a CPU in bfloat16, everything else by PyTorch's own kernel.

    There the layers of a 32 x 32 map take half of the time, forward and backward; in float32 nothing is gained. Scores
    are rounded to bfloat16 once more than in the kernel, before the softmax (computed in float32) instead of after.
    """

    def __init__(self) -> None:
        self.kernel = AttnProcessor2_0()

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
        small = hidden_states.dim() == 3 and hidden_states.shape[1] * keys.shape[1] <= SMALL
        if small and attention_mask is None and _is_plain(attn) and multiplies_half_on_cpu(hidden_states):
            return self.products(attn, hidden_states, keys)
        way: Any = self.kernel
        return way(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

    def products(self, attn: Attention, hidden_states: Tensor, keys: Tensor) -> Tensor:
        """The same by two products, with queries of `hidden_states` (N, L, D), keys and values of `keys` (N, S, E)."""
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))  # (N heads, L, d)
        repeats = len(keys) if keys.stride(0) == 0 else 1  # one prompt for all rows is projected once
        keys = keys[: len(keys) // repeats]
        key, value = (attn.head_to_batch_dim(project(keys)) for project in (attn.to_k, attn.to_v))
        if repeats > 1:
            key, value = key.repeat(repeats, 1, 1), value.repeat(repeats, 1, 1)
        with torch.autocast("cpu", enabled=False):  # which would turn scores into float32, twice the memory to move
            probabilities = torch.bmm(query * attn.scale, key.transpose(1, 2)).softmax(-1)
            attended = torch.bmm(probabilities, value)
        output, dropout = attn.to_out
        return dropout(output(attn.batch_to_head_dim(attended))) / attn.rescale_output_factor


def attend_by_size(network: UNet2DConditionModel | ControlNetModel) -> None:
    """Let the attention layers of the network choose, but for those that attend in a way of their own."""
    chosen = AttentionBySize()
    known = network.attn_processors
    network.set_attn_processor({k: chosen if type(v) is AttnProcessor2_0 else v for k, v in known.items()})


def _is_plain(attn: Attention) -> bool:
    """Whether the layer is projections and attention alone, as all those of a UNet's transformers are."""
    norms = (attn.group_norm, attn.spatial_norm, attn.norm_cross, attn.norm_q, attn.norm_k)
    upcast = attn.upcast_attention or attn.upcast_softmax
    return not (upcast or attn.residual_connection or any(norm is not None for norm in norms))
