"""OpenCLIP's visual towers at any block."""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any, Literal

import open_clip
import torch
from torch import Tensor

from featinv.backbones.base import Backbone
from featinv.config import nearest
from featinv.errors import UserError
from featinv.files import first_line, read_state


class OpenCLIPBackbone(Backbone):
    """The image tower of an OpenCLIP model, cut at a block.

    Args:
        name: OpenCLIP's name of the model, such as "ViT-B-32".
        layer: "final" (the last block) or "blocks.N" ("stages.N" of a convolutional tower), N from 0.
        pretrained: OpenCLIP's weight tag, such as "laion2b_s34b_b79k"; None, or False as of other backbones, draws
            random weights from `seed`.
        checkpoint_path: A state dict of the whole model or of its image tower to load instead.
        seed: Of random weights; the global random state is left alone.
        input_size: Side of the network's input; it must be the model's own, which None takes.

    Raises:
        UserError: If there is no such model, layer or weights, or the model's input has another size.
    """

    def __init__(
        self,
        name: str = "ViT-B-32",
        layer: str = "final",
        pretrained: str | Literal[False] | None = "laion2b_s34b_b79k",
        checkpoint_path: str | None = None,
        seed: int = 0,
        input_size: int | None = None,
    ):
        visual = _create(name, None if checkpoint_path else pretrained or None, seed)
        size = visual.image_size if isinstance(visual.image_size, int) else visual.image_size[0]
        if input_size not in (None, size):
            raise UserError(f"OpenCLIP's {name} sees {size} pixels, not {input_size}; give that input size, or none.")
        super().__init__(layer, size, visual.image_mean, visual.image_std)
        if checkpoint_path is not None:
            _load(visual, checkpoint_path, name)
        self.name, self.model = name, visual
        self._count = len(self._intermediates(torch.zeros(1, 3, size, size), None))
        self._cut()
        self.freeze()

    @property
    def layers(self) -> list[str]:
        """Names that `layer` may have."""
        kind = "blocks" if hasattr(self.model, "transformer") else "stages"
        return [*(f"{kind}.{i}" for i in range(self._count)), "final"]

    def _cut(self) -> None:
        if self.layer not in self.layers:
            raise UserError(f"OpenCLIP's {self.name} has no layer {self.layer!r}: {nearest(self.layer, self.layers)}")
        self._index = min(self.layers.index(self.layer), self._count - 1)

    def _intermediates(self, x: Tensor, indices: list[int] | None) -> list[Tensor]:
        return self.model.forward_intermediates(x, indices=indices, intermediates_only=True)["image_intermediates"]

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> features (N, C, H, W), the class token removed."""
        return self._intermediates(self.preprocess(images), [self._index])[0]

    def embed(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> the joint image-text embedding (N, D), not normalised."""
        return self.model(self.preprocess(images))


def _create(name: str, pretrained: str | None, seed: int) -> Any:
    if name not in open_clip.list_models():
        raise UserError(f"OpenCLIP has no model {name!r}: {nearest(name, open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is not None and pretrained not in tags:
        raise UserError(f"OpenCLIP has no weights {pretrained!r} of {name}: {nearest(pretrained, tags)}")
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stderr(io.StringIO()):
        torch.manual_seed(seed)
        logging.getLogger("open_clip").setLevel(logging.ERROR)
        try:
            return open_clip.create_model(name, pretrained=pretrained).visual
        except Exception as error:  # the hub client raises many kinds; all mean "not to be had"
            raise UserError(
                f"cannot get the weights {pretrained!r} of {name} ({first_line(error)}); connect to the "
                "hub, give checkpoint_path, or set pretrained=null for random weights."
            ) from error


def _load(visual: Any, path: str, name: str) -> None:
    state = read_state(path)
    tower = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")} or state
    try:
        visual.load_state_dict(tower)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit OpenCLIP's {name}: {str(error).splitlines()[1].strip()}") from error
