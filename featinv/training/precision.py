"""Which number format training and sampling use on this machine."""

from __future__ import annotations

from typing import Any

import torch

from featinv.diffusion.half import store_half
from featinv.errors import UserError
from featinv.inverters.base import Inverter
from featinv.inverters.diffusion import DiffusionInverter


def fast_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 matrices in hardware; without it bfloat16 is many times slower."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, flag, lambda: False)() for flag in flags)


def lightning_precision(precision: str) -> str:
    """Translate "auto", "bf16" or "fp32" for Lightning's Trainer.

    Raises:
        UserError: If it is none of them.
    """
    if precision not in ("auto", "bf16", "fp32"):
        raise UserError(f"precision {precision!r} is not auto, bf16 or fp32.")
    if precision == "auto":
        precision = "bf16" if fast_bfloat16() else "fp32"
    return "bf16-mixed" if precision == "bf16" else "32-true"


def stores_half(settings: Any) -> bool:
    """Whether a run with these settings (`config.training`) keeps its frozen UNet in bfloat16.

    Not under fsdp, which splits weights of one format only.
    """
    return lightning_precision(settings.precision) == "bf16-mixed" and settings.strategy != "fsdp"


def hasten(inverter: Inverter, settings: Any) -> None:
    """Make training faster as `settings` (`config.training`) allow: half-precision storage, torch.compile.

    Raises:
        UserError: If `settings.compile` is set for an inverter without a UNet.
    """
    if isinstance(inverter, DiffusionInverter) and stores_half(settings):
        store_half(inverter.prior.unet)
    if settings.compile:
        if not isinstance(inverter, DiffusionInverter):
            raise UserError(f"training.compile: {type(inverter).__name__} has no UNet to compile.")
        inverter.compile_networks()


def draw_in(inverter: Inverter, precision: str) -> str:
    """Let an inverter that samples by diffusion do so in "auto", "bf16" or "fp32"; returns which of the two it is.

    Raises:
        UserError: If it is none of them.
    """
    half = lightning_precision(precision) == "bf16-mixed" and isinstance(inverter, DiffusionInverter)
    if half:
        inverter.halve()  # type: ignore[attr-defined]
    return "bf16" if half else "fp32"
