"""Sizes of the networks in an LDM checkpoint: from tensor shapes what these tell, from its YAML what they cannot.

Shapes do not show the number of attention heads, the schedule, the latent scale, the picture's size and the kind of
prediction. The YAML may be CompVis' own (`model: {params: {unet_config: ...}}`) or a short one with some of the
sections `unet`, `control`, `vae`, `schedule` and `text`, as docs/checkpoints.md describes.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from featinv.config import nearest
from featinv.diffusion.ldm_keys import Levels
from featinv.errors import UserError
from featinv.files import first_line, given_path

State = Mapping[str, Tensor]
SCHEDULE: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
"""Stable Diffusion's."""
SCHEDULE_KEYS = [*SCHEDULE, "num_train_timesteps", "prediction_type", "rescale_betas_zero_snr"]
SECTIONS = {
    "unet": ["num_attention_heads", "num_heads", "attention_head_dim", "num_head_channels", "sample_size"],
    "control": ["feature_channels", "feature_size"],
    "vae": ["scaling_factor"],
    "schedule": [*SCHEDULE_KEYS, "ddim_steps", "guidance_scale"],
    "text": ["num_attention_heads"],
}
"""Of a short YAML, with the keys that are read."""
_SIZES = ["in_channels", "out_channels", "block_out_channels", "layers_per_block", "num_res_blocks"]
_SIZES += ["down_block_types", "up_block_types"]
_NEEDLESS = {
    "unet": [*_SIZES, "model_channels", "channel_mult", "cross_attention_dim", "context_dim", "attention_resolutions"]
    + ["transformer_depth", "transformer_layers_per_block", "use_linear_projection", "use_linear_in_transformer"],
    "control": ["hidden_channels"],
    "vae": [*_SIZES, "ch", "ch_mult", "out_ch", "latent_channels", "z_channels", "embed_dim", "attn_resolutions"],
    "schedule": ["eta"],  # samplers draw no noise here
    "text": [],
}
"""Keys that it may have, too: shapes tell what they say, and `check_stated` compares some of it."""
_PARAMS = ["image_size", "scale_factor", "beta_schedule", "linear_start", "linear_end", "timesteps", "parameterization"]
_PARAMS += ["rescale_betas_zero_snr", "unet_config"]
_UNET_PARAMS = ["image_size", "num_heads", "num_head_channels"]
"""What is read of CompVis' `model.params` and of its `unet_config.params`, beside sizes."""


@dataclass(frozen=True)
class LdmSettings:
    """What tensor shapes do not tell; the defaults are Stable Diffusion 1's, at miniSD's picture size.

    Attributes:
        heads: Attention heads, of every level or of each.
        head_channels: Channels of one head instead, the same on every level.
        sample_size: Side of the latents.
        scaling_factor: Of the latents.
        schedule: Arguments of diffusers' `DDPMScheduler`.
        feature_size: Height and width of the branch's feature map.
        feature_channels: Its channels, for a checkpoint without a branch.
        steps: Sampling steps.
        guidance_scale: Of the guidance that drops the prompt.
        text_heads: Attention heads of the text encoder; None takes 64 channels for each, as CLIP does.
        stated: What the YAML says of each part, also where the shapes tell it, to be compared.
    """

    heads: int | tuple[int, ...] = 8
    head_channels: int | None = None
    sample_size: int = 32
    scaling_factor: float = 0.18215
    schedule: dict[str, Any] = field(default_factory=SCHEDULE.copy)
    feature_size: tuple[int, int] = (9, 9)
    feature_channels: int = 1024
    steps: int = 50
    guidance_scale: float = 1.75
    text_heads: int | None = None
    stated: dict[str, Any] = field(default_factory=dict)


def read_settings(path: str | Path | None) -> LdmSettings:
    """Read a YAML of either kind; None gives the defaults.

    Raises:
        UserError: If the file is missing or of neither kind, one of its sections is not a mapping, or a key is unknown:
            in a short YAML any, naming the nearest; in CompVis', which is full of what is not ours, one that looks like
            a key that is read.
    """
    if path is None:
        return LdmSettings()
    path = given_path(path)
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise UserError(f"there is no configuration {path}.") from error
    except Exception as error:  # YAML's parser raises many kinds
        raise UserError(f"{path} is not a YAML file ({first_line(error)}).") from error
    plain = OmegaConf.to_container(config) if isinstance(config, DictConfig) else {}
    assert isinstance(plain, dict)
    sections = {name: plain[name] or {} for name in ("model", *SECTIONS) if name in plain}
    if not sections:
        raise UserError(
            f"{path} describes no latent-diffusion model: it has none of the sections model, {', '.join(SECTIONS)}."
        )
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise UserError(f"the section {name} of {path} must be a mapping, not {section!r}.")
    try:
        if "model" not in sections:
            _refuse_unknown(plain, list(SECTIONS))
        found = _compvis(sections) if "model" in sections else _short(sections)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return LdmSettings(**{name: value for name, value in found.items() if value is not None})


def _refuse_unknown(section: Mapping[Any, Any], keys: Sequence[str], where: str = "") -> None:
    for key in map(str, section):
        if key not in keys:
            raise UserError(f"{where}{key} is unknown: {nearest(key, keys)}")


def _refuse_misspelt(section: Mapping[Any, Any], keys: Sequence[str], where: str) -> None:
    """Of a section that holds keys of others, refuse those that are nearly ours or that a short YAML has for ours."""
    of_short = {*SECTIONS["unet"], *SECTIONS["vae"], *SCHEDULE_KEYS}
    for key in map(str, section):
        if key not in keys and (key in of_short or difflib.get_close_matches(key, keys, 1, cutoff=0.8)):
            raise UserError(f"{where}.{key} is unknown: {nearest(key, keys)}")


def _short(config: dict[str, Any]) -> dict[str, Any]:
    for name, section in config.items():
        _refuse_unknown(section, SECTIONS[name] + _NEEDLESS[name], f"{name}.")
    unet, control, vae, schedule, text = (config.get(name, {}) for name in SECTIONS)
    heads = unet.get("num_attention_heads") or unet.get("num_heads") or unet.get("attention_head_dim")
    return {
        "heads": tuple(heads) if isinstance(heads, list) else heads,
        "head_channels": unet.get("num_head_channels"),
        "sample_size": unet.get("sample_size"),
        "scaling_factor": vae.get("scaling_factor"),
        "schedule": SCHEDULE | {name: schedule[name] for name in SCHEDULE_KEYS if schedule.get(name) is not None},
        **_control(control),
        "steps": schedule.get("ddim_steps"),
        "guidance_scale": schedule.get("guidance_scale"),
        "text_heads": text.get("num_attention_heads"),
        "stated": _stated(unet, vae, control),
    }


def _control(control: dict[str, Any]) -> dict[str, Any]:
    return {"feature_size": _pair(control.get("feature_size")), "feature_channels": control.get("feature_channels")}


def _stated(unet: dict[str, Any], vae: dict[str, Any], control: dict[str, Any]) -> dict[str, Any]:
    """All that the YAML says of each part; `check_stated` looks at what shapes tell."""
    parts = (("the UNet", unet), ("the first stage", vae), ("the branch", control))
    return {f"{part}'s {name}": value for part, section in parts for name, value in section.items()}


def _compvis(config: dict[str, Any]) -> dict[str, Any]:
    params = config["model"].get("params") or {}
    unet = (params.get("unet_config") or {}).get("params") or {}
    control = config.get("control", {})
    _check_compvis(config, params, unet, control)
    first_stage = (params.get("first_stage_config") or {}).get("params") or {}
    # The LDM code's "linear" is linear in the square root of beta, its "sqrt_linear" is linear in beta.
    betas = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}
    kinds = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
    if (kind := params.get("parameterization") or "eps") not in kinds:
        raise UserError(f"model.params.parameterization is {kind!r}: {nearest(str(kind), list(kinds))}")
    heads, head_channels = unet.get("num_heads", -1), unet.get("num_head_channels", -1)
    image_size = params.get("image_size") or unet.get("image_size")
    return {
        "heads": heads if heads != -1 else None,
        "head_channels": head_channels if head_channels != -1 else None,
        "sample_size": image_size,
        "scaling_factor": params.get("scale_factor"),
        "schedule": {
            "beta_schedule": betas.get(params.get("beta_schedule", "linear")),
            "beta_start": params.get("linear_start", 1e-4),
            "beta_end": params.get("linear_end", 2e-2),
            "num_train_timesteps": params.get("timesteps", 1000),
            "prediction_type": kinds[kind],
            "rescale_betas_zero_snr": params.get("rescale_betas_zero_snr"),
        },
        **_control(control),
        "stated": _stated(unet, first_stage.get("ddconfig") or {}, control),
    }


def _check_compvis(
    config: Mapping[str, Any], params: Mapping[str, Any], unet: Mapping[str, Any], control: Mapping[str, Any]
) -> None:
    if ignored := sorted(set(config) - {"model", "control"}):
        raise UserError(
            f"beside model only the section control is read, not {ignored[0]}: leave it out, or write a short YAML, "
            "without model."
        )
    _refuse_unknown(control, SECTIONS["control"] + _NEEDLESS["control"], "control.")
    _refuse_misspelt(params, _PARAMS, "model.params")
    _refuse_misspelt(unet, _UNET_PARAMS, "model.params.unet_config.params")


def _pair(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    pair = (value, value) if isinstance(value, int) else tuple(value)
    return int(pair[0]), int(pair[1])


def check_stated(settings: LdmSettings, found: Mapping[str, Any]) -> None:
    """Compare what the YAML states with what the shapes say.

    Raises:
        UserError: If they differ: then its number of heads may be another model's, too, which nothing else would show.
    """
    for name, size in found.items():
        value = settings.stated.get(name, size)
        # A count may be given for each level: num_res_blocks: [2, 2, 2, 2].
        each = value if isinstance(value, list) and isinstance(size, int) else [value]
        if value is not None and any(one != size for one in each):
            raise UserError(f"the configuration says {value} for {name}, the checkpoint has {size}.")


def found_sizes(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> dict[str, Any]:
    """What shapes tell and a YAML may state, by diffusers' names and by the LDM code's, for `check_stated`.

    Args:
        unet: From `unet_config`.
        vae: From `vae_config`.
    """
    common = {"in_channels": "in_channels", "out_channels": "out_channels", "num_res_blocks": "layers_per_block"}
    names = {**common, "context_dim": "cross_attention_dim"}
    vae_names = {**common, "out_ch": "out_channels", "z_channels": "latent_channels"}
    found: dict[str, Any] = {}
    for part, config, ldm_names, width, factors in (
        ("the UNet", unet, names, "model_channels", "channel_mult"),
        ("the first stage", vae, vae_names, "ch", "ch_mult"),
    ):
        channels = config["block_out_channels"]
        sizes = {
            "block_out_channels": channels,
            width: channels[0],
            factors: [_ratio(c, channels[0]) for c in channels],
        }
        sizes |= {name: config[own] for ldm, own in ldm_names.items() for name in (ldm, own)}
        found |= {f"{part}'s {name}": value for name, value in sizes.items()}
    return found


def _ratio(width: int, first: int) -> int | float:
    return width // first if width % first == 0 else width / first


def _shape(state: State, name: str, part: str) -> torch.Size:
    if name not in state:
        raise UserError(f"{part} lacks {name!r}: the checkpoint is damaged or not of the latent-diffusion kind.")
    return state[name].shape


def unet_config(state: State, settings: LdmSettings, part: str = "the UNet") -> tuple[dict[str, Any], Levels]:
    """The arguments of diffusers' `UNet2DConditionModel` for tensors named as beneath model.diffusion_model."""
    channels: list[int] = []
    depths: list[int] = []
    layers: list[int] = []
    number = 1
    while f"input_blocks.{number}.0.in_layers.2.weight" in state:
        channels.append(int(state[f"input_blocks.{number}.0.in_layers.2.weight"].shape[0]))
        depths.append(_depth(state, f"input_blocks.{number}.1"))
        layers.append(0)
        while f"input_blocks.{number}.0.in_layers.2.weight" in state:
            layers[-1] += 1
            number += 1
        number += 1  # the downsampling
    first = _shape(state, "input_blocks.0.0.weight", part)
    _check_uniform(layers, channels, int(first[0]), part)
    attention, middle = tuple(depth > 0 for depth in depths), "middle_block.1"
    depths = [depth or 1 for depth in depths[:-1]] + [_depth(state, middle) or 1]
    config = {
        "sample_size": settings.sample_size,
        "in_channels": first[1],
        "out_channels": _shape(state, "out.2.weight", part)[0],
        "down_block_types": [f"{'CrossAttn' if has else ''}DownBlock2D" for has in attention],
        "up_block_types": [f"{'CrossAttn' if has else ''}UpBlock2D" for has in reversed(attention)],
        "block_out_channels": channels,
        "layers_per_block": layers[0],
        "cross_attention_dim": _shape(state, f"{middle}.transformer_blocks.0.attn2.to_k.weight", part)[1],
        "transformer_layers_per_block": depths,
        "use_linear_projection": len(_shape(state, f"{middle}.proj_in.weight", part)) == 2,
        "attention_head_dim": _heads(settings, channels),  # diffusers' name for the number of heads
    }
    return config, Levels(layers[0], attention)


def _check_uniform(layers: list[int], channels: list[int], first: int, part: str) -> None:
    if not layers:
        raise UserError(f"{part} has no residual blocks: the checkpoint is damaged or of another kind.")
    if len(set(layers)) > 1:
        raise UserError(f"{part} has {layers} residual blocks a level; only the same number on each is supported.")
    if channels[0] != first:
        raise UserError(f"{part} starts with {first} channels and goes on with {channels[0]}; these must be equal.")


def _depth(state: State, attention: str) -> int:
    depth = 0
    while f"{attention}.transformer_blocks.{depth}.norm1.weight" in state:
        depth += 1
    return depth


def _heads(settings: LdmSettings, channels: list[int]) -> list[int]:
    if settings.head_channels:
        return [max(1, width // settings.head_channels) for width in channels]
    heads = [settings.heads] * len(channels) if isinstance(settings.heads, int) else list(settings.heads)
    if len(heads) != len(channels):
        raise UserError(f"the configuration has heads for {len(heads)} levels, the checkpoint has {len(channels)}.")
    return heads


def vae_config(state: State, settings: LdmSettings) -> tuple[dict[str, Any], Levels]:
    """The arguments of diffusers' `AutoencoderKL` for tensors named as beneath first_stage_model."""
    part = "the first stage"
    channels: list[int] = []
    attention: list[bool] = []
    layers: list[int] = []
    while f"encoder.down.{len(layers)}.block.0.conv1.weight" in state:
        level, count = f"encoder.down.{len(layers)}", 0
        while f"{level}.block.{count}.conv1.weight" in state:
            count += 1
        channels.append(int(state[f"{level}.block.0.conv1.weight"].shape[0]))
        attention.append(f"{level}.attn.0.q.weight" in state)
        layers.append(count)
    first = _shape(state, "encoder.conv_in.weight", part)
    _check_uniform(layers, channels, int(first[0]), part)
    latents = int(_shape(state, "post_quant_conv.weight", part)[1])
    config = {
        "in_channels": first[1],
        "out_channels": _shape(state, "decoder.conv_out.weight", part)[0],
        "down_block_types": [f"{'Attn' if has else ''}DownEncoderBlock2D" for has in attention],
        "up_block_types": [f"{'Attn' if has else ''}UpDecoderBlock2D" for has in reversed(attention)],
        "block_out_channels": channels,
        "layers_per_block": layers[0],
        "latent_channels": latents,
        "sample_size": settings.sample_size * 2 ** (len(channels) - 1),
        "scaling_factor": settings.scaling_factor,
    }
    return config, Levels(layers[0], tuple(attention))


def scheduler(state: State, settings: LdmSettings) -> DDPMScheduler:
    """The schedule of the YAML, or the checkpoint's own `betas` where these differ: the LDM code samples with them."""
    options = {**settings.schedule, "clip_sample": False, "steps_offset": 1}
    made = DDPMScheduler(**{name: value for name, value in options.items() if value is not None})
    betas = state.get("betas")
    if betas is None or (betas.shape == made.betas.shape and torch.allclose(betas, made.betas, rtol=1e-3)):
        return made
    kept = {name: options[name] for name in ("prediction_type", "clip_sample", "steps_offset") if name in options}
    return DDPMScheduler(trained_betas=betas.tolist(), num_train_timesteps=len(betas), **kept)
