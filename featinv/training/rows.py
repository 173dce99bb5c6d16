"""From a configuration to the rows that training sees: cached latents and features, or images as they come."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from featinv.config import differences
from featinv.data import load_part
from featinv.data.datamodule import collate, tell_epoch
from featinv.data.image_list import write_skipped
from featinv.diffusion.lift import training_first_stage
from featinv.errors import UserError
from featinv.files import write_text
from featinv.inverters.build import take_over
from featinv.inverters.fingerprints import fingerprint, first_stage_fingerprint
from featinv.training.batches import BatchedRows, Epochs
from featinv.training.cache import build_cache
from featinv.training.module import InversionModule
from featinv.training.runner import last_checkpoint

log = logging.getLogger(__name__)
FREE = {"num_workers", "checkpoint_every", "probe_every", "probe_images", "cache_root"}
FREE |= {"devices", "strategy", "accelerator", "compile"}
"""Settings under `training` that may differ between a run and its continuation: the weights do not depend on them."""


def keep_config(config: DictConfig, folder: Path, changed: bool = False, stages: Sequence[str] = (".",)) -> None:
    """Write `folder`/config.yaml; a run that has begun must go on with the configuration it began with.

    Args:
        config: The run's configuration.
        folder: The run's folder.
        changed: Go on although the configuration has changed.
        stages: Folders in it in which there may be checkpoints; it has begun if there is one.

    Raises:
        UserError: If it has changed and `changed` is not set; the differences are listed. If `accumulate` has.
    """
    path = folder / "config.yaml"
    if path.is_file() and any(last_checkpoint(folder / stage) is not None for stage in stages):
        free = {f"training.{name}" for name in FREE}
        changes = [x for x in differences(OmegaConf.load(path), config) if x.partition(":")[0] not in free]  # type: ignore[arg-type]
        if changes and not changed:
            raise UserError(
                f"the run in {folder} was begun with other settings ({'; '.join(changes)}); choose another out=FOLDER, "
                "or go on with --changed."
            )
        if any(change.startswith("training.accumulate:") for change in changes):
            raise UserError(
                "training.accumulate counts the batches of a step, and cannot change within a run: begin another "
                f"out=FOLDER with training.start={folder}."
            )
        for change in changes:
            log.warning("going on with a changed setting: %s", change)
    write_text(path, OmegaConf.to_yaml(config, resolve=True))


def training_rows(config: DictConfig, module: InversionModule, folder: Path) -> Dataset[dict[str, Any]]:
    """The training set of `config.data`: indexed with a list of rows it returns a batch; or a stream.

    With `training.cache`, features and latents (images, if there is no first stage) are computed once, or found from an
    earlier run, which saves the first stage and the backbone in every step; random crops and flips are then those of
    the first `training.cache_epochs` epochs. A lift reads no latents, so the images are kept in their place.

    Unreadable images are named in `folder`/skipped.json.

    Raises:
        UserError: If the disk is too small, or the images have another size than the inverter draws.
    """
    check_size(stated_size(config), module.inverter.size)
    dataset, settings = load_part(config.data, "train"), config.training
    write_skipped(dataset, folder / "skipped.json")
    if isinstance(dataset, IterableDataset):
        if settings.cache:
            log.warning("streamed images are not cached: latents and features are computed in every step")
        return dataset
    check_size(dataset[0]["image"].shape[-1], module.inverter.size)
    if not settings.cache:
        return BatchedRows(dataset)
    first_stage = training_first_stage(module.inverter)
    description = {
        "data": OmegaConf.to_container(config.data.params, resolve=True)["train"],  # type: ignore[index,call-overload]
        "first_stage": None
        if first_stage is None
        else [first_stage_fingerprint(first_stage), *first_stage.latent_scale()],
        "backbone": OmegaConf.to_container(config.backbone, resolve=True),
        "weights": fingerprint(*module.backbone.state_dict().values()),  # a file may have been replaced by another
        "layer": module.backbone.layer,
    }
    epochs = settings.get("cache_epochs", 1)
    if epochs != 1:
        dataset, description = Epochs(dataset, epochs), description | {"epochs": epochs}
    workers = OmegaConf.select(config, "data.params.num_workers", default=0)
    root = settings.cache_root
    return build_cache(root, description, dataset, first_stage, module.backbone, num_workers=workers)


def stated_size(config: DictConfig) -> int | None:
    """The side of the training images in pixels, where the configuration says it."""
    return OmegaConf.select(config, "data.params.train.params.size")


def check_size(found: int | None, size: int) -> None:
    """Raise UserError if training images are known to have a side of `found` pixels, and an inverter draws another."""
    if found not in (None, size):
        raise UserError(
            f"data gives pictures of {found} px, the inverter draws {size}: set data.params.train.params.size (with "
            "{target, params} in the place of a path, if data.params.train is one)."
        )


def held_out_images(config: DictConfig, count: int) -> Tensor:
    """The first `count` validation images, (N, 3, H, W) in [0, 1].

    Raises:
        UserError: If there are none, or they are streamed.
    """
    if count < 1:
        raise UserError(f"training.probe_images must be at least 1, not {count}.")
    images = load_part(config.data, "val")
    if images is None:
        raise UserError("data.params.val is missing: training reports the feature cosine of held-out images.")
    if isinstance(images, IterableDataset):
        raise UserError("data.params.val is a stream, which cannot be looked up; take indexed shards (IndexedShards).")
    return torch.stack([images[i]["image"] for i in range(min(count, len(images)))])


@contextlib.contextmanager
def on_device(module: InversionModule, device: torch.device) -> Iterator[None]:
    """Let the backbone and the first stage compute on a device; afterwards they are back, for Lightning to move."""
    parts = module.backbone, training_first_stage(module.inverter)
    _move(parts, device)
    try:
        yield
    finally:
        _move(parts, torch.device("cpu"))


def _move(parts: Iterable[nn.Module | None], device: torch.device) -> None:
    for part in parts:
        if part is not None:
            part.to(device)


@torch.no_grad()
def prepare(module: InversionModule, dataset: Dataset[dict[str, Any]], images: int, folder: Path) -> None:
    """Let the inverter fit what it solves in closed form, from the first `images` rows, unless the run has begun.

    Latents are read from the cache, but computed only for an encoder with a linear estimate: no other asks for them.
    Every process fits on the same rows; of a stream on those that a single process would see first.

    Raises:
        UserError: If there are none.
    """
    if not images or last_checkpoint(folder) is not None:
        return
    features, latents, first_stage = [], [], training_first_stage(module.inverter)
    asked = getattr(getattr(module.inverter, "encoder", None), "linear", None) is not None
    device = module.backbone.mean.device
    read = _first_of_stream if isinstance(dataset, IterableDataset) else _first_rows
    for batch in read(dataset, images):
        if "image" in batch:
            batch["image"] = batch["image"].to(device)
        features.append(module.features_of(batch).cpu())
        if "latents" in batch:
            latents.append(batch["latents"])
        elif first_stage is not None and asked:
            latents.append(first_stage.encode(batch["image"]).cpu())
    if not features:
        raise UserError("there are no training images.")
    log.info("fitting whitening and linear estimate on %d images", sum(map(len, features)))
    module.inverter.prepare(torch.cat(features), torch.cat(latents) if latents else None)


def _first_rows(dataset: Any, count: int, batch_size: int = 64) -> Iterator[dict[str, Any]]:
    """Batches of the first `count` rows, or of all if there are fewer."""
    total = min(count, len(dataset))
    for start in range(0, total, batch_size):
        yield dataset[list(range(start, min(start + batch_size, total)))]


def _first_of_stream(stream: Any, count: int, batch_size: int = 64) -> Iterator[dict[str, Any]]:
    """Batches of the first `count` items, or of all if there are fewer, the same ones in every process."""
    with _alone():
        tell_epoch(stream, 0)
        items = itertools.islice(stream, count)
        while part := list(itertools.islice(items, batch_size)):
            yield collate(part)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Within the block, which is before the processes have joined, streams take this one for the only one."""
    kept = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def start_from(module: InversionModule, name_or_path: str | None, folder: Path) -> None:
    """Begin with the weights of another inverter where `training.start` names one, unless the run has begun."""
    if not name_or_path or last_checkpoint(folder) is not None:
        return
    taken, fresh = take_over(module.inverter, name_or_path)
    module.restart_average()
    log.info("from %s: %s; new: %s", name_or_path, ", ".join(taken), ", ".join(fresh) or "nothing")
