"""Frozen backbones: images -> spatial feature maps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from featinv.backbones.base import Backbone, FeatureSpec

__all__ = ["Backbone", "FeatureSpec", "load_backbone", "without_weights"]


def without_weights(node: Mapping[str, Any]) -> dict[str, Any]:
    """A backbone's `{target, params}` node changed so that it has random weights: its shapes, and nothing fetched.

    A class without a parameter `pretrained`, as your own may be, keeps what it has.
    """
    from featinv.config import resolve_target

    given = {name: value for name, value in (node.get("params") or {}).items() if name != "checkpoint_path"}
    signature = inspect.signature(resolve_target(node["target"], "backbone.target")).parameters
    if "pretrained" in signature or "pretrained" in given:
        # A switch in timm's case, the name of a set of weights in OpenCLIP's.
        named = "pretrained" in signature and not isinstance(signature["pretrained"].default, bool)
        given["pretrained"] = None if named else False
    return {"target": node["target"], "params": given}


def load_backbone(name: str, layer: str | None = None, **params: Any) -> Backbone:
    """Load a frozen backbone.

    Args:
        name: A file in configs/backbone ("convnext_base", "resnet50_early"), a bundled name (efficientnet_lite0,
            mobilenetv2), any timm model, or "open_clip:" and the name of an OpenCLIP model.
        layer: "final", a name from the model's feature list, or any module of a timm model; None takes the YAML's own,
            else "final".
        **params: Arguments of the backbone class; they override the YAML's.

    Raises:
        UserError: If there is no such model or layer, naming the nearest.
    """
    from featinv.backbones.bundled import BUNDLED, bundled_backbone
    from featinv.backbones.timm_backbone import TimmBackbone
    from featinv.config import CONFIG_ROOT, instantiate, load_group

    if layer is not None:
        params["layer"] = layer
    if (CONFIG_ROOT / "backbone" / f"{name}.yaml").is_file():
        node = load_group("backbone", name)
        return instantiate(
            {"target": node.target, "params": {**(node.get("params") or {}), **params}}, where=f"backbone {name}"
        )
    if name in BUNDLED:
        return bundled_backbone(name, **params)
    if name.startswith("open_clip:"):
        from featinv.backbones.open_clip_backbone import OpenCLIPBackbone

        return OpenCLIPBackbone(name.removeprefix("open_clip:"), **params)
    return TimmBackbone(name, **params)
