"""Train a small prior from scratch: its first stage, then its UNet. Interrupted, the same command goes on.

python -m tools.train_prior scenes64
python -m tools.train_prior scenes64 first_stage.module.params.max_steps=100 out=runs/quick
python -m tools.train_prior scenes64 start=scenes64 first_stage.module=null unet.module=null out=runs/decoder
                                                                             the bundled prior's decoder goes on
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from featinv.backbones.base import Backbone
from featinv.checkpoint import read_header
from featinv.cli import split_out
from featinv.config import CONFIG_ROOT, instantiate, load_config
from featinv.data.memory import InMemoryImages
from featinv.diffusion.controlled_unet import unconditional
from featinv.diffusion.first_stage import Finish, FirstStage, normalise_latents
from featinv.diffusion.loss import DiffusionLoss
from featinv.diffusion.prior import DiffusionPrior, load_prior
from featinv.diffusion.samplers import sample
from featinv.errors import UserError, exit_on_user_error
from featinv.files import write_json
from featinv.image import make_grid, save_png, seeded_noise
from featinv.processes import is_first_process
from featinv.training.rows import keep_config
from featinv.training.runner import fit, hold_run, last_checkpoint

STAGES = {"module": "first_stage", "finishing": "finish", "polish": "decoder"}
"""Stages of the first stage's training, and the folders of their checkpoints."""


class Latents:
    """The latents of all images, with the interface of a batch-indexed data set."""

    def __init__(self, first_stage: FirstStage, images: InMemoryImages):
        with torch.no_grad():
            parts = [first_stage.encode(images[range(i, min(i + 64, len(images)))]["image"]) for i in _starts(images)]
        self.latents = torch.cat(parts)

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        return {"latents": self.latents[[row % len(self) for row in rows]]}


def _starts(images: InMemoryImages) -> range:
    return range(0, len(images), 64)


def _plain(node: Any) -> dict[str, Any]:
    return OmegaConf.to_container(node, resolve=True)  # type: ignore[return-value]


@torch.no_grad()
def judge_first_stage(first_stage: FirstStage, backbone: Backbone, images: Tensor) -> tuple[dict[str, float], Tensor]:
    """PSNR in dB and feature cosine of the round trip, and the floor of the cosine (shuffled images)."""
    again = torch.cat([first_stage.decode(first_stage.encode(part)) for part in images.split(64)])
    features, other = (torch.cat([backbone(p).flatten(1) for p in x.split(64)]) for x in (images, again))
    psnr = -10 * (again - images).square().mean((1, 2, 3)).log10()
    figures = {
        "psnr": float(psnr.mean()),
        "cosine": float(F.cosine_similarity(features, other).mean()),
        "floor": float(F.cosine_similarity(features, features.roll(1, 0)).mean()),
        "images": len(images),
    }
    return figures, again


def new_first_stage(config: DictConfig, images: Tensor) -> FirstStage:
    """Build the first stage and fit its linear part; with `config.start`, near the latents of that prior.

    Without `first_stage.module` it is that of `config.start`, with a new finish where that one has none; only
    `first_stage.finishing` and `first_stage.polish` train it further.
    """
    node = config.first_stage
    torch.manual_seed(0)
    finish = Finish(**_plain(node.finish)) if node.get("finish") else None
    if not node.get("module"):
        first_stage = load_prior(config.start).first_stage
        first_stage.finish = first_stage.finish or finish
        return first_stage
    first_stage = FirstStage(AutoencoderKL(**_plain(node.vae)), node.patch_size, node.shortcut, finish)
    start = load_prior(config.start).first_stage if config.get("start") else None
    if start is not None:
        copy_weights(first_stage.vae, start.vae, "first_stage.vae")
    if first_stage.shortcut is not None and start is not None and start.shortcut is not None:
        with torch.no_grad():
            latents = torch.cat([start.distribution(part).mean for part in images.split(64)])
        first_stage.shortcut.fit_like(images, latents)
    elif first_stage.shortcut is not None:
        first_stage.shortcut.fit(images)
    return first_stage


def check_start(config: DictConfig) -> None:
    """Raise UserError if a part is neither trained nor that of another prior, or the schedule cannot be trained on."""
    for part in ("first_stage", "unet"):
        if not config[part].get("module") and not config.get("start"):
            raise UserError(f"without {part}.module it must be another prior's: name that one in `start`.")
    if config.unet.get("module"):
        DiffusionLoss(_schedule(config))  # which would refuse it only after the first stage's hours


def _schedule(config: DictConfig) -> DDPMScheduler:
    return DDPMScheduler(**_plain(config.unet.scheduler))


def copy_weights(part: nn.Module, other: nn.Module, name: str) -> None:
    """Copy the weights of `other`, a network of the same shape, into `part`; otherwise raise UserError."""
    own, given = part.state_dict(), other.state_dict()
    if differing := [key for key in own if key not in given or own[key].shape != given[key].shape]:
        raise UserError(
            f"{name} differs from that of `start` in {differing[0]!r}; leave `start` out, or give it equal sizes."
        )
    part.load_state_dict({key: given[key] for key in own})


def check_order(config: DictConfig, out: Path, stage: str, max_steps: int) -> None:
    """Raise UserError if a stage has steps to go and later ones have begun, whose checkpoints would undo them.

    They hold the whole first stage as it was; and a UNet knows only the latents that it was trained on.
    """
    last = last_checkpoint(out / STAGES[stage])
    if last is not None and read_header(last)["global_step"] >= max_steps:
        return
    names = list(STAGES)
    later = [STAGES[name] for name in names[names.index(stage) + 1 :] if config.first_stage.get(name)]
    if stage == "module" and config.unet.get("module"):
        later.append("unet")
    if begun := [str(out / name) for name in later if last_checkpoint(out / name) is not None]:
        raise UserError(
            f"first_stage.{stage} has steps to go, but what comes after it was trained without them: delete "
            f"{' and '.join(begun)}, or choose another out=FOLDER."
        )


def train_first_stage(config: DictConfig, images: InMemoryImages, held_out: Tensor, out: Path) -> FirstStage:
    """Train the autoencoder and write its figures and a grid."""
    backbone = instantiate(config.backbone, where="backbone")
    node = config.first_stage
    first_stage = new_first_stage(config, images[range(min(3000, len(images)))]["image"])
    started = time.time()
    for stage, folder in STAGES.items():
        if node.get(stage):
            parts = {"first_stage": first_stage, "backbone": backbone}
            module = instantiate(node[stage], where=f"first_stage.{stage}", **parts)
            check_order(config, out, stage, module.max_steps)
            fit(module, images, out / folder, max_steps=module.max_steps, batch_size=node.batch_size)
    first_stage.eval().requires_grad_(False)
    if node.get("module"):  # otherwise its latents stay what a UNet and branches have learned
        normalise_latents(first_stage, images[range(min(2000, len(images)))]["image"])
    if is_first_process():
        figures, again = judge_first_stage(first_stage, backbone, held_out)
        write_json(out / "first_stage.json", figures | {"minutes": (time.time() - started) / 60})
        save_png(out / "first_stage.png", make_grid([held_out[:10], again[:10]], ["original", "round trip"]))
        print("first stage, held out:", json.dumps(figures))
    return first_stage


def train_unet(config: DictConfig, first_stage: FirstStage, images: InMemoryImages, out: Path) -> DiffusionPrior:
    """Train the UNet on the latents and write samples; without `unet.module` it is that of `config.start`."""
    if not config.unet.get("module"):
        prior = load_prior(config.start)
        prior.first_stage = first_stage
        write_prior(prior, out)
        return prior
    torch.manual_seed(1)
    unet = UNet2DConditionModel(**_plain(config.unet.config))
    if config.get("start"):
        copy_weights(unet, load_prior(config.start).unet, "unet")
    # Scenes have no captions: one token of zeros stands for every prompt.
    text = {name: torch.zeros(1, 1, unet.config.cross_attention_dim) for name in ("prompt", "null")}
    prior = DiffusionPrior(first_stage, unet, _schedule(config), text, config.size)
    module = instantiate(config.unet.module, where="unet.module", prior=prior)
    latents = Latents(first_stage, images)
    fit(module, latents, out / "unet", max_steps=module.max_steps, batch_size=config.unet.batch_size)  # type: ignore[arg-type]
    with module.ema.applied():
        write_prior(prior, out)
    return prior


def write_prior(prior: DiffusionPrior, out: Path) -> None:
    """Keep a finished prior, in half precision, and a grid of its samples; the first process does."""
    if not is_first_process():
        return
    save_png(out / "samples.png", make_grid(list(draw(prior, 30).split(10))))
    prior.save_pretrained(out / "prior", dtype=torch.float16)


def draw(prior: DiffusionPrior, n: int, num_inference_steps: int = 20) -> Tensor:
    """n unconditional samples (n, 3, H, W) with seeds 0 .. n - 1."""
    prior.freeze()
    noise = seeded_noise(range(n), prior.latent_shape)
    latents = sample(
        lambda x, t: unconditional(prior.unet, prior.text["null"], x, t),
        noise,
        prior.scheduler,
        num_inference_steps=num_inference_steps,
    )
    return prior.first_stage.decode(latents)


@exit_on_user_error
def main() -> None:
    """Parse, train, report."""
    names = ", ".join(sorted(p.stem for p in (CONFIG_ROOT / "prior").glob("*.yaml")))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prior", help=f"a name in configs/prior ({names}) or a YAML file")
    parser.add_argument("overrides", nargs="*", help="key=value; out=FOLDER chooses where the run goes")
    parser.add_argument("--changed", action="store_true", help="go on with a run that was begun with other settings")
    arguments = parser.parse_intermixed_args()  # --changed may stand anywhere
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    overrides, chosen = split_out(arguments.overrides)
    path = CONFIG_ROOT / "prior" / f"{arguments.prior}.yaml"
    if not path.is_file() and not Path(arguments.prior).is_file():
        raise UserError(f"no prior {arguments.prior!r} in configs/prior; there are: {names}.")
    config = load_config(path if path.is_file() else arguments.prior, overrides)
    check_start(config)
    out = chosen or Path(f"runs/prior_{Path(arguments.prior).stem}")
    pl.seed_everything(0)
    with hold_run(out):
        keep_config(config, out, arguments.changed, [*STAGES.values(), "unet"])
        images = InMemoryImages(instantiate(config.data, where="data"), num_workers=2)
        validation = InMemoryImages(instantiate(config.validation, where="validation"))
        first_stage = train_first_stage(config, images, validation[range(len(validation))]["image"], out)
        train_unet(config, first_stage, images, out)
    if is_first_process():
        print(f"prior in {out / 'prior'}; samples in {out / 'samples.png'}")


if __name__ == "__main__":
    main()
