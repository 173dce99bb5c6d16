"""The studies of `eval.classic`: each takes networks and pictures and returns figures, pictures and claims."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from featinv.applications.layers import layer_curve
from featinv.attribution.diagnostics import ChannelActivity, blank_reconstructions, dead_channels, leak_check
from featinv.attribution.localisation import localisation, single_object_scenes
from featinv.attribution.maximisation import channel_objective, maximise
from featinv.attribution.prior_maximisation import maximise_with_prior
from featinv.attribution.saliency import grad_cam, overlay, to_map
from featinv.attribution.transfer import attacks, predict, transfer_table
from featinv.backbones.base import Backbone
from featinv.diffusion.prior import DiffusionPrior
from featinv.errors import UserError
from featinv.image import resize
from featinv.inverters.base import Inverter
from featinv.inverters.optimisation import OptimizationInverter
from featinv.metrics.features import feature_cosine
from featinv.metrics.images import psnr


@dataclass(frozen=True)
class Claim:
    """One thing that should show.

    Attributes:
        text: What is claimed.
        value: What was measured.
        target: What it must reach.
    """

    text: str
    value: float
    target: float

    @property
    def met(self) -> bool:
        """Whether it does."""
        return self.value >= self.target


@dataclass
class Study:
    """What a study found.

    Attributes:
        figures: For the JSON file.
        rows: Label -> pictures (K, 3, H, W) in [0, 1], for one grid.
        claims: What should show, and whether it does.
    """

    figures: dict[str, Any]
    rows: dict[str, Tensor] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)


class WithBar:
    """An optimisation inverter that moves a progress bar at every step."""

    def __init__(self, inverter: OptimizationInverter, title: str):
        self.inverter, self._title, self.size = inverter, title, inverter.size

    def invert(self, features: Tensor, *, seeds: Sequence[int]) -> Tensor:
        """As the inverter does."""
        with tqdm(total=self.inverter.steps, desc=self._title, unit="step") as bar:
            return self.inverter.invert(features, seeds=seeds, callback=lambda step, images: bar.update() and None)


def study_layers(
    backbone: Backbone,
    referee: Backbone,
    images: Tensor,
    others: Tensor,
    layers: Sequence[str],
    steps: int,
    shown: int = 5,
) -> Study:
    """Invert every layer by optimisation: fidelity in features and pixels, blank pictures and leak over depth.

    Args:
        backbone: Cut at each layer.
        referee: Judges the leak.
        images: (N, 3, H, W), inverted.
        others: Further candidates of the leak check, same shape.
        layers: First to last.
        steps: Of the optimisation.
        shown: Pictures in the grid.
    """
    points = layer_curve(
        backbone,
        layers,
        images,
        lambda cut: WithBar(OptimizationInverter(cut, images.shape[-1], steps), f"inverting {cut.layer}"),
        referee,
    )
    candidates = torch.cat([images, others])
    figures: dict[str, Any] = {}
    rows = {"original": images[:shown]}
    for point in points:
        leak = leak_check(candidates, point.images, referee)
        figures[point.layer] = {
            "shape": list(point.shape),
            **point.figures,
            "leak": leak.top1,
            "leak_chance": leak.chance,
            "blank": int(blank_reconstructions(point.images).sum()),
        }
        rows[point.layer] = point.images[:shown]
    first, last = figures[layers[0]], figures[layers[-1]]
    claims = [
        Claim(f"cosine at {layers[0]} after {steps} steps", first["cosine"]["value"], 0.95),
        Claim(f"cosine at {layers[-1]} after {steps} steps", last["cosine"]["value"], 0.90),
        Claim(f"PSNR at {layers[0]}, dB, above {layers[-1]}'s", first["psnr"]["value"], last["psnr"]["value"]),
        Claim(f"SSIM at {layers[0]} above {layers[-1]}'s", first["ssim"]["value"], last["ssim"]["value"]),
    ]
    return Study(figures, rows, claims)


def study_attacks(
    networks: Mapping[str, Backbone],
    images: Tensor,
    labels: Tensor,
    *,
    n: int,
    eps: float,
    l2_eps: float,
    steps: int,
    inverted: int,
    invert_steps: int,
) -> Study:
    """Clean accuracy, attacks on the images that the first network gets right, transfer, and what is then inverted.

    Args:
        networks: The attacked one first, then the judges.
        images: (M, 3, H, W), all that clean accuracy is measured on.
        labels: (M,).
        n: Attack the first so many correctly classified.
        eps: L-infinity radius in [0, 1] pixel units.
        l2_eps: L2 radius.
        steps: Of PGD.
        inverted: Invert the features of so many attacked images.
        invert_steps: Of the optimisation.
    """
    name, backbone = next(iter(networks.items()))
    clean = {judge: predict(network, images) == labels for judge, network in networks.items()}
    right = clean[name].nonzero()[:n, 0]
    if not len(right):
        raise UserError(f"{name} gets none of the {len(images)} images right; are the labels ILSVRC's? labelled=false.")
    chosen, true = images[right], labels[right]
    targets = (true + 500) % backbone.logits(chosen[:1]).shape[1]
    seeds = range(len(chosen))
    parts: dict[str, list[Tensor]] = {}
    for rows in tqdm(torch.arange(len(chosen)).split(8), desc="attacking", unit="batch"):
        made = attacks(
            backbone,
            chosen[rows],
            true[rows],
            eps=eps,
            l2_eps=l2_eps,
            steps=steps,
            targets=targets[rows],
            seeds=[seeds[int(i)] for i in rows],
        )
        for attack, found in made.items():
            parts.setdefault(attack, []).append(found)
    attacked = {attack: torch.cat(found) for attack, found in parts.items()}
    table = transfer_table(attacked, true, dict(networks), originals=chosen)
    hits = {attack: float((predict(backbone, attacked[attack]) == targets).double().mean()) for attack in attacked}
    figures = {
        "clean_accuracy": {judge: float(hit.double().mean()) for judge, hit in clean.items()},
        "images": len(images),
        "attacked": len(chosen),
        "table": table,
        "target_hit": {attack: hit for attack, hit in hits.items() if attack.endswith("targeted")},
    }
    claim = Claim(f"PGD flips of {len(chosen)} correctly classified", table["pgd"][name]["flipped"], 0.95)
    study = Study(figures, claims=[claim])
    if inverted:
        _invert_attacked(study, backbone, chosen[:inverted], attacked["pgd"][:inverted], eps, invert_steps)
    return study


def _invert_attacked(study: Study, backbone: Backbone, clean: Tensor, attacked: Tensor, eps: float, steps: int) -> None:
    """Add what the optimiser reconstructs from the features of attacked images, next to the clean ones."""
    inverter = WithBar(OptimizationInverter(backbone, clean.shape[-1], steps), "inverting clean and attacked features")
    with torch.no_grad():
        features = backbone(torch.cat([clean, attacked]))
    seeds = [*range(len(clean))] * 2  # the same start for both, so that they differ by the features alone
    from_clean, from_attacked = inverter.invert(features, seeds=seeds).chunk(2)
    study.rows |= {
        "clean": clean,
        "attacked": attacked,
        "change,\nmagnified": 0.5 + (attacked - clean) / (2 * eps),
        "from clean\nfeatures": from_clean,
        "from attacked\nfeatures": from_attacked,
    }
    before, after = predict(backbone, attacked), predict(backbone, from_attacked)
    study.figures["inverted"] = {
        "feature_cosine_clean_attacked": feature_cosine(*features.chunk(2)).tolist(),
        "psnr_between_images": psnr(clean, attacked).tolist(),
        "psnr_between_reconstructions": psnr(from_clean, from_attacked).tolist(),
        "reconstruction_has_the_attacked_class": (before == after).tolist(),
        "reconstruction_has_the_clean_class": (predict(backbone, from_clean) == predict(backbone, clean)).tolist(),
    }


def study_grad_cam(backbone: Backbone, untrained: Backbone, count: int, layer: str, shown: int = 10) -> Study:
    """Grad-CAM's mass inside the one object of rendered scenes, against a network with random weights."""
    images, masks = single_object_scenes(count, backbone.input_size)
    figures: dict[str, Any] = {}
    rows = {"scene": images[:shown], "true mask": masks[:shown].expand(-1, 3, -1, -1)}
    for name, network in (("trained", backbone), ("random weights", untrained)):
        maps = grad_cam(network, images, layer=layer)
        found = localisation(maps, masks)
        figures[name] = {
            "inside": found.inside.tolist(),
            "area": found.area.tolist(),
            "found": int(found.found.sum()),
            "median_lift": float((found.inside / found.area).quantile(0.5)),
        }
        rows[name] = overlay(images, to_map(maps))[:shown]
    claim = Claim(f"scenes of {count} with Grad-CAM on the object", figures["trained"]["found"], 0.8 * count)
    return Study(figures, rows, [claim])


def study_activity(backbone: Backbone, images: Tensor, layers: Sequence[str]) -> tuple[Study, list[ChannelActivity]]:
    """Dead channels and inactive units of every layer over a set of images."""
    found = [dead_channels(backbone.at(layer), tqdm(images.split(16), desc=layer, unit="batch")) for layer in layers]
    figures = {
        activity.layer: {
            "images": activity.images,
            "channels": len(activity.dead),
            "dead_channels": activity.dead_count,
            "units": activity.unit_images.numel(),
            "inactive_units": int(activity.inactive_units.sum()),
            "rectified": activity.rectified,
            "mean_share_of_positions_active": float(activity.position_share.mean()),
        }
        for activity in found
    }
    return Study(figures), found


def study_maximisation(backbone: Backbone, prior: DiffusionPrior, images: Tensor, channels: int, steps: int) -> Study:
    """The same channels maximised over pixels, over a spectrum and over what the diffusion prior draws."""
    with torch.no_grad():
        activity = backbone(images).mean((2, 3))
    chosen = activity.std(0).topk(channels).indices.tolist()
    figures: dict[str, Any] = {}
    columns: dict[str, list[Tensor]] = {}
    where: dict[str, Any] = {"size": prior.size, "steps": steps, "device": backbone.mean.device}
    kinds: dict[str, Callable[[Any], Tensor]] = {
        "pixel": lambda o: maximise(o, [0], parametrisation="pixel", learning_rate=0.02, **where),
        "fourier": lambda o: maximise(o, [0], **where),
        "prior alone": lambda o: maximise_with_prior(o, [0], prior, strength=0.0).images,
        "prior, guided": lambda o: maximise_with_prior(o, [0], prior).images,
    }
    for channel in tqdm(chosen, desc="maximising", unit="channel"):
        objective = channel_objective(backbone, channel)
        best = int(activity[:, channel].argmax())
        made = {"strongest\nimage": resize(images[best : best + 1], prior.size)}
        made |= {kind: find(objective) for kind, find in kinds.items()}
        with torch.no_grad():
            scores = {kind.replace("\n", " "): float(objective(picture)) for kind, picture in made.items()}
        figures[f"channel {channel}"] = scores
        for kind, picture in made.items():
            columns.setdefault(kind, []).append(picture)
    rises = [scores["prior, guided"] > scores["prior alone"] for scores in figures.values()]
    claim = Claim("channels that guidance raises above the prior's own sample", float(sum(rises)), float(len(rises)))
    return Study(figures, {kind: torch.cat(pictures) for kind, pictures in columns.items()}, [claim])


def seconds_per_image(inverter: Inverter, features: Tensor) -> float:
    """Wall-clock seconds that one image takes in a batch of these features (N, C, H, W)."""
    started = time.perf_counter()
    inverter.invert(features, seeds=range(len(features)))
    return (time.perf_counter() - started) / len(features)
