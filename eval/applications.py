"""Measure the applications on rendered scenes, whose truth is known: applications.json and applications.html.

python -m eval.applications inverter=scenes64/efficientnet_lite0_early
python -m eval.applications inverter=runs/scenes64 pooled=runs/scenes64_pooled parts=[composites]
python -m eval.applications inverter=runs/scenes64 parts=[steering] factor=shape n=200 out=runs/steering
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from featinv.applications import measure
from featinv.applications.batches import decode, encode, seeds_of
from featinv.applications.measure import Measured
from featinv.applications.scene_reader import SceneReader, SceneSet, scene_set, with_reconstructions
from featinv.backbones.base import Backbone
from featinv.cli import parse_command_line
from featinv.config import CONFIG_ROOT, instantiate, nearest
from featinv.errors import UserError, exit_on_user_error
from featinv.files import write_json
from featinv.inverters.base import Inverter
from featinv.inverters.build import Trained, check_backbone, load_trained
from featinv.metrics.networks import check_referee
from featinv.report.page import picture_table, write_page


class Measurements:
    """The parts that a configuration can ask for; what several need is made once."""

    def __init__(self, config: DictConfig, trained: Trained, device: torch.device):
        self.config, self.device, self.trained = config, device, trained
        self.backbone: Backbone = trained.load_backbone().to(device)
        self.inverter = self._moved(trained.inverter)
        self.scenes = scene_set(config.family, config.n, trained.inverter.size)

    def _moved(self, inverter: Inverter) -> Inverter:
        return inverter.to(self.device) if isinstance(inverter, torch.nn.Module) else inverter

    @cached_property
    def learn(self) -> SceneSet:
        """Scenes of the probes' family."""
        return scene_set(2, self.config.learn, self.inverter.size)

    @cached_property
    def referee(self) -> Backbone:
        """The network that no inverter saw."""
        referee = instantiate(self.config.referee, where="referee").to(self.device)
        check_referee(referee, self.backbone)
        return referee

    def steering(self) -> Measured:
        """See `measure_steering`."""
        c = self.config
        measure.check_factor(c.factor)  # before thousands of scenes are drawn
        learn = self.learn
        decoded = decode(self.inverter, encode(self.backbone, learn.images), seeds_of(c.seed, len(learn.images)))
        reader = SceneReader(self.referee, with_reconstructions(learn, decoded))
        return measure.measure_steering(
            self.inverter, self.backbone, reader, learn, self.scenes, c.factor, list(c.strengths), c.seed
        )

    def composites(self) -> Measured:
        """See `measure_composites`."""
        inverters = {"spatial": self.inverter}
        if self.config.pooled is not None:
            pooled = load_trained(self.config.pooled)
            check_backbone(self.config.pooled, pooled, self.trained)
            inverters["pooled"] = self._moved(pooled.inverter)
        return measure.measure_composites(inverters, self.backbone, self.scenes, self.config.seed)

    def posterior(self) -> Measured:
        """See `measure_posterior`."""
        c = self.config
        return measure.measure_posterior(self.inverter, self.backbone, self.scenes, c.samples, c.level, c.seed)

    def subset(self) -> Measured:
        """See `measure_subset`."""
        return measure.measure_subset(self.inverter, self.backbone, self.scenes, self.config.seed)

    def refinement(self) -> Measured:
        """See `measure_refinement`."""
        c = self.config
        return measure.measure_refinement(
            self.inverter, self.backbone, self.referee, self.scenes, c.tolerance, c.steps, c.seed
        )

    @property
    def parts(self) -> dict[str, Callable[[], Measured]]:
        """By the names of the configuration."""
        names = ("steering", "composites", "posterior", "subset", "refinement")
        return {name: getattr(self, name) for name in names}


@exit_on_user_error
def main() -> None:
    """Read the command line, measure, write."""
    command = parse_command_line(__doc__ or "", str(CONFIG_ROOT / "applications.yaml"))
    config, out = command.config, command.out or Path("runs/applications")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = Measurements(config, load_trained(config.inverter), device)
    unknown = [name for name in config.parts if name not in work.parts]
    if unknown:
        raise UserError(f"parts has no {unknown[0]!r}: {nearest(unknown[0], list(work.parts))}")
    content, sections = {"meta": {"inverter": config.inverter, "n": config.n, "seed": config.seed}}, []
    for name in tqdm(list(config.parts), desc="applications", unit="part"):
        found = work.parts[name]()
        content[name] = found.figures
        figures = f"<pre>{html.escape(json.dumps(found.figures, indent=2))}</pre>"
        sections.append((name, picture_table(found.rows) + figures))
        write_json(out / "applications.json", content)
        write_page(out / "applications.html", f"Applications of {config.inverter} on scenes", sections)
    print(json.dumps(content, indent=2))
    print(f"applications.json and applications.html are in {out}")


if __name__ == "__main__":
    main()
