"""One picture through one of the classic systems: PNGs and a JSON of numbers.

python -m tools.visualize grad_cam --image my.jpg
python -m tools.visualize optimisation --backbone efficientnet_lite0 --layer blocks.2 --image my.jpg --steps 300
python -m tools.visualize deconvnet --backbone resnet18 --layer layer2 --channel 5 --image my.jpg
python -m tools.visualize pgd --image my.jpg --eps 4
python -m tools.visualize attacked_inversion --image my.jpg      what is reconstructed from attacked features
python -m tools.visualize --all --image my.jpg                   every method, one page: report.html
"""

from __future__ import annotations

import argparse
import html
from pathlib import Path

from torch import Tensor

from featinv.backbones import Backbone, load_backbone
from featinv.config import nearest
from featinv.data.folders import pictures
from featinv.errors import UserError, exit_on_user_error
from featinv.files import given_path, write_json
from featinv.image import save_png
from featinv.report.page import picture_table, write_page
from tools.visual_methods import METHODS, Result


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
            text = "".join(f"<p class='note'>{html.escape(f'{key}: {value}')}</p>" for key, value in numbers.items())
            sections.append((name, picture_table(found, 1) + text))
        except UserError as error:
            sections.append((name, f"<p class='note'>{html.escape(str(error))}</p>"))
    write_page(out / "report.html", f"{options.backbone}, layer {backbone.layer}", sections)
    print(out / "report.html")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", nargs="?", help=f"one of {', '.join(METHODS)}")
    parser.add_argument("--all", action="store_true", help="every method, one page")
    parser.add_argument("--image", required=True, help="a picture")
    parser.add_argument("--backbone", default="efficientnet_lite0", help="as load_backbone takes it")
    parser.add_argument("--layer", default=None, help="see tools/list_layers.py; the backbone's own if not given")
    parser.add_argument("--untrained", action="store_true", help="random weights: the control")
    parser.add_argument("--input-size", type=int, default=224, help="side of the network's input and of the pictures")
    parser.add_argument("--out", type=given_path, default=Path("runs/visualize"))
    parser.add_argument("--target", type=int, default=None, help="class index; the predicted one if not given")
    parser.add_argument("--channel", type=int, default=None, help="one channel of the feature map")
    parser.add_argument("--top", type=int, default=None, help="the strongest channels only")
    parser.add_argument(
        "--region", type=float, nargs=4, default=None, help="left top right bottom, shares of the picture"
    )
    parser.add_argument("--objective", choices=("channel", "unit", "class", "direction"), help="of maximisation")
    parser.add_argument("--steps", type=int, default=256, help="of optimisation and maximisation")
    parser.add_argument("--parametrisation", default="pixel", help="pixel, fourier or latent, of the optimisation")
    parser.add_argument("--optimizer", default="adam", help="adam or lbfgs")
    parser.add_argument("--start", choices=("noise", "grey", "image"), default="noise", help="of the optimisation")
    parser.add_argument("--prior", default="scenes64", help="of prior_maximisation and of latents")
    parser.add_argument("--jitter", type=int, default=0, help="pixels, of the optimisation")
    parser.add_argument("--scale", type=float, default=0.0, help="largest change of size, of the optimisation")
    parser.add_argument("--eps", type=float, default=8.0, help="L-infinity radius of an attack in grey levels of 255")
    parser.add_argument("--norm", choices=("linf", "l2"), default="linf", help="of pgd")
    parser.add_argument("--l2", type=float, default=1.5, help="L2 radius of an attack, of the change in [0, 1] units")
    parser.add_argument("--judges", nargs="*", default=["mobilenetv2"], help="backbones that the attacks are tried on")
    parser.add_argument("--data", type=given_path, default=None, help="a folder of pictures, for activity")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


@exit_on_user_error
def main() -> None:
    """Read the picture, run the method."""
    options = arguments()
    if not options.all and options.method not in METHODS:
        given = options.method or ""
        raise UserError(f"unknown method {given!r}: {nearest(given, list(METHODS))} Or give --all.")
    weights = {"pretrained": False} if options.untrained else {}
    backbone = load_backbone(options.backbone, options.layer, input_size=options.input_size, **weights)
    image = pictures(options.image, options.input_size)[0]["image"][None]
    if options.all:
        run_all(backbone, image, options, options.out)
        return
    _, numbers = run(options.method, backbone, image, options, options.out)
    print(numbers)


if __name__ == "__main__":
    main()
