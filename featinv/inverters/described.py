"""What a picture depends on beside its features and its seed, for a folder of pictures to tell whose they are."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_VALUES = 64  # of each tensor: training changes all of them


def describe(thing: Any) -> Any:
    """A JSON tree of an object's class, of the arguments it was built with, as far as it kept them, and its weights.

    Equal trees mean that the same pictures are drawn: an inverter, the wrappers around it, its guidance, a backbone and
    its layer. Weights are hashed by some values of each tensor, which takes no time.
    """
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, list | tuple | torch.Size):
        return [describe(part) for part in thing]
    if isinstance(thing, Mapping):
        return {str(key): describe(value) for key, value in thing.items()}
    if isinstance(thing, Tensor):
        return weights_hash({"": thing})
    kind = type(thing)
    found: dict[str, Any] = {"class": kind.__name__}
    if kind.__module__.startswith("featinv."):
        kept = vars(thing) | (thing._modules if isinstance(thing, nn.Module) else {})
        found |= {name: describe(kept[name]) for name in inspect.signature(kind).parameters if name in kept}
    if isinstance(thing, nn.Module):
        found["weights"] = weights_hash(thing.state_dict())
    return found


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """A short hash of a state dict: of names, shapes, and some values of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().flatten()
        some = flat[:: max(1, flat.numel() // _VALUES)]
        digest.update(some.cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]
