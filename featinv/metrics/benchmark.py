"""One evaluation: several inverters, the same images, the same metrics, floor and ceiling: the table of a paper."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from featinv.backbones.base import Backbone
from featinv.diffusion.first_stage import FirstStage
from featinv.errors import UserError
from featinv.files import write_json
from featinv.image import to_uint8
from featinv.inverters.base import Inverter
from featinv.inverters.reconstruct import Items, Reconstructions, reconstruct
from featinv.metrics.collection import PairedEvaluation, evaluate_floor, evaluate_images
from featinv.metrics.distribution import distribution_meta
from featinv.metrics.factors import FactorProbe, FactorSpec
from featinv.metrics.features import share_of_span
from featinv.metrics.intervals import Interval, bootstrap_mean
from featinv.metrics.summary import summarise

log = logging.getLogger(__name__)
Figures = dict[str, Interval]


@dataclass(frozen=True)
class Contestant:
    """An inverter in a benchmark.

    Attributes:
        inverter: The inverter.
        limit: Reconstruct the first so many images only (slow inverters); None is all.
        about: Its settings, written beside its pictures; pictures made with other settings are refused.
    """

    inverter: Inverter
    limit: int | None = None
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FactorTruth:
    """Originals from which the factor probe learns, and which columns of their table it reads.

    Attributes:
        images: (N, 3, H, W).
        values: (N, F).
        schema: One entry for each column.
    """

    images: Tensor
    values: Tensor
    schema: list[FactorSpec]


@torch.no_grad()
def _embeddings(network: Backbone, images: Tensor) -> Tensor:
    """Maps averaged to 2 x 2, flattened: enough to read positions from, (N, 4 C)."""
    device = network.mean.device
    return torch.cat([F.adaptive_avg_pool2d(network(part.to(device)), 2).flatten(1).cpu() for part in images.split(64)])


def _rounded(images: Tensor) -> Tensor:
    """What a PNG would hold."""
    return to_uint8(images).float() / 255


@torch.no_grad()
def _round_trip(first_stage: FirstStage, images: Tensor) -> Tensor:
    device = next(first_stage.parameters()).device
    parts = [first_stage.decode(first_stage.encode(part.to(device))).cpu() for part in images.split(32)]
    return _rounded(torch.cat(parts))


class Benchmark:
    """Evaluate inverters on the same images.

    Args:
        backbone: The inverted network.
        items: Data set items; with "factors" where factor recovery is wanted.
        out: Folder of all pictures and figures.
        referee: A network that no inverter saw.
        referee_name: Its name in metric names.
        first_stage: Its round trip is the ceiling; without one the ceiling is 1.
        truth: Trains the factor probe.
        size: Side of the pictures in pixels.
        seed: Of samples and intervals.
        batch_size: Images at a time.
        distribution_resamples: Bootstrap resamples of Frechet and kernel distances.
    """

    def __init__(
        self,
        backbone: Backbone,
        items: Items,
        out: str | Path,
        *,
        referee: Backbone | None = None,
        referee_name: str = "mobilenetv2",
        first_stage: FirstStage | None = None,
        truth: FactorTruth | None = None,
        size: int = 64,
        seed: int = 0,
        batch_size: int = 32,
        distribution_resamples: int = 20,
    ):
        if len(items) < 2:
            raise UserError(f"a benchmark needs at least two images, not {len(items)}: the floor pairs them.")
        self.backbone, self.items, self.out, self.size, self.seed = backbone, items, Path(out), size, seed
        self.referee, self.referee_name, self.first_stage = referee, referee_name, first_stage
        self.truth, self.batch_size, self.distribution_resamples = truth, batch_size, distribution_resamples
        self.probe = FactorProbe(truth.schema).fit(self._probe_input(truth.images), truth.values) if truth else None

    def _probe_input(self, images: Tensor) -> Tensor:
        return _embeddings(self.referee or self.backbone, images)

    def run(self, contestants: Mapping[str, Contestant], samples: int = 1) -> dict[str, Any]:
        """Reconstruct, evaluate, write `metrics.json`.

        Args:
            contestants: By the name of their row.
            samples: Reconstructions of each image; the first is evaluated.

        Returns:
            The content of metrics.json: "meta", "floor", "ceiling", "inverters", and "subset", where every inverter is
            evaluated on the images that all of them have, if some have fewer.
        """
        if not contestants:
            raise UserError("there is no inverter to evaluate.")
        made = {name: self._reconstruct(name, contestant, samples) for name, contestant in contestants.items()}
        longest = max(made.values(), key=lambda m: len(m.ids))
        originals = longest.originals()
        floor = self._floor(originals)
        ceiling = self._ceiling(originals)
        span = (floor["cosine"]["value"] or 0.0, (ceiling["cosine"]["value"] or 0.0) if ceiling else 1.0)
        pictures = {name: m.samples(0) for name, m in made.items()}
        rows = {name: self.figures(originals[: len(p)], p, span) for name, p in pictures.items()}
        content: dict[str, Any] = {"meta": self._meta(originals), "floor": floor, "ceiling": ceiling, "inverters": rows}
        shortest = min(len(p) for p in pictures.values())
        if shortest < len(originals):
            few = {name: self.figures(originals[:shortest], p[:shortest], span) for name, p in pictures.items()}
            content["subset"] = {"n": shortest, "inverters": few}
        write_json(self.out / "metrics.json", content)
        return content

    def _reconstruct(self, name: str, contestant: Contestant, samples: int) -> Reconstructions:
        count = len(self.items) if contestant.limit is None else min(contestant.limit, len(self.items))
        return reconstruct(
            contestant.inverter,
            self.backbone,
            Subset(self.items, range(count)),  # type: ignore[arg-type]
            self.out / name,
            samples=samples,
            seed=self.seed,
            size=self.size,
            batch_size=self.batch_size,
            about=contestant.about,
            title=name,
        )

    def _paired(self, originals: Tensor, reconstructions: Tensor) -> PairedEvaluation:
        device = self.backbone.mean.device
        return evaluate_images(
            originals,
            reconstructions,
            self.backbone,
            self.referee,
            referee_name=self.referee_name,
            batch_size=self.batch_size,
            device=device,
        )

    def figures(self, originals: Tensor, reconstructions: Tensor, span: tuple[float, float]) -> Figures:
        """All figures of one inverter's pictures (N, 3, H, W); `span` is (floor, ceiling) of the cosine."""
        evaluated = self._paired(originals, reconstructions)
        per_image = dict(evaluated.per_image)
        if span[1] > span[0]:
            per_image["share"] = share_of_span(per_image["cosine"], *span)
        else:
            log.warning("no share of the span: the ceiling %.3f is not above the floor %.3f", span[1], span[0])
        figures = summarise(
            per_image,
            evaluated.embeddings_real,
            evaluated.embeddings_fake,
            seed=self.seed,
            distribution_resamples=self.distribution_resamples,
        )
        return figures | self._factors(reconstructions)

    def _factors(self, pictures: Tensor) -> Figures:
        if self.probe is None or self.truth is None:
            return {}
        columns = self._true_factors[: len(pictures)]
        scores = self.probe.score(self._probe_input(pictures), columns, seed=self.seed)
        return {f"factor_{name}": value for name, value in scores.items()}

    @cached_property
    def _true_factors(self) -> Tensor:
        assert self.truth is not None
        rows = [self.items[i]["factors"] for i in range(len(self.items))]
        return torch.stack(rows)[:, [spec_column(spec.name) for spec in self.truth.schema]]

    def _floor(self, originals: Tensor) -> Figures:
        values = evaluate_floor(
            originals, self.backbone, self.referee, batch_size=self.batch_size, device=self.backbone.mean.device
        )
        return {name: bootstrap_mean(value, seed=self.seed) for name, value in values.items()}

    def _ceiling(self, originals: Tensor) -> Figures:
        if self.first_stage is None:
            return {}
        again = _round_trip(self.first_stage, originals)
        evaluated = self._paired(originals, again)
        figures = summarise(
            evaluated.per_image,
            evaluated.embeddings_real,
            evaluated.embeddings_fake,
            distribution_resamples=self.distribution_resamples,
        )
        return figures | self._factors(again)

    def _meta(self, originals: Tensor) -> dict[str, Any]:
        spec = self.backbone.spec
        return {
            "images": len(originals),
            "size": self.size,
            "seed": self.seed,
            "features": {"layer": spec.layer, "shape": [spec.channels, spec.height, spec.width]},
            "distribution": distribution_meta(self.referee_name, len(originals), len(originals), True),
            "python": platform.python_version(),
        }


def evaluate(
    inverters: Mapping[str, Inverter], backbone: Backbone, items: Items, out: str | Path, **settings: Any
) -> dict[str, Any]:
    """Compare inverters on the same images.

    Args:
        inverters: By the name of their row.
        backbone: The inverted network.
        items: A map-style data set (see `load_dataset`); every image is used.
        out: Folder of all pictures and of metrics.json.
        **settings: Of `Benchmark`: referee, first_stage, size, seed, ...

    Returns:
        The content of metrics.json: {"meta", "floor", "ceiling", "inverters": {NAME: {METRIC: {"value", "low", "high",
        "n"}}}}.
    """
    rows = {name: Contestant(inverter) for name, inverter in inverters.items()}
    return Benchmark(backbone, items, out, **settings).run(rows)


def spec_column(name: str) -> int:
    """Column of a scene factor."""
    from featinv.data.scene_factors import FACTOR_INDEX

    return FACTOR_INDEX[name]


def scene_truth(count: int = 2000, seed: int = 2, size: int = 64, objects: int = 1) -> FactorTruth:
    """Render the originals from which the factor probe learns: `count` scenes of a family of their own.

    Args:
        count: Scenes.
        seed: Of the family, neither the training's nor the validation's.
        size: Side of the pictures in pixels.
        objects: How many objects' factors are read, largest first.
    """
    from featinv.data.scene_factors import FACTORS
    from featinv.data.scenes import render_scenes

    # Angles wrap and heights hide behind perspective; the factors below are what a picture shows plainly.
    kept = ("shape", "colour", "texture", "size", "image_x", "image_y")
    names = ["count", "floor_colour", "floor_texture", "sky", "light_elevation", "camera_height"]
    names += [f"object{k}_{name}" for k in range(objects) for name in kept]
    by_name = {f.name: FactorSpec(f.name, f.kind, len(f.classes)) for f in FACTORS}
    columns = [spec_column(name) for name in names]
    images, values = [], []
    for start in tqdm(range(0, count, 100), desc="scenes for the factor probe", unit="batch"):
        picture, factors, _ = render_scenes(seed, range(start, min(start + 100, count)), size)
        images.append(picture)
        values.append(factors[:, columns])
    return FactorTruth(_rounded(torch.cat(images)), torch.cat(values), [by_name[name] for name in names])


def read_metrics(path: str | Path) -> dict[str, Any]:
    """Read a metrics.json.

    Raises:
        UserError: If it is missing or damaged.
    """
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; run the evaluation first.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and evaluate again.") from error
