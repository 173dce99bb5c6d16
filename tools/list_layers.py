"""List the layers of a backbone with channels, grid and stride.

python tools/list_layers.py convnext_base          a file in configs/backbone
python tools/list_layers.py resnet50               any timm model
python tools/list_layers.py open_clip:ViT-B-32     an OpenCLIP image tower

No weights are downloaded: shapes do not depend on them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file, too

from featinv import backbones  # noqa: E402
from featinv.backbones import Backbone, load_backbone  # noqa: E402
from featinv.config import CONFIG_ROOT, instantiate, load_group  # noqa: E402
from featinv.errors import UserError, exit_on_user_error  # noqa: E402


def without_weights(name: str) -> Backbone:
    """The backbone `name` with random weights, so that nothing is fetched."""
    if not (CONFIG_ROOT / "backbone" / f"{name}.yaml").is_file():
        return load_backbone(name, pretrained=False)
    node: Any = OmegaConf.to_container(load_group("backbone", name), resolve=True)
    return instantiate(backbones.without_weights(node), where=f"backbone {name}")


def modules_with_maps(backbone: Backbone) -> list[str]:
    """Every module of a timm model that can be named as a layer; of another network the layers that it lists."""
    model = getattr(backbone, "model", None)
    names = [name for name, _ in model.named_modules() if name] if model is not None else []
    usable = []
    for name in names:
        try:
            _ = backbone.at(name).spec
            usable.append(name)
        except (UserError, RuntimeError, IndexError, AttributeError):
            continue
    return usable or backbone.layers


def rows(backbone: Backbone, layers: list[str]) -> list[tuple[str, int, str, str]]:
    """(layer, channels, grid, stride) of each layer."""
    table = []
    for layer in layers:
        with torch.no_grad():
            spec = backbone.at(layer).spec
        stride = backbone.input_size / spec.height
        table.append((layer, spec.channels, f"{spec.height} x {spec.width}", f"{stride:g}"))
    return table


@exit_on_user_error
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone")
    parser.add_argument("--all", action="store_true", help="every module that gives a map, not only the listed ones")
    arguments = parser.parse_args()
    backbone = without_weights(arguments.backbone)
    layers = modules_with_maps(backbone) if arguments.all else backbone.layers
    table = rows(backbone, layers)
    print(f"{arguments.backbone}, input {backbone.input_size} px")
    width = max(len(row[0]) for row in table)
    print(f"{'layer':<{width}}  channels  grid       stride")
    for layer, channels, grid, stride in table:
        print(f"{layer:<{width}}  {channels:<8}  {grid:<9}  {stride}")


if __name__ == "__main__":
    main()
