"""What a training step costs: operations, kept activations, bytes for each parameter; and what the machine can do."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from featinv.diffusion.prior import DiffusionPrior
from featinv.processes import return_freed_memory

BYTES_TRAINED = {"weights": 4, "gradients": 4, "AdamW's moments": 8, "average": 4}
"""Bytes for each trained parameter: all of them in float32, also under bf16 autocast."""


@dataclass(frozen=True)
class StepCost:
    """Cost of one training step.

    Attributes:
        images: Of the step.
        flops: Floating-point operations of matrix products and convolutions, forward and backward.
        activations: Bytes that autograd keeps between them, in float32.
    """

    images: int
    flops: int
    activations: int


class _KeptBytes:
    """Counts the memory of tensors that autograd keeps, each once, parameters left out."""

    def __init__(self, parameters: Iterable[Tensor]):
        self._own = {p.untyped_storage()._cdata for p in parameters}
        self._kept: dict[int, Any] = {}  # the storages are held, so that no two are taken for one

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._kept[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._kept.values())


def step_cost(inverter: Any, images: int, features: tuple[int, int, int], cached: bool = False) -> StepCost:
    """Run one training step on the meta device, where it costs nothing, and count.

    Args:
        inverter: On the meta device.
        images: Of the step.
        features: (C, H, W).
        cached: Whether latents come from a cache, so that the first stage does not run.

    Raises:
        Exception: Whatever the step itself raises: parts that do not fit are found here.
    """
    assert isinstance(inverter, nn.Module)
    size: Any = inverter.size
    meta: dict[str, Any] = {"device": "meta"}
    pictures = torch.empty(images, 3, size, size, **meta)
    prior = getattr(inverter, "prior", None)
    from_cache = cached and isinstance(prior, DiffusionPrior)
    latents = torch.empty(images, *prior.latent_shape, **meta) if from_cache else None  # type: ignore[union-attr]
    kept = _KeptBytes([*inverter.parameters(), *inverter.buffers()])
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
            losses = inverter.training_losses(  # type: ignore[operator]
                pictures, torch.empty(images, *features, **meta), seeds=list(range(images)), latents=latents
            )
        losses["loss"].backward()
    return StepCost(images, counter.get_total_flops(), kept.bytes)


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Measured floating-point operations a second of a large matrix product: the best this machine does.

    Args:
        device: CPU (with the threads that torch uses) or GPU.
        dtype: Of the factors.
        seconds: How long to measure.
    """
    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until or not best:
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def reset_peak_memory(device: torch.device) -> None:
    """Start `peak_memory` anew from what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        return_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes held at most since `reset_peak_memory`: of the GPU, or of this process (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
