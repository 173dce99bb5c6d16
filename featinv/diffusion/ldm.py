"""Priors and branches in the format of CompVis' latent-diffusion code and of ControlNet's, read and written.

Such a checkpoint is one state dict: model.diffusion_model.* (the UNet), first_stage_model.* (the autoencoder),
cond_stage_model.* (the text encoder, if kept), control_model.* (the branch, if there is one), the schedule's buffers.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from featinv.diffusion.first_stage import FirstStage
from featinv.diffusion.ldm_config import (
    SCHEDULE_KEYS,
    LdmSettings,
    check_stated,
    found_sizes,
    read_settings,
    scheduler,
    unet_config,
    vae_config,
)
from featinv.diffusion.ldm_keys import (
    Levels,
    Table,
    branch_table,
    inverted,
    renamed,
    unet_table,
    unfolded,
    vae_table,
)
from featinv.diffusion.ldm_text import prompt_embeddings
from featinv.diffusion.prior import DiffusionPrior
from featinv.errors import UserError
from featinv.files import given_path, read_state

log = logging.getLogger(__name__)

LDM_SUFFIXES = (".ckpt", ".pth", ".pt", ".bin", ".safetensors")
UNET, BRANCH, FIRST_STAGE, TEXT = "model.diffusion_model.", "control_model.", "first_stage_model.", "cond_stage_model."
_HINT = "input_hint_block."


@dataclass(frozen=True)
class LdmCheckpoint:
    """The tensors of a checkpoint in float32, and what its YAML adds.

    Attributes:
        path: Where it was read.
        state: Tensors by their names in the LDM code.
        settings: From the YAML, or Stable Diffusion 1's.
    """

    path: Path
    state: dict[str, Tensor]
    settings: LdmSettings

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose names start with `prefix`, without it."""
        return {name.removeprefix(prefix): tensor for name, tensor in self.state.items() if name.startswith(prefix)}

    @property
    def has_branch(self) -> bool:
        """Whether there is a ControlNet branch."""
        return any(name.startswith(BRANCH) for name in self.state)


def read_ldm(path: str | Path, config_path: str | Path | None = None) -> LdmCheckpoint:
    """Read a checkpoint (.ckpt and the like with weights_only=True, or .safetensors) and its YAML.

    Args:
        path: The checkpoint.
        config_path: Its YAML; None looks for one of the same name, then for config.yaml, beside it.

    Raises:
        UserError: If a file is missing, damaged, of another kind, or holds more than tensors.
    """
    path = given_path(path)
    state = read_state(path)
    state = state.get("state_dict", state) if isinstance(state, dict) else {}  # type: ignore[assignment]
    if not any(name.startswith(UNET) for name in state):
        raise UserError(
            f"{path} is no latent-diffusion checkpoint: it holds no {UNET}* tensors. A prior in diffusers' layout is a "
            "folder, an inverter of ours is loaded with load_inverter."
        )
    if config_path is None:
        beside = (path.with_suffix(".yaml"), path.with_name("config.yaml"))
        config_path = next((file for file in beside if file.is_file()), None)
        if config_path is None:
            log.warning(
                "no YAML for %s: Stable Diffusion 1's 8 heads, schedule and scale, and 256 px are assumed", path
            )
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in state.items() if isinstance(v, Tensor)}
    return LdmCheckpoint(path, tensors, read_settings(config_path))


def ldm_prior(checkpoint: LdmCheckpoint) -> DiffusionPrior:
    """The frozen prior in a checkpoint.

    Raises:
        UserError: If a part is missing, incomplete, or of sizes that diffusers' networks cannot have.
    """
    settings, own_unet, own_vae = checkpoint.settings, checkpoint.part(UNET), checkpoint.part(FIRST_STAGE)
    if not own_vae:
        raise UserError(f"{checkpoint.path} holds no first stage ({FIRST_STAGE}*): use the full checkpoint.")
    own_vae = {name: value for name, value in own_vae.items() if not name.startswith("loss.")}  # its discriminator
    unet_sizes, unet_levels = unet_config(own_unet, settings)
    vae_sizes, vae_levels = vae_config(own_vae, settings)
    check_stated(settings, found_sizes(unet_sizes, vae_sizes))
    unet, vae = UNet2DConditionModel(**unet_sizes), AutoencoderKL(**vae_sizes)
    load_exactly(unet, renamed(own_unet, unet_table(unet_levels), "the UNet"), "the UNet")
    load_exactly(
        vae, unfolded(renamed(own_vae, vae_table(vae_levels), "the first stage"), to_linear=True), "the first stage"
    )
    text = prompt_embeddings(checkpoint.part(TEXT), unet_sizes["cross_attention_dim"], settings.text_heads)
    return DiffusionPrior(FirstStage(vae), unet, scheduler(checkpoint.state, settings), text, vae_sizes["sample_size"])


def load_exactly(module: nn.Module, state: dict[str, Tensor], part: str) -> None:
    """Load every tensor into a module that has exactly these.

    Raises:
        UserError: If one is missing, left over, or of another shape, naming it.
    """
    own = module.state_dict()
    missing, surplus = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or surplus:
        what = f"lacks {missing[0]!r}" if missing else f"has {surplus[0]!r} beyond what it should"
        raise UserError(f"{part} in the checkpoint {what} (diffusers' names): it is damaged or of an unsupported kind.")
    for name, value in state.items():
        if value.shape != own[name].shape:
            raise UserError(f"{part}: {name!r} has shape {tuple(value.shape)}, not {tuple(own[name].shape)}.")
    module.load_state_dict(state)


def levels_of(unet: UNet2DConditionModel) -> Levels:
    """How the LDM code would number this UNet's blocks."""
    attention = tuple(kind.startswith("CrossAttn") for kind in unet.config.down_block_types)
    return Levels(unet.config.layers_per_block, attention)


def load_branch(checkpoint: LdmCheckpoint, branch: ControlNetModel, unet: UNet2DConditionModel) -> None:
    """Fill a branch made by `control_branch(unet)` with the checkpoint's; its hint block is left to `hint_layers`."""
    own = {name: value for name, value in checkpoint.part(BRANCH).items() if not name.startswith(_HINT)}
    load_exactly(branch, renamed(own, branch_table(levels_of(unet)), "the branch"), "the branch")


def hint_layers(checkpoint: LdmCheckpoint) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of each convolution in the branch's hint block, in the order in which they run.

    Raises:
        UserError: If it is not the published recipe's three 3 x 3 convolutions.
    """
    own = checkpoint.part(BRANCH + _HINT)
    names = sorted(
        (name.removesuffix(".weight") for name in own if name.endswith(".weight")),
        key=lambda name: [int(word) for word in name.split(".") if word.isdigit()],
    )
    layers = [
        (own[f"{name}.weight"], own.get(f"{name}.bias", torch.zeros(len(own[f"{name}.weight"])))) for name in names
    ]
    if len(layers) != 3 or any(tuple(weight.shape[2:]) != (3, 3) for weight, _ in layers):
        raise UserError(
            f"the hint block of {checkpoint.path} has {len(layers)} convolutions, not the three of 3 x 3 that read a "
            "feature map: it is a branch of another kind (a picture ControlNet has eight)."
        )
    return layers


def export_ldm(prior: DiffusionPrior, branch: ControlNetModel | None = None) -> dict[str, Tensor]:
    """Tensors of a prior, and of a branch if given, by their names in the LDM code.

    The prompt's embeddings have no place in that format: prior.text is left out, and so is the text encoder.

    Raises:
        UserError: If the prior has parts that the LDM code does not know (patches, a shortcut, a finish, a shift).
    """
    stage = prior.first_stage
    _refuse_own_parts(stage)
    vae_levels = Levels(
        stage.vae.config.layers_per_block, tuple(kind.startswith("Attn") for kind in stage.vae.config.down_block_types)
    )
    levels = levels_of(prior.unet)
    state = _exported(prior.unet.state_dict(), unet_table(levels), UNET)
    state |= _exported(unfolded(stage.vae.state_dict(), to_linear=False), vae_table(vae_levels), FIRST_STAGE)
    if branch is not None:
        state |= _exported(branch.state_dict(), branch_table(levels), BRANCH)
    return state | {"betas": prior.scheduler.betas.clone(), "alphas_cumprod": prior.scheduler.alphas_cumprod.clone()}


def _refuse_own_parts(stage: FirstStage) -> None:
    parts = {
        "folds patches": stage.patch_size != 1,
        "has a shortcut": stage.shortcut is not None,
        "finishes what it decodes": stage.finish is not None,
        "shifts its latents": bool(getattr(stage.vae.config, "shift_factor", None)),
    }
    found = [part for part, there in parts.items() if there]
    if found:
        raise UserError(f"this prior's first stage {' and '.join(found)}, which an LDM checkpoint cannot hold.")


def _exported(state: dict[str, Tensor], table: Table, prefix: str) -> dict[str, Tensor]:
    names = renamed(state, inverted(table), "the network")
    return {prefix + name: tensor.detach().contiguous() for name, tensor in names.items()}


def export_config(prior: DiffusionPrior) -> dict[str, Any]:
    """The short YAML's content for `export_ldm`: what the tensors' shapes do not tell."""
    unet, vae, schedule = prior.unet.config, prior.first_stage.vae.config, prior.scheduler.config
    heads = unet.num_attention_heads or unet.attention_head_dim
    return {
        "unet": {
            "num_attention_heads": heads if isinstance(heads, int) else list(heads),
            "sample_size": prior.latent_shape[1],
        },
        "vae": {"scaling_factor": float(vae.scaling_factor)},
        "schedule": {name: schedule[name] for name in SCHEDULE_KEYS},
    }
