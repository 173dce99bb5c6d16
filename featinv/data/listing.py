"""Who an item is, without reading its picture where the data set knows."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Subset


def identity(items: Any, index: int) -> tuple[str, int]:
    """Id and label of an item.

    Folders and shards keep them in a list (`entries`), which saves decoding the picture.

    Args:
        items: A map-style data set, a `Subset` of one, or a list of items.
        index: Which item.
    """
    if isinstance(items, Subset):
        return identity(items.dataset, items.indices[index])
    entries = getattr(items, "entries", None)
    if entries is not None:
        return entries[index].id, int(entries[index].label)
    item = items[index]
    return str(item["id"]), int(item["label"])


def knows_identities(items: Any) -> bool:
    """Whether `identity` reads no picture."""
    return knows_identities(items.dataset) if isinstance(items, Subset) else hasattr(items, "entries")
