"""Which number format training and sampling use on this machine."""

from __future__ import annotations

import torch

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


def draw_in(inverter: Inverter, precision: str) -> str:
    """Let an inverter that samples by diffusion do so in "auto", "bf16" or "fp32"; returns which of the two it is.

    Raises:
        UserError: If it is none of them.
    """
    half = lightning_precision(precision) == "bf16-mixed" and isinstance(inverter, DiffusionInverter)
    if half:
        inverter.halve()  # type: ignore[attr-defined]
    return "bf16" if half else "fp32"
