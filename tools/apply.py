"""One application of feature inversion on one picture: PNGs, a JSON of numbers and report.html.

NAME is a run's folder or a bundled inverter, such as scenes64/efficientnet_lite0_early.

python -m tools.apply posterior --inverter NAME --scene 5:3 --samples 8
python -m tools.apply steer --inverter NAME --scene 5:3 --concept mean:object0_colour=red --positions object0
python -m tools.apply paste --inverter NAME --image a.jpg --other b.jpg --region .2 .3 .6 .9
python -m tools.apply refine --inverter NAME --image a.jpg --tolerance 0.9
python -m tools.apply subset --inverter NAME --scene 5:3 --region 0 0 .5 1 --top 50
python -m tools.apply layers --inverter optimisation --backbone efficientnet_lite0 --scene 5:3 --n 8
"""

from __future__ import annotations

import argparse
import html
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featinv.applications import composites
from featinv.applications.batches import decode, device_of, encode
from featinv.applications.concepts import Subspace
from featinv.applications.discovery import completeness, nmf_concepts, subspace_concepts
from featinv.applications.layers import layer_curve, leak_report
from featinv.applications.matching import FeatureGuidedInverter
from featinv.applications.posterior import draw_samples, perceptual_map, pixel_map, sample_cosines
from featinv.applications.refine import refine
from featinv.applications.steering import steer_strip
from featinv.applications.subset import concepts_only, invert_subset
from featinv.attribution.saliency import overlay
from featinv.backbones import Backbone, load_backbone
from featinv.conditioning.masking import mean_feature
from featinv.config import nearest
from featinv.errors import UserError, exit_on_user_error
from featinv.files import given_path, write_json
from featinv.image import make_grid, resize, save_png
from featinv.inverters.base import Inverter
from featinv.inverters.diffusion import DiffusionInverter
from featinv.inverters.masks import top_channels
from featinv.metrics.features import feature_cosine
from featinv.metrics.networks import check_referee
from featinv.report.page import picture_table, write_page
from tools.task import Task, bar

Result = tuple[dict[str, Tensor], dict[str, Any]]
"""Rows of pictures (K, 3, H, W) by label, and numbers."""


def _heat(maps: Tensor) -> Tensor:
    """Maps (N, 1, H, W) as colours, brightest where largest."""
    top = maps.flatten(1).amax(1).clamp(min=1e-9).view(-1, 1, 1, 1)
    return overlay(torch.zeros_like(maps).expand(-1, 3, -1, -1), maps / top, alpha=1.0)


def _steer(task: Task) -> Result:
    strengths = task.options.strengths
    if isinstance(task.concept, Subspace):  # cannot be lowered further than away
        strengths = [max(strength, -1.0) for strength in strengths]
    strip = steer_strip(
        task.inverter,
        task.backbone,
        task.features,
        task.concept,
        strengths,
        task.seeds,
        task.positions(),
        progress=bar("steering"),
    )
    rows = {"original": task.images} | {
        f"{s:+g}: {strip.summary(k)}": strip.images[k] for k, s in enumerate(strip.strengths)
    }
    numbers: dict[str, Any] = {"concept": task.concept.name, "evidence": getattr(task.concept, "evidence", {})}
    for k, strength in enumerate(strip.strengths):
        found = {
            name: getattr(strip, name)[k].tolist() for name in ("asked", "found", "cosine", "moved", "on_manifold")
        }
        found["moved"] = [share if math.isfinite(share) else None for share in found["moved"]]  # JSON has no NaN
        if strip.probabilities is not None:
            best = strip.probabilities[k].topk(min(3, strip.probabilities.shape[-1]))
            rows_of = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            found["classes"] = [dict(zip(map(str, kinds), chances, strict=True)) for kinds, chances in rows_of]
        numbers[f"{strength:+g}"] = found
    return rows, numbers


def _concepts(task: Task) -> Result:
    features = encode(task.backbone, task.examples.images)
    kinds: dict[str, Any] = {"subspaces": subspace_concepts(features, task.options.count)}
    if float(features.min()) >= 0:
        kinds["factors"] = nmf_concepts(features, task.options.count)
    rows, numbers = {}, {}
    for kind, concepts in kinds.items():
        numbers[kind] = {"completeness": completeness(concepts, features)}
        for concept in concepts:
            scores = concept.score(features)
            best = scores.amax((1, 2)).topk(min(8, len(scores))).indices
            rows[concept.name] = overlay(task.examples.images[best], _unit(scores[best])[:, None])
            numbers[kind][concept.name] = concept.evidence
    return rows, numbers


def _unit(maps: Tensor) -> Tensor:
    low, high = maps.amin(), maps.amax()
    return (maps - low) / (high - low).clamp(min=1e-9)


def _composite(make: Callable[[Task, Tensor], Tensor], paired: bool = True) -> Callable[[Task], Result]:
    def method(task: Task) -> Result:
        other = encode(task.backbone, task.other) if paired else task.features
        edited = make(task, other)
        images = task.decode(edited)
        rows = {"picture": task.images} | ({"other": task.other} if paired else {})
        rows |= {"decoded as it was": task.decode(task.features), "composite": images}
        return rows, {"cosine_to_composite": task.fit(edited, images)}

    return method


def _paste(task: Task, other: Tensor) -> Tensor:
    return composites.paste(task.features, other, task.box, task.options.to)


def _channels(task: Task) -> list[int]:
    count, top = task.features.shape[1], task.options.top
    return torch.arange(count)[: count // 2 if top is None else top].tolist()


def _subset(task: Task) -> Result:
    keep = torch.ones(1, 1, 1, 1)
    where = task.positions()
    keep = keep if where is None else keep * where
    keep = keep if task.options.top is None else keep * top_channels(task.features, task.options.top)
    rows = {"original": task.images, "everything": task.decode(task.features)}
    if task.options.concept is not None:
        only = concepts_only(task.features, [task.concept], mean_feature(task.inverter, task.features.shape[1]))
        rows[f"{task.concept.name} alone"] = task.decode(only)
    images = invert_subset(task.inverter, task.features.to(device_of(task.inverter)), keep, seeds=task.seeds).cpu()
    again = encode(task.backbone, images)
    given = feature_cosine(task.features * keep, again * keep)
    rows["subset"] = images
    return rows, {"kept": float(keep.expand_as(task.features).mean()), "cosine_of_what_was_kept": given.tolist()}


def _posterior(task: Task) -> Result:
    count = task.options.samples
    samples = draw_samples(task.inverter, task.features, count, seed=task.options.seed, progress=bar("sampling"))
    deviation, felt = pixel_map(samples), perceptual_map(samples, task.backbone)
    rows = {"original": task.images, "mean": samples.mean(1)}
    rows |= {f"sample {k + 1}": samples[:, k] for k in range(count)}
    rows |= {"deviation of pixels": _heat(deviation), "deviation of features": _heat(felt)}
    cosines = sample_cosines(samples, task.features, task.backbone)
    return rows, {
        "cosines": cosines.tolist(),
        "mean_deviation": deviation.mean((1, 2, 3)).tolist(),
        "mean_feature_deviation": felt.mean((1, 2, 3)).tolist(),
    }


def _referee(task: Task) -> Backbone:
    referee = load_backbone(task.options.referee, input_size=128).to(task.backbone.mean.device)
    check_referee(referee, task.backbone)
    return referee


def _refine(task: Task) -> Result:
    prior = getattr(task.inverter, "prior", None)
    start = task.decode(task.features)
    rows = {"original": task.images, "sample": start}
    if isinstance(task.inverter, DiffusionInverter):
        guided = FeatureGuidedInverter(task.inverter, task.backbone)
        rows["guided sample"] = decode(guided, task.features, task.seeds)
    refined = refine(
        task.backbone,
        task.features,
        start,
        first_stage=None if prior is None else prior.first_stage,
        tolerance=task.options.tolerance,
        steps=task.options.steps,
        referee=_referee(task),
        originals=resize(task.images, task.inverter.size).clamp(0, 1),
        progress=bar("refining"),
    )
    numbers = {name: task.fit(task.features, images) for name, images in rows.items() if name != "original"}
    rows["refined"] = refined.images
    return rows, {"cosine": numbers, "refined": [refined.verdict(i) for i in range(len(start))]}


def _layers(task: Task) -> Result:
    layers = task.options.layers.split(",") if task.options.layers else task.backbone.layers

    def inverter_for(cut: Backbone) -> Inverter:
        own = task.trained is not None and task.trained.spec == cut.spec
        return task.inverter if own else task.untrained(cut)

    points = layer_curve(
        task.backbone, layers, task.images, inverter_for, _referee(task), task.options.seed, progress=bar("layers")
    )
    rows = {"original": task.images} | {point.layer: point.images for point in points}
    numbers: dict[str, Any] = {p.layer: {"shape": p.shape, "chance": p.chance, **p.figures} for p in points}
    return rows, numbers | {"leak": leak_report(points)}


METHODS: dict[str, Callable[[Task], Result]] = {
    "concepts": _concepts,
    "steer": _steer,
    "paste": _composite(_paste),
    "mix": _composite(lambda task, other: composites.mix(task.features, other, task.options.share)),
    "swap": _composite(lambda task, other: composites.swap_channels(task.features, other, _channels(task))),
    "permute": _composite(lambda task, _: composites.permute_positions(task.features, task.options.seed), paired=False),
    "subset": _subset,
    "posterior": _posterior,
    "refine": _refine,
    "layers": _layers,
}


def write(name: str, rows: dict[str, Tensor], numbers: dict[str, Any], out: Path, title: str) -> None:
    """Every picture as a PNG, all of them as one, METHOD.json and report.html."""
    for number, (label, images) in enumerate(rows.items()):
        for k, image in enumerate(images):
            short = "".join(c if c.isalnum() else "-" for c in label.partition(":")[0]).strip("-")
            save_png(out / name / f"{number:02d}_{short}_{k}.png", image)
    save_png(out / f"{name}.png", make_grid(list(rows.values()), [label.partition(":")[0] for label in rows]))
    write_json(out / f"{name}.json", numbers)
    figures = f"<pre>{html.escape(json.dumps(numbers, indent=2, default=str))}</pre>"
    write_page(out / "report.html", title, [("Pictures", picture_table(rows)), ("Figures", figures)])


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", help=f"one of {', '.join(METHODS)}")
    add = parser.add_argument
    add("--inverter", required=True, help="a run's folder, a checkpoint, a bundled name, or optimisation")
    add("--backbone", default=None, help="as load_backbone takes it; a trained inverter's own if not given")
    add("--layer", default=None, help="see tools/list_layers.py")
    add("--input-size", type=int, default=None, help="side of the backbone's input")
    add("--image", default=None, help="a picture, or a folder of which the first --n are taken")
    add("--scene", default=None, help="SEED:INDEX of a rendered scene (and the next --n - 1)")
    add("--n", type=int, default=1, help="pictures")
    add("--other", default=None, help="the second picture of a composite")
    add("--other-scene", default=None, help="the same, a rendered scene")
    add("--out", type=given_path, default=Path("runs/apply"))
    add("--seed", type=int, default=0)
    add("--size", type=int, default=64, help="side of the pictures of the optimisation inverter")
    add("--steps", type=int, default=100, help="of refinement and optimisation")
    add("--region", type=float, nargs=4, default=None, help="left top right bottom: what is pasted, kept or steered")
    add("--positions", default=None, help="object0 ... object3: the positions that a scene's object covers")
    add("--to", type=float, nargs=2, default=None, help="left top: where a pasted region goes")
    add("--share", type=float, default=0.5, help="of the second picture in a mixture")
    add("--top", type=int, default=None, help="subset: the strongest channels; swap: the first channels")
    add("--concept", default=None, help="mean:FACTOR=CLASS, probe:FACTOR=CLASS, nmf:K, subspace:K or text:PROMPT")
    strengths = [-4.0, -2.0, -1.0, 1.0, 2.0, 4.0]
    add("--strengths", type=float, nargs="+", default=strengths, help="of steering, in the concept's own units")
    add("--folder", default=None, help="pictures that concepts are found in; rendered scenes if not given")
    add("--examples", type=int, default=300, help="how many of them")
    add("--count", type=int, default=8, help="factors or subspaces that features are taken apart into")
    add("--text-weights", default="laion2b_s34b_b79k", help="OpenCLIP's weight tag of the text tower")
    add("--samples", type=int, default=8, help="of a posterior map")
    add("--tolerance", type=float, default=0.9, help="cosine that refinement must pass")
    add("--layers", default=None, help="names with commas between; all of the backbone's if not given")
    add("--referee", default="mobilenetv2", help="the network that judges and took no part")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Read the command line, apply, write."""
    options = arguments(argv)
    if options.method not in METHODS:
        raise UserError(f"unknown method {options.method!r}: {nearest(options.method, list(METHODS))}")
    task = Task(options)
    rows, numbers = METHODS[options.method](task)
    size = task.inverter.size
    rows = {label: resize(images.float(), size).clamp(0, 1) for label, images in rows.items()}
    write(options.method, rows, numbers, options.out, f"{options.method}: {options.inverter}, {task.backbone.layer}")
    print(json.dumps(numbers, indent=2, default=str))
    print(f"{options.method}.png, {options.method}.json and report.html are in {options.out}")


if __name__ == "__main__":
    main()
