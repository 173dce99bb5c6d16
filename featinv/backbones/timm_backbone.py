"""Any timm model at any layer, through timm's own feature interfaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from featinv.backbones.base import Backbone
from featinv.backbones.rest import RestOfNetwork, hooked_output
from featinv.config import nearest
from featinv.errors import UserError
from featinv.files import first_line, read_state


class TimmBackbone(Backbone):
    """A timm model cut at a layer.

    Args:
        name: timm's name of the model, optionally with its weight tag.
        layer: "final" (what the model's own head reads), a name from timm's feature list such as "blocks.4" or
            "stages.2", or any module of the model that gives tokens or a square map.
        pretrained: Load timm's weights from the hub; False draws random ones from `seed` (the untrained control).
        checkpoint_path: A state dict to load instead, .safetensors or .pth (read without unpickling code).
        input_size: Side of the network's input; None takes the model's own.
        seed: Of random weights; the global random state is left alone.
        state: A state dict to load instead, by the caller.
        mean: Preprocessing; None takes the model's own.
        std: Preprocessing; None takes the model's own.
    """

    def __init__(
        self,
        name: str,
        layer: str = "final",
        pretrained: bool = True,
        checkpoint_path: str | None = None,
        input_size: int | None = None,
        seed: int = 0,
        state: dict[str, Tensor] | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ):
        from_hub = pretrained and checkpoint_path is None and state is None
        model = _create(name, from_hub, input_size, seed)
        config = timm.data.resolve_model_data_config(model)
        super().__init__(layer, input_size or config["input_size"][-1], mean or config["mean"], std or config["std"])
        if checkpoint_path is not None:
            state = read_state(checkpoint_path)
        if state is not None:
            try:
                model.load_state_dict(state)
            except RuntimeError as error:
                raise UserError(
                    f"the weights do not fit timm's {name}: {str(error).splitlines()[1].strip()}"
                ) from error
        self.name = name
        self.model: Any = model
        self._cut()
        self.freeze()

    @property
    def layers(self) -> list[str]:
        """Names in timm's feature list, then "final"; any other module's name works as well."""
        return [*self._listed, "final"]

    @property
    def _listed(self) -> list[str]:
        """Names in timm's feature list."""
        return [info["module"] for info in getattr(self.model, "feature_info", [])]

    def _index(self, layer: str) -> int:
        """Position of a listed layer among the outputs of `forward_intermediates`, counted from the last."""
        return self._listed.index(layer) - len(self._listed)

    def _is_intermediate(self, layer: str) -> bool:
        return layer in self._listed and hasattr(self.model, "forward_intermediates")

    def _cut(self) -> None:
        self._rest: RestOfNetwork | None = None
        self._cube: tuple[bool, bool] | None = None
        modules = dict(self.model.named_modules())
        if not self.layer or not (self.layer in ("final", *modules) or self._is_intermediate(self.layer)):
            names = ["final", *self._listed, *modules][:400]
            raise UserError(f"{self.name} has no layer {self.layer!r}: {nearest(self.layer, names)}")

    def _extract(self, x: Tensor) -> Tensor:
        """The network's input (N, 3, H, W) -> features (N, C, H, W)."""
        if self.layer == "final":
            return self._nchw(self.model.forward_features(x))
        if self._is_intermediate(self.layer):
            return self.model.forward_intermediates(
                x, indices=[self._index(self.layer)], output_fmt="NCHW", intermediates_only=True, stop_early=True
            )[0]
        output = hooked_output(self.model, self.model.get_submodule(self.layer), x)
        if output is None or len(output) != len(x):
            raise UserError(f"layer {self.layer!r} of {self.name} is not run on each whole image, or gives no tensor.")
        if output.ndim == 4:
            return output.permute(0, 3, 1, 2) if self._is_channels_last(output.shape, x) else output
        return self._nchw(output)

    def _is_channels_last(self, shape: torch.Size, x: Tensor) -> bool:
        """Whether a module's map is (N, H, W, C): within its blocks many a model leaves the layout that it has outside.

        Inputs are square, and so are maps: the two equal sides are height and width.

        Args:
            shape: Of the map.
            x: The network's input (N, 3, H, W).

        Raises:
            UserError: If the shape does not tell.
        """
        first, last = shape[2] == shape[3], shape[1] == shape[2]
        if first and last:
            first, last = self._narrowed(shape, x)
        if first == last:
            raise UserError(
                f"layer {self.layer!r} of {self.name} gives {' x '.join(map(str, shape[1:]))} numbers an image: which "
                "two of these are the sides of a square map cannot be told; choose another layer."
            )
        return last

    @torch.no_grad()
    def _narrowed(self, shape: torch.Size, x: Tensor) -> tuple[bool, bool]:
        """Whether a cube's width is its last axis, or the one before: only that changes with the picture's width."""
        if self._cube is None:
            try:
                narrow = hooked_output(self.model, self.model.get_submodule(self.layer), x[:1, :, :, : x.shape[3] // 2])
            except (AssertionError, RuntimeError, ValueError):  # a network of one input size
                narrow = None
            sides = shape[2:] if narrow is None or narrow.ndim != 4 else narrow.shape[2:]
            self._cube = sides[1] != shape[3], sides[0] != shape[2]
        return self._cube

    def _nchw(self, x: Tensor) -> Tensor:
        """Tokens or NHWC maps -> (N, C, H, W), prefix tokens removed."""
        if not isinstance(x, Tensor):
            raise UserError(f"layer {self.layer!r} of {self.name} gives a {type(x).__name__}, not one map.")
        if x.ndim == 3:
            x = x[:, getattr(self.model, "num_prefix_tokens", 0) :]
            height, width = self._grid(x.shape[1])
            return x.transpose(1, 2).unflatten(2, (height, width))
        if x.ndim == 4:
            return x.permute(0, 3, 1, 2) if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else x
        raise UserError(f"layer {self.layer!r} of {self.name} gives {x.ndim - 1} axes an image, not a spatial map.")

    def _grid(self, tokens: int) -> tuple[int, int]:
        grid = tuple(getattr(getattr(self.model, "patch_embed", None), "grid_size", None) or ())
        if len(grid) == 2 and grid[0] * grid[1] == tokens:
            return grid
        side = round(tokens**0.5)
        if side * side != tokens:
            raise UserError(f"layer {self.layer!r} of {self.name} has {tokens} tokens, which form no square map.")
        return side, side

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> features (N, C, H, W)."""
        return self._extract(self.preprocess(images))

    def maps(self, images: Tensor, layers: Sequence[str]) -> list[Tensor]:
        """Maps (N, C, H, W) of the same images at several layers, in one pass where timm lists them.

        Raises:
            UserError: As `at`.
        """
        listed = self._listed
        inner = set(layers) - {"final"}
        if not inner or not inner <= set(listed) or not hasattr(self.model, "forward_intermediates"):
            return super().maps(images, layers)
        names = sorted(inner, key=listed.index)  # timm returns them in the network's order
        found = self.model.forward_intermediates(
            self.preprocess(images),
            indices=[self._index(name) for name in names],
            output_fmt="NCHW",
            intermediates_only="final" not in layers,
            stop_early="final" not in layers,
        )
        if "final" in layers:
            last, inner_maps = found
            names, found = [*names, "final"], [*inner_maps, self._nchw(last)]
        named = dict(zip(names, found, strict=True))
        return [named[layer] for layer in layers]

    def _check_classifier(self) -> None:
        # Without a head timm's models give their pooled features in the place of class scores.
        if not self.model.num_classes:
            raise UserError(f"{self.name} has no classifier.")

    def logits(self, images: Tensor) -> Tensor:
        """Class scores (N, K) of images (N, 3, H, W) in [0, 1].

        Raises:
            UserError: If the model has no classifier.
        """
        self._check_classifier()
        return self.model(self.preprocess(images))

    def final_from(self, features: Tensor) -> Tensor:
        """The network's last map (N, C', H', W') of images whose map at this layer is `features` (N, C, H, W).

        Raises:
            UserError: If the layer gives tokens, some of which the map does not hold, or is not one module, or what
                follows reads more than its output, as the end of a residual block does.
        """
        module = dict(self.model.named_modules()).get(self.layer)
        if self.layer == "final" or module is None:
            return super().final_from(features)
        if self._rest is None or self._rest.device != self.mean.device:
            self._rest = RestOfNetwork(self.model, module, self.mean.new_zeros(1, 3, self.input_size, self.input_size))
        output = self._rest.output
        if self._rest.determined and output.ndim == 4 and self._is_channels_last(output.shape, self._rest.blank):
            features = features.permute(0, 2, 3, 1)
        if not self._rest.determined or features.shape[1:] != output.shape[1:]:
            raise UserError(f"the map of layer {self.layer!r} of {self.name} is not all that the next layer reads.")
        return self._nchw(self._rest(features))

    def logits_from(self, features: Tensor) -> Tensor:
        """Class scores (N, K) from the final map.

        Raises:
            UserError: If the model has no classifier, at an earlier layer, or where the head reads more than the map,
                such as a class token.
        """
        self._check_classifier()
        if self.layer != "final":
            return super().logits_from(features)
        if getattr(self.model, "num_prefix_tokens", 0) and getattr(self.model, "global_pool", "") != "avg":
            raise UserError(f"{self.name} classifies by its class token, which the spatial map does not hold.")
        if hasattr(self.model, "patch_embed") and getattr(self.model, "output_fmt", "NCHW") != "NHWC":
            prefix = features.new_zeros(len(features), getattr(self.model, "num_prefix_tokens", 0), features.shape[1])
            given = torch.cat([prefix, features.flatten(2).transpose(1, 2)], 1)
        else:
            given = features.permute(0, 2, 3, 1) if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else features
        try:
            return self.model.forward_head(given)
        except RuntimeError as error:  # a form of its own between features and head
            raise UserError(f"the head of {self.name} cannot read the spatial map ({first_line(error)}).") from error


def _create(name: str, pretrained: bool, input_size: int | None, seed: int) -> nn.Module:
    if name.split(".")[0] not in timm.list_models():
        raise UserError(f"timm has no model {name!r}: {nearest(name, timm.list_models())}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if input_size is not None:
                try:
                    return timm.create_model(name, pretrained=pretrained, img_size=input_size)
                except TypeError:  # a convolutional network takes any size
                    pass
            return timm.create_model(name, pretrained=pretrained)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"cannot get the weights of {name} ({first_line(error)}); connect to the hub, give "
                "checkpoint_path, or set pretrained=false for random weights."
            ) from error
