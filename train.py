"""Train an inverter: a frozen prior, a frozen backbone, and what lies between them.

python train.py experiment=scenes64                      the embedded default, on a laptop
python train.py experiment=convnext_base                 the paper's setting; IMAGENET_ROOT and a GPU needed
python train.py experiment=scenes64 conditioning=pooled training.max_steps=500 out=runs/pooled

Interrupted, the same command goes on from the last checkpoint. The run's folder then holds inverter.safetensors, which
sample.py and eval/ take, and probe.png, the feature cosine of held-out images over training.
"""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from featinv.cli import parse_command_line
from featinv.config import instantiate
from featinv.diffusion.lift import training_backbone
from featinv.errors import exit_on_user_error
from featinv.inverters.build import INVERTER_FILE, about, build_inverter, save_inverter
from featinv.processes import keep_freed_memory, own_device
from featinv.training.module import InversionModule
from featinv.training.plan import plan
from featinv.training.precision import hasten
from featinv.training.probe import FeatureProbe
from featinv.training.rows import held_out_images, keep_config, on_device, prepare, start_from, training_rows
from featinv.training.runner import fit, hold_run
from featinv.training.settings import check_settings
from featinv.training.summary import describe


def train(config: DictConfig, out: Path, dry_run: bool = False, changed: bool = False) -> None:
    """Train the inverter that a configuration describes.

    Args:
        config: See configs/experiment.
        out: The run's folder.
        dry_run: Build everything without weights, print parts, memory and time, and stop (`featinv.training.plan`).
        changed: Go on with a run that was begun with another configuration.

    Raises:
        UserError: If a setting cannot work, or parts do not fit each other.
    """
    check_settings(config.training)
    if dry_run:
        for line in plan(config):
            print(line, flush=True)
        return
    with hold_run(out):
        _train(config, out, changed)


def _train(config: DictConfig, out: Path, changed: bool) -> None:
    settings = config.training
    pl.seed_everything(settings.seed, verbose=False)
    backbone = instantiate(config.backbone, where="backbone")
    inverter = build_inverter(config, backbone.spec, backbone)
    module: InversionModule = instantiate(
        settings.module,
        where="training.module",
        inverter=inverter,
        backbone=training_backbone(inverter, backbone),
        max_steps=settings.max_steps,
        seed=settings.seed,
        described=about(config, inverter, backbone.spec),
    )
    hasten(inverter, settings)
    print(describe(config, module))
    keep_config(config, out, changed)
    probe_images = held_out_images(config, settings.probe_images)
    with on_device(module, torch.device("cpu") if settings.accelerator == "cpu" else own_device()):
        dataset = training_rows(config, module, out)
        prepare(module, dataset, settings.prepare_images, out)
    start_from(module, settings.get("start"), out)
    probe = FeatureProbe(probe_images, backbone, out, settings.probe_every, settings.batch_size * settings.accumulate)
    fit(
        module,
        dataset,
        out,
        max_steps=settings.max_steps,
        callbacks=[probe],
        **{
            name: settings[name]
            for name in (
                "batch_size",
                "seed",
                "checkpoint_every",
                "precision",
                "accumulate",
                "num_workers",
                "devices",
                "strategy",
                "accelerator",
            )
        },
    )
    state = module.apply_average()
    if module.global_rank == 0:
        figures = probe.lines[-1] if probe.lines else {}
        save_inverter(out / INVERTER_FILE, inverter, module.described, torch.float16, figures, state)
        print(f"{out / INVERTER_FILE} is written; feature cosine of {len(probe_images)} held-out images: {figures}")


@exit_on_user_error
def main() -> None:
    """Read the command line, train."""
    flags = {
        "dry-run": "build everything without weights, print parts, memory and predicted time, and stop",
        "changed": "go on with a run that was begun with other settings",
    }
    command = parse_command_line(__doc__ or "", "scenes64", flags)
    keep_freed_memory()
    train(command.config, command.out or Path("runs") / command.name, *(flag in command.flags for flag in flags))


if __name__ == "__main__":
    main()
