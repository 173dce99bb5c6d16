"""Feature inversion: from the spatial feature map of a frozen backbone, images that have those features.

load_backbone(name, layer)      images -> features
load_prior(name_or_path)        the frozen latent-diffusion prior
load_inverter(name_or_path)     features -> images
import_ldm(checkpoint, config)  the same from a checkpoint of the published code
load_dataset(name_or_path)      images with labels and ids
evaluate(inverters, ...)        figures of several inverters on the same images
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featinv.backbones import load_backbone
    from featinv.data import load_dataset
    from featinv.diffusion.prior import load_prior
    from featinv.inverters.build import load_inverter
    from featinv.inverters.ldm import import_ldm
    from featinv.metrics.benchmark import evaluate

__all__ = ["evaluate", "import_ldm", "load_backbone", "load_dataset", "load_inverter", "load_prior"]

_HOME = {
    "load_backbone": "featinv.backbones",
    "load_dataset": "featinv.data",
    "load_inverter": "featinv.inverters.build",
    "import_ldm": "featinv.inverters.ldm",
    "load_prior": "featinv.diffusion.prior",
    "evaluate": "featinv.metrics.benchmark",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: `import featinv` alone must not load torch, timm and diffusers.
    if name not in _HOME:
        raise AttributeError(f"module 'featinv' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
