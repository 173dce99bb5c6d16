"""A dry run: a training run's networks at their real size, without weights; their memory, their time, their mismatches.

Everything is built on torch's meta device and goes through one training step there, which costs seconds and no memory,
so that what does not fit together is found before the first image is read.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import IterableDataset
from torch.utils.flop_counter import FlopCounterMode

from featinv.backbones import Backbone, without_weights
from featinv.config import instantiate
from featinv.data import load_part
from featinv.diffusion.architectures import outline_prior
from featinv.diffusion.half import saved_bytes
from featinv.diffusion.lift import training_backbone, training_first_stage
from featinv.diffusion.prior import DiffusionPrior
from featinv.errors import UserError
from featinv.files import first_line, given_path
from featinv.inverters.build import build_inverter
from featinv.training.cache import cache_bytes
from featinv.training.costs import BYTES_TRAINED, StepCost, matmul_peak, step_cost
from featinv.training.precision import lightning_precision, stores_half
from featinv.training.rows import check_size, stated_size

IMAGENET_IMAGES = 1_281_167
SHARES = (0.4, 0.15)
"""Shares of the matrix-multiply peak between which the prediction lies: a well-fed GPU's and a plain CPU run's."""


def plan(config: DictConfig) -> Iterator[str]:
    """Yield a report line by line: parts, parameters, memory, time, and what is missing on this machine.

    Args:
        config: See configs/experiment.

    Raises:
        UserError: If parts do not fit each other.
    """
    settings = config.training
    backbone: Backbone = instantiate(without_weights(OmegaConf.to_container(config.backbone, resolve=True)))  # type: ignore[arg-type]
    with FlopCounterMode(display=False) as counter:
        spec = backbone.spec
    inverter = outline_inverter(config, backbone)
    read = training_backbone(inverter, backbone).spec
    shape = (read.channels, read.height, read.width)
    problems: list[str] = [*_missing_weights(config), *_devices(settings)]
    images = count_images(config, inverter.size, problems)
    yield f"features    {spec.channels} x {spec.height} x {spec.width} of {spec.layer!r}, {_named(config.backbone)}"
    yield f"pictures    {inverter.size} px" + _latents(inverter)
    yield ""
    yield f"{'part':12s}{'parameters':>14s}"
    for name, part in _parts(backbone, inverter):
        kind = "trained" if any(p.requires_grad for p in part.parameters()) else "frozen"
        yield f"{name:12s}{sum(p.numel() for p in part.parameters()) / 1e6:12.1f} M  {kind}"
    yield f"{'trained':12s}{_trained(inverter) / 1e6:12.1f} M  in all"
    yield ""
    with _mismatch("a training step does not go through"):
        cost = step_cost(inverter, settings.batch_size, shape, settings.cache)
    yield from _memory(config, backbone, inverter, cost)
    yield ""
    yield from _time(config, cost, 0 if settings.cache else counter.get_total_flops(), images)
    yield from _disk(config, inverter, shape, images, problems)
    yield ""
    yield from ["before it can train:", *(f"  - {line}" for line in problems)] if problems else ["nothing is missing."]


def outline_inverter(config: DictConfig, backbone: Backbone) -> Any:
    """The inverter of a configuration on the meta device.

    Raises:
        UserError: If its parts do not fit, or there is nothing to train.
    """
    prior = outline_prior(config.prior) if config.get("prior") is not None else None
    with torch.device("meta"), _mismatch("the inverter's parts do not fit"):
        inverter = build_inverter(config, backbone.spec, backbone, prior)
    if not isinstance(inverter, nn.Module) or not any(p.requires_grad for p in inverter.parameters()):
        raise UserError(f"{type(inverter).__name__} has nothing to train.")
    return inverter.to("meta")


@contextlib.contextmanager
def _mismatch(what: str) -> Iterator[None]:
    """Name what torch's own complaints are about."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{what}: {first_line(error)}") from error


def _named(node: DictConfig) -> str:
    name = (node.get("params") or {}).get("name")
    return f"{name} ({node.target.rpartition('.')[2]})" if name else node.target


def _latents(inverter: Any) -> str:
    prior = getattr(inverter, "prior", None)
    return f", latents {' x '.join(map(str, prior.latent_shape))}" if isinstance(prior, DiffusionPrior) else ""


def _parts(backbone: Backbone, inverter: Any) -> Iterator[tuple[str, nn.Module]]:
    """Names and networks, the prior's two by themselves."""
    yield "backbone", backbone
    for name, part in inverter.named_children():
        if isinstance(part, DiffusionPrior):
            yield "first stage", part.first_stage
            yield "UNet", part.unet
        elif any(True for _ in part.parameters()):
            yield name, part


def _trained(inverter: nn.Module) -> int:
    return sum(p.numel() for p in inverter.parameters() if p.requires_grad)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:8.2f} GB"


def _memory(config: DictConfig, backbone: Backbone, inverter: Any, cost: StepCost) -> Iterator[str]:
    trained = _trained(inverter)
    frozen = sum(p.numel() for p in [*inverter.parameters(), *backbone.parameters()]) - trained
    average = config.training.module.params.get("ema_decay", 1)
    sizes = {f"trained {name}": size * trained for name, size in BYTES_TRAINED.items() if average or name != "average"}
    half = lightning_precision(config.training.precision) != "32-true"
    prior = getattr(inverter, "prior", None)
    saved = saved_bytes(prior.unet) if stores_half(config.training) and isinstance(prior, DiffusionPrior) else 0
    activations = {f"activations of {cost.images} images": cost.activations}
    sizes = {"frozen weights": 4 * frozen - saved, **sizes, **activations}
    for name, size in sizes.items():
        yield f"{name:32s}{_gigabytes(size)}"
    yield f"{'memory in all':32s}{_gigabytes(sum(sizes.values()))}  on each device"
    yield "  activations: what autograd keeps, counted in fp32" + (
        "; bf16 about halves them and adds at most 2 bytes for each trained weight." if half else "."
    )


def _time(config: DictConfig, cost: StepCost, backbone_flops: int, images: int | None) -> Iterator[str]:
    settings = config.training
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = lightning_precision(settings.precision) != "32-true"
    peak = matmul_peak(device, torch.bfloat16 if half else torch.float32)
    flops = cost.flops / cost.images + backbone_flops
    rate = [share * peak / flops for share in SHARES]  # images a second
    run = settings.max_steps * settings.batch_size * settings.accumulate
    yield f"operations  {flops / 1e12:.3f} TFLOP an image, forward and backward"
    kind = "bf16" if half else "fp32"
    yield f"peak        {peak / 1e12:.3g} TFLOP/s, measured: {kind} matrix products on one {device.type}"
    yield f"images/s    {rate[1]:.3g} to {rate[0]:.3g}, assuming {SHARES[1]:.0%} to {SHARES[0]:.0%} of the peak"
    if images is not None:
        yield f"epoch       {images} images: {_duration(images / rate[0])} to {_duration(images / rate[1])}"
    length = f"{_duration(run / rate[0])} to {_duration(run / rate[1])}"
    yield f"whole run   {settings.max_steps} steps, {run} images: {length}, if reading keeps up"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _disk(
    config: DictConfig, inverter: Any, features: tuple[int, int, int], images: int | None, problems: list[str]
) -> Iterator[str]:
    checkpoints = 3 * 16 * _trained(inverter)  # last, previous, being written: weights, two moments, average
    cache = 0
    if config.training.cache and images:
        shapes = {"features": features}
        if training_first_stage(inverter) is not None:
            shapes |= dict.fromkeys(("mean", "std"), inverter.prior.latent_shape)
        else:
            shapes["image"] = (3, inverter.size, inverter.size)
        cache = cache_bytes(images * config.training.get("cache_epochs", 1), shapes)
    free = shutil.disk_usage(".").free
    yield f"disk        {_gigabytes(checkpoints).strip()} of checkpoints, {_gigabytes(cache).strip()} of cache"
    if checkpoints + cache > free:
        problems.append(f"the disk has {_gigabytes(free).strip()} free: make room or set out= and training.cache_root=")


def count_images(config: DictConfig, size: int, problems: list[str]) -> int | None:
    """Training images of a configuration, None if unknown; what is missing is added to `problems`.

    Raises:
        UserError: If the images have another size than the inverter draws.
    """
    check_size(stated_size(config), size)
    try:
        data = load_part(config.data, "train")
    except UserError as error:
        problems.append(str(error))
        return (
            IMAGENET_IMAGES
            if OmegaConf.select(config, "data.params.train.target", default="").endswith("ImageNetFolder")
            else None
        )
    if isinstance(data, IterableDataset):
        return None
    check_size(data[0]["image"].shape[-1], size)
    return len(data)


def _devices(settings: DictConfig) -> Iterator[str]:
    devices = settings.devices
    if isinstance(devices, int) and settings.batch_size % devices:
        raise UserError(f"batch_size {settings.batch_size} cannot be shared by {devices} devices; make it a multiple.")
    available = torch.cuda.device_count() if torch.cuda.is_available() else None
    if isinstance(devices, int) and available is not None and devices > available:
        yield f"training.devices={devices}, but this machine has {available} GPUs"


def _missing_weights(config: DictConfig) -> Iterator[str]:
    """Weights that come from the hub and are not in its local cache."""
    from huggingface_hub import try_to_load_from_cache

    prior = config.get("prior")
    if prior is None or prior.startswith("random:") or given_path(prior).exists() or "/" not in prior:
        return
    if not any(
        isinstance(try_to_load_from_cache(prior, f"unet/diffusion_pytorch_model.{kind}"), str)
        for kind in ("safetensors", "bin")
    ):
        yield f"the prior {prior} will be fetched from the hub, or give prior=FOLDER or prior=CHECKPOINT"
