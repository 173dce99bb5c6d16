"""How good the applications are on scenes, whose truth is known: the figures behind docs/applications.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from featinv.applications.batches import decode, encode, seeds_of
from featinv.applications.composites import covered, mean_over, placement, replace
from featinv.applications.concepts import Direction, class_means
from featinv.applications.matching import FeatureGuidedInverter
from featinv.applications.posterior import calibrate, draw_samples, pixel_map, sample_cosines
from featinv.applications.refine import refine
from featinv.applications.scene_reader import OBJECT, SceneReader, SceneSet
from featinv.applications.steering import SteeringTest, Strip, factor_changes, steer_strip
from featinv.applications.subset import SubsetInverter
from featinv.backbones.base import Backbone
from featinv.config import nearest
from featinv.data.scene_factors import FACTOR_INDEX, FACTORS
from featinv.errors import UserError
from featinv.inverters.base import Inverter
from featinv.inverters.diffusion import DiffusionInverter
from featinv.metrics.features import feature_cosine
from featinv.metrics.intervals import bootstrap_mean


@dataclass(frozen=True)
class Measured:
    """Figures of one application, and rows of pictures (K, 3, H, W) to look at."""

    figures: dict[str, Any]
    rows: dict[str, Tensor] = field(default_factory=dict)


def object_concepts(backbone: Backbone, scenes: SceneSet, factor: str) -> list[Direction]:
    """Class means of an object factor over the positions that the largest object covers."""
    features = encode(backbone, scenes.images)
    inside = mean_over(features, covered(scenes.masks, (features.shape[2], features.shape[3])))
    column = FACTOR_INDEX[f"object0_{factor}"]
    return class_means(inside, scenes.factors[:, column].long(), FACTORS[column].classes)


def _check_count(scenes: SceneSet, fewest: int, what: str) -> None:
    if len(scenes.images) < fewest:
        raise UserError(f"{what} is measured on at least {fewest} scenes, not {len(scenes.images)}.")


def check_factor(factor: str) -> None:
    """Raise UserError if a factor is none of an object's that have classes."""
    if factor not in OBJECT:
        raise UserError(f"factor {factor!r}: {nearest(factor, OBJECT)}")


def measure_steering(
    inverter: Inverter,
    backbone: Backbone,
    reader: SceneReader,
    learn: SceneSet,
    scenes: SceneSet,
    factor: str = "colour",
    strengths: Sequence[float] = (1.0, 2.0, 4.0),
    seed: int = 0,
) -> Measured:
    """Steer the largest object of each scene towards another class of a factor, every class in turn.

    The strength is chosen on the first half of the scenes, the figures are those of the second half: "own" is the share
    that became what was asked for (the aim: 0.8), "others" how often another factor changed (the aim: at most 0.2), and
    "others_by_chance" how often it does between two draws of the unsteered features.

    Raises:
        UserError: If there are fewer than four scenes, or objects have no such factor.
    """
    _check_count(scenes, 4, "steering")
    check_factor(factor)
    name = f"object0_{factor}"
    own, classes = scenes.factors[:, FACTOR_INDEX[name]], FACTORS[FACTOR_INDEX[name]].classes
    wanted = torch.tensor([(int(c) + 1 + i % (len(classes) - 1)) % len(classes) for i, c in enumerate(own)])
    features = encode(backbone, scenes.images)
    keep, seeds = covered(scenes.masks, (features.shape[2], features.shape[3])), seeds_of(seed, len(features))
    strips = []
    for concept in object_concepts(backbone, learn, factor):
        rows = (wanted == classes.index(concept.name)).nonzero()[:, 0]
        if len(rows):
            own_seeds = [seeds[i] for i in rows]
            strip = steer_strip(inverter, backbone, features[rows], concept, strengths, own_seeds, keep[rows])
            strips.append((rows, strip))
    first = torch.arange(len(features)) < len(features) // 2
    tests, shown = {}, {"original": scenes.images[:8]}
    for strength in strengths:
        read, pictures = _read_strips(reader, scenes, strips, strength)
        tests[strength] = [_steering_test(reader, read[half], wanted[half], name) for half in (first, ~first)]
        shown[f"strength {strength:g}"] = pictures[:8]
    best = max(strengths, key=lambda s: tests[s][0].own - tests[s][0].others)
    again = reader.read(decode(inverter, features, seeds_of(seed + 1, len(seeds))), scenes.masks)
    chance = _steering_test(reader, torch.stack([read[:, 0], again], 1)[~first], wanted[~first], name)
    figures = {
        "strength": best,
        "own": bootstrap_mean(tests[best][1].reached.double(), seed=seed),
        "others": tests[best][1].others,
        "others_by_chance": chance.others,
        "by_strength": {f"{s:g}": {"own": t[1].own, "others": t[1].others} for s, t in tests.items()},
        "changed": {factor: float(c.double().mean()) for factor, c in tests[best][1].changed.items()},
        "reader_accuracy": reader.accuracy(scenes),
    }
    return Measured(figures, shown)


def _read_strips(
    reader: SceneReader, scenes: SceneSet, strips: Sequence[tuple[Tensor, Strip]], strength: float
) -> tuple[Tensor, Tensor]:
    """Factors (N, 2, F) read from the unsteered and the steered pictures, and the steered pictures (N, 3, H, W)."""
    read = torch.full((len(scenes.images), 2, len(reader.schema)), torch.nan, dtype=torch.float64)
    pictures = torch.full((len(scenes.images), *strips[0][1].images.shape[2:]), torch.nan)
    for rows, strip in strips:
        at = strip.strengths.index(strength)
        pictures[rows] = strip.images[at]
        for slot, k in enumerate((strip.origin, at)):
            read[rows, slot] = reader.read(strip.images[k], scenes.masks[rows])
    return read, pictures


def _steering_test(reader: SceneReader, read: Tensor, wanted: Tensor, name: str) -> SteeringTest:
    column = [spec.name for spec in reader.schema].index(name)
    changes = factor_changes(read[:, 0], read[:, 1], reader.schema, torch.ones(len(reader.schema)))
    return SteeringTest(read[:, 1, column] == wanted, changes, name)


def measure_composites(inverters: dict[str, Inverter], backbone: Backbone, scenes: SceneSet, seed: int = 0) -> Measured:
    """Paste the largest object of one scene into another, decode, judge by its mask; the same for all inverters.

    Raises:
        UserError: If there are fewer than two scenes.
    """
    _check_count(scenes, 2, "pasting")
    half = len(scenes.images) // 2
    target, source = scenes[slice(0, half)], scenes[slice(half, 2 * half)]
    features = encode(backbone, target.images)
    where = covered(source.masks, (features.shape[2], features.shape[3]))
    pasted = replace(features, encode(backbone, source.images), where)
    seeds, figures, rows = seeds_of(seed, half), {}, {"target": target.images[:8], "source": source.images[:8]}
    for name, inverter in inverters.items():
        decoded, unpasted = decode(inverter, pasted, seeds), decode(inverter, features, seeds)
        found = placement(decoded, unpasted, target.images, source.images, source.masks)
        values = {"placed": found.placed, "appeared": found.appeared, "kept": found.kept, "inside": found.inside}
        figures[name] = {key: bootstrap_mean(value.double(), seed=seed) for key, value in values.items()}
        figures[name]["area"] = bootstrap_mean(found.area, seed=seed)
        rows[name] = decoded[:8]
    return Measured(figures, rows)


def measure_posterior(
    inverter: Inverter, backbone: Backbone, scenes: SceneSet, samples: int = 8, level: float = 0.9, seed: int = 0
) -> Measured:
    """Calibrate on the first half of the scenes, measure coverage on the second.

    "knows" is the rank correlation, over the pixels of an image, of the deviation map with the error of the mean
    sample: whether the map says where the picture is wrong.

    Raises:
        UserError: If there are fewer than two scenes, or too few for the level.
    """
    _check_count(scenes, 2, "the posterior")
    features, half = encode(backbone, scenes.images), len(scenes.images) // 2
    drawn = draw_samples(inverter, features, samples, seed=seed)
    intervals = calibrate(scenes.images[:half], drawn[:half], level)
    truth, drawn_, maps = scenes.images[half:], drawn[half:], pixel_map(drawn[half:])
    error = (drawn_.mean(1) - truth).square().mean(1, keepdim=True).sqrt()
    ranks = [x.flatten(1).argsort(1).argsort(1).double().T for x in (maps, error)]
    knows = torch.corrcoef(torch.cat(ranks, 1).T)[: len(truth), len(truth) :].diagonal()
    figures = {
        "nominal": level,
        "coverage": intervals.coverage(truth, drawn_, seed=seed),
        "width": bootstrap_mean(intervals.width(drawn_), seed=seed),
        "knows": bootstrap_mean(knows, seed=seed),
        "cosine": bootstrap_mean(sample_cosines(drawn_, features[half:], backbone).mean(1), seed=seed),
    }
    brightest = maps.flatten(1).amax(1).clamp(min=1e-6).view(-1, 1, 1, 1)
    rows = {"original": truth[:8], "sample 1": drawn_[:8, 0], "sample 2": drawn_[:8, 1]}
    return Measured(figures, rows | {"deviation": (maps / brightest).expand(-1, 3, -1, -1)[:8]})


def measure_subset(inverter: Inverter, backbone: Backbone, scenes: SceneSet, seed: int = 0) -> Measured:
    """Invert the left half of the positions, and a random half of the channels; compare what was given with what came.

    "given" is the cosine over the kept values, "rest" over the others; "all" is the unmasked inversion over the same.
    """
    features = encode(backbone, scenes.images)
    channels, width = features.shape[1], features.shape[3]
    generator = torch.Generator().manual_seed(seed)
    some = torch.zeros(1, channels, 1, 1).index_fill_(
        1, torch.randperm(channels, generator=generator)[: channels // 2], 1
    )
    left = (torch.arange(width) < (width + 1) // 2).float()[None, None, None]
    seeds, rows, figures = seeds_of(seed, len(features)), {"original": scenes.images[:8]}, {}
    whole = encode(backbone, decode(inverter, features, seeds))
    for name, keep in (("left half", left), ("half of the channels", some)):
        images = decode(SubsetInverter(inverter, keep), features, seeds)
        again, rows[name] = encode(backbone, images), images[:8]
        pairs = {"given": (again, keep), "rest": (again, 1 - keep), "all": (whole, keep)}
        figures[name] = {
            key: bootstrap_mean(feature_cosine(features * part, found * part), seed=seed)
            for key, (found, part) in pairs.items()
        }
    return Measured(figures, rows)


def measure_refinement(
    inverter: Inverter,
    backbone: Backbone,
    referee: Backbone,
    scenes: SceneSet,
    tolerance: float = 0.9,
    steps: int = 50,
    seed: int = 0,
) -> Measured:
    """Samples, the same under feature guidance (diffusion inverters), and refined: cosine, and the referee's beside it.

    A gain that the referee does not share is adversarial.
    """
    features = encode(backbone, scenes.images)
    wanted, seeds = encode(referee, scenes.images), seeds_of(seed, len(features))
    pictures = {"sample": decode(inverter, features, seeds)}
    figures: dict[str, Any] = {"tolerance": tolerance}
    first_stage = None
    if isinstance(inverter, DiffusionInverter):
        first_stage = inverter.prior.first_stage
        guided = FeatureGuidedInverter(inverter, backbone)
        pictures["guided"] = decode(guided, features, seeds)
        figures["guided_gradients_skipped"] = guided.skipped
    refined = refine(backbone, features, pictures["sample"], first_stage=first_stage, tolerance=tolerance, steps=steps)
    pictures["refined"] = refined.images
    figures |= {"reached": float(refined.reached.double().mean()), "gradients_skipped": int(refined.skipped.sum())}
    for name, images in pictures.items():
        figures[name] = {
            "cosine": bootstrap_mean(feature_cosine(features, encode(backbone, images)), seed=seed),
            "referee_cosine": bootstrap_mean(feature_cosine(wanted, encode(referee, images)), seed=seed),
        }
    return Measured(figures, {"original": scenes.images[:8]} | {name: p[:8] for name, p in pictures.items()})
