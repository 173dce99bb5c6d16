"""bfloat16 for networks that are not trained: what autocast computes, without casting every weight at every call."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn


def store_half(network: nn.Module) -> None:
    """Round the weights of frozen convolutions and linear layers to bfloat16, in place.

    Autocast multiplies in bfloat16 anyway, so the results are the same, from half the memory; the network must run
    under autocast from now on. Normalisation keeps its float32.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and not any(p.requires_grad for p in layer.parameters()):
            layer.to(torch.bfloat16)


def half_arithmetic(device: torch.device, half: bool) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 products if `half`, else whatever the caller has chosen."""
    return torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()
