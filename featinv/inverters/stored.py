"""A data set's images as files: read, rendered or cropped once, then compared with any number of reconstructions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from featinv.data.image_list import Entry
from featinv.data.listing import identity, knows_identities
from featinv.errors import UserError
from featinv.files import read_json, write_json
from featinv.image import load_png, save_png
from featinv.inverters.reconstruct import Items, is_stored, is_whole


def store_items(items: Items, folder: str | Path) -> None:
    """Write every image as ID.png, losslessly but for 8 bits, and items.json with ids, labels and factors.

    Files that are there and whole are kept, where the data set knows its ids without reading its pictures.

    Raises:
        UserError: If the folder holds other pictures under the same names.
    """
    folder, listing, cheap = Path(folder), [], knows_identities(items)
    for i in tqdm(range(len(items)), desc="originals", unit="img", disable=len(items) < 100):
        item = items[i] if i == 0 or not cheap else None
        image_id, label = identity(items, i) if item is None else (str(item["id"]), int(item["label"]))
        path = folder / f"{image_id}.png"
        if not is_whole(path):
            item = items[i] if item is None else item
            save_png(path, item["image"])
        elif item is not None and not is_stored(item["image"], load_png(path)):
            raise UserError(f"{folder} holds other pictures of the same names; choose another folder.")
        factors = None
        if item is not None and "factors" in item:
            factors = [None if math.isnan(f) else f for f in item["factors"].tolist()]
        listing.append({"id": image_id, "label": label, "factors": factors})
    write_json(folder / "items.json", listing)


class StoredItems(Dataset[dict[str, Any]]):
    """What `store_items` wrote, as a map-style data set.

    Args:
        folder: The folder.

    Attributes:
        entries: Id, label and file of each picture.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.listing: list[dict[str, Any]] = read_json(self.folder / "items.json")
        self.entries = [Entry(e["id"], e["label"], str(self.folder / f"{e['id']}.png")) for e in self.listing]

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[index]
        return {"image": load_png(str(entry.source)), "label": entry.label, "id": entry.id}

    @property
    def ids(self) -> list[str]:
        """Ids of the images."""
        return [entry.id for entry in self.entries]

    @property
    def labels(self) -> Tensor:
        """(N,), -1 where unknown."""
        return torch.tensor([entry.label for entry in self.entries])

    @property
    def factors(self) -> Tensor | None:
        """(N, F), NaN where a factor does not apply; None if the data set has none."""
        if any(entry["factors"] is None for entry in self.listing):
            return None
        rows = [[math.nan if f is None else f for f in entry["factors"]] for entry in self.listing]
        return torch.tensor(rows)
