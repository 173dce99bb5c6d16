"""What `config.training` may hold, looked at before anything is built or computed."""

from __future__ import annotations

from omegaconf import DictConfig

from featinv.errors import UserError
from featinv.processes import torchrun_layout
from featinv.training.precision import lightning_precision

LEAST = {
    **dict.fromkeys(("max_steps", "batch_size", "accumulate", "checkpoint_every", "cache_epochs", "probe_images"), 1),
    **dict.fromkeys(("seed", "num_workers", "prepare_images", "probe_every"), 0),
}
"""The whole numbers among the settings, and the least that each may be."""


def check_settings(settings: DictConfig) -> None:
    """Check `config.training`; what the module's own parameters may be, its constructor checks.

    Raises:
        UserError: If a setting cannot work, alone or beside another.
    """
    for name, least in LEAST.items():
        value = settings.get(name, least)
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"training.{name} must be a whole number, not {value}.")
        if value < least:
            raise UserError(f"training.{name} must be at least {least}, not {value}.")
    lightning_precision(settings.precision)
    machines, started = torchrun_layout()
    devices, size = started or settings.devices, settings.batch_size
    if isinstance(devices, int) and devices > 0 and size % (devices * machines):
        raise UserError(f"batch_size {size} cannot be shared by {devices * machines} devices; make it a multiple.")
    params = settings.module.get("params") or {}
    if settings.cache and params.get("teacher") and params.get("estimate_steps"):
        raise UserError("a teacher looks at images, and the cache holds none; set training.cache=false.")
