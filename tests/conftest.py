"""Tiny random-weight parts, so that the rooms are tested together in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from omegaconf import DictConfig, OmegaConf

from featinv.backbones import Backbone, load_backbone
from featinv.conditioning.encoders import SpatialEncoder
from featinv.diffusion.first_stage import FirstStage
from featinv.diffusion.prior import DiffusionPrior
from featinv.inverters.base import TrainableInverter
from featinv.inverters.build import about, build_inverter, save_inverter
from featinv.inverters.diffusion import DiffusionInverter

TINY_BACKBONE: dict[str, Any] = {"name": "resnet10t", "pretrained": False, "input_size": 64}


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def tiny_first_stage(shortcut: bool = False) -> FirstStage:
    """An 8-pixel-patch first stage with 4 latent channels."""
    vae = AutoencoderKL(
        in_channels=48,
        out_channels=48,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    return FirstStage(vae, patch_size=4, shortcut=shortcut)


def tiny_prior(prediction_type: str = "v_prediction") -> DiffusionPrior:
    """A prior for 32-pixel pictures with text attention."""
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )
    text = {"prompt": torch.randn(1, 3, 8), "null": torch.randn(1, 3, 8)}
    return DiffusionPrior(tiny_first_stage(), unet, scheduler, text, size=32)


def tiny_config(prior: Path, **more: Any) -> DictConfig:
    """Configuration of an inverter of `backbone` with the prior of a folder, and other groups beside it."""
    encoder = {"components": 16, "hidden": 16, "blocks": 1}
    return OmegaConf.create(
        {
            "prior": str(prior),
            "backbone": {"target": "featinv.backbones.timm_backbone.TimmBackbone", "params": TINY_BACKBONE},
            "conditioning": {"target": "featinv.conditioning.encoders.SpatialEncoder", "params": encoder},
            "inverter": {
                "target": "featinv.inverters.diffusion.DiffusionInverter",
                "params": {"num_inference_steps": 3},
            },
            **more,
        }
    )


def save_tiny(path: Path, config: DictConfig, backbone: Backbone, **more: Any) -> TrainableInverter:
    """Write the inverter of a configuration with random weights, also in the zero convolutions."""
    inverter = build_inverter(config, backbone.spec)
    for parameter in inverter.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    save_inverter(path, inverter, about(config, inverter, backbone.spec), **more)
    return inverter.eval()


def wake(inverter: DiffusionInverter) -> DiffusionInverter:
    """Give the zero convolutions values, as training would."""
    for block in [*inverter.branch.controlnet_down_blocks, inverter.branch.controlnet_mid_block]:
        torch.nn.init.normal_(block.weight, std=0.3)
    torch.nn.init.normal_(inverter.null_embedding)
    return inverter


@pytest.fixture
def prior() -> DiffusionPrior:
    return tiny_prior()


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    return load_backbone(**TINY_BACKBONE)


@pytest.fixture
def inverter(prior: DiffusionPrior, backbone: Backbone) -> DiffusionInverter:
    encoder = SpatialEncoder(backbone.spec, prior.latent_shape, 16, components=16, hidden=16, blocks=1)
    return DiffusionInverter(prior, encoder, num_inference_steps=3)
