"""One picture through one of the classic systems: PNGs and a JSON of numbers.

python -m tools.visualize grad_cam --image my.jpg
python -m tools.visualize optimisation --backbone efficientnet_lite0 --layer blocks.2 --image my.jpg --steps 300
python -m tools.visualize pgd --image my.jpg --eps 4
python -m tools.visualize --all --image my.jpg          every method, one page: report.html
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from featinv.attribution.adversarial import fgsm, pgd
from featinv.attribution.deconvnet import deconvnet
from featinv.attribution.maximisation import channel_objective, class_objective, maximise
from featinv.attribution.saliency import SALIENCY, overlay, to_map
from featinv.backbones import Backbone, load_backbone
from featinv.config import nearest
from featinv.data.folders import pictures
from featinv.errors import UserError, exit_on_user_error
from featinv.files import write_json
from featinv.image import save_png
from featinv.inverters.masks import channel_mask, top_channels
from featinv.inverters.optimisation import OptimizationInverter
from featinv.metrics.features import feature_cosine
from featinv.metrics.images import psnr, ssim
from featinv.report.page import picture_table, write_page

Result = tuple[dict[str, Tensor], dict[str, Any]]
"""Pictures (1, 3, H, W) by file name, and numbers."""


def _saliency(name: str) -> Callable[..., Result]:
    def method(backbone: Backbone, image: Tensor, options: argparse.Namespace) -> Result:
        target = None if options.target is None else [options.target]
        found = to_map(SALIENCY[name](backbone, image, target))
        logits = backbone.logits(image)
        best = logits.softmax(1)[0].topk(5)
        numbers = {"class": best.indices.tolist(), "probability": best.values.tolist()}
        return {name: overlay(image, found)}, numbers

    return method


def _mask(features: Tensor, options: argparse.Namespace) -> Tensor | None:
    if options.channel is not None:
        return channel_mask(features, [options.channel])
    return None if options.top is None else top_channels(features, options.top)


def _deconvnet(backbone: Backbone, image: Tensor, options: argparse.Namespace) -> Result:
    signal = deconvnet(backbone, image, _mask(backbone(image), options))
    centred = 0.5 + 0.5 * signal / signal.abs().max().clamp(min=1e-12)
    return {"deconvnet": centred}, {"largest": float(signal.abs().max())}


def _optimisation(backbone: Backbone, image: Tensor, options: argparse.Namespace) -> Result:
    features = backbone(image)
    inverter = OptimizationInverter(
        backbone, image.shape[-1], options.steps, parametrisation=options.parametrisation, jitter=options.jitter
    )
    with tqdm(total=options.steps, desc="inverting", unit="step") as bar:
        found = inverter.invert(
            features,
            seeds=[options.seed],
            mask=_mask(features, options),
            callback=lambda step, images: bar.update() and None,
        )
    numbers = {
        "cosine": float(feature_cosine(features, backbone(found))),
        "psnr": float(psnr(image, found)),
        "ssim": float(ssim(image, found)),
    }
    return {"optimisation": found}, numbers


def _maximisation(backbone: Backbone, image: Tensor, options: argparse.Namespace) -> Result:
    with torch.no_grad():
        channel = int(backbone(image).mean((2, 3)).argmax()) if options.channel is None else options.channel
    chosen = {"channel": channel} if options.target is None else {"class": options.target}
    objective = (
        channel_objective(backbone, channel) if options.target is None else class_objective(backbone, options.target)
    )
    with tqdm(total=options.steps, desc="maximising", unit="step") as bar:
        found = maximise(
            objective,
            [options.seed],
            size=image.shape[-1],
            steps=options.steps,
            callback=lambda step, images: bar.update() and None,
        )
    with torch.no_grad():
        values = {"picture": float(objective(image)), "maximised": float(objective(found))}
    return {"maximisation": found}, chosen | values


def _attack(name: str) -> Callable[..., Result]:
    def method(backbone: Backbone, image: Tensor, options: argparse.Namespace) -> Result:
        before = backbone.logits(image).argmax(1)
        attack = {"fgsm": fgsm, "pgd": pgd}[name]
        labels = before if options.target is None else torch.tensor([options.target])
        found = attack(backbone, image, labels, options.eps / 255, targeted=options.target is not None)
        after = backbone.logits(found).argmax(1)
        noise = 0.5 + (found - image) / (2 * max(options.eps / 255, 1e-6))
        features = backbone(image).flatten(1), backbone(found).flatten(1)
        numbers = {
            "class": int(before),
            "class_attacked": int(after),
            "feature_cosine": float(F.cosine_similarity(*features)),
        }
        return {name: found, f"{name}_noise": noise}, numbers

    return method


METHODS: dict[str, Callable[[Backbone, Tensor, argparse.Namespace], Result]] = {
    **{name: _saliency(name) for name in SALIENCY},
    "deconvnet": _deconvnet,
    "optimisation": _optimisation,
    "maximisation": _maximisation,
    "fgsm": _attack("fgsm"),
    "pgd": _attack("pgd"),
}


def run(name: str, backbone: Backbone, image: Tensor, options: argparse.Namespace, out: Path) -> Result:
    """One method; its pictures and numbers are written into `out`."""
    found, numbers = METHODS[name](backbone, image, options)
    for file, picture in found.items():
        save_png(out / f"{file}.png", picture[0].detach().cpu())
    write_json(out / f"{name}.json", numbers)
    return {k: v.detach().cpu() for k, v in found.items()}, numbers


def run_all(backbone: Backbone, image: Tensor, options: argparse.Namespace, out: Path) -> None:
    """Every method on one page; those that the network cannot do are named with the reason."""
    sections = [("The picture", picture_table({"original": image.cpu()}, 1))]
    for name in METHODS:
        try:
            found, numbers = run(name, backbone, image, options, out)
            text = "".join(f"<p class='note'>{key}: {value}</p>" for key, value in numbers.items())
            sections.append((name, picture_table(found, 1) + text))
        except UserError as error:
            sections.append((name, f"<p class='note'>{error}</p>"))
    write_page(out / "report.html", f"{options.backbone}, layer {backbone.layer}", sections)
    print(out / "report.html")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", nargs="?", help=f"one of {', '.join(METHODS)}")
    parser.add_argument("--all", action="store_true", help="every method, one page")
    parser.add_argument("--image", required=True, help="a picture")
    parser.add_argument("--backbone", default="efficientnet_lite0", help="as load_backbone takes it")
    parser.add_argument("--layer", default=None, help="see tools/list_layers.py; the backbone's own if not given")
    parser.add_argument("--input-size", type=int, default=224, help="side of the network's input and of the pictures")
    parser.add_argument("--out", type=Path, default=Path("runs/visualize"))
    parser.add_argument("--target", type=int, default=None, help="class index; the predicted one if not given")
    parser.add_argument("--channel", type=int, default=None, help="one channel of the feature map")
    parser.add_argument("--top", type=int, default=None, help="the strongest channels only")
    parser.add_argument("--steps", type=int, default=256, help="of optimisation and maximisation")
    parser.add_argument("--parametrisation", default="pixel", help="pixel or fourier")
    parser.add_argument("--jitter", type=int, default=0, help="pixels, of the optimisation")
    parser.add_argument("--eps", type=float, default=8.0, help="radius of an attack in grey levels of 255")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@exit_on_user_error
def main() -> None:
    """Read the picture, run the method."""
    options = arguments()
    if not options.all and options.method not in METHODS:
        given = options.method or ""
        raise UserError(f"unknown method {given!r}: {nearest(given, list(METHODS))} Or give --all.")
    backbone = load_backbone(options.backbone, options.layer, input_size=options.input_size)
    image = pictures(options.image, options.input_size)[0]["image"][None]
    if options.all:
        run_all(backbone, image, options, options.out)
        return
    _, numbers = run(options.method, backbone, image, options, options.out)
    print(numbers)


if __name__ == "__main__":
    main()
