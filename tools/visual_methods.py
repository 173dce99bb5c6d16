"""The methods of `tools.visualize`: (backbone, image (1, 3, H, W), options) -> pictures by file name, and numbers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from featinv.attribution.adversarial import fgsm, pgd
from featinv.attribution.deconvnet import deconvnet
from featinv.attribution.diagnostics import blank_reconstructions, dead_channels
from featinv.attribution.maximisation import (
    Objective,
    channel_objective,
    class_objective,
    direction_objective,
    maximise,
    unit_objective,
)
from featinv.attribution.prior_maximisation import maximise_with_prior
from featinv.attribution.saliency import SALIENCY, overlay, to_map
from featinv.attribution.transfer import attacks, transfer_table
from featinv.backbones import Backbone, load_backbone
from featinv.data.folders import pictures
from featinv.diffusion.prior import load_prior
from featinv.errors import UserError
from featinv.image import save_png
from featinv.inverters.masks import channel_mask, region_mask, top_channels
from featinv.inverters.optimisation import OptimizationInverter
from featinv.metrics.features import feature_cosine
from featinv.metrics.images import psnr, ssim

Result = tuple[dict[str, Tensor], dict[str, Any]]
Method = Callable[[Backbone, Tensor, argparse.Namespace], Result]


def _saliency(name: str) -> Method:
    def method(backbone: Backbone, image: Tensor, options: argparse.Namespace) -> Result:
        target = None if options.target is None else [options.target]
        words = {"seeds": [options.seed]} if name == "smooth_grad" else {}  # the only one that draws
        found = to_map(SALIENCY[name](backbone, image, target, **words))
        with torch.no_grad():
            probabilities = backbone.logits(image).softmax(1)[0]
            best = probabilities.topk(min(5, len(probabilities)))
        numbers = {"class": best.indices.tolist(), "probability": best.values.tolist()}
        return {name: overlay(image, found)}, numbers

    return method


def _mask(features: Tensor, options: argparse.Namespace) -> Tensor | None:
    """Which part of the map counts: --channel or --top, within --region."""
    mask = None
    if options.channel is not None:
        mask = channel_mask(features, [options.channel])
    elif options.top is not None:
        mask = top_channels(features, options.top)
    if options.region is not None:
        region = region_mask(features, options.region)
        mask = region if mask is None else mask * region
    return mask


def _deconvnet(backbone: Backbone, image: Tensor, options: argparse.Namespace) -> Result:
    with torch.no_grad():
        mask = _mask(backbone(image), options)
    signal = deconvnet(backbone, image, mask)
    centred = 0.5 + 0.5 * signal / signal.abs().max().clamp(min=1e-12)
    return {"deconvnet": centred}, {"largest": float(signal.abs().max())}


def _inverted(
    name: str,
    backbone: Backbone,
    features: Tensor,
    side: int,
    options: argparse.Namespace,
    image: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pictures with these features, and the progress at steps 1, 2, 4, ... side by side (1, 3, H, K W).

    The progress is written to a file whenever it grows, so that one can watch.
    """
    inverter = OptimizationInverter(
        backbone,
        side,
        options.steps,
        parametrisation=options.parametrisation,
        prior=options.prior if options.parametrisation == "latent" else None,
        optimizer=options.optimizer,
        jitter=options.jitter,
        scale=options.scale,
        start="grey" if options.start == "grey" else "noise",
    )
    snapshots: list[Tensor] = []
    with tqdm(total=options.steps, desc="inverting", unit="step") as bar:

        def watch(step: int, images: Tensor) -> None:
            bar.update()
            if (step + 1) & step == 0 or step + 1 == options.steps:  # powers of two
                snapshots.append(images[:1].cpu())
                save_png(options.out / f"{name}_progress.png", torch.cat(snapshots, 3)[0].clamp(0, 1))

        found = inverter.invert(
            features,
            seeds=[options.seed] * len(features),
            mask=_mask(features, options),
            start=None if image is None or options.start != "image" else image,
            callback=watch,
        )
    return found, torch.cat(snapshots, 3).clamp(0, 1)


def _optimisation(backbone: Backbone, image: Tensor, options: argparse.Namespace) -> Result:
    with torch.no_grad():
        features = backbone(image)
    found, progress = _inverted("optimisation", backbone, features, image.shape[-1], options, image)
    with torch.no_grad():
        numbers = {
            "cosine": float(feature_cosine(features, backbone(found))),
            "psnr": float(psnr(image, found)),
            "ssim": float(ssim(image, found)),
            "blank": bool(blank_reconstructions(found)),
        }
    return {"optimisation": found, "optimisation_progress": progress}, numbers


def _objective(backbone: Backbone, image: Tensor, options: argparse.Namespace) -> tuple[Objective, dict[str, Any]]:
    """What --objective names: of the picture's strongest channel, its class or its mean feature."""
    with torch.no_grad():
        mean = backbone(image).mean((0, 2, 3))
    channel = int(mean.argmax()) if options.channel is None else options.channel
    if options.objective == "class" or (options.objective is None and options.target is not None):
        with torch.no_grad():
            target = int(backbone.logits(image).argmax()) if options.target is None else options.target
        return class_objective(backbone, target), {"class": target}
    if options.objective == "unit":
        return unit_objective(backbone, channel), {"unit of channel": channel}
    if options.objective == "direction":
        return direction_objective(backbone, mean), {"direction": "mean feature of the picture"}
    return channel_objective(backbone, channel), {"channel": channel}


def _scores(objective: Objective, **images: Tensor) -> dict[str, float]:
    with torch.no_grad():
        return {name: float(objective(image)) for name, image in images.items()}


def _maximisation(backbone: Backbone, image: Tensor, options: argparse.Namespace) -> Result:
    objective, chosen = _objective(backbone, image, options)
    with tqdm(total=options.steps, desc="maximising", unit="step") as bar:
        found = maximise(
            objective,
            [options.seed],
            size=image.shape[-1],
            device=backbone.mean.device,
            steps=options.steps,
            callback=lambda step, images: bar.update() and None,
        )
    return {"maximisation": found}, chosen | _scores(objective, picture=image, maximised=found)


def _prior_maximisation(backbone: Backbone, image: Tensor, options: argparse.Namespace) -> Result:
    objective, chosen = _objective(backbone, image, options)
    prior, steps = load_prior(options.prior), 30
    alone = maximise_with_prior(objective, [options.seed], prior, steps=steps, strength=0.0).images
    with tqdm(total=steps, desc="drawing", unit="step") as bar:
        found = maximise_with_prior(
            objective, [options.seed], prior, steps=steps, callback=lambda step, latents: bar.update() and None
        )
    numbers = chosen | _scores(objective, picture=image, prior_alone=alone, guided=found.images)
    pictures_ = {"prior_alone": alone, "prior_maximisation": found.images}
    return pictures_, numbers | {"gradients_skipped": found.skipped}


def _attacked(name: str, backbone: Backbone, image: Tensor, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The attacked picture and the network's class before."""
    with torch.no_grad():
        before = backbone.logits(image).argmax(1)
    labels = before if options.target is None else torch.tensor([options.target])
    targeted = options.target is not None
    if name == "fgsm":
        return fgsm(backbone, image, labels, options.eps / 255, targeted), before
    radius = options.eps / 255 if options.norm == "linf" else options.l2
    return pgd(backbone, image, labels, radius, norm=options.norm, targeted=targeted), before


def _attack(name: str) -> Method:
    def method(backbone: Backbone, image: Tensor, options: argparse.Namespace) -> Result:
        found, before = _attacked(name, backbone, image, options)
        change = found - image
        with torch.no_grad():
            cosine = feature_cosine(backbone(image), backbone(found))
            after = backbone.logits(found).argmax(1)
        numbers = {"class": int(before), "class_attacked": int(after), "feature_cosine": float(cosine)}
        noise = 0.5 + change / (2 * float(change.abs().max().clamp(min=1e-6)))
        return {name: found, f"{name}_change": noise}, numbers

    return method


def _attacked_inversion(backbone: Backbone, image: Tensor, options: argparse.Namespace) -> Result:
    attacked, before = _attacked("pgd", backbone, image, options)
    with torch.no_grad():
        features = backbone(torch.cat([image, attacked]))
        after = backbone.logits(attacked).argmax(1)
    # The same seed for both: they differ by the features alone.
    found, _ = _inverted("attacked_inversion", backbone, features, image.shape[-1], options)
    with torch.no_grad():
        classes = backbone.logits(found).argmax(1).tolist()
    numbers = {
        "class": int(before),
        "class_attacked": int(after),
        "class_from_clean_features": classes[0],
        "class_from_attacked_features": classes[1],
        "feature_cosine": float(feature_cosine(features[:1], features[1:])),
        "psnr_between_pictures": float(psnr(image, attacked)),
        "psnr_between_reconstructions": float(psnr(found[:1], found[1:])),
    }
    return {"attacked": attacked, "from_clean_features": found[:1], "from_attacked_features": found[1:]}, numbers


def _transfer(backbone: Backbone, image: Tensor, options: argparse.Namespace) -> Result:
    with torch.no_grad():
        label = backbone.logits(image).argmax(1)
    target = None if options.target is None else torch.tensor([options.target])
    made = attacks(backbone, image, label, eps=options.eps / 255, l2_eps=options.l2, targets=target)
    judges = {name: load_backbone(name, input_size=backbone.input_size) for name in options.judges}
    # Marked: a judge may have the same name and other weights (--untrained) or another layer.
    networks = {f"{options.backbone} (attacked)": backbone, **judges}
    table = transfer_table(made, label, networks, originals=image)
    changed = {attack: {judge: bool(cell["changed"]) for judge, cell in row.items()} for attack, row in table.items()}
    return {f"transfer_{attack}": picture for attack, picture in made.items()}, {"class_changed": changed}


def _activity(backbone: Backbone, image: Tensor, options: argparse.Namespace) -> Result:
    if options.data is None:
        raise UserError("dead channels are counted over a set of pictures; give --data FOLDER.")
    items = pictures(options.data, image.shape[-1])
    bar = tqdm(range(len(items)), desc="counting", unit="img")
    found = dead_channels(backbone, (items[i]["image"][None] for i in bar))
    where = found.inactive_units.float().mean(0)[None, None].expand(1, 3, -1, -1)
    shares = found.image_share.float().sort(descending=True).values
    strip = shares[None, None, None].expand(1, 3, 24, -1)
    numbers = {
        "images": found.images,
        "channels": len(found.dead),
        "dead": found.dead.nonzero()[:, 0].tolist(),
        "inactive_units": int(found.inactive_units.sum()),
        "units": found.unit_images.numel(),
    }
    side = image.shape[-1]
    enlarged = torch.nn.functional.interpolate(where, (side, side), mode="nearest")
    return {"inactive_units": enlarged, "channel_activity": strip}, numbers


METHODS: dict[str, Method] = {
    **{name: _saliency(name) for name in SALIENCY},
    "deconvnet": _deconvnet,
    "optimisation": _optimisation,
    "maximisation": _maximisation,
    "prior_maximisation": _prior_maximisation,
    "fgsm": _attack("fgsm"),
    "pgd": _attack("pgd"),
    "attacked_inversion": _attacked_inversion,
    "transfer": _transfer,
    "activity": _activity,
}
