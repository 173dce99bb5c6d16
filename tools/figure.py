"""A figure: originals, samples, posterior mean and a baseline, for one or several inverters, as one PNG.

python -m tools.figure inverters=[scenes64/efficientnet_lite0_early] baselines=[optimisation] n=8 out=runs/scenes.png
python -m tools.figure inverters=[photos64/efficientnet_lite0+refined,photos64/efficientnet_lite0_early+refined] \
    baselines=[runs/photos64_upconv] images=[astronaut,cat,coffee,rocket] out=docs/images/photos64.png

The photographs by name come with scikit-image and are in the public domain or CC0. Pictures are cropped to the centre
square and shrunk to the inverters' size first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from eval.benchmark import Setting, untrained_contestant, untrained_names
from featinv.applications.matching import matched, split_name
from featinv.backbones.base import Backbone
from featinv.cli import parse_command_line
from featinv.config import CONFIG_ROOT, nearest
from featinv.data import SHARD_SUFFIXES, load_dataset
from featinv.data.folders import pictures
from featinv.data.scenes import render_scenes
from featinv.data.transforms import EvalTransform
from featinv.errors import UserError, exit_on_user_error
from featinv.image import make_grid, save_png
from featinv.inverters.base import Inverter
from featinv.inverters.build import Trained, load_trained
from featinv.inverters.diffusion import DiffusionInverter
from featinv.inverters.reconstruct import sample_seed
from featinv.metrics.names import distinct, short_names
from featinv.report.app.pictures import PHOTOGRAPHS, from_array

HELD_OUT_SCENES = 1
"""Seed of the validation scenes (configs/data/scenes.yaml)."""


def chosen_images(images: str | Sequence[str], n: int, size: int) -> tuple[list[str], Tensor]:
    """Ids and pictures (N, 3, size, size).

    Raises:
        UserError: If there is no such photograph or path.
    """
    if images == "scenes":
        return [f"scene-{i}" for i in range(n)], render_scenes(HELD_OUT_SCENES, range(n), size)[0]
    if isinstance(images, str):
        items = load_dataset(images, size=size) if images.endswith(SHARD_SUFFIXES) else pictures(images, size)
        chosen = [items[i] for i in range(min(n, len(items)))]  # type: ignore[arg-type]
        return [item["id"] for item in chosen], torch.stack([item["image"] for item in chosen])
    names = list(images)[:n]
    for name in names:
        if name not in PHOTOGRAPHS:
            raise UserError(f"no photograph {name!r}: {nearest(name, list(PHOTOGRAPHS))}")
    import skimage.data

    raw = [from_array(getattr(skimage.data, PHOTOGRAPHS[name])()) for name in names]
    return names, torch.stack([EvalTransform(size)(image) for image in raw])


def drawn(inverter: Inverter, backbone: Backbone, images: Tensor, seeds: Sequence[int]) -> Tensor:
    """Reconstructions (N, 3, H, W) of images (N, 3, H, W) from their features."""
    with torch.no_grad():
        features = backbone(images)
    return inverter.invert(features, seeds=seeds).detach()


def baseline(name: str, trained: Trained, backbone: Backbone, params: DictConfig) -> tuple[Inverter, Backbone]:
    """A trained inverter with its own backbone, or one that needs no training, on the layer of `trained`."""
    base, kinds = split_name(name)
    if base in untrained_names():
        setting = Setting(trained.config, backbone, trained.inverter.size, None)
        given = OmegaConf.to_container(params.get(base) or OmegaConf.create({}))
        inverter: Inverter = untrained_contestant(base, setting, None, given).inverter  # type: ignore[arg-type]
    else:
        other = load_trained(base)
        inverter, backbone = other.inverter, other.load_backbone()
    first_stage = getattr(getattr(trained.inverter, "prior", None), "first_stage", None)
    return matched(inverter, backbone, kinds, params, first_stage), backbone


def rows_of(config: DictConfig) -> dict[str, Tensor]:
    """Label -> pictures (N, 3, H, W), in the order of the figure.

    Raises:
        UserError: If the inverters draw different sizes, there are not as many baselines, or two rows would have one
            name.
    """
    if not config.inverters or len(config.baselines) not in (0, 1, len(config.inverters)):
        raise UserError("give inverters=[A,B], and one baseline for each of them, one for all, or none.")
    loaded = {name: load_trained(split_name(name)[0]) for name in config.inverters}
    sizes = {trained.inverter.size for trained in loaded.values()}
    if len(sizes) > 1:
        raise UserError(f"the inverters draw pictures of different sizes, {sorted(sizes)}; make a figure of each.")
    ids, images = chosen_images(config.images, config.n, sizes.pop())
    rows, titles, baselines = {"original": images}, _titles(loaded), short_names(list(config.baselines))
    for number, (name, trained) in enumerate(tqdm(loaded.items(), desc="drawing", unit="inverter")):
        backbone, (base, kinds) = trained.load_backbone(), split_name(name)
        plain = titles[base]
        title = "\n".join([plain, "".join(f"+{kind}" for kind in kinds)]).strip()
        inverter = matched(trained.inverter, backbone, kinds, config.params)
        for k in range(config.samples):
            seeds = [sample_seed(config.seed, image_id, k) for image_id in ids]
            rows[f"{title}\nsample {k + 1}"] = drawn(inverter, backbone, images, seeds)
        first = next(other for other in loaded if split_name(other)[0] == base)
        if config.posterior_mean and name == first and isinstance(trained.inverter, DiffusionInverter):
            with torch.no_grad():
                rows[f"{plain}\nposterior mean"] = trained.inverter.posterior_mean(backbone(images))
        if config.baselines and (number == 0 or len(config.baselines) > 1):
            chosen = config.baselines[number]
            other, own = baseline(chosen, trained, backbone, config.params)
            seeds = [sample_seed(config.seed, image_id, 0) for image_id in ids]
            layer = plain if own is backbone else own.spec.layer  # a trained baseline may read another layer
            rows[f"{layer}\n{baselines[chosen]}"] = drawn(other, own, images, seeds)
    return rows


def _titles(loaded: Mapping[str, Trained]) -> dict[str, str]:
    """Inverter without its suffixes -> its layer, or its own name where another one has that layer, too."""
    bases = {split_name(name)[0]: trained.spec.layer for name, trained in loaded.items()}
    short, layers = short_names(list(bases)), list(bases.values())
    return distinct({base: layer if layers.count(layer) == 1 else short[base] for base, layer in bases.items()})


@exit_on_user_error
def main() -> None:
    """Read the command line, draw."""
    command = parse_command_line(__doc__ or "", str(CONFIG_ROOT / "figure.yaml"))
    out = command.out or Path("runs/figure.png")
    rows = rows_of(command.config)
    save_png(out, make_grid(list(rows.values()), list(rows), scale=command.config.scale))
    print(f"{out}: {len(rows)} rows of {len(rows['original'])} pictures")


if __name__ == "__main__":
    main()
