"""The whole system in a few minutes on a laptop: train a branch, sample, evaluate, one page to look at.

python -m tools.demo            interrupted, the same command goes on
python -m tools.demo demo.images=64 training.max_steps=100
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Subset

from featinv.backbones import load_backbone
from featinv.cli import parse_command_line
from featinv.config import load_group
from featinv.data import load_part
from featinv.errors import exit_on_user_error
from featinv.files import write_json
from featinv.inverters.build import Trained, build_inverter, bundled_inverters, load_trained
from featinv.inverters.diffusion import PosteriorMean
from featinv.metrics.benchmark import Benchmark, Contestant, scene_truth
from featinv.report.benchmark import benchmark_sections, write_tables
from featinv.report.page import file_tag, write_page
from train import train

BUNDLED = "scenes64/efficientnet_lite0_early"
JUDGE = "final"
"""Layer whose features judge every row: the last, although an earlier one is inverted."""


def contestants(trained: Trained, backbone: Any, sizes: DictConfig) -> dict[str, Contestant]:
    """The branch just trained, the bundled one, and the optimisation inverter on a few images, all given one layer."""
    node = load_group("inverter", "optimisation")
    node.params.steps = sizes.slow_steps
    optimisation = build_inverter(DictConfig({"inverter": node}), backbone.spec, backbone, size=trained.inverter.size)
    own = {"note": trained.note}
    rows = {
        "branch": Contestant(trained.inverter, about=own),
        "branch-posterior-mean": Contestant(PosteriorMean(trained.inverter), about=own),  # type: ignore[arg-type]
    }
    if BUNDLED in bundled_inverters():
        bundled = load_trained(BUNDLED)
        rows["bundled"] = Contestant(bundled.inverter, about={"note": bundled.note})
    rows[f"optimisation-{sizes.slow_steps}"] = Contestant(optimisation, sizes.slow_images, {"steps": sizes.slow_steps})
    return {name: replace(row, backbone=backbone) for name, row in rows.items()}


def run(config: DictConfig, out: Path, changed: bool = False) -> dict[str, Any]:
    """Train, sample, evaluate, write metrics.json and report.html.

    Args:
        config: Of the training, and `demo` of what follows.
        out: Folder.
        changed: As of `train`.

    Returns:
        The content of metrics.json.
    """
    started = time.time()
    branch = out / "branch"
    # Without `demo`: what follows the training may change, and the branch is still the same.
    train(OmegaConf.masked_copy(config, [key for key in config if key != "demo"]), branch, changed=changed)
    trained = load_trained(branch)
    backbone = trained.load_backbone()
    images = load_part(config.data, "val")
    benchmark = Benchmark(
        backbone.at(JUDGE),
        Subset(images, range(min(config.demo.images, len(images)))),
        out,
        referee=load_backbone("mobilenetv2"),
        first_stage=trained.inverter.prior.first_stage,  # type: ignore[attr-defined]
        truth=scene_truth(config.demo.factor_images),
        batch_size=64,
        distribution_resamples=5,
    )
    content = benchmark.run(contestants(trained, backbone, config.demo))
    content["meta"]["minutes"] = round((time.time() - started) / 60, 1)
    content["meta"]["training"] = json.loads((branch / "probe.jsonl").read_text().splitlines()[-1])
    write_json(out / "metrics.json", content)
    write_tables(out, content)
    curve = ("Training: share of the span on held-out scenes", file_tag(branch / "probe.png", "share over images seen"))
    write_page(out / "report.html", "featinv: the demo", [curve, *benchmark_sections(out, content)])
    return content


@exit_on_user_error
def main() -> None:
    """Say what will happen, then do it."""
    flags = {"changed": "go on with a training that was begun with other settings"}
    command = parse_command_line(__doc__ or "", "demo", flags)
    settings, sizes = command.config.training, command.config.demo
    out = command.out or Path("runs/demo")
    scenes = command.config.data.params.train.params.length
    print(
        f"demo, about 10 minutes on 2 cores: caches {scenes} rendered scenes (1 min), trains a branch for "
        f"{settings.max_steps} steps of {settings.batch_size} (6 min), reconstructs {sizes.images} held-out scenes, "
        f"inverts {sizes.slow_images} by optimisation, evaluates (3 min). Into {out}; goes on if interrupted."
    )
    content = run(command.config, out, "changed" in command.flags)
    print((out / "table.md").read_text())
    print(f"{content['meta']['minutes']} minutes; open {out / 'report.html'}")


if __name__ == "__main__":
    main()
