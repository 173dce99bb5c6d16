"""The classic systems on a user's pictures: what each shows, in figures and on one page.

python -m eval.classic                                   photographs that come with scikit-image, and rendered scenes
python -m eval.classic images=val-000.tar labelled=true out=runs/classic
python -m eval.classic parts=[layers] layers.n=4 layers.steps=200
python -m eval.classic parts=[table] table.inverters=[runs/upconv,runs/branch]

Writes classic.json, one PNG a study, and report.html. Parts that were made before and are not asked for again are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import Subset

from eval.classic_studies import (
    Study,
    WithBar,
    seconds_per_image,
    study_activity,
    study_attacks,
    study_grad_cam,
    study_layers,
    study_maximisation,
)
from featinv import evaluate
from featinv.applications.matching import matched, split_name
from featinv.attribution.transfer import predict
from featinv.backbones import load_backbone
from featinv.cli import parse_command_line
from featinv.config import CONFIG_ROOT, listed, nearest
from featinv.data import SHARD_SUFFIXES, load_dataset, load_part
from featinv.data.folders import pictures
from featinv.data.transforms import EvalTransform
from featinv.diffusion.prior import DiffusionPrior, load_prior
from featinv.errors import UserError, exit_on_user_error
from featinv.files import write_json
from featinv.image import make_grid, save_png
from featinv.inverters.build import check_backbone, load_trained
from featinv.inverters.optimisation import OptimizationInverter
from featinv.metrics.names import short_names
from featinv.metrics.networks import check_referee
from featinv.report.classic import activity_figure, layer_figure, read_classic, write_classic

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina")


def chosen_images(config: DictConfig, size: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, size, size) and labels (N,), -1 where unknown, of a path or of scikit-image's own photographs."""
    path = config.images
    if path is None:
        import skimage.data

        raw = [torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1) / 255 for name in PHOTOGRAPHS]
        return torch.stack([EvalTransform(size)(image) for image in raw]), torch.full((len(raw),), -1)
    items = user_items(path, size)
    read = [items[int(i)] for i in spread(len(items), config.count or len(items))]
    return torch.stack([item["image"] for item in read]), torch.tensor([int(item["label"]) for item in read])


def user_items(path: str, size: int) -> Any:
    """The pictures of a path as data set items."""
    one = Path(path).expanduser().is_file() and not path.endswith(SHARD_SUFFIXES)
    return pictures(path, size) if one else load_dataset(path, size=size)


def spread(count: int, wanted: int) -> Tensor:
    """Indices of `wanted` of `count` images, evenly over the list, whose order may be by class."""
    return torch.linspace(0, count - 1, min(wanted, count)).long()


def layers(config: DictConfig, out: Path) -> Study:
    """Optimisation inversion over depth."""
    part = config.layers
    images, _ = chosen_images(config, part.size)
    inverted = spread(len(images), part.n)
    rest = [i for i in range(len(images)) if i not in set(inverted.tolist())][: max(part.candidates - len(inverted), 0)]
    backbone = load_backbone(config.backbone, input_size=part.size)
    referee = load_backbone(config.referee, input_size=part.size)
    check_referee(referee, backbone)
    names = listed(part.names) or list(backbone.layers)
    study = study_layers(backbone, referee, images[inverted], images[rest], names, part.steps)
    layer_figure(out / "layer_curve.png", study.figures)
    return study


def attacks(config: DictConfig, out: Path) -> Study:
    """Adversarial examples, their transfer, and what is reconstructed from them."""
    part = config.attacks
    images, labels = chosen_images(config, part.size)
    networks = {name: load_backbone(name, input_size=part.size) for name in (config.backbone, config.referee)}
    check_referee(networks[config.referee], networks[config.backbone])
    if not config.labelled:
        labels = predict(networks[config.backbone], images)
    return study_attacks(
        networks,
        images,
        labels,
        n=part.n,
        eps=part.eps / 255,
        l2_eps=part.l2,
        steps=part.steps,
        inverted=part.inverted,
        invert_steps=part.invert_steps,
    )


def grad_cam(config: DictConfig, out: Path) -> Study:
    """Grad-CAM on scenes whose masks are known."""
    part = config.grad_cam
    trained, untrained = (
        load_backbone(config.backbone, input_size=part.size, **words) for words in ({}, {"pretrained": False})
    )
    return study_grad_cam(trained, untrained, part.scenes, part.layer)


def activity(config: DictConfig, out: Path) -> Study:
    """Dead channels and inactive units."""
    part = config.activity
    images, _ = chosen_images(config, part.size)
    backbone = load_backbone(config.backbone, input_size=part.size)
    study, found = study_activity(backbone, images[spread(len(images), part.n)], backbone.layers)
    activity_figure(out / "activity.png", found)
    return study


def maximisation(config: DictConfig, out: Path) -> Study:
    """Activation maximisation with and without the diffusion prior, on rendered scenes and their prior."""
    from featinv.data.scenes import render_scenes

    part = config.maximisation
    prior = load_prior(part.prior)
    backbone = load_backbone(config.backbone, part.layer, input_size=2 * prior.size)
    images, _, _ = render_scenes(1, range(32), prior.size)
    return study_maximisation(backbone, prior, images, part.channels, part.steps)


def table(config: DictConfig, out: Path) -> Study:
    """Trained inverters beside the optimiser: one benchmark, and the seconds of each."""
    part = config.table
    if not part.inverters:
        raise UserError("the table needs trained inverters: table.inverters=[runs/a,runs/b].")
    rows = short_names([*part.inverters, "optimisation"])
    trained = {name: load_trained(split_name(name)[0]) for name in part.inverters}
    first = next(iter(trained.values()))
    backbone, size = first.load_backbone(), first.inverter.size
    for name, other in trained.items():
        check_backbone(name, other, first)
    images = load_part(first.config.data, "val")
    items = Subset(images, range(min(part.n, len(images))))
    priors = [
        each.inverter.prior
        for each in trained.values()
        if isinstance(getattr(each.inverter, "prior", None), DiffusionPrior)
    ]
    first_stage = priors[0].first_stage if priors else None  # as eval.benchmark has it
    inverters: dict[str, Any] = {
        rows[name]: matched(each.inverter, backbone, split_name(name)[1], first_stage=first_stage)
        for name, each in trained.items()
    }
    inverters[rows["optimisation"]] = WithBar(
        OptimizationInverter(backbone, size, part.steps, batch_size=part.n), "optimisation"
    )
    with torch.no_grad():
        features = backbone(torch.stack([items[i]["image"] for i in range(min(part.timed, len(items)))]))
    figures = evaluate(
        inverters,
        backbone,
        items,
        out / "table",
        referee=load_backbone(config.referee, input_size=128),
        referee_name=config.referee,
        first_stage=first_stage,
        size=size,
    )
    seconds = {name: seconds_per_image(inverter, features) for name, inverter in inverters.items()}
    return Study({**figures, "seconds_per_image": seconds})


PARTS: dict[str, Callable[[DictConfig, Path], Study]] = {
    "layers": layers,
    "attacks": attacks,
    "grad_cam": grad_cam,
    "activity": activity,
    "maximisation": maximisation,
    "table": table,
}


READS = {
    "layers": ("backbone", "referee", "images", "count"),
    "attacks": ("backbone", "referee", "images", "count", "labelled"),
    "grad_cam": ("backbone",),
    "activity": ("backbone", "images", "count"),
    "maximisation": ("backbone",),
    "table": ("referee",),
}
"""What a part reads beside its own settings."""


def reason_to_skip(name: str, config: DictConfig) -> str | None:
    """Why one of several parts is left out, if it is; asked for alone, a part says so itself."""
    if len(config.parts) == 1:
        return None
    if name == "table" and not config.table.inverters:
        return "no trained inverters were named"
    if name == "layers" and config.images is not None:
        count = len(user_items(config.images, config.layers.size))
        if min(count, config.count or count) < 2:
            return "one picture has no others to be found among"
    return None


@exit_on_user_error
def main() -> None:
    """Run the parts that are asked for, write figures and page."""
    command = parse_command_line(__doc__ or "", str(CONFIG_ROOT / "classic.yaml"))
    config, out = command.config, command.out or Path("runs/classic")
    for name in config.parts:
        if name not in PARTS:
            raise UserError(f"unknown part {name!r}: {nearest(name, list(PARTS))}")
    content = read_classic(out)
    for name in config.parts:
        if (reason := reason_to_skip(name, config)) is not None:
            print(f"{name} is left out: {reason}")
            continue
        study = PARTS[name](config, out)
        if study.rows:
            grid = make_grid(list(study.rows.values()), list(study.rows), scale=2 if name == "maximisation" else 1)
            save_png(out / f"{name}.png", grid)
        claims = [{"claim": c.text, "value": c.value, "target": c.target, "met": c.met} for c in study.claims]
        settings = {key: config[key] for key in READS[name]} | OmegaConf.to_container(config[name])
        content[name] = {"figures": study.figures, "claims": claims, "settings": settings}
        write_json(out / "classic.json", content)
        write_classic(out, content)
        for claim in study.claims:
            print(f"{'met ' if claim.met else 'MISS'} {claim.text}: {claim.value:.3f} (target {claim.target:.3f})")
    print(out / "report.html")


if __name__ == "__main__":
    main()
