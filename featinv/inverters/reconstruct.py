"""Reconstruct a whole data set into a folder of PNGs with a manifest; interrupted, the same call finishes the rest."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from featinv.backbones.base import Backbone
from featinv.errors import UserError
from featinv.files import run_lock, write_json
from featinv.image import load_png, resize, save_png
from featinv.inverters.base import Inverter

log = logging.getLogger(__name__)


def sample_seed(seed: int, image_id: str, sample: int) -> int:
    """The seed of one sample of one image: stable whatever else is reconstructed beside it."""
    digest = hashlib.sha256(f"{seed}/{image_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


class Items(Protocol):
    """A list of items or a map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class Reconstructions:
    """A folder of originals and their reconstructions.

    Layout: `originals/ID.png`, `samples/ID_K.png` and `manifest.json`, which names every file with its seed.

    Args:
        folder: Written by `reconstruct`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not path.is_file():
            raise UserError(f"{folder} holds no reconstructions (no manifest.json); run sample.py first.")
        self.manifest: dict[str, Any] = json.loads(path.read_text())

    @property
    def ids(self) -> list[str]:
        """Ids of the images, in the data set's order."""
        return [entry["id"] for entry in self.manifest["images"]]

    def originals(self) -> Tensor:
        """(N, 3, H, W) in [0, 1]."""
        return torch.stack([load_png(self.folder / e["original"]) for e in self.manifest["images"]])

    def samples(self, sample: int = 0) -> Tensor:
        """Sample number `sample` of every image, (N, 3, H, W) in [0, 1]."""
        return torch.stack([load_png(self.folder / e["samples"][sample]["file"]) for e in self.manifest["images"]])


def _plan(item: dict[str, Any], samples: int, seed: int) -> dict[str, Any]:
    drawn = [
        {"file": f"samples/{item['id']}_{k}.png", "seed": sample_seed(seed, item["id"], k)} for k in range(samples)
    ]
    return {"id": item["id"], "label": int(item["label"]), "original": f"originals/{item['id']}.png", "samples": drawn}


def _is_whole(path: Path) -> bool:
    try:
        load_png(path)
    except UserError:
        return False
    return True


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
) -> Reconstructions:
    """Reconstruct images from their features.

    A picture that is there and whole is kept; a missing or damaged one is made again, from the same seed.

    Args:
        inverter: Any inverter.
        backbone: Computes the features, on its own device.
        items: Data set items (image, label, id), read when they are needed.
        folder: Where the pictures go.
        samples: Reconstructions of each image.
        seed: The seed of sample k of an image follows from (seed, id, k).
        size: Originals are stored at this side, which is the inverter's.
        batch_size: Reconstructions at a time; changes the speed, not the pictures.
        about: Written into the manifest (configuration, versions).
        title: Of the progress bar.

    Raises:
        UserError: If the folder holds reconstructions with other settings, or the disk is full.
    """
    folder, device = Path(folder), backbone.mean.device
    manifest: dict[str, Any] = {"about": about or {}, "seed": seed, "images": []}
    path = folder / "manifest.json"
    with run_lock(folder):
        if path.is_file():
            before = json.loads(path.read_text())
            if before["about"] != json.loads(json.dumps(manifest["about"], default=str)) or before["seed"] != seed:
                raise UserError(f"{folder} holds reconstructions with other settings; choose another folder.")
        for i in range(len(items)):
            item = items[i]
            entry = _plan(item, samples, seed)
            manifest["images"].append(entry)
            if not _is_whole(folder / entry["original"]):
                save_png(folder / entry["original"], _at_size(item["image"], size))
        write_json(path, manifest)
        todo = [
            (i, k)
            for i, entry in enumerate(manifest["images"])
            for k in range(samples)
            if not _is_whole(folder / entry["samples"][k]["file"])
        ]
        if len(todo) < samples * len(items):
            log.info(
                "%d of %d reconstructions are already there",
                samples * len(items) - len(todo),
                samples * len(items),
            )
        with tqdm(total=len(todo), desc=title, unit="img", disable=not todo) as bar:
            for start in range(0, len(todo), batch_size):
                part = todo[start : start + batch_size]
                read = {i: items[i]["image"] for i in {i for i, _ in part}}
                images = torch.stack([read[i] for i, _ in part])
                seeds = [manifest["images"][i]["samples"][k]["seed"] for i, k in part]
                with torch.no_grad():
                    features = backbone(images.to(device))
                for (i, k), image in zip(part, inverter.invert(features, seeds=seeds), strict=True):
                    save_png(folder / manifest["images"][i]["samples"][k]["file"], image)
                bar.update(len(part))
    return Reconstructions(folder)


def _at_size(image: Tensor, size: int) -> Tensor:
    return resize(image[None], size)[0].clamp(0, 1)
