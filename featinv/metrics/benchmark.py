"""One evaluation: several inverters, the same images, the same metrics, floors and ceiling: the table of a paper."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from featinv.backbones.base import Backbone
from featinv.diffusion.first_stage import FirstStage
from featinv.errors import UserError
from featinv.files import write_json, write_text
from featinv.image import resize
from featinv.inverters.base import Inverter
from featinv.inverters.reconstruct import Items, Reconstructions, reconstruct
from featinv.inverters.stored import StoredItems, store_items
from featinv.metrics.collection import (
    class_count,
    classes_needed,
    derangement,
    possible_metrics,
    same_class_partner,
)
from featinv.metrics.distribution import SMALL_N, distribution_meta
from featinv.metrics.factors import FactorProbe
from featinv.metrics.networks import check_referee, same_network
from featinv.metrics.rows import Judges, Row, RowEvaluation, evaluate_rows, probe_input
from featinv.metrics.tables import CEILING, FLOOR, SAME_CLASS, Tables
from featinv.metrics.truth import FactorTruth, rounded, scene_truth
from featinv.metrics.views import Embedder, Perceptual
from featinv.processes import first_does

__all__ = ["Benchmark", "Contestant", "FactorTruth", "evaluate", "scene_truth"]


@dataclass(frozen=True)
class Contestant:
    """An inverter in a benchmark.

    Attributes:
        inverter: The inverter.
        limit: Reconstruct the first so many images only (slow inverters); None is all.
        about: Its settings, written beside its pictures; pictures made with other settings are refused.
        backbone: The network whose features it is given, where that is another than the benchmark's: another layer,
            another architecture, the untrained control.
    """

    inverter: Inverter
    limit: int | None = None
    about: dict[str, Any] = field(default_factory=dict)
    backbone: Backbone | None = None


class Benchmark:
    """Evaluate inverters on the same images.

    Pictures are kept; interrupted, `run` makes the missing or damaged ones and evaluates again. Under torchrun the
    processes share the work.

    Args:
        backbone: The inverted network; it judges every row.
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
        embedders: More networks for distribution metrics, such as "inception".
        perceptual: LPIPS.
        class_labels: Whether the items' labels are the classes that the networks tell apart.
        skipped: Metric -> why it is not computed; printed beside the table.
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
        embedders: Mapping[str, Embedder] | None = None,
        perceptual: Perceptual | None = None,
        class_labels: bool = False,
        skipped: Mapping[str, str] | None = None,
    ):
        if len(items) < 2:
            raise UserError(f"a benchmark needs at least two images, not {len(items)}: the floor pairs them.")
        check_referee(referee, backbone)
        self.backbone, self.referee, self.out, self.size, self.seed = backbone, referee, Path(out), size, seed
        self.first_stage, self.batch_size = first_stage, batch_size
        self.distribution_resamples, self.class_labels = distribution_resamples, class_labels
        self.skipped = dict(skipped or {})
        self._items = items
        self.judges = Judges(
            backbone,
            referee,
            referee_name,
            embedders or {},
            perceptual,
            probe=_fitted(truth, referee or backbone),
            feature_probe=_fitted(truth, backbone),
            device=backbone.mean.device,
        )

    def run(self, contestants: Mapping[str, Contestant], samples: int = 1) -> dict[str, Any]:
        """Reconstruct, evaluate, write `metrics.json` and `per_image.csv`.

        Args:
            contestants: By the name of their row.
            samples: Reconstructions of each image; the first is evaluated, all are for diversity.

        Returns:
            The content of metrics.json: "meta", "floor", "floor_same_class" (if labels are known), "ceiling",
            "inverters", "factors" (what a probe reads from originals and from their features), "differences" of every
            inverter from the first one over the images of both, "cases" (ids of the worst, median and best images), and
            "subset", where every inverter is evaluated on the images that all of them have, if some have fewer.

        Raises:
            UserError: If there is no inverter, or a row's name, limit or pictures make no sense.
        """
        if not contestants:
            raise UserError("there is no inverter to evaluate.")
        if "originals" in contestants:
            raise UserError("no row can be named 'originals': the images themselves are kept under that name.")
        for name, contestant in contestants.items():
            if contestant.limit is not None and not (isinstance(contestant.limit, int) and contestant.limit > 0):
                raise UserError(f"the limit of {name} must be a number of images from 1, not {contestant.limit!r}.")
            if same_network(self.referee, contestant.backbone):
                self.skipped[f"a referee for {name}"] = "it inverts the referee's own network"
        first_does(lambda: store_items(self._items, self.out / "originals"))
        items = StoredItems(self.out / "originals")
        made = {name: self._reconstruct(items, name, contestant, samples) for name, contestant in contestants.items()}
        rows = self._reference_rows(items, own_networks(contestants))
        rows |= {name: self._row(made[name], contestants[name]) for name in contestants}
        judges = replace(self.judges, labels=items.labels if self.class_labels else None)
        scratch = self.out / ".evaluation"
        numbers = evaluate_rows(self._originals(items), len(items), rows, judges, scratch, self.batch_size)
        return first_does(lambda: self._write(items, numbers, contestants, made))

    def _originals(self, items: StoredItems) -> Any:
        def pictures(indices: list[int]) -> Tensor:
            return rounded(resize(torch.stack([items[i]["image"] for i in indices]), self.size))

        return pictures

    def _reconstruct(self, items: StoredItems, name: str, contestant: Contestant, samples: int) -> Reconstructions:
        count = len(items) if contestant.limit is None else min(contestant.limit, len(items))
        stored_at_size = items[0]["image"].shape[-1] == self.size
        return reconstruct(
            contestant.inverter,
            contestant.backbone or self.backbone,
            Subset(items, range(count)),  # type: ignore[arg-type]
            self.out / name,
            samples=samples,
            seed=self.seed,
            size=self.size,
            batch_size=self.batch_size,
            about=contestant.about,
            title=name,
            originals=items.folder if stored_at_size else None,
        )

    def _row(self, made: Reconstructions, contestant: Contestant) -> Row:
        each = made.samples_each

        def all_samples(indices: list[int]) -> Tensor:
            return torch.stack([made.samples(k, indices) for k in range(each)], 1)

        return Row(
            lambda indices: made.samples(0, indices),
            range(len(made.ids)),
            all_samples if each > 1 else None,
            own=contestant.backbone,
        )

    def _reference_rows(self, items: StoredItems, own: list[Backbone]) -> dict[str, Row]:
        """Floors (another image, another image of the class) and ceiling (round trip), as rows like any other."""
        originals, first_stage = self._originals(items), self.first_stage

        def others(partner: Tensor) -> Row:
            paired = frozenset((partner >= 0).nonzero().flatten().tolist())
            return Row(lambda indices: originals(partner[indices].tolist()), paired)

        rows = {FLOOR: replace(others(derangement(len(items), self.seed)), also=own)}
        same = same_class_partner(items.labels, self.seed)
        if (same >= 0).any():
            rows[SAME_CLASS] = others(same)
        if first_stage is not None:
            device = next(first_stage.parameters()).device

            def round_trip(indices: list[int]) -> Tensor:
                return rounded(first_stage.decode(first_stage.encode(originals(indices).to(device)))).cpu()

            rows[CEILING] = Row(round_trip, range(len(items)), also=own)
        return rows

    def _write(
        self,
        items: StoredItems,
        numbers: RowEvaluation,
        contestants: Mapping[str, Contestant],
        made: Mapping[str, Reconstructions],
    ) -> dict[str, Any]:
        tables = Tables(items, numbers, self.judges, self.seed, self.distribution_resamples)
        floor = tables.references(FLOOR)
        ceiling = tables.references(CEILING) if self.first_stage is not None else {}
        own = {id(network): {"own_cosine": tables.span(k)} for k, network in enumerate(own_networks(contestants))}
        spans = {name: {"cosine": tables.span()} | own.get(id(c.backbone), {}) for name, c in contestants.items()}
        content: dict[str, Any] = {"meta": self._meta(len(items), contestants), "floor": floor}
        if (same_class_partner(items.labels) >= 0).any():
            content["floor_same_class"] = tables.references(SAME_CLASS)
        content["ceiling"] = ceiling
        content["inverters"] = {name: tables.figures(name, spans[name]) for name in contestants}
        content["factors"] = tables.factors_of_originals()
        content["differences"] = tables.differences(list(contestants))
        content["cases"] = {name: tables.cases(name) for name in contestants}
        shortest = min(len(m.ids) for m in made.values())
        if shortest < len(items):
            few = {name: tables.figures(name, spans[name], shortest) for name in contestants}
            content["subset"] = {"n": shortest, "inverters": few}
        write_json(self.out / "metrics.json", content)
        write_text(self.out / "per_image.csv", tables.per_image(list(contestants)))
        shutil.rmtree(self.out / ".evaluation")
        return content

    def _meta(self, count: int, contestants: Mapping[str, Contestant]) -> dict[str, Any]:
        networks = [*([self.judges.referee_name] if self.judges.referee else []), *self.judges.embedders]
        warning = f"{count} images (< {SMALL_N:,}): Frechet distances are biased upwards, read the KID."
        return {
            "images": count,
            "size": self.size,
            "seed": self.seed,
            "features": described(self.backbone),
            "rows": {name: described(c.backbone or self.backbone) for name, c in contestants.items()},
            "distribution": [distribution_meta(network, count, count, True) for network in networks],
            "warnings": [warning] if networks and count < SMALL_N else [],
            "skipped": self.skipped | self._without_classes(),
            "python": platform.python_version(),
        }

    def _without_classes(self) -> dict[str, str]:
        """The metrics of class scores that a judge cannot give -> why."""
        judges = {"backbone": self.backbone, "referee": self.referee}
        counts = {judge: 0 if network is None else class_count(network) for judge, network in judges.items()}
        found = {}
        for name in possible_metrics(referee=self.referee is not None, labels=self.class_labels):
            judge = "referee" if "referee" in name else "backbone"
            if counts[judge] < classes_needed(name):
                has = f"too few classes ({counts[judge]})" if counts[judge] else "no classifier"
                found[name] = f"the {judge} has {has}"
        return found


def own_networks(contestants: Mapping[str, Contestant]) -> list[Backbone]:
    """The networks that rows have of their own, each once."""
    return list({id(c.backbone): c.backbone for c in contestants.values() if c.backbone is not None}.values())


def _fitted(truth: FactorTruth | None, network: Backbone) -> FactorProbe | None:
    """A probe of factors, taught with the network's maps of originals."""
    if truth is None:
        return None
    device = network.mean.device
    with torch.no_grad():
        inputs = torch.cat([probe_input(network(part.to(device))) for part in truth.images.split(64)])
    return FactorProbe(truth.schema).fit(inputs, truth.values)


def described(backbone: Backbone) -> dict[str, Any]:
    """Network, layer, shape and depth: the share of the network's modules that come before, 1 for "final"."""
    spec = backbone.spec
    modules = [name for name, _ in getattr(backbone, "model", backbone).named_modules()]
    inner = modules.index(spec.layer) / len(modules) if spec.layer in modules else None
    depth = 1.0 if spec.layer == "final" else inner
    return {
        "network": getattr(backbone, "name", type(backbone).__name__),
        "layer": spec.layer,
        "shape": [spec.channels, spec.height, spec.width],
        "depth": depth,
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
