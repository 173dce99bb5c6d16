"""Data sets: items {"image": (3, H, W) in [0, 1], "label": int, "id": str, optional "factors": (F,)}."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from featinv.errors import UserError

# Dotted paths, so that a data set's libraries are imported only with it.
DATASETS = {
    "scenes": "featinv.data.scenes.ScenesDataset",
    "imagenet": "featinv.data.folders.ImageNetFolder",
    "folder": "featinv.data.folders.FlatFolder",
    "cifar10": "featinv.data.cifar.CIFAR10",
    "webdataset": "featinv.data.shards.WebDatasetShards",
    "shards": "featinv.data.shards.IndexedShards",
}
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")

__all__ = ["DATASETS", "load_dataset"]


def load_dataset(name_or_node: str | os.PathLike[str] | Mapping[str, Any], **params: Any) -> Dataset[dict[str, Any]]:
    """Build a data set.

    Args:
        name_or_node: A name of `DATASETS` (`webdataset` streams, `shards` is indexed); a `{target, params}`
            node; or a path: shards (`*.tar`, `*.tar.gz`; indexed), a folder of class folders, or of images.
        **params: Arguments of the data set; they override the node's.

    Raises:
        UserError: If there is no such name or path, or the data set refuses its arguments.
    """
    from featinv.config import instantiate

    if isinstance(name_or_node, Mapping):
        given = name_or_node.get("params") or {}
        return instantiate({**name_or_node, "params": {**given, **params}})
    name = os.fspath(name_or_node)
    if name not in DATASETS:
        name, key = _guess(name)
        params = {key: os.fspath(name_or_node), **params}
    return instantiate({"target": DATASETS[name], "params": params})


def _guess(path: str) -> tuple[str, str]:
    if path.endswith(SHARD_SUFFIXES):
        return "shards", "urls"
    folder = Path(path).expanduser()
    if not folder.is_dir():
        near = difflib.get_close_matches(path, DATASETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"names are {', '.join(DATASETS)}."
        raise UserError(f"{path!r} is neither a data set's name nor an existing folder or shard; {hint}")
    from featinv.data.folders import has_class_folders

    return ("imagenet" if has_class_folders(folder) else "folder"), "root"
