"""The frozen latent-diffusion prior as one object: first stage, UNet, schedule, prompt embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from featinv.diffusion.attention import attend_by_size
from featinv.diffusion.convolution import convolve_by_size
from featinv.diffusion.first_stage import Finish, FirstStage
from featinv.errors import UserError
from featinv.files import first_line, given_path, load_safetensors, save_safetensors, write_json

WEIGHTS_ROOT = Path(__file__).resolve().parents[1] / "weights"
PROMPT = "a high-quality, detailed, and professional image"
"""The one prompt of the published recipe, for training and sampling alike."""
RANDOM = "random:"
"""Before the name of an architecture: that prior with random weights, to measure speed and memory without a hub."""


class DiffusionPrior(nn.Module):
    """First stage + UNet + schedule + prompt embeddings; frozen unless it is being trained.

    Args:
        first_stage: Pixels <-> latents.
        unet: Predicts noise or velocity.
        scheduler: The schedule it was trained with.
        text: Embeddings (1, L, D) of the prompt and of the empty prompt, by the keys "prompt" and "null".
        size: Side of the pictures in pixels.
    """

    def __init__(
        self,
        first_stage: FirstStage,
        unet: UNet2DConditionModel,
        scheduler: DDPMScheduler,
        text: dict[str, Tensor],
        size: int,
    ):
        super().__init__()
        self.first_stage, self.unet, self.scheduler, self.size = first_stage, unet, scheduler, size
        attend_by_size(unet)
        convolve_by_size(unet)
        convolve_by_size(first_stage)
        latents = first_stage.latent_shape(size)
        if unet.config.in_channels != latents[0]:
            raise UserError(
                f"the UNet takes {unet.config.in_channels} latent channels, the first stage makes {latents[0]}: "
                "they do not belong together."
            )
        if text["prompt"].shape[-1] != unet.config.cross_attention_dim:
            raise UserError(
                f"prompt embeddings of width {text['prompt'].shape[-1]} do not fit a UNet that takes "
                f"{unet.config.cross_attention_dim}."
            )
        self.text = nn.ParameterDict({k: nn.Parameter(v, requires_grad=False) for k, v in text.items()})
        self.freeze()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (c, h, w) of the latents."""
        return self.first_stage.latent_shape(self.size)

    def freeze(self) -> DiffusionPrior:
        """Stop every gradient and every change of mode."""
        self.requires_grad_(False).eval()
        return self

    def train(self, mode: bool = True) -> DiffusionPrior:
        """Stay in evaluation mode: a frozen prior has no training mode (its trainer sets the UNet's own)."""
        return super().train(False)

    def encoder_hidden_states(self, n: int, dropped: Tensor | None = None) -> Tensor:
        """Prompt embeddings (n, L, D), those of the empty prompt where `dropped` (n,) is True."""
        prompt = self.text["prompt"].expand(n, -1, -1)
        if dropped is None or not dropped.any():
            return prompt  # one row's memory for all: attention projects it once
        return torch.where(dropped.to(prompt.device)[:, None, None], self.text["null"].expand(n, -1, -1), prompt)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write diffusers' own folders (vae, unet, scheduler), and ours: embeddings, shortcut, finish, prior.json."""
        folder = Path(folder)
        for name, part in (("vae", self.first_stage.vae), ("unet", self.unet)):
            write_json(folder / name / "config.json", _plain_config(part))
            state = {k: v.to(dtype or v.dtype).contiguous() for k, v in part.state_dict().items()}
            save_safetensors(folder / name / "diffusion_pytorch_model.safetensors", state)
        self.scheduler.save_pretrained(folder / "scheduler")
        extra = {f"text.{k}": v.detach().clone() for k, v in self.text.items()}
        shortcut, finish = self.first_stage.shortcut, self.first_stage.finish
        for name, own in (("shortcut", shortcut), ("finish", finish)):
            if own is not None:
                extra |= {f"{name}.{k}": v for k, v in own.state_dict().items()}
        save_safetensors(folder / "prior.safetensors", {k: v.to(dtype or v.dtype) for k, v in extra.items()})
        sizes = {} if finish is None else {"finish": {"width": finish.width, "layers": finish.layers}}
        write_json(folder / "prior.json", {"size": self.size, "patch_size": self.first_stage.patch_size} | sizes)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> DiffusionPrior:
        """See `load_prior`."""
        return load_prior(name_or_path)


def _plain_config(part: AutoencoderKL | UNet2DConditionModel) -> dict[str, object]:
    return json.loads(part.to_json_string())


def bundled_priors() -> list[str]:
    """Names of the priors that come with the package."""
    return sorted(path.parent.name for path in WEIGHTS_ROOT.glob("*/prior.json"))


def load_prior(name_or_path: str | Path, config_path: str | Path | None = None) -> DiffusionPrior:
    """Load a frozen prior.

    Args:
        name_or_path: A bundled name ("scenes64"), a folder written by `DiffusionPrior.save_pretrained`, a Stable
            Diffusion folder in diffusers' layout, a hub id of one, or a checkpoint file of the LDM code (.ckpt,
            .safetensors); or "random:minisd" for random weights (see `featinv.diffusion.architectures`).
        config_path: YAML of such a file; None looks for one beside it.

    Returns:
        The prior, frozen, in float32.

    Raises:
        UserError: If nothing of that name is found or the files do not fit each other.
    """
    if str(name_or_path).startswith(RANDOM):
        from featinv.diffusion.architectures import random_prior

        return random_prior(str(name_or_path).removeprefix(RANDOM))
    path = WEIGHTS_ROOT / str(name_or_path)
    path = path if (path / "prior.json").is_file() else given_path(name_or_path)
    if (path / "prior.json").is_file():
        return _load_own(path)
    if path.is_file():
        from featinv.diffusion.ldm import ldm_prior, read_ldm

        return ldm_prior(read_ldm(path, config_path))
    if path.is_dir() and not (path / "unet").is_dir():
        raise UserError(f"{path} is no prior: it has neither prior.json nor a unet folder.")
    return _load_stable_diffusion(str(path if path.is_dir() else name_or_path))


def _load_own(path: Path) -> DiffusionPrior:
    info = json.loads((path / "prior.json").read_text())
    tensors, _ = load_safetensors(path / "prior.safetensors")
    tensors = {k: v.float() for k, v in tensors.items()}
    shortcut = {k.removeprefix("shortcut."): v for k, v in tensors.items() if k.startswith("shortcut.")}
    finish = {k.removeprefix("finish."): v for k, v in tensors.items() if k.startswith("finish.")}
    try:
        vae = _from_config(AutoencoderKL, path / "vae")
        unet = _from_config(UNet2DConditionModel, path / "unet")
        sizes = info.get("finish")
        first_stage = FirstStage(vae, info["patch_size"], bool(shortcut), Finish(**sizes) if sizes else None)
        for own, state in ((first_stage.shortcut, shortcut), (first_stage.finish, finish)):
            if own is not None:
                own.load_state_dict(state)
        for part, name in ((vae, "vae"), (unet, "unet")):
            state, _ = load_safetensors(path / name / "diffusion_pytorch_model.safetensors")
            part.load_state_dict({k: v.float() for k, v in state.items()})
    except (OSError, KeyError, RuntimeError) as error:
        raise UserError(f"the prior in {path} is damaged or incomplete: {first_line(error)}") from error
    scheduler = DDPMScheduler.from_pretrained(path / "scheduler")
    text = {k.removeprefix("text."): v for k, v in tensors.items() if k.startswith("text.")}
    return DiffusionPrior(first_stage, unet, scheduler, text, info["size"])


def _from_config(kind: Any, folder: Path) -> Any:
    return kind.from_config(json.loads((folder / "config.json").read_text()))


def _load_stable_diffusion(name: str) -> DiffusionPrior:
    from transformers import CLIPTextModel, CLIPTokenizer

    try:
        vae = AutoencoderKL.from_pretrained(name, subfolder="vae")
        unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet")
        scheduler = DDPMScheduler.from_pretrained(name, subfolder="scheduler")
        tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer")
        tower = CLIPTextModel.from_pretrained(name, subfolder="text_encoder").eval()
    except Exception as error:  # the hub client raises many kinds; all mean "not to be had"
        raise UserError(
            f"no prior {name!r}: not bundled ({', '.join(bundled_priors()) or 'none'}), no such folder, and not "
            f"loadable from the hub ({first_line(error)}). Small priors are made by tools.train_prior."
        ) from error
    # The tower is needed for two constant prompts only, then released.
    length = tokenizer.model_max_length
    ids = tokenizer(
        [PROMPT, ""], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        prompt, null = tower(ids).last_hidden_state.float().split(1)  # some are stored in half precision
    first_stage = FirstStage(vae)
    size = unet.config.sample_size * first_stage.factor
    return DiffusionPrior(first_stage, unet, scheduler, {"prompt": prompt, "null": null}, size)
