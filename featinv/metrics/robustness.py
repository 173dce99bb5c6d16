"""Inversion of changed and foreign pictures: is the reconstruction true to what was given, or to the clean picture?"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from featinv.backbones.base import Backbone
from featinv.errors import UserError
from featinv.files import write_json
from featinv.inverters.base import Inverter
from featinv.inverters.reconstruct import Reconstructions, reconstruct
from featinv.inverters.stored import StoredItems, store_items
from featinv.metrics.intervals import Interval, bootstrap_mean
from featinv.metrics.networks import check_referee
from featinv.metrics.rows import Judges, Row, evaluate_rows
from featinv.processes import first_does

METRICS = ("cosine", "top1_agreement", "top5_agreement", "referee_cosine", "referee_top1_agreement", "psnr", "ssim")


@dataclass(frozen=True)
class Condition:
    """A way of changing pictures, or a set of foreign ones.

    Attributes:
        name: Good for a folder.
        kind: "clean", "corruption", "attack" or "ood".
        picture: (position, clean picture (3, H, W)) -> the picture whose features are given.
        severity: 1 to 5, if it has one.
        has_clean: Whether the clean picture is still what it shows.
    """

    name: str
    kind: str
    picture: Callable[[int, Tensor], Tensor]
    severity: int | None = None
    has_clean: bool = True


class _Changed(Dataset[dict[str, Any]]):
    """Clean items, seen through a condition."""

    def __init__(self, items: StoredItems, condition: Condition):
        self.items, self.condition = items, condition
        self.entries = items.entries  # so that a finished picture is not attacked again to learn its name

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        return {**item, "image": self.condition.picture(index, item["image"])}


class Robustness:
    """Reconstruct and evaluate under every condition.

    Pictures are kept as in a benchmark: interrupted, the same call makes the rest; under torchrun the processes share
    them.

    Args:
        inverter: The inverter.
        backbone: Its network.
        items: Clean data set items of the inverter's size.
        out: Folder.
        referee: A network that the inverter never saw.
        seed: Of the samples: those of an image are the same under every condition.
        batch_size: Images at a time.
        about: Settings of the inverter; pictures made with others are refused.
    """

    def __init__(
        self,
        inverter: Inverter,
        backbone: Backbone,
        items: Any,
        out: str | Path,
        *,
        referee: Backbone | None = None,
        seed: int = 0,
        batch_size: int = 32,
        about: dict[str, Any] | None = None,
    ):
        self.inverter, self.backbone, self.out = inverter, backbone, Path(out)
        self.seed, self.batch_size, self.about = seed, batch_size, about or {}
        check_referee(referee, backbone)
        self.judges = Judges(backbone, referee, device=backbone.mean.device)
        first_does(lambda: store_items(items, self.out / "clean"))
        self.clean = StoredItems(self.out / "clean")
        if self.clean[0]["image"].shape[-1] != inverter.size:
            raise UserError(f"the pictures must have the inverter's side, {inverter.size}; set the data set's size.")

    def run(self, conditions: Sequence[Condition], meta: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Evaluate every condition, write `robustness.json`.

        Returns:
            {"meta", "conditions": {NAME: {"kind", "severity", "given": figures of reconstruction against the picture
            given, "clean": against the clean picture, "input": of the picture given against the clean picture}}}; the
            last two only where the picture still shows the clean one.
        """
        results = {condition.name: self._evaluate(condition) for condition in conditions}
        described = {"images": len(self.clean), "seed": self.seed, **(meta or {})}
        content = {"meta": described, "conditions": results}
        first_does(lambda: shutil.rmtree(self.out / ".evaluation", ignore_errors=True))
        first_does(lambda: write_json(self.out / "robustness.json", content))
        return content

    def _evaluate(self, condition: Condition) -> dict[str, Any]:
        given_folder = self.out / "inputs" / condition.name
        first_does(lambda: store_items(_Changed(self.clean, condition), given_folder))
        given = StoredItems(given_folder)
        made = reconstruct(
            self.inverter,
            self.backbone,
            given,  # type: ignore[arg-type]
            self.out / "reconstructions" / condition.name,
            seed=self.seed,
            size=self.inverter.size,
            batch_size=self.batch_size,
            about=self.about,
            title=condition.name,
            originals=given_folder,
        )
        found: dict[str, Any] = {"kind": condition.kind, "severity": condition.severity}
        found["given"] = self._figures(given, {"row": _row(made)})["row"]
        if condition.has_clean:
            against = self._figures(
                self.clean, {"clean": _row(made), "input": Row(_pictures(given), range(len(given)))}
            )
            found |= against
        return found

    def _figures(self, originals: StoredItems, rows: Mapping[str, Row]) -> dict[str, dict[str, Interval]]:
        scratch = self.out / ".evaluation"
        numbers = evaluate_rows(_pictures(originals), len(originals), rows, self.judges, scratch, self.batch_size)
        return first_does(
            lambda: {
                name: {
                    metric: bootstrap_mean(values, seed=self.seed)
                    for metric, values in numbers.values(name).items()
                    if metric in METRICS
                }
                for name in rows
            }
        )


def _pictures(items: StoredItems) -> Callable[[list[int]], Tensor]:
    return lambda indices: torch.stack([items[i]["image"] for i in indices])


def _row(made: Reconstructions) -> Row:
    return Row(lambda indices: made.samples(0, indices), range(len(made.ids)))
