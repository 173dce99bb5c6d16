"""Reconstruct a whole data set into a folder of PNGs with a manifest; interrupted, the same call finishes the rest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from featinv.backbones.base import Backbone
from featinv.config import differences
from featinv.data.listing import identity
from featinv.errors import UserError
from featinv.files import read_json, run_lock, write_json
from featinv.image import load_png, resize, save_png
from featinv.inverters.base import Inverter
from featinv.inverters.described import describe
from featinv.processes import first_does, own_share, process_rank, wait_for_all

log = logging.getLogger(__name__)

_DESCRIBED = ("inverter", "features_of")
_COMPARED = 16  # originals that are read again on resuming, to see that they are still the same


def sample_seed(seed: int, image_id: str, sample: int) -> int:
    """The seed of one sample of one image: stable whatever else is reconstructed beside it."""
    digest = hashlib.sha256(f"{seed}/{image_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


class Items(Protocol):
    """A list of items or a map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class Reconstructions:
    """A folder of originals and their reconstructions; pictures are read when they are asked for.

    Layout: `originals/ID.png` (or another folder that the manifest names), `samples/ID_K.png` and `manifest.json`,
    which names every file with its seed.

    Args:
        folder: Written by `reconstruct`.

    Raises:
        UserError: If there is no manifest, or a damaged one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not path.is_file():
            raise UserError(f"{folder} holds no reconstructions (no manifest.json); run sample.py first.")
        self.manifest: dict[str, Any] = read_json(path)

    @property
    def ids(self) -> list[str]:
        """Ids of the images, in the data set's order."""
        return [entry["id"] for entry in self.manifest["images"]]

    @property
    def samples_each(self) -> int:
        """Reconstructions of each image."""
        return len(self.manifest["images"][0]["samples"]) if self.manifest["images"] else 0

    def originals(self, indices: Sequence[int] | None = None) -> Tensor:
        """Originals at the given positions, or all: (N, 3, H, W) in [0, 1]."""
        return self._load([entry["original"] for entry in self._entries(indices)])

    def samples(self, sample: int = 0, indices: Sequence[int] | None = None) -> Tensor:
        """Sample number `sample` at the given positions, or of every image: (N, 3, H, W) in [0, 1]."""
        return self._load([entry["samples"][sample]["file"] for entry in self._entries(indices)])

    def _entries(self, indices: Sequence[int] | None) -> list[dict[str, Any]]:
        entries = self.manifest["images"]
        return entries if indices is None else [entries[i] for i in indices]

    def _load(self, names: list[str]) -> Tensor:
        return torch.stack([load_png(self.folder / name) for name in names])


def is_whole(path: Path, size: int | None = None) -> bool:
    """Whether a PNG is there, passes its checksums and decodes (to `size` pixels a side)."""
    try:
        with Image.open(path) as file:
            file.verify()  # decoding alone does not look at the checksums
        shape = load_png(path).shape
    except (UserError, OSError, SyntaxError):
        return False
    return size is None or tuple(shape[1:]) == (size, size)


def is_stored(image: Tensor, stored: Tensor) -> bool:
    """Whether a picture is the stored one, up to 8 bits and what another machine computes (an attack) otherwise."""
    return image.shape == stored.shape and float((image - stored).abs().mean()) < 0.03


def _plan(image_id: str, label: int, samples: int, seed: int, original: str) -> dict[str, Any]:
    drawn = [{"file": f"samples/{image_id}_{k}.png", "seed": sample_seed(seed, image_id, k)} for k in range(samples)]
    return {"id": image_id, "label": label, "original": f"{original}/{image_id}.png", "samples": drawn}


def _prepare(
    items: Items, folder: Path, samples: int, seed: int, size: int, about: dict[str, Any], originals: Path | None
) -> dict[str, Any]:
    """Check the folder, write the originals (unless they lie elsewhere) and the manifest."""
    path = folder / "manifest.json"
    manifest: dict[str, Any] = {"about": about, "seed": seed, "images": []}
    if path.is_file():
        made, now = ({"seed": x["seed"], **x["about"]} for x in (read_json(path), json.loads(json.dumps(manifest))))
        if not set(_DESCRIBED) & set(made):
            log.warning("%s does not say which inverter drew it; it is taken for the same.", path)
            now = {name: value for name, value in now.items() if name not in _DESCRIBED}
        if changed := differences(made, now):
            raise UserError(
                f"{folder} holds reconstructions with other settings ({'; '.join(changed[:3])}); choose another folder "
                "by out=FOLDER."
            )
    where = "originals" if originals is None else os.path.relpath(originals, folder)
    for i in range(len(items)):
        entry = _plan(*identity(items, i), samples, seed, where)
        manifest["images"].append(entry)
        stored = folder / entry["original"]
        if originals is not None:
            continue
        if not is_whole(stored, size):
            save_png(stored, _at_size(items[i]["image"], size))
        elif i < _COMPARED and not is_stored(_at_size(items[i]["image"], size), load_png(stored)):
            raise UserError(f"{folder} holds other pictures of the same names; choose another folder by out=FOLDER.")
    write_json(path, manifest)
    return manifest


def _missing(manifest: dict[str, Any], folder: Path, size: int) -> set[tuple[int, int]]:
    """(image, sample) of the pictures that are not there or not whole."""
    return {
        (i, k)
        for i, entry in enumerate(manifest["images"])
        for k, sample in enumerate(entry["samples"])
        if not is_whole(folder / sample["file"], size)
    }


def reconstruct(
    inverter: Inverter,
    backbone: Backbone,
    items: Items,
    folder: str | Path,
    *,
    samples: int = 1,
    seed: int = 0,
    size: int = 64,
    batch_size: int = 32,
    about: dict[str, Any] | None = None,
    title: str = "reconstructing",
    originals: Path | None = None,
) -> Reconstructions:
    """Reconstruct images from their features.

    A picture that is there and whole is kept; a missing or damaged one is made again, from the same seed and in the
    same batch, so that it comes out bit for bit as before. Under torchrun the processes share the batches.

    Args:
        inverter: Any inverter.
        backbone: Computes the features, on its own device.
        items: Data set items (image, label, id), read when they are needed.
        folder: Where the pictures go.
        samples: Reconstructions of each image.
        seed: The seed of sample k of an image follows from (seed, id, k).
        size: Originals are stored at this side, which is the inverter's.
        batch_size: Reconstructions at a time; changes the speed, and the pictures by rounding only.
        about: Written into the manifest (configuration, versions), beside what `describe` says of both networks.
        title: Of the progress bar.
        originals: A folder that holds them already, as ID.png; by default they are written into `folder`.

    Raises:
        UserError: If the folder holds reconstructions with other settings or of other pictures, a picture is not
            finite, or the disk is full.
    """
    folder = Path(folder)
    with contextlib.ExitStack() as held:
        first_does(lambda: held.enter_context(run_lock(folder)))
        about = {**(about or {}), **dict(zip(_DESCRIBED, map(describe, (inverter, backbone)), strict=True))}
        manifest = first_does(lambda: _prepare(items, folder, samples, seed, size, about, originals))
        todo = first_does(lambda: _missing(manifest, folder, size))
        if len(todo) < samples * len(items):
            there = samples * len(items) - len(todo)
            log.info("%d of %d reconstructions are already there", there, samples * len(items))
        # Batches stay those of an uninterrupted run: rounding depends on what is computed together.
        every = [(i, k) for i in range(len(items)) for k in range(samples)]
        whole = [every[start : start + batch_size] for start in range(0, len(every), batch_size)]
        batches = own_share([batch for batch in whole if todo.intersection(batch)])
        quiet = not batches or process_rank()[0] > 0
        with tqdm(total=sum(map(len, batches)), desc=title, unit="img", disable=quiet) as bar:
            for batch in batches:
                _make(inverter, backbone, items, manifest, batch, todo, folder)
                bar.update(len(batch))
        wait_for_all()
    return Reconstructions(folder)


def _make(
    inverter: Inverter,
    backbone: Backbone,
    items: Items,
    manifest: dict[str, Any],
    batch: list[tuple[int, int]],
    todo: set[tuple[int, int]],
    folder: Path,
) -> None:
    """Draw one batch of (image, sample) and store those of it that are in `todo`."""
    read = {i: items[i]["image"] for i in {i for i, _ in batch}}
    images = torch.stack([read[i] for i, _ in batch])
    drawn = [manifest["images"][i]["samples"][k] for i, k in batch]
    with torch.no_grad():
        features = backbone(images.to(backbone.mean.device))
    pictures = inverter.invert(features, seeds=[sample["seed"] for sample in drawn])
    for place, sample, picture in zip(batch, drawn, pictures, strict=True):
        if place not in todo:
            continue
        if not picture.isfinite().all():
            raise UserError(f"{sample['file']} (seed {sample['seed']}) is not finite; the inverter has diverged.")
        save_png(folder / sample["file"], picture)


def _at_size(image: Tensor, size: int) -> Tensor:
    return resize(image[None], size)[0].clamp(0, 1)
