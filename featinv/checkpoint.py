"""Checkpoints as one safetensors file: tensors beside a JSON tree. Nothing in them can run code when loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from featinv.errors import UserError
from featinv.files import load_safetensors, read_metadata, save_safetensors

_TREE = "featinv_tree"


def save_checkpoint(path: str | Path, tree: Any) -> None:
    """Write a nested structure of dicts, lists, numbers, strings and tensors; atomically.

    Raises:
        UserError: If the disk is full or a value is of another kind.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _flatten(tree, "", tensors)
    save_safetensors(path, _unshared(tensors), {_TREE: json.dumps(skeleton)})


def load_checkpoint(path: str | Path) -> Any:
    """Read what `save_checkpoint` wrote, on the CPU.

    Raises:
        UserError: If the file is missing, truncated or not one of ours.
    """
    tensors, metadata = load_safetensors(path)
    return _unflatten(_skeleton(path, metadata), tensors)


def read_header(path: str | Path) -> Any:
    """The same structure with None for every tensor: quick, however large the file is.

    Raises:
        UserError: As `load_checkpoint`.
    """
    return _unflatten(_skeleton(path, read_metadata(path)), None)


def _skeleton(path: str | Path, metadata: dict[str, str]) -> dict[str, Any]:
    if _TREE not in metadata:
        raise UserError(f"{path} is a safetensors file but not a featinv checkpoint.")
    return json.loads(metadata[_TREE])


def _flatten(node: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        while name in tensors:  # keys with dots in them: {"a": {"b.c": ...}, "a.b": {"c": ...}}
            name += "'"
        tensors[name] = node.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(node, dict):
        # Keys may be numbers (optimizer state), which JSON objects cannot hold.
        return {"dict": [[key, _flatten(value, f"{name}.{key}", tensors)] for key, value in node.items()]}
    if isinstance(node, list | tuple):
        kind = "list" if isinstance(node, list) else "tuple"
        return {kind: [_flatten(value, f"{name}.{i}", tensors) for i, value in enumerate(node)]}
    if node is None or isinstance(node, bool | int | float | str):
        return {"value": node}
    raise UserError(f"a checkpoint cannot hold {type(node).__name__} at {name.lstrip('.')!r}.")


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that share memory, which the format refuses; the rest as it is, since it may be many GB."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes
        found[name] = tensor.clone() if shared else tensor
        seen.add(storage.data_ptr())
    return found


def _unflatten(node: dict[str, Any], tensors: dict[str, Tensor] | None) -> Any:
    ((kind, content),) = node.items()
    if kind == "tensor":
        return None if tensors is None else tensors[content]
    if kind == "dict":
        return {key: _unflatten(value, tensors) for key, value in content}
    if kind in ("list", "tuple"):
        values = [_unflatten(value, tensors) for value in content]
        return values if kind == "list" else tuple(values)
    return content
