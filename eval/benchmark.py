"""Compare inverters on the same images: metrics.json, table.md, table.csv, report.html.

python -m eval.benchmark                                         the branch of `make demo` and optimisation
python -m eval.benchmark inverters=[runs/a,runs/b] n=1000 out=runs/compare
python -m eval.benchmark inverters=[runs/convnext_base] n=10000 factor_images=0

Pictures are stored as they are made: interrupted, the same command makes the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset, Subset

from featinv.backbones.base import Backbone
from featinv.cli import parse_command_line
from featinv.config import CONFIG_ROOT, instantiate, is_node, load_group, nearest, resolve_target
from featinv.data.scenes import ScenesDataset
from featinv.diffusion.prior import DiffusionPrior
from featinv.errors import UserError, exit_on_user_error
from featinv.inverters.build import Trained, build_inverter, check_spec, find_inverter, load_trained
from featinv.metrics.benchmark import Benchmark, Contestant, scene_truth
from featinv.report.benchmark import write_benchmark


def untrained_names() -> list[str]:
    """Inverters that need no training, by their file in configs/inverter."""
    names = sorted(path.stem for path in (CONFIG_ROOT / "inverter").glob("*.yaml"))
    return [n for n in names if not hasattr(resolve_target(load_group("inverter", n).target), "training_losses")]


def load_all(names: list[str]) -> dict[str, Trained | None]:
    """Trained inverters; None for those that need no training.

    Raises:
        UserError: If one does not exist, or none is trained: a trained one says which backbone and data to use.
    """
    loaded = {name: None if name in untrained_names() else load_trained(name) for name in names}
    if all(trained is None for trained in loaded.values()):
        raise UserError("give at least one trained inverter; it says which backbone and images to use.")
    return loaded


def contestants(
    loaded: dict[str, Trained | None], backbone: Backbone, limits: dict[str, int], device: torch.device
) -> dict[str, Contestant]:
    """The benchmark's rows, by names that are good for folders."""
    unknown = set(limits) - set(loaded)
    if unknown:
        raise UserError(
            f"limits.{sorted(unknown)[0]} is no inverter of this run: {nearest(sorted(unknown)[0], list(loaded))}"
        )
    first = next(trained for trained in loaded.values() if trained is not None)
    rows = {}
    for name, trained in loaded.items():
        if trained is None:
            node = load_group("inverter", name)
            config = OmegaConf.create({"inverter": node, "prior": first.config.get("prior")})
            size = {"size": first.inverter.size} if "size" not in node.params else {}
            config.inverter.params.update(size)
            inverter: Any = build_inverter(config, backbone.spec, backbone)
            about = OmegaConf.to_container(config.inverter)
        else:
            check_spec(trained.spec, backbone.spec)
            inverter = (
                trained.inverter.to(device) if isinstance(trained.inverter, torch.nn.Module) else trained.inverter
            )
            about = {"file": find_inverter(name).name, **trained.note}
        rows[name.strip("/").removeprefix("runs/").replace("/", "-")] = Contestant(inverter, limits.get(name), about)  # type: ignore[arg-type]
    return rows


def chosen_data(config: DictConfig, trained: Trained) -> Dataset[dict[str, Any]]:
    """The first n images of the data set to evaluate on."""
    if is_node(config.data):
        dataset = instantiate(config.data, where="data")
    else:
        module = instantiate(trained.config.data, where="data")
        module.setup()
        dataset = module.val
    return Subset(dataset, range(min(config.n, len(dataset))))


@exit_on_user_error
def main() -> None:
    """Read the command line, evaluate, print the table."""
    command = parse_command_line(__doc__ or "", str(CONFIG_ROOT / "benchmark.yaml"))
    config, out = command.config, command.out or Path("runs/benchmark")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_all(list(config.inverters))
    first = next(trained for trained in loaded.values() if trained is not None)
    backbone = first.load_backbone().to(device)
    dataset = chosen_data(config, first)
    prior = getattr(first.inverter, "prior", None)
    scenes = isinstance(dataset.dataset, ScenesDataset)  # type: ignore[attr-defined]
    benchmark = Benchmark(
        backbone,
        dataset,  # type: ignore[arg-type]
        out,
        referee=instantiate(config.referee, where="referee").to(device) if config.referee else None,
        referee_name=config.referee.params.name if config.referee else "",
        first_stage=prior.first_stage if isinstance(prior, DiffusionPrior) else None,
        truth=scene_truth(config.factor_images, size=first.inverter.size) if scenes and config.factor_images else None,
        size=first.inverter.size,
        seed=config.seed,
        batch_size=config.batch_size,
        distribution_resamples=config.distribution_resamples,
    )
    rows = contestants(loaded, backbone, dict(config.limits or {}), device)
    content = benchmark.run(rows, samples=config.samples)
    write_benchmark(out, content, "Feature inversion: " + ", ".join(rows))
    print((out / "table.md").read_text())
    print(f"metrics.json, table.md, table.csv and report.html are in {out}")


if __name__ == "__main__":
    main()
