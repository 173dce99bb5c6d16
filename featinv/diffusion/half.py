"""bfloat16 for networks that are not trained: what autocast computes, without casting every weight at every call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def store_half(network: nn.Module) -> None:
    """Round the weights of frozen convolutions and linear layers to bfloat16, in place.

    Autocast multiplies in bfloat16 anyway, so the results are the same, from half the memory; the network must run
    under autocast from now on. Normalisation keeps its float32.
    """
    for layer in _multiplying(network):
        layer.to(torch.bfloat16)


def saved_bytes(network: nn.Module) -> int:
    """What `store_half` saves of a network in float32."""
    return sum(2 * p.numel() for layer in _multiplying(network) for p in layer.parameters())


def _multiplying(network: nn.Module) -> Iterator[nn.Module]:
    """Frozen convolutions and linear layers."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and not any(p.requires_grad for p in layer.parameters()):
            yield layer


def multiplies_half_on_cpu(values: Tensor) -> bool:
    """Whether these values are multiplied in bfloat16 on a CPU, where small maps have faster ways than the kernels."""
    autocast = values.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return autocast and torch.get_autocast_dtype("cpu") == torch.bfloat16


def multiplies_float_on_cpu(values: Tensor) -> bool:
    """Whether these values are multiplied in float32 on a CPU."""
    return values.device.type == "cpu" and values.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def half_arithmetic(device: torch.device, half: bool) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 products if `half`, else whatever the caller has chosen."""
    return torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()


def full_arithmetic(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The products that the tensors' own formats ask for, also where a caller has chosen bfloat16."""
    known = torch.amp.is_autocast_available(device.type)  # not on the meta device
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()
