"""Latents and features computed once, kept in memory-mapped files, resumed where an interrupted run stopped."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from featinv.backbones.base import Backbone
from featinv.diffusion.first_stage import FirstStage
from featinv.errors import UserError
from featinv.files import given_path, read_json, run_lock, write_json
from featinv.image import seeded_noise, to_uint8

log = logging.getLogger(__name__)


class FeatureCache(Dataset[dict[str, Tensor]]):
    """Cached latents (posterior mean, standard deviation) or images, and features, read batch by batch.

    Indexed with a list of rows it returns a whole batch: latents drawn anew from the posterior each time, features in
    float32. Use it with a batch sampler and `batch_size=None`.

    Args:
        folder: Written by `build_cache`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        paths = sorted(self.folder.glob("*.npy"))
        self.arrays = {path.stem: np.load(path, mmap_mode="r") for path in paths}

    def __len__(self) -> int:
        return len(self.arrays["features"])

    def __getitem__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        index = np.asarray(rows) % len(self)
        found = {name: torch.from_numpy(array[index]).float() for name, array in self.arrays.items()}
        if "image" in found:
            return {"image": found["image"] / 255, "features": found["features"]}
        mean, std, features = found["mean"], found["std"], found["features"]
        # Row by row, so that a row's latents are the same however many processes share its batch.
        noise = seeded_noise([int(row) for row in rows], mean.shape[1:])
        return {"latents": mean + std * noise, "features": features}


def cache_key(description: dict[str, Any]) -> str:
    """Hash of everything the cached values depend on."""
    return hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _dtype(name: str) -> type[np.generic]:
    return np.uint8 if name == "image" else np.float16


def cache_bytes(images: int, shapes: Mapping[str, Sequence[int]]) -> int:
    """Size on disk in bytes: pictures as bytes, latents and features in half precision."""
    return images * sum(int(np.prod(shape)) * np.dtype(_dtype(name)).itemsize for name, shape in shapes.items())


def build_cache(
    root: str | Path,
    description: dict[str, Any],
    dataset: Dataset[dict[str, Any]],
    first_stage: FirstStage | None,
    backbone: Backbone,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> FeatureCache:
    """Compute latents and features of a whole data set, or go on where an earlier call was interrupted.

    Args:
        root: Parent folder; the cache lies in a folder named by the hash of `description`.
        description: Configuration of data set, prior and backbone.
        dataset: Map-style; its "image" items are (3, H, W) in [0, 1].
        first_stage: Makes the latents; None keeps the images themselves, as bytes.
        backbone: Makes the features.
        batch_size: Images at a time.
        num_workers: Processes that read or render images.
        progress: Called as progress(done, total) after each batch, beside the progress bar.

    Raises:
        UserError: If the disk is too small for it. (Another process that writes the same cache is waited for.)
    """
    total = len(dataset)  # type: ignore[arg-type]
    folder = given_path(root) / cache_key(description)
    done_file = folder / "cache.json"
    folder.mkdir(parents=True, exist_ok=True)
    with run_lock(folder, wait=True):
        shapes = _shapes(dataset[0]["image"].shape, first_stage, backbone)
        files = {folder / f"{name}.npy": (total, *shape) for name, shape in shapes.items()}
        done = read_json(done_file)["done"] if done_file.is_file() else 0
        if not (done and all(_fits(path, shape) for path, shape in files.items())):
            done = 0
            for path in (done_file, *files):  # not overwritten: a run that reads them keeps what it has mapped
                path.unlink(missing_ok=True)
            size = cache_bytes(total, shapes)
            _check_space(folder, size)
            log.info("caching latents and features of %d images: %.2f GB in %s", total, size / 1e9, folder)
            _reserve(files)
        if done >= total:
            return FeatureCache(folder)
        arrays = {path.stem: np.load(path, mmap_mode="r+") for path in files}
        loader: DataLoader[dict[str, Any]] = DataLoader(
            Subset(dataset, range(done, total)),
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=_stack_images,
        )
        with tqdm(total=total, initial=done, desc="caching latents and features", unit="img") as bar:
            for number, images in enumerate(loader):
                rows = slice(done, done + len(images))
                for name, value in _encode(images, first_stage, backbone).items():
                    arrays[name][rows] = value
                done = rows.stop
                bar.update(len(images))
                if number % 16 == 15 or done == total:
                    for array in arrays.values():
                        array.flush()
                    write_json(done_file, {"done": done, "total": total, "description": description})
                if progress is not None:
                    progress(done, total)
    return FeatureCache(folder)


@torch.no_grad()
def _encode(images: Tensor, first_stage: FirstStage | None, backbone: Backbone) -> dict[str, np.ndarray]:
    images = images.to(backbone.mean.device)
    features = backbone(images).half().cpu().numpy()
    if first_stage is None:
        return {"features": features, "image": to_uint8(images).cpu().numpy()}
    mean, std = first_stage.posterior(images)
    return {"features": features, "mean": mean.half().cpu().numpy(), "std": std.half().cpu().numpy()}


def _stack_images(items: list[dict[str, Any]]) -> Tensor:
    return torch.stack([item["image"] for item in items])


def _shapes(picture: Sequence[int], first_stage: FirstStage | None, backbone: Backbone) -> dict[str, tuple[int, ...]]:
    """Shape of one row of each file, for pictures (3, H, W)."""
    spec = backbone.spec
    shapes: dict[str, tuple[int, ...]] = {"features": (spec.channels, spec.height, spec.width)}
    if first_stage is None:
        return shapes | {"image": tuple(picture)}
    return shapes | dict.fromkeys(("mean", "std"), tuple(first_stage.latent_shape(picture[-1])))


def _fits(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether an interrupted run's file is there with all its rows."""
    try:
        return np.load(path, mmap_mode="r").shape == shape
    except (OSError, ValueError):
        return False


def _reserve(files: Mapping[Path, tuple[int, ...]]) -> None:
    """Make files of zeros that really have their space: a memory map that meets a full disk kills the process."""
    try:
        for path, shape in files.items():
            np.lib.format.open_memmap(path, mode="w+", dtype=_dtype(path.stem), shape=shape)
            with open(path, "rb+") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    except OSError as error:
        for path in files:
            path.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space, choose another training.cache_root or "
            "set training.cache=false."
        ) from error


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > 0.95 * free:
        raise UserError(
            f"the cache needs {size / 1e9:.1f} GB but {folder} has {free / 1e9:.1f} GB free; "
            "choose another folder or set training.cache=false."
        )
