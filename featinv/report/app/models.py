"""Which backbones, layers and inverters the app offers; each is loaded when first asked for, once."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from featinv.applications.lookup import Examples
from featinv.backbones import Backbone, load_backbone
from featinv.checkpoint import read_header
from featinv.config import CONFIG_ROOT, instantiate, load_group, nearest
from featinv.data.folders import pictures
from featinv.data.scenes import render_scenes
from featinv.diffusion.prior import DiffusionPrior, load_prior
from featinv.errors import UserError
from featinv.inverters.base import Inverter
from featinv.inverters.build import (
    INVERTER_FILE,
    build_inverter,
    bundled_inverters,
    description,
    find_inverter,
    load_trained,
)

log = logging.getLogger(__name__)

OPTIMISATION = "optimisation"
"""The inverter that needs no training and so is there for every backbone and layer."""
DEFAULT_BACKBONE = "efficientnet_lite0"
EXAMPLE_SEED = 2
"""The family of scenes that concepts are found in; inverters train on 0 and are judged on 1."""


@dataclass(frozen=True)
class Choice:
    """What a user chose in the three lists."""

    backbone: str
    layer: str
    inverter: str


@dataclass(frozen=True)
class Loaded:
    """An inverter and the backbone whose features it inverts."""

    inverter: Inverter
    backbone: Backbone


@dataclass(frozen=True)
class _Entry:
    """A trained inverter as its file describes it, without its weights."""

    name: str
    backbone: str
    node: Any
    layer: str
    prior: str | None


def found_inverters(root: str | Path = "runs") -> list[str]:
    """Bundled names, those of scenes first, as the page starts with one; and folders of runs that hold an inverter."""
    folders = {
        path.parent
        for file in (INVERTER_FILE, "last.safetensors")
        for pattern in (f"*/{file}", f"*/*/{file}")
        for path in Path(root).glob(pattern)
    }
    bundled = sorted(bundled_inverters(), key=lambda name: not name.startswith("scenes"))
    return bundled + sorted(str(folder) for folder in folders if _is_inverter(folder))


def _is_inverter(folder: Path) -> bool:
    try:
        description(read_header(find_inverter(folder)), folder)
        return True
    except UserError as error:
        log.warning("left out: %s", error)
        return False


def backbone_label(node: Any) -> str:
    """A backbone's `{target, params}` node in a few words, without its layer."""
    params = node.get("params") or {}
    words = [str(params.get("name") or node["target"].rpartition(".")[2])]
    words += [f"{params['input_size']} px"] if params.get("input_size") else []
    words += ["random weights"] if params.get("pretrained") is False else []
    return ", ".join(words)


class Models:
    """Everything that can be chosen. Safe to share between threads.

    Args:
        inverters: Bundled names, runs' folders or files.
        backbones: Further ones, as `load_backbone` takes them, for the optimisation inverter; the embedded default is
            always there.
        steps: Of the optimisation inverter.
        size: Side of its pictures in pixels.
        examples: How many pictures concepts are found in.
        folder: Of those pictures; None renders scenes.

    Raises:
        UserError: If there is no such inverter, or it is damaged.
    """

    def __init__(
        self,
        inverters: Sequence[str] = (),
        backbones: Sequence[str] = (),
        steps: int = 200,
        size: int = 64,
        examples: int = 300,
        folder: str | None = None,
    ):
        self.steps, self.size, self._count, self._folder = steps, size, examples, folder
        self._entries = [_describe(name) for name in dict.fromkeys(inverters)]
        self._sources: dict[str, Callable[[], Backbone]] = {}
        for entry in self._entries:
            self._sources.setdefault(entry.backbone, functools.partial(instantiate, entry.node, where="backbone"))
        for name in [DEFAULT_BACKBONE, *backbones]:
            is_file = (CONFIG_ROOT / "backbone" / f"{name}.yaml").is_file()
            label = backbone_label(load_group("backbone", name)) if is_file else name
            self._sources.setdefault(label, functools.partial(load_backbone, name))
        self._lock = threading.RLock()
        self._cache: dict[Any, Any] = {}

    @property
    def backbones(self) -> list[str]:
        """Labels, those with a trained inverter first."""
        return list(self._sources)

    def layers(self, backbone: str) -> list[str]:
        """Layers, first to last; loads the backbone."""
        return list(dict.fromkeys(self._backbone(backbone).layers + self._trained_layers(backbone)))

    def start(self, backbone: str) -> str:
        """The layer to start with: one that has a trained inverter, else the backbone's own."""
        return [*self._trained_layers(backbone), self._backbone(backbone).layer][0]

    def _trained_layers(self, backbone: str) -> list[str]:
        return [entry.layer for entry in self._entries if entry.backbone == backbone]

    def inverters(self, backbone: str, layer: str) -> list[str]:
        """Inverters of that layer; the last is the optimisation inverter."""
        own = [e.name for e in self._entries if (e.backbone, e.layer) == (backbone, layer)]
        return [*own, OPTIMISATION]

    def load(self, choice: Choice) -> Loaded:
        """The chosen inverter and backbone, loaded once and kept.

        Raises:
            UserError: If there is no such choice, or a file does not fit.
        """
        known = self.inverters(choice.backbone, choice.layer)
        if choice.inverter not in known:
            raise UserError(f"no inverter {choice.inverter!r} for this layer: {nearest(choice.inverter, known)}")
        return self._once(choice, lambda: self._load(choice))

    def examples(self, size: int) -> Examples:
        """Pictures that concepts are found in, `size` pixels a side."""
        return self._once(("examples", size), lambda: self._examples(size))

    @property
    def has_scenes(self) -> bool:
        """Whether these are scenes, whose factors are known."""
        return self._folder is None

    def _examples(self, size: int) -> Examples:
        if self._folder is None:
            return Examples(*render_scenes(EXAMPLE_SEED, range(self._count), size))
        dataset = pictures(self._folder, size)
        return Examples(torch.stack([dataset[i]["image"] for i in range(min(self._count, len(dataset)))]))

    def _load(self, choice: Choice) -> Loaded:
        if choice.inverter == OPTIMISATION:
            base = self._backbone(choice.backbone)
            cut = base if base.layer == choice.layer else base.at(choice.layer)
            node = load_group("inverter", OPTIMISATION)
            node.params.update({"steps": self.steps, "size": self.size})
            return Loaded(build_inverter(OmegaConf.create({"inverter": node}), cut.spec, cut), cut)
        entry = next(e for e in self._entries if e.name == choice.inverter)
        trained = load_trained(entry.name, prior=None if entry.prior is None else self._prior(entry.prior))
        backbone = _placed(trained.load_backbone())
        return Loaded(_placed(trained.inverter), backbone)

    def _backbone(self, label: str) -> Backbone:
        if label not in self._sources:
            raise UserError(f"no backbone {label!r}: {nearest(label, self.backbones)}")
        return self._once(("backbone", label), lambda: _placed(self._sources[label]()))

    def _prior(self, name: str) -> DiffusionPrior:
        # Inverters of one prior share it: it is by far the largest part.
        return self._once(("prior", name), lambda: load_prior(name))

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        with self._lock:
            if key not in self._cache:
                self._cache[key] = make()
            return self._cache[key]


def _describe(name: str) -> _Entry:
    described = description(read_header(find_inverter(name)), name)
    config, spec = described["config"], described["spec"]
    prior = config.get("prior")
    node = config["backbone"]
    return _Entry(name, backbone_label(node), node, spec["layer"], None if prior is None else str(prior))


def _placed(part: Any) -> Any:
    is_module = isinstance(part, torch.nn.Module)
    return part.to("cuda") if is_module and torch.cuda.is_available() else part
