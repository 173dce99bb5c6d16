"""Frozen backbones: images -> spatial feature maps."""

from __future__ import annotations

from typing import Any

from featinv.backbones.base import Backbone, FeatureSpec

__all__ = ["Backbone", "FeatureSpec", "load_backbone"]


def load_backbone(name: str, layer: str = "final", **params: Any) -> Backbone:
    """Load a frozen backbone.

    Args:
        name: A bundled name (efficientnet_lite0, mobilenetv2) or any timm model.
        layer: "final", a name from timm's feature list, or any module of the model.
        **params: See `TimmBackbone`.

    Raises:
        UserError: If there is no such model or layer, naming the nearest.
    """
    from featinv.backbones.bundled import BUNDLED, bundled_backbone
    from featinv.backbones.timm_backbone import TimmBackbone

    if name in BUNDLED:
        return bundled_backbone(name, layer, **params)
    return TimmBackbone(name, layer, **params)
