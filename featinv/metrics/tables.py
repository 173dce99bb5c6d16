"""From the numbers of a finished pass to figures with intervals, differences, cases and a line for each picture."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from featinv.inverters.stored import StoredItems
from featinv.metrics.collection import METRICS
from featinv.metrics.factors import FactorProbe
from featinv.metrics.features import share_of_span
from featinv.metrics.intervals import Interval, bootstrap_mean
from featinv.metrics.rows import Judges, RowEvaluation
from featinv.metrics.summary import summarise
from featinv.metrics.truth import spec_column

log = logging.getLogger(__name__)
Figures = dict[str, Interval]
Span = tuple[float, float]
FLOOR, SAME_CLASS, CEILING = "floor\n", "floor_same_class\n", "ceiling\n"  # no inverter's name ends so
PAIRED = ("cosine", "referee_cosine", "top1_agreement", "top5_agreement", "psnr", "ssim", "lpips")
"""Per-image metrics whose differences between inverters are given, before those that `METRICS` was extended by."""
UNPAIRED = (
    *("cosine_median", "cosine_q05", "l2", "own_cosine", "label_accuracy"),
    *("referee_top1_agreement", "referee_top5_agreement", "referee_label_accuracy"),
)
"""Those whose differences would say no more."""


class Tables:
    """Figures from the numbers of a finished pass.

    Args:
        items: The originals.
        numbers: Of every row.
        judges: Who looked at them.
        seed: Of the intervals.
        distribution_resamples: Bootstrap resamples of Frechet and kernel distances.
    """

    def __init__(
        self, items: StoredItems, numbers: RowEvaluation, judges: Judges, seed: int, distribution_resamples: int
    ):
        self.seed, self.resamples = seed, distribution_resamples
        self.probes = {"originals": judges.probe, "features": judges.feature_probe}
        self.items, self.numbers = items, numbers
        self.real = numbers.embeddings()
        factors, probe = items.factors, judges.probe
        known = factors is not None and probe is not None
        self.truth = factors[:, [spec_column(s.name) for s in probe.schema]] if known else None  # type: ignore[index, union-attr]

    def references(self, row: str) -> Figures:
        """A floor or the ceiling. Floors have no distribution metric: both sides are the same images."""
        if row == CEILING:
            return self.figures(row)
        values = self.numbers.values(row)
        return {name: bootstrap_mean(v, seed=self.seed) for name, v in values.items()}

    def span(self, own: int | None = None) -> Span:
        """Floor and ceiling of the cosine: in the judges' backbone, or in the network at this place of `Row.also`."""
        return self._mean_cosine(FLOOR, own), self._mean_cosine(CEILING, own)

    def _mean_cosine(self, row: str, own: int | None) -> float:
        values = self.numbers.values(row)
        if not values:  # no first stage: its ceiling is 1
            return 1.0
        cosines = values["cosine"] if own is None else self.numbers.also(row)[own]
        return bootstrap_mean(cosines, seed=self.seed)["value"] or 0.0

    def figures(self, row: str, spans: Mapping[str, Span] | None = None, first: int | None = None) -> Figures:
        """All figures of a row, over its `first` images or all; `spans` of "cosine" and of "own_cosine" give shares."""
        values = {name: v[:first] for name, v in self.numbers.values(row).items()}
        for name, (low, high) in (spans or {}).items():
            if high > low:
                values[name.replace("cosine", "share")] = share_of_span(values[name], low, high)
            else:
                log.warning("%s: no share of the span, the ceiling %.3f is not above the floor %.3f", name, high, low)
        fake = {name: rows[:first] for name, rows in self.numbers.embeddings(row).items()}
        real = {name: rows[self.numbers.indices(row)[:first]] for name, rows in self.real.items()}
        figures = summarise(values, real, fake, seed=self.seed, distribution_resamples=self.resamples)
        return figures | self._factors(row, first)

    def _factors(self, row: str, first: int | None = None) -> Figures:
        probe = self.probes["originals"]
        if self.truth is None or probe is None:
            return {}
        truth = self.truth[self.numbers.indices(row)[:first]]
        return self._recovery(probe, self.numbers.predicted(row)["pictures"][:first], truth)

    def _recovery(self, probe: FactorProbe, predicted: Tensor, truth: Tensor) -> Figures:
        """A figure for each factor, and the mean accuracy of the categorical ones."""
        scores = probe.score_predicted(predicted, truth, seed=self.seed)
        scores["accuracy"] = bootstrap_mean(probe.class_accuracy(predicted, truth), seed=self.seed)
        return {f"factor_{name}": value for name, value in scores.items()}

    def factors_of_originals(self) -> dict[str, Figures]:
        """What the probe reads from the originals, and a probe of the inverted features from those themselves."""
        found = {}
        for name, key in (("originals", "pictures"), ("features", "features")):
            probe = self.probes[name]
            if self.truth is not None and probe is not None:
                found[name] = self._recovery(probe, self.numbers.predicted()[key], self.truth)
        return found

    def differences(self, names: list[str]) -> dict[str, Any]:
        """Mean differences from the first row, image by image, over the images of both rows."""
        against = self.numbers.values(names[0])
        paired = [*PAIRED, *(metric for metric in METRICS if metric not in PAIRED + UNPAIRED)]
        found: dict[str, Figures] = {}
        for name in names[1:]:
            values = self.numbers.values(name)
            n = min(len(values["cosine"]), len(against["cosine"]))
            shared = [metric for metric in paired if metric in values and metric in against]
            found[name] = {m: bootstrap_mean(values[m][:n] - against[m][:n], seed=self.seed) for m in shared}
        return {"against": names[0], "rows": found}

    def cases(self, name: str, each: int = 6) -> dict[str, Any]:
        """Ids of the images with the lowest, middle and highest cosine (in the referee, if there is one)."""
        values = self.numbers.values(name)
        metric = "referee_cosine" if "referee_cosine" in values else "cosine"
        order = values[metric].argsort().tolist()
        each, ids = min(each, len(order)), self.items.ids
        middle = (len(order) - each) // 2
        chosen = {"worst": order[:each], "median": order[middle : middle + each], "best": order[len(order) - each :]}
        return {"metric": metric, **{kind: [ids[i] for i in picked] for kind, picked in chosen.items()}}

    def per_image(self, names: list[str]) -> str:
        """A CSV with a line for each picture."""
        tables = {name: self.numbers.values(name) for name in names}
        metrics = list(dict.fromkeys(metric for values in tables.values() for metric in values))
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        writer.writerow(["row", "id", *metrics])
        for name, values in tables.items():
            columns = [values[metric].tolist() if metric in values else None for metric in metrics]
            for k, image in enumerate(self.items.ids[: len(values["cosine"])]):
                writer.writerow([name, image, *("" if column is None else column[k] for column in columns)])
        return buffer.getvalue()
