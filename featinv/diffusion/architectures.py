"""Priors known by their sizes, for networks with random weights or with none at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

from featinv.config import nearest
from featinv.diffusion.first_stage import FirstStage
from featinv.diffusion.prior import RANDOM, DiffusionPrior, load_prior
from featinv.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """Sizes of a Stable-Diffusion-like prior; the last level has no attention.

    Attributes:
        size: Side of the pictures in pixels.
        channels: Of the UNet's levels.
        vae_channels: Of the first stage's levels.
        heads: Attention heads.
        text_width: Width of the prompt's embeddings.
    """

    size: int
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)
    heads: int = 8
    text_width: int = 768


ARCHITECTURES = {
    "sd15": Architecture(512),  # Rombach et al. 2022, arXiv 2112.10752: 859.5 M + 83.7 M parameters
    "minisd": Architecture(256),  # the same network, tuned at 256 px
    "small": Architecture(64, (64, 128, 256), (32, 64, 64), 4, 64),  # for trying things out
}

ON_THE_HUB = {
    "lambdalabs/miniSD-diffusers": "minisd",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "runwayml/stable-diffusion-v1-5": "sd15",
    "CompVis/stable-diffusion-v1-4": "sd15",
}
"""Architectures of published priors, so that their sizes are known without the hub."""


def random_prior(name: str, seed: int = 0) -> DiffusionPrior:
    """A prior with random weights, for measuring speed and memory; it draws noise.

    Args:
        name: A key of `ARCHITECTURES`.
        seed: Of the weights; the global random state is left alone.

    Raises:
        UserError: If the name is unknown, naming the nearest.
    """
    if name not in ARCHITECTURES:
        raise UserError(f"no architecture {name!r}: {nearest(name, list(ARCHITECTURES))}")
    sizes = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _build(sizes)


def _build(sizes: Architecture) -> DiffusionPrior:
    levels, vae_levels = len(sizes.channels), len(sizes.vae_channels)
    unet = UNet2DConditionModel(
        sample_size=sizes.size // 2 ** (vae_levels - 1),
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        block_out_channels=sizes.channels,
        cross_attention_dim=sizes.text_width,
        attention_head_dim=sizes.heads,  # diffusers' name for the number of heads
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * vae_levels,
        up_block_types=("UpDecoderBlock2D",) * vae_levels,
        block_out_channels=sizes.vae_channels,
        layers_per_block=2,
        scaling_factor=0.18215,
    )
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    text = {name: torch.randn(1, 77, sizes.text_width) for name in ("prompt", "null")}
    return DiffusionPrior(FirstStage(vae), unet, scheduler, text, sizes.size)


def outline_prior(name_or_path: str) -> DiffusionPrior:
    """A prior's shapes on the meta device, without values; what is published is not fetched.

    A local one is loaded once, so that a damaged file is found now and not later.

    Raises:
        UserError: If nothing of that name is known or the files do not fit each other.
    """
    known = ON_THE_HUB.get(name_or_path)
    if known is None and not name_or_path.startswith(RANDOM):
        return load_prior(name_or_path).to("meta")
    with torch.device("meta"):
        return random_prior(known or name_or_path.removeprefix(RANDOM))
