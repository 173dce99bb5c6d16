"""What is about to be trained, in a few lines."""

from __future__ import annotations

from omegaconf import DictConfig
from torch import nn

from featinv.training.module import InversionModule


def parameters(module: nn.Module, trained: bool) -> float:
    """Millions of parameters that training changes, or that it does not."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad == trained) / 1e6


def describe(config: DictConfig, module: InversionModule) -> str:
    """Parts, shapes, sizes and length of a training run."""
    inverter, spec, settings = module.inverter, module.backbone.spec, config.training
    lines = [f"features   {spec.channels} x {spec.height} x {spec.width} of {spec.layer!r}, {config.backbone.target}"]
    prior = getattr(inverter, "prior", None)
    if prior is not None:
        latents, frozen = " x ".join(map(str, prior.latent_shape)), parameters(prior, False)
        lines.append(f"prior      {config.prior}: {prior.size} px, latents {latents}, {frozen:.1f} M frozen")
    assert isinstance(inverter, nn.Module)
    lines.append(f"inverter   {type(inverter).__name__}, {parameters(inverter, True):.1f} M trained")
    per_step = settings.batch_size * settings.accumulate
    lines.append(f"training   {settings.max_steps} steps of {per_step} images ({settings.max_steps * per_step} in all)")
    return "\n".join(lines)
