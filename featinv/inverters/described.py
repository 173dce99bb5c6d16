"""What a picture depends on beside its features and its seed, for a folder of pictures to tell whose they are."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_VALUES = 64  # of each tensor: training changes all of them
_LISTED = 64  # a longer list is hashed


def describe(thing: Any) -> Any:
    """A JSON tree of an object's class, of the arguments it was built with, as far as it kept them, and its weights.

    Arguments are looked for under their names, with an underscore or without.

    Equal trees mean that the same pictures are drawn: an inverter, the wrappers around it, its guidance, a backbone and
    its layer. Weights are hashed by some values of each tensor, which takes no time; other libraries' networks have
    nothing else.
    """
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, Sequence):
        parts = [describe(part) for part in thing]
        return parts if len(parts) <= _LISTED else hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    if isinstance(thing, Mapping):
        return {str(key): describe(value) for key, value in thing.items()}
    if isinstance(thing, Tensor):
        return weights_hash({"": thing})
    if isinstance(thing, np.ndarray | np.generic):
        return describe(thing.tolist())
    if isinstance(thing, os.PathLike | torch.dtype | torch.device) or inspect.isroutine(thing):
        return str(getattr(thing, "__qualname__", thing))
    kind, module = type(thing), isinstance(thing, nn.Module)
    found: dict[str, Any] = {"class": kind.__name__}
    if kind.__module__.startswith("featinv.") or not module:
        kept = getattr(thing, "__dict__", {}) | (thing._modules if module else {})
        kept |= {name.removeprefix("_"): value for name, value in kept.items() if name.removeprefix("_") not in kept}
        found |= {name: describe(kept[name]) for name in _parameters(kind) if name in kept}
    if not module and isinstance(config := getattr(thing, "config", None), Mapping):  # diffusers' schedulers
        found |= {name: describe(value) for name, value in config.items() if not name.startswith("_")}
    if module:
        found["weights"] = weights_hash(thing.state_dict())
    return found


def _parameters(kind: type) -> list[str]:
    try:
        return list(inspect.signature(kind).parameters)
    except ValueError:  # built in
        return []


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """A short hash of a state dict: of names, shapes, and some values of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().flatten()
        some = flat[:: max(1, flat.numel() // _VALUES)]
        digest.update(some.cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]
