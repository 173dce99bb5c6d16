"""A fixed set of images that is reconstructed during training: the feature cosine, not the loss, says how it goes."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from featinv.backbones.base import Backbone
from featinv.files import write_text
from featinv.image import make_grid, resize, save_png


class FeatureProbe(Callback):
    """Reconstruct a fixed set with the averaged weights; log, list and draw the feature cosine.

    Writes `probe.jsonl` (one line each time), `probe.png` (the curve) and `probe/STEP.png` (pictures) into `folder`.
    The share of the span from floor to ceiling is None where there is no span; a single image has no floor.

    Args:
        images: (N, 3, H, W) in [0, 1], held out.
        backbone: Whose features are compared.
        folder: The run's folder.
        every: Optimizer steps between reconstructions; 0 makes one, at the end.
        batch_images: Images of one optimizer step, for the curve's axis.
        shown: Pictures in a grid.
    """

    def __init__(
        self, images: Tensor, backbone: Backbone, folder: str | Path, every: int, batch_images: int, shown: int = 12
    ):
        self.images, self.backbone, self.folder = images, backbone, Path(folder)
        self.every, self.batch_images, self.shown = every, batch_images, shown
        path = self.folder / "probe.jsonl"
        self.lines: list[dict[str, Any]] = (
            [json.loads(x) for x in path.read_text().splitlines()] if path.is_file() else []
        )
        self._started = time.time()

    @torch.no_grad()
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute the features, their floor (shuffled pairs) and ceiling (the first stage's round trip)."""
        device = pl_module.device
        self.images = self.images.to(device)
        self.features = self.backbone(self.images)
        prior = getattr(pl_module.inverter, "prior", None)
        self.floor = self._cosine(self.features.roll(1, 0)) if len(self.images) > 1 else None
        again = prior.first_stage.decode(prior.first_stage.encode(resize(self.images, prior.size))) if prior else None
        self.ceiling = self._cosine(self.backbone(again)) if again is not None else 1.0
        # What an interrupted run measured beyond its last checkpoint is measured again.
        self.lines = [line for line in self.lines if line["step"] <= trainer.global_step]

    def _cosine(self, features: Tensor) -> float:
        return float(F.cosine_similarity(features.flatten(1), self.features.flatten(1)).mean())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Reconstruct at every `every`-th step, and at the last."""
        step = trainer.global_step
        known = self.lines[-1]["step"] if self.lines else 0
        # Split weights come together only if every process asks for them; else the first one draws alone.
        takes_part = trainer.is_global_zero or pl_module.device_mesh is not None
        due = step == trainer.max_steps or (self.every > 0 and step % self.every == 0)
        if takes_part and step > known and due:
            self.measure(trainer, pl_module)

    def _images(self, step: int) -> int:
        """Images seen, also where the run was begun with another batch size."""
        last = self.lines[-1] if self.lines else {"step": 0, "images": 0}
        return last["images"] + (step - last["step"]) * self.batch_images

    @torch.no_grad()
    def measure(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Reconstruct, and write the figures down."""
        ema = getattr(pl_module, "ema", None)
        # Frozen weights may be stored in half precision, which only the trainer's own arithmetic can multiply.
        with trainer.precision_plugin.forward_context(), ema.applied() if ema is not None else nullcontext():
            images = pl_module.inverter.invert(self.features, seeds=range(len(self.features)))
        cosine = self._cosine(self.backbone(images))
        floor, ceiling = self.floor, self.ceiling
        share = (cosine - floor) / (ceiling - floor) if floor is not None and ceiling > floor else None
        step = trainer.global_step
        line = {
            "step": step,
            "images": self._images(step),
            "minutes": round((time.time() - self._started) / 60, 2),
            "cosine": cosine,
            "share": share,
            "floor": floor,
            "ceiling": ceiling,
        }
        self.lines.append(line)
        if not trainer.is_global_zero:
            return
        figures = {"probe/cosine": cosine, "probe/share": share}
        pl_module.log_dict({name: value for name, value in figures.items() if value is not None}, prog_bar=True)
        write_text(self.folder / "probe.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.lines))
        rows = [resize(self.images[: self.shown], images.shape[-1]), images[: self.shown]]
        save_png(self.folder / "probe" / f"{step:07d}.png", make_grid(rows, ["original", "sample"]))
        draw_curve(self.lines, self.folder / "probe.png")


def draw_curve(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw the share of the span over images seen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([line["images"] for line in lines], [line["share"] for line in lines], marker=".")  # None: no point
    axes.set(xlabel="images seen", ylabel="share of the span", title="(cosine - floor) / (ceiling - floor)")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
