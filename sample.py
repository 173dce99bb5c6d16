"""Draw images that have the features of given images.

python sample.py                                             the bundled branch, held-out scenes
python sample.py image=my.jpg samples=8                      one picture, eight samples
python sample.py inverter=photos64/efficientnet_lite0_early+refined image=my.jpg      matched to the features afterwards
python sample.py inverter=runs/convnext_base per_class=10 n=null samples=1 out=runs/val   ImageNet val, 10 a class

Writes originals/, samples/ and manifest.json (every file with its seed) and grid.png into the folder. Interrupted, the
same command makes what is missing and nothing twice; under torchrun the processes share the work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from featinv.applications.matching import MATCHING, matched, split_name
from featinv.cli import parse_command_line
from featinv.config import CONFIG_ROOT, check_count, listed
from featinv.data import load_part
from featinv.data.folders import pictures
from featinv.data.image_list import write_skipped
from featinv.data.listing import identity
from featinv.diffusion.guidance import ClassifierFreeGuidance, NoGuidance
from featinv.errors import UserError, exit_on_user_error
from featinv.image import make_grid, save_png
from featinv.inverters.build import Trained, load_trained
from featinv.inverters.reconstruct import Reconstructions, reconstruct
from featinv.processes import keep_freed_memory, own_device, process_group, process_rank
from featinv.training.precision import draw_in


def chosen_images(config: DictConfig, trained: Trained, size: int, out: Path) -> Dataset[dict[str, Any]]:
    """The images that the command line names, cropped to `size`; read when they are needed.

    Unreadable ones of a folder are left out and named in skipped.json.

    Raises:
        UserError: If there is no such picture, or it cannot be read, or a number makes no sense.
    """
    for name in ("n", "per_class"):
        check_count(name, config[name])
    if config.image is not None:
        dataset = pictures(config.image, size)
    else:
        dataset = load_part(trained.config.data, "val")
        if dataset is None:
            raise UserError(f"{config.inverter} was trained without validation images; set image=FILE_OR_FOLDER.")
    write_skipped(dataset, out / "skipped.json")
    rows = list(range(len(dataset)))  # type: ignore[arg-type]
    if config.per_class is not None:
        count: Counter[int] = Counter()
        kept = []
        for row in tqdm(rows, desc="reading labels"):
            label = identity(dataset, row)[1]
            count[label] += 1
            if count[label] <= config.per_class:
                kept.append(row)
        rows = kept
    return Subset(dataset, rows[: config.n])


def set_sampling(inverter: Any, config: DictConfig) -> None:
    """Change how an inverter samples, where the command line says so."""
    for name in ("sampler", "num_inference_steps", "strength"):
        if config[name] is not None:
            if not hasattr(inverter, name):
                raise UserError(f"{type(inverter).__name__} has no {name}.")
            setattr(inverter, name, config[name])
    own = inverter.guidance if isinstance(getattr(inverter, "guidance", None), ClassifierFreeGuidance) else None
    names = ("scale", "drop", "interval")
    changed = {name: config[f"guidance_{name}"] for name in names if config[f"guidance_{name}"] is not None}
    if "drop" in changed:
        changed["drop"] = listed(changed["drop"])
    if changed and not hasattr(inverter, "guidance"):
        raise UserError(f"{type(inverter).__name__} has no guidance.")
    if changed and own is None and "scale" not in changed:
        raise UserError(f"{config.inverter} is not guided; set guidance_scale, too.")
    if changed:
        kept = {name: getattr(own, name) for name in names} if own else {}
        guidance = ClassifierFreeGuidance(**{**kept, **changed})
        inverter.guidance = NoGuidance() if guidance.scale == 1 else guidance


def matching_params(config: DictConfig, kinds: Sequence[str]) -> dict[str, Any]:
    """Parameters of the suffixes, by their name; a sampler that was asked for holds under guidance, too.

    Raises:
        UserError: If there are some for a suffix that the inverter's name does not have.
    """
    params: dict[str, Any] = OmegaConf.to_container(config.params)  # type: ignore[assignment]
    for name in set(params) - set(kinds):
        raise UserError(
            f"params.{name}: {config.inverter} is not +{name}; there are {', '.join(f'+{x}' for x in MATCHING)}."
        )
    if config.sampler is not None:
        params["guided"] = {"sampler": config.sampler, **(params.get("guided") or {})}
    return params


def sample(config: DictConfig, out: Path) -> Reconstructions:
    """Reconstruct the chosen images into `out`."""
    name, kinds = split_name(config.inverter)
    params = matching_params(config, kinds)
    trained, device = load_trained(name), own_device()
    backbone = trained.load_backbone().to(device)
    set_sampling(trained.inverter, config)
    if isinstance(trained.inverter, torch.nn.Module):
        trained.inverter.to(device)
    precision = draw_in(trained.inverter, config.precision)
    inverter = matched(trained.inverter, backbone, kinds, params)
    size = inverter.size
    items = chosen_images(config, trained, size, out)
    settings = {str(k): v for k, v in OmegaConf.to_container(config).items() if k not in ("n", "batch_size")}  # type: ignore[union-attr]
    made = reconstruct(
        inverter,
        backbone,
        items,
        out,
        samples=config.samples,
        seed=config.seed,
        size=size,
        batch_size=config.batch_size,
        about=settings | {"precision": precision},
        title="sampling",
    )
    if process_rank()[0] == 0:
        draw_grid(made, config.samples, out / "grid.png")
    return made


def draw_grid(made: Reconstructions, samples: int, path: Path, shown: int = 16) -> None:
    """One column an image: the original above its samples."""
    chosen = range(min(shown, len(made.ids)))
    rows = [made.originals(chosen), *(made.samples(k, chosen) for k in range(samples))]
    save_png(path, make_grid(rows, ["original", *(f"sample {k + 1}" for k in range(samples))]))


@exit_on_user_error
def main() -> None:
    """Read the command line, sample."""
    command = parse_command_line(__doc__ or "", str(CONFIG_ROOT / "sample.yaml"))
    out = command.out or Path("runs/samples")
    keep_freed_memory()
    with process_group():
        made = sample(command.config, out)
    print(f"{len(made.ids)} images x {command.config.samples} samples in {out}; look at {out / 'grid.png'}")


if __name__ == "__main__":
    main()
