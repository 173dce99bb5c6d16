"""Compare inverters on the same images: metrics.json, table.md, table.csv, per_image.csv, report.html.

python -m eval.benchmark                                         the branch of `make demo`, optimisation, retrieval
python -m eval.benchmark experiment=scenes64_early               train.py's run of it, optimisation, retrieval
python -m eval.benchmark inverters=[runs/a,runs/b] n=1000 out=runs/compare
python -m eval.benchmark inverters=[runs/convnext_base] n=10000 factor_images=0
python -m eval.benchmark inverters=[runs/photos64] data=val-000.tar class_labels=true n=500      photographs of any size
python -m eval.benchmark inverters=[retrieval@blocks.2,retrieval] setting=scenes64 'params.retrieval={count: 1000}'
python -m eval.benchmark inverters=[runs/a,runs/a+guided,runs/a+refined] 'params.refined={steps: 20}'
torchrun --nproc-per-node 8 -m eval.benchmark ...                processes or GPUs share the work

A trained inverter is given the features that it was trained on; the first one's backbone judges all rows. NAME@LAYER
puts an inverter that needs no training on another layer; NAME+corrected, +guided, +best and +refined match the pictures
to the features (docs/applications.md#refine-to-match). Pictures are stored as they are made: interrupted, the same
command makes the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset, Subset

from featinv.applications.matching import MATCHING, matched, settings_of, split_name
from featinv.backbones.base import Backbone
from featinv.cli import parse_command_line
from featinv.config import (
    CONFIG_ROOT,
    check_count,
    instantiate,
    is_node,
    listed,
    load_config,
    load_group,
    nearest,
    resolve_target,
)
from featinv.data import load_dataset, load_part
from featinv.data.folders import ilsvrc_synsets
from featinv.data.scenes import ScenesDataset
from featinv.diffusion.first_stage import FirstStage
from featinv.diffusion.prior import DiffusionPrior, load_prior
from featinv.errors import UserError, exit_on_user_error
from featinv.inverters.build import Trained, build_inverter, find_inverter, load_trained
from featinv.metrics.benchmark import Benchmark, Contestant, scene_truth
from featinv.metrics.names import distinct
from featinv.metrics.networks import available_networks
from featinv.processes import own_device, process_group, process_rank
from featinv.report.benchmark import write_benchmark
from featinv.training.precision import draw_in


@dataclass(frozen=True)
class Setting:
    """What all rows share: configuration (backbone, data, prior), judging backbone, the pictures' side, the ceiling."""

    config: DictConfig
    backbone: Backbone
    size: int
    first_stage: FirstStage | None


def untrained_names() -> list[str]:
    """Inverters that need no training, by their file in configs/inverter."""
    names = sorted(path.stem for path in (CONFIG_ROOT / "inverter").glob("*.yaml"))
    return [n for n in names if not hasattr(resolve_target(load_group("inverter", n).target), "training_losses")]


def load_all(names: list[str]) -> dict[str, Trained | None]:
    """Trained inverters, each read once, whatever the suffixes; None for those that need no training."""
    untrained = untrained_names()
    bases = {name: split_name(name)[0] for name in names}
    loaded = {base: None if base.partition("@")[0] in untrained else load_trained(base) for base in bases.values()}
    return {name: loaded[base] for name, base in bases.items()}


def shared_setting(experiment: str | None, loaded: dict[str, Trained | None], device: torch.device) -> Setting:
    """The setting of the first trained inverter, or of an experiment.

    Raises:
        UserError: If there is neither.
    """
    first = next((trained for trained in loaded.values() if trained is not None), None)
    if experiment is not None:
        config = load_config(experiment)
        backbone, prior = instantiate(config.backbone, where="backbone"), load_prior(config.prior)
        return Setting(config, backbone.to(device), prior.size, prior.first_stage.to(device))
    if first is None:
        raise UserError(
            "give at least one trained inverter, which says which backbone and images to use, or setting=EXPERIMENT."
        )
    own = getattr(first.inverter, "prior", None)
    first_stage = own.first_stage.to(device) if isinstance(own, DiffusionPrior) else None
    return Setting(first.config, first.load_backbone().to(device), first.inverter.size, first_stage)


def untrained_contestant(name: str, setting: Setting, limit: int | None, params: dict[str, Any]) -> Contestant:
    """An inverter of configs/inverter, with other `params`, on the setting's layer or on `NAME@LAYER`."""
    kind, _, layer = split_name(name)[0].partition("@")
    node = load_group("inverter", kind)
    node.params = {**(node.get("params") or {}), **params}
    own = setting.backbone.at(layer) if layer and layer != setting.backbone.layer else None
    backbone = own or setting.backbone
    config = OmegaConf.create({"inverter": node, **{key: setting.config.get(key) for key in ("prior", "data")}})
    inverter = build_inverter(config, backbone.spec, backbone, size=setting.size)
    return Contestant(inverter, limit, OmegaConf.to_container(node), own)  # type: ignore[arg-type]


def own_backbone(trained: Trained, setting: Setting, known: dict[str, Backbone]) -> Backbone | None:
    """The network that the inverter inverts, from `known` if a row has it already; None if it is the setting's."""
    if trained.config.backbone == setting.config.backbone:
        return None
    key = OmegaConf.to_yaml(trained.config.backbone)
    if key not in known:
        known[key] = trained.load_backbone().to(setting.backbone.mean.device)
    return known[key]


def trained_contestant(
    name: str,
    trained: Trained,
    setting: Setting,
    limit: int | None,
    known: dict[str, Backbone],
    precision: str = "fp32",
) -> Contestant:
    """A trained inverter, with its own backbone if that is not the setting's (see `own_backbone`)."""
    if trained.inverter.size != setting.size:
        raise UserError(
            f"{name} draws {trained.inverter.size} pixels, not {setting.size}; compare it in its own table."
        )
    if isinstance(trained.inverter, torch.nn.Module):
        trained.inverter.to(setting.backbone.mean.device)
    about = {"file": find_inverter(split_name(name)[0]).name, **trained.note}
    if (used := draw_in(trained.inverter, precision)) != "fp32":
        about["precision"] = used
    return Contestant(trained.inverter, limit, about, own_backbone(trained, setting, known))


def matched_contestant(name: str, row: Contestant, setting: Setting, params: dict[str, Any]) -> Contestant:
    """The row with the wrappers that its name asks for; `params` by their kind."""
    _, kinds = split_name(name)
    inverter = matched(row.inverter, row.backbone or setting.backbone, kinds, params, setting.first_stage)
    about = {"matching": {kind: settings_of(kind, params.get(kind)) for kind in kinds}} if kinds else {}
    return replace(row, inverter=inverter, about=row.about | about)


def contestants(loaded: dict[str, Trained | None], setting: Setting, config: DictConfig) -> dict[str, Contestant]:
    """The benchmark's rows, by names that are good for folders.

    `config.limits` and `config.params` of a kind (`optimisation`, `refined`) hold for all its rows, if there are any.

    Raises:
        UserError: If one of them is of no inverter here, or two rows would have one name.
    """
    limits, params = dict(config.get("limits") or {}), dict(config.get("params") or {})
    kinds = untrained_names()
    for key, names, known in (("limits", limits, [*loaded, *kinds]), ("params", params, [*kinds, *MATCHING])):
        for name in sorted(set(names) - set(known)):
            raise UserError(f"{key}.{name} is no inverter of this run: {nearest(name, known)}")
    rows = distinct({name: name.strip("/").removeprefix("runs/").replace("/", "-") for name in loaded})
    found: dict[str, Contestant] = {}
    networks: dict[str, Backbone] = {}
    for name, trained in loaded.items():
        if trained is None:
            kind = split_name(name)[0].partition("@")[0]
            limit = limits.get(name, limits.get(kind))
            row = untrained_contestant(name, setting, limit, dict(params.get(kind) or {}))
        else:
            precision = config.get("precision", "fp32")
            row = trained_contestant(name, trained, setting, limits.get(name), networks, precision)
        found[rows[name]] = matched_contestant(name, row, setting, params)
    return found


def chosen_data(config: DictConfig, setting: Setting) -> Subset[dict[str, Any]]:
    """The first n images of the data set to evaluate on."""
    if is_node(config.data):
        dataset: Dataset[dict[str, Any]] = instantiate(config.data, where="data")
    elif config.data is not None:
        dataset = load_dataset(str(config.data), size=setting.size)
    else:
        dataset = load_part(setting.config.data, "val")
        if dataset is None:
            raise UserError("the setting has no validation images; set data=FOLDER.")
    check_count("n", config.n)
    return Subset(dataset, range(len(dataset))[: config.n])  # type: ignore[arg-type]


def has_class_labels(given: bool | None, dataset: Any) -> bool:
    """Whether labels are the 1000 classes of ILSVRC, in their order; shards do not say, so the user does."""
    return getattr(dataset, "classes", None) == ilsvrc_synsets() if given is None else given


def build_benchmark(config: DictConfig, setting: Setting, out: Path, device: torch.device) -> Benchmark:
    """The benchmark that the command line describes."""
    chosen = chosen_data(config, setting)
    scenes = isinstance(chosen.dataset, ScenesDataset)
    embedders, perceptual, skipped = available_networks()
    class_labels = has_class_labels(config.class_labels, chosen.dataset)
    if not class_labels:
        skipped["label_accuracy"] = "the labels are not known to be the networks' classes (class_labels=true says so)"
    return Benchmark(
        setting.backbone,
        chosen,  # type: ignore[arg-type]
        out,
        referee=instantiate(config.referee, where="referee").to(device) if config.referee else None,
        referee_name=_network_name(config.referee) if config.referee else "",
        first_stage=setting.first_stage,
        truth=scene_truth(config.factor_images, size=setting.size) if scenes and config.factor_images else None,
        size=setting.size,
        seed=config.seed,
        batch_size=config.batch_size,
        distribution_resamples=config.distribution_resamples,
        embedders={name: network.to(device) for name, network in embedders.items()},
        perceptual=perceptual.to(device) if perceptual else None,
        class_labels=class_labels,
        skipped=skipped,
    )


def _network_name(node: DictConfig) -> str:
    """The name of a backbone's node, else of its class."""
    return (node.get("params") or {}).get("name") or node.target.rpartition(".")[2].lower()


def spelled_out(words: Sequence[str]) -> list[str]:
    """The words of a command line, with the run in `train.py`'s folder and baselines in place of `experiment=NAME`.

    They go first, so that `inverters=` and `out=` have the last word.
    """
    chosen = [word.partition("=")[2] for word in words if word.startswith("experiment=")]
    if not chosen:
        return list(words)
    name = Path(chosen[-1]).stem
    rows = f"inverters=[runs/{name},optimisation,retrieval]"
    rest = [word for word in words if not word.startswith("experiment=")]
    return [rows, f"out=runs/{name}_benchmark", *rest]


@exit_on_user_error
def main() -> None:
    """Read the command line, evaluate, print the table."""
    command = parse_command_line(__doc__ or "", str(CONFIG_ROOT / "benchmark.yaml"), argv=spelled_out(sys.argv[1:]))
    config, out = command.config, command.out or Path("runs/benchmark")
    device = own_device()
    with process_group():
        loaded = load_all(listed(config.inverters))
        setting = shared_setting(config.setting, loaded, device)
        rows = contestants(loaded, setting, config)
        content = build_benchmark(config, setting, out, device).run(rows, samples=config.samples)
        if process_rank()[0] == 0:
            write_benchmark(out, content, "Feature inversion: " + ", ".join(rows))
            print((out / "table.md").read_text())
            print(f"metrics.json, table.md, table.csv, per_image.csv and report.html are in {out}")


if __name__ == "__main__":
    main()
