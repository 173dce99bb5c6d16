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

_DATA_MODULE = "featinv.data.datamodule.ImageDataModule"

__all__ = ["DATASETS", "load_dataset", "load_part"]


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


def load_part(node: Mapping[str, Any], part: str) -> Any:
    """Build the training ("train") or the validation ("val") images of a configuration's `data`, not the others.

    ImageNet's million training pictures need not be there, nor be looked at, to draw from fifty thousand others. A data
    module of another class than ours sets up what it will, and has its `train` or `val` taken.

    Returns:
        A data set; None if there are no validation images.

    Raises:
        UserError: As `load_dataset`, or if there are no training images.
    """
    from featinv.config import check_params, instantiate, is_node, resolve_target

    if node.get("target") != _DATA_MODULE:
        module = instantiate(node, where="data")
        module.setup()
        return getattr(module, part)
    params = node.get("params") or {}
    check_params(resolve_target(_DATA_MODULE), list(params), "data.params")
    given = params.get(part)
    if given is None and part == "train":
        raise UserError("data.params.train is missing.")
    if is_node(given):
        return instantiate(given, where=f"data.params.{part}")
    return load_dataset(given) if isinstance(given, str) else given


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
