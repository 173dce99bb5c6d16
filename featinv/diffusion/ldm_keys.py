"""Names of tensors: CompVis' latent-diffusion code (LDM, ControlNet) <-> diffusers.

A table maps module names of one side to those of the other and is its own description: `renamed` reads it forwards,
`inverted` turns it round. The networks are the same, block for block; only the LDM code numbers its blocks in one list
(input_blocks.7.1) where diffusers sorts them by level and kind (down_blocks.2.attentions.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from featinv.errors import UserError

Table = dict[str, str]
"""Module name in the LDM code -> module name in diffusers."""

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


@dataclass(frozen=True)
class Levels:
    """What the numbering depends on.

    Attributes:
        layers: Residual blocks on each level of the encoder; the decoder has one more.
        attention: Whether each level has attention after its residual blocks, highest resolution first.
    """

    layers: int
    attention: tuple[bool, ...]


def _beneath(ldm: str, diffusers: str, inner: Table) -> Table:
    return {f"{ldm}.{theirs}": f"{diffusers}.{ours}" for theirs, ours in inner.items()}


def _encoder(levels: Levels) -> Table:
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
    }
    number = 1
    for level, attention in enumerate(levels.attention):
        for layer in range(levels.layers):
            table |= _beneath(f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{layer}", _RESNET)
            if attention:
                table[f"input_blocks.{number}.1"] = f"down_blocks.{level}.attentions.{layer}"
            number += 1
        if level < len(levels.attention) - 1:
            table[f"input_blocks.{number}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            number += 1
    table |= _beneath("middle_block.0", "mid_block.resnets.0", _RESNET)
    table |= _beneath("middle_block.2", "mid_block.resnets.1", _RESNET)
    return table | {"middle_block.1": "mid_block.attentions.0"}


def unet_table(levels: Levels) -> Table:
    """The UNet (model.diffusion_model)."""
    table = _encoder(levels) | {"out.0": "conv_norm_out", "out.2": "conv_out"}
    number = 0
    for block, attention in enumerate(reversed(levels.attention)):
        for layer in range(levels.layers + 1):
            table |= _beneath(f"output_blocks.{number}.0", f"up_blocks.{block}.resnets.{layer}", _RESNET)
            if attention:
                table[f"output_blocks.{number}.1"] = f"up_blocks.{block}.attentions.{layer}"
            number += 1
        if block < len(levels.attention) - 1:
            place = 2 if attention else 1
            table[f"output_blocks.{number - 1}.{place}.conv"] = f"up_blocks.{block}.upsamplers.0.conv"
    return table


def branch_table(levels: Levels) -> Table:
    """The ControlNet branch (control_model) without its hint block."""
    outputs = len(levels.attention) * (levels.layers + 1)
    zero_convolutions = {f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(outputs)}
    return _encoder(levels) | zero_convolutions | {"middle_block_out.0": "controlnet_mid_block"}


def vae_table(levels: Levels) -> Table:
    """The first stage (first_stage_model)."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        table |= {f"{side}.{name}": f"{side}.{name}" for name in ("conv_in", "conv_out")}
        table |= {f"{side}.norm_out": f"{side}.conv_norm_out"}
        middle = f"{side}.mid_block"
        table |= _beneath(f"{side}.mid.attn_1", f"{middle}.attentions.0", _VAE_ATTENTION)
        for i in range(2):
            table |= _beneath(f"{side}.mid.block_{i + 1}", f"{middle}.resnets.{i}", _VAE_RESNET)
    last = len(levels.attention) - 1
    for level, attention in enumerate(levels.attention):
        # The LDM code counts the decoder's levels by resolution, diffusers in the order in which they run.
        for theirs, ours, count in (
            (f"encoder.down.{level}", f"encoder.down_blocks.{level}", levels.layers),
            (f"decoder.up.{level}", f"decoder.up_blocks.{last - level}", levels.layers + 1),
        ):
            for layer in range(count):
                table |= _beneath(f"{theirs}.block.{layer}", f"{ours}.resnets.{layer}", _VAE_RESNET)
                if attention:
                    table |= _beneath(f"{theirs}.attn.{layer}", f"{ours}.attentions.{layer}", _VAE_ATTENTION)
        table[f"encoder.down.{level}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        table[f"decoder.up.{level}.upsample.conv"] = f"decoder.up_blocks.{last - level}.upsamplers.0.conv"
    return table


def inverted(table: Table) -> Table:
    """The table in the other direction."""
    return {ours: theirs for theirs, ours in table.items()}


def renamed(state: Mapping[str, Tensor], table: Table, part: str) -> dict[str, Tensor]:
    """Rename every tensor of `state`.

    Raises:
        UserError: If a tensor belongs to no module of the table, naming it.
    """
    return {_new_name(name, table, part): tensor for name, tensor in state.items()}


def _new_name(name: str, table: Table, part: str) -> str:
    words = name.split(".")
    for length in range(len(words) - 1, 0, -1):
        module = ".".join(words[:length])
        if module in table:
            return ".".join([table[module], *words[length:]])
    raise UserError(f"{part} holds {name!r}, which a latent-diffusion network of this kind does not have.")


def unfolded(state: dict[str, Tensor], to_linear: bool) -> dict[str, Tensor]:
    """The first stage's attention, by diffusers' names: 1 x 1 convolutions (LDM code) to linear layers, or back."""
    ends = tuple(f"{name}.weight" for name in _VAE_ATTENTION.values() if name != "group_norm")
    found = {name for name in state if ".attentions." in name and name.endswith(ends)}
    return {
        name: tensor if name not in found else tensor.flatten(1) if to_linear else tensor.flatten(1)[:, :, None, None]
        for name, tensor in state.items()
    }
