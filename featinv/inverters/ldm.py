"""A FeatInv checkpoint of the published code (ControlNet's format) as one of our inverters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import ControlNetModel
from torch import Tensor

from featinv.backbones.base import FeatureSpec
from featinv.conditioning.dropout import ConditionDropout
from featinv.conditioning.encoders import PublishedEncoder
from featinv.diffusion.controlled_unet import Conditions
from featinv.diffusion.guidance import ClassifierFreeGuidance
from featinv.diffusion.ldm import LdmCheckpoint, export_ldm, hint_layers, ldm_prior, load_branch, read_ldm
from featinv.diffusion.ldm_config import check_stated
from featinv.diffusion.samplers import sample
from featinv.errors import UserError
from featinv.inverters.diffusion import DiffusionInverter

log = logging.getLogger(__name__)


def import_ldm(checkpoint_path: str | Path, config_path: str | Path | None = None) -> DiffusionInverter:
    """Load a checkpoint of the published code: prior, branch and hint encoder, sampling as that code does.

    The parts are where every `DiffusionInverter` has them: `prior` (with `prior.unet`, `prior.first_stage`,
    `prior.scheduler`, `prior.text`), `branch` (diffusers' `ControlNetModel`), `encoder` (the hint block) and `unet`
    (UNet and branch as one function). docs/checkpoints.md shows each.

    Args:
        checkpoint_path: .ckpt (read with weights_only=True) or .safetensors.
        config_path: Its YAML; None looks for one beside it.

    Returns:
        The inverter, in float32 and evaluation mode. If the checkpoint holds no branch, this starts untrained, and so
        equal to the prior, with a warning.

    Raises:
        UserError: If a file is missing, damaged, holds more than tensors, or does not fit the other.
    """
    checkpoint = read_ldm(checkpoint_path, config_path)
    prior, settings = ldm_prior(checkpoint), checkpoint.settings
    layers = hint_layers(checkpoint) if checkpoint.has_branch else None
    channels, hidden = (layers[0][0].shape[1], layers[0][0].shape[0]) if layers else (settings.feature_channels, 512)
    check_stated(settings, {"the branch's feature_channels": channels})
    encoder = PublishedEncoder(
        FeatureSpec(channels, *settings.feature_size, "final"),
        prior.latent_shape,
        prior.unet.config.block_out_channels[0],
        hidden,
    )
    inverter = DiffusionInverter(
        prior,
        encoder,
        ClassifierFreeGuidance(settings.guidance_scale, ["text"]),
        "ddim_leading",
        settings.steps,
        ConditionDropout(0.15, 0.15, joint=True),
        regression_weight=0.0,
        gated=False,
    )
    if layers is None:
        log.warning("%s holds no branch: it starts untrained, equal to the prior", checkpoint.path)
    else:
        _fill(inverter, checkpoint, layers)
    return inverter.eval()


@torch.no_grad()
def _fill(inverter: DiffusionInverter, checkpoint: LdmCheckpoint, layers: list[tuple[Tensor, Tensor]]) -> None:
    load_branch(checkpoint, inverter.branch, inverter.prior.unet)
    encoder = inverter.encoder
    assert isinstance(encoder, PublishedEncoder)
    for convolution, (weight, bias) in zip((encoder.conv1, encoder.conv2, encoder.out), layers, strict=True):
        if convolution.weight.shape != weight.shape:
            raise UserError(
                f"a convolution of the hint block is {tuple(weight.shape)}, not {tuple(convolution.weight.shape)}."
            )
        convolution.weight.copy_(weight)
        convolution.bias.copy_(bias)  # type: ignore[union-attr]
    # The published code drops features by setting them to zero before the hint block; away from the edges that is one
    # vector for every position, which is what our empty embedding is.
    nothing = encoder(torch.zeros(1, encoder.spec.channels, encoder.spec.height, encoder.spec.width))[0]
    inverter.null_embedding.copy_(nothing[:, :, nothing.shape[2] // 2, nothing.shape[3] // 2, None, None])


def export_inverter(inverter: DiffusionInverter) -> dict[str, Tensor]:
    """Tensors of prior, branch and hint block by the published code's names: what `import_ldm` reads back.

    Raises:
        UserError: If the inverter has parts that code does not know (another encoder or branch, a gate, a lift).
    """
    published = isinstance(inverter.encoder, PublishedEncoder) and isinstance(inverter.branch, ControlNetModel)
    if not published or inverter.gate is not None or inverter.lift is not None:
        raise UserError(
            "only an inverter with the published hint encoder and branch, without a gate or a lift, fits an LDM "
            "checkpoint."
        )
    state = export_ldm(inverter.prior, inverter.branch)
    for place, name in ((1, "conv1"), (3, "conv2"), (5, "out")):
        for kind, value in getattr(inverter.encoder, name).state_dict().items():
            state[f"control_model.input_hint_block.block.{place}.{kind}"] = value.detach()
    return state


@torch.no_grad()
def parity(inverter: DiffusionInverter, expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Compare with what another implementation computed from the same weights.

    Args:
        inverter: From `import_ldm`.
        expected: Inputs `features` (N, C, H, W), `noisy_latents` (N, c, h, w), `timesteps` (N,),
            `encoder_hidden_states` and `negative_encoder_hidden_states` (N, L, D), `images` (N, 3, S, S) in [-1, 1];
            and outputs by the names below, where ddim* is what the YAML's guided steps make of `noisy_latents`. What
            is not there is not compared.

    Returns:
        Relative difference of each output: the norm of the difference over the norm of what is expected.
    """
    prior, stage = inverter.prior, inverter.prior.first_stage
    noisy, timesteps = expected["noisy_latents"], expected["timesteps"]
    text, null_text = expected["encoder_hidden_states"], expected.get("negative_encoder_hidden_states")
    embedding = inverter.encoder(expected["features"])[0] if "features" in expected else None
    conditions = Conditions(embedding, None, text, text if null_text is None else null_text)

    def denoise(noisy_latents: Tensor, timestep: Tensor) -> Tensor:
        return inverter.guidance.denoise(inverter.unet, noisy_latents, timestep, conditions)

    def draw() -> Tensor:
        return sample(denoise, noisy, prior.scheduler, inverter.sampler, inverter.num_inference_steps)

    outputs: dict[str, Callable[[], Tensor | None]] = {
        "hint_embedding": lambda: embedding,
        "noise_pred_without_control": lambda: inverter.unet(noisy, timesteps, conditions.without(["branch"])),
        "noise_pred_with_control": lambda: inverter.unet(noisy, timesteps, conditions),
        "latents_mean_scaled": lambda: stage.encode((expected["images"] + 1) / 2),
        "decoded_from_noisy_latents": lambda: stage.decode(noisy, clamp=False) * 2 - 1,
        **{name: draw for name in expected if name.startswith("ddim")},
    }
    found = {}
    for name, compute in outputs.items():
        value = compute() if name in expected else None
        if value is not None:
            found[name] = float((value - expected[name]).norm() / expected[name].norm())
    return found
