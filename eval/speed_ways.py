"""The ways of working that `eval.speed` compares: one training step, or drawing, of each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from featinv.backbones import Backbone, without_weights
from featinv.config import instantiate, load_config
from featinv.diffusion.architectures import random_prior
from featinv.diffusion.samplers import sample
from featinv.inverters.build import build_inverter
from featinv.inverters.diffusion import DiffusionInverter
from featinv.training.ema import EMA
from featinv.training.optimizers import FusedAdamW
from featinv.training.precision import fast_bfloat16


@dataclass
class Networks:
    """Everything one way of working needs."""

    inverter: DiffusionInverter
    backbone: Backbone
    images: Tensor
    device: torch.device
    training: DictConfig

    @property
    def seeds(self) -> list[int]:
        return list(range(len(self.images)))


OURS = {
    "default": (),
    "light": ("inverter.params.branch=light", "inverter.params.num_inference_steps=2"),
}
"""Our ways of working: changes in `experiment=convnext_base`."""


def networks(experiment: str, size: str, batch: int, device: torch.device, changes: Sequence[str] = ()) -> Networks:
    """The inverter of an experiment with random weights."""
    smaller = [] if size != "small" else ["backbone=efficientnet_lite0", "backbone.params.input_size=64"]
    config = load_config(experiment, [*smaller, *changes])
    backbone = instantiate(without_weights(OmegaConf.to_container(config.backbone)), where="backbone").to(device)  # type: ignore[arg-type]
    inverter = build_inverter(config, backbone.spec, backbone, random_prior(size)).to(device)  # type: ignore[attr-defined]
    images = torch.rand(batch, 3, inverter.size, inverter.size, device=device)
    return Networks(inverter, backbone, images, device, config.training.module.params)


def text_encoder(width: int, device: torch.device) -> Callable[[int], Tensor]:
    """CLIP's text tower (123.1 M parameters at width 768), as the published code runs it in every step."""
    from transformers import CLIPTextConfig, CLIPTextModel

    heads = max(1, width // 64)
    config = CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads)
    tower = CLIPTextModel(config).eval().requires_grad_(False).to(device)
    ids = torch.full((1, 77), 49407, device=device)
    return lambda n: tower(ids.expand(n, -1)).last_hidden_state


def reference_training(nets: Networks, text: Callable[[int], Tensor]) -> Callable[[], Any]:
    """A step of the published code: nothing cached, fp32, no average."""
    inverter = nets.inverter
    inverter._unet[0].to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(inverter.trainable_parameters(), lr=1e-5)

    def step() -> None:
        with torch.no_grad():
            features = torch.cat([nets.backbone(image[None]) for image in nets.images])
            inverter.prior.text["prompt"].copy_(text(len(features))[:1])
        inverter.training_losses(nets.images, features, seeds=nets.seeds)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def default_training(nets: Networks) -> Callable[[], Any]:
    """A step of ours: latents and features from the cache, bf16."""
    inverter = nets.inverter
    optimizer = FusedAdamW(inverter.trainable_parameters(), lr=1e-5)
    weights = {k: p for k, p in inverter.named_parameters() if p.requires_grad}
    average = EMA(weights, nets.training.ema_decay, nets.training.ema_every)
    with torch.no_grad():
        features, latents = nets.backbone(nets.images), inverter.prior.first_stage.encode(nets.images)

    def step() -> None:
        with _bfloat16(nets.device):
            loss = inverter.training_losses(nets.images, features, seeds=nets.seeds, latents=latents)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update()

    return step


@torch.no_grad()
def reference_sampling(nets: Networks, text: Callable[[int], Tensor], steps: int) -> None:
    """Draw one image with `steps` steps of guided DDIM, the published code's way."""
    inverter = nets.inverter
    features = nets.backbone(nets.images[:1])
    inverter.prior.text["prompt"].copy_(text(1))
    inverter.prior.text["null"].copy_(text(1))
    noise = torch.randn(1, *inverter.prior.latent_shape, device=nets.device)

    def denoise(noisy_latents: Tensor, timestep: Tensor) -> Tensor:
        # Both evaluations run the hint block, which lies inside the published branch.
        conditional = inverter.unet(noisy_latents, timestep, inverter.conditions(features))
        dropped = inverter.unet(noisy_latents, timestep, inverter.conditions(features).without(["text"]))
        return dropped + 1.75 * (conditional - dropped)

    latents = sample(denoise, noise, inverter.prior.scheduler, "ddim_leading", steps)
    inverter.prior.first_stage.decode(latents)


@torch.no_grad()
def default_sampling(nets: Networks) -> None:
    """Draw a batch our way."""
    nets.inverter.invert(nets.backbone(nets.images), seeds=nets.seeds)


def _bfloat16(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if fast_bfloat16() else contextlib.nullcontext()
