"""What a command line of `tools.apply` names: pictures, backbone, inverter, concept, each loaded when it is needed."""

from __future__ import annotations

import argparse
from functools import cached_property
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm

from featinv.applications import composites
from featinv.applications.batches import Progress, decode, encode, seeds_of
from featinv.applications.concepts import Concept
from featinv.applications.lookup import Examples, find_concept
from featinv.backbones import Backbone, load_backbone
from featinv.config import load_group
from featinv.data.folders import pictures
from featinv.data.scenes import render_scenes
from featinv.errors import UserError
from featinv.inverters.base import Inverter
from featinv.inverters.build import Trained, build_inverter, check_spec, load_trained
from featinv.inverters.described import weights_hash
from featinv.inverters.masks import region_mask
from featinv.metrics.features import feature_cosine


class Task:
    """What a command line names, loaded when it is asked for."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        for word in ("n", "examples", "count", "samples"):
            if getattr(options, word) < 1:
                raise UserError(f"--{word} must be at least 1, not {getattr(options, word)}.")
        name = options.inverter
        self.trained: Trained | None = None if name == "optimisation" else load_trained(name)
        self.backbone = self._backbone()
        if self.trained is not None and options.backbone is not None:
            self._check_weights(self.trained)
        self.inverter: Inverter = self.trained.inverter if self.trained else self.untrained(self.backbone)
        if isinstance(self.inverter, torch.nn.Module) and torch.cuda.is_available():
            self.inverter.to("cuda")

    def _backbone(self) -> Backbone:
        o = self.options
        if o.backbone is None:
            if self.trained is None:
                raise UserError("name a --backbone; only a trained inverter knows its own.")
            if o.layer is not None or o.input_size is not None:
                raise UserError("--layer and --input-size go with --backbone; a trained inverter has its own.")
            backbone = self.trained.load_backbone()
        else:
            size = {} if o.input_size is None else {"input_size": o.input_size}
            backbone = load_backbone(o.backbone, o.layer, **size)
        return backbone.to("cuda") if torch.cuda.is_available() else backbone

    def _check_weights(self, trained: Trained) -> None:
        """Networks with other weights have maps of the same shape and layer: the spec alone does not tell."""
        check_spec(trained.spec, self.backbone.spec)
        if weights_hash(trained.load_backbone().state_dict()) != weights_hash(self.backbone.state_dict()):
            raise UserError(
                f"{self.options.inverter} was trained on other weights than --backbone has; leave that out."
            )

    def untrained(self, backbone: Backbone) -> Inverter:
        """The optimisation inverter at any layer."""
        node = load_group("inverter", "optimisation")
        node.params.update({"steps": self.options.steps, "size": self.options.size})
        return build_inverter(OmegaConf.create({"inverter": node}), backbone.spec, backbone)

    def _pictures(self, file: str | None, scene: str | None, count: int) -> tuple[Tensor, Tensor | None]:
        """Images (K, 3, size, size), and the masks of their objects where they are scenes."""
        size = self.inverter.size
        if file is not None:
            dataset = pictures(file, size)
            return torch.stack([dataset[i]["image"] for i in range(min(count, len(dataset)))]), None
        if scene is None:
            raise UserError(
                "name a picture by --image FILE or --scene SEED:INDEX, the second by --other, --other-scene."
            )
        seed, _, index = scene.partition(":")
        if not (seed.isdigit() and index.isdigit()):
            raise UserError(f"a scene is SEED:INDEX, as in 5:3, not {scene!r}.")
        images, _, masks = render_scenes(int(seed), range(int(index), int(index) + count), size)
        return images, masks

    @cached_property
    def given(self) -> tuple[Tensor, Tensor | None]:
        """The pictures, and their objects' masks."""
        return self._pictures(self.options.image, self.options.scene, self.options.n)

    @property
    def images(self) -> Tensor:
        """(N, 3, size, size)."""
        return self.given[0]

    @cached_property
    def features(self) -> Tensor:
        """(N, C, H, W)."""
        return encode(self.backbone, self.images)

    @cached_property
    def other(self) -> Tensor:
        """The second picture (1, 3, size, size)."""
        return self._pictures(self.options.other, self.options.other_scene, 1)[0]

    @cached_property
    def seeds(self) -> list[int]:
        """One for each picture."""
        return seeds_of(self.options.seed, len(self.images))

    @cached_property
    def examples(self) -> Examples:
        """Pictures that concepts are found in: a folder's, or scenes of the probes' family."""
        count, size = self.options.examples, self.inverter.size
        if self.options.folder is not None:
            return Examples(self._pictures(self.options.folder, None, count)[0])
        return Examples(*render_scenes(2, range(count), size))

    @cached_property
    def concept(self) -> Concept:
        """What --concept names."""
        if self.options.concept is None:
            raise UserError("name a --concept, such as mean:object0_colour=red, nmf:0 or subspace:0.")
        return find_concept(
            self.options.concept, self.backbone, self.examples, self.options.count, self.options.text_weights
        )

    @property
    def box(self) -> list[float]:
        """What --region names."""
        if self.options.region is None:
            raise UserError("name a --region LEFT TOP RIGHT BOTTOM in fractions of the picture.")
        return self.options.region

    def positions(self) -> Tensor | None:
        """The mask of --positions or --region; None is everywhere."""
        word = self.options.positions
        if word is None:
            return region_mask(self.features, self.box) if self.options.region else None
        masks, number = self.given[1], word.removeprefix("object")
        if masks is None or not number.isdigit() or int(number) >= masks.shape[1]:
            raise UserError("--positions is object0 to object3, of scenes alone; for pictures give --region.")
        grid = (self.features.shape[2], self.features.shape[3])
        where = composites.covered(masks[:, int(number), None], grid)
        if not where.flatten(1).any(1).all():
            raise UserError(
                f"{word} covers no position in {'this scene' if len(where) == 1 else 'one of these scenes'}."
            )
        return where

    def decode(self, features: Tensor) -> Tensor:
        """Pictures of feature maps with the task's seeds."""
        return decode(self.inverter, features, self.seeds, progress=bar("decoding"))

    def fit(self, features: Tensor, images: Tensor) -> list[float]:
        """Feature cosine of each picture with the map it was decoded from: low where the map is no picture's."""
        return feature_cosine(features, encode(self.backbone, images)).tolist()


def bar(title: str) -> Progress:
    """A progress bar as the applications take it."""
    shown: list[Any] = []

    def progress(done: int, total: int) -> None:
        if not shown:
            shown.append(tqdm(total=total, desc=title))
        shown[0].update(done - shown[0].n)
        if done >= total:
            shown[0].close()

    return progress
