"""Grad-CAM at any layer, of convolutional networks and transformers alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn

from featinv.attribution.scores import Logits, LogitsFromFinal, prepare
from featinv.backbones.base import Backbone, FeatureSpec
from featinv.config import nearest
from featinv.errors import UserError
from featinv.image import resize


def grad_cam(
    backbone: Backbone, images: Tensor, target: Tensor | Sequence[int] | None = None, layer: str | None = None
) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391) at any layer that is a map.

    Tokens are laid out on their grid without the prefix tokens.

    Args:
        backbone: A backbone with a classifier.
        images: (N, 3, H, W) in [0, 1].
        target: Class indices (N,); None takes the predicted classes.
        layer: "final" or any module of the model; None takes the backbone's own layer, and where the classifier reads
            a class token instead of the final map, the first norm of the last block, the last place where patches
            still reach that token.

    Returns:
        (N, 1, H, W), at least 0, bilinearly enlarged to the images' size.

    Raises:
        UserError: As `gradient`, or if there is no such layer, it is no map, or the scores do not depend on it.
    """
    layer = layer or _cam_layer(backbone)
    images, target = prepare(backbone, images, target)
    probe = nn.Identity()
    with _probed(backbone, layer, probe, len(images)) as logits:
        cam = LayerGradCam(logits, probe).attribute(images, target).detach().to(images.device)
    if getattr(_network(backbone), "num_prefix_tokens", 0) and not cam.any():
        raise UserError(f"the classifier reads a class token that layer {layer!r} no longer feeds; choose an earlier.")
    height, width = images.shape[-2:]
    return resize(cam.relu(), (height, width))


def _network(backbone: Backbone) -> Any:
    return getattr(backbone, "model", backbone)


def _cam_layer(backbone: Backbone) -> str:
    if backbone.layer != "final":
        return backbone.layer
    spec = backbone.spec
    try:
        with torch.no_grad():
            backbone.logits_from(backbone.mean.new_zeros(1, spec.channels, spec.height, spec.width))
    except UserError as error:
        blocks = getattr(_network(backbone), "blocks", [None])
        if not hasattr(blocks[-1], "norm1"):
            raise UserError(f"{error} Grad-CAM needs the name of an earlier layer.") from error
        return f"blocks.{len(blocks) - 1}.norm1"
    return "final"


@contextmanager
def _probed(backbone: Backbone, layer: str, probe: nn.Module, count: int) -> Iterator[Logits]:
    """Class scores whose computation passes the layer's map, as (N, C, H, W), through `probe`."""
    cut = backbone if layer == backbone.layer else backbone.at(layer)
    if layer == "final":
        yield LogitsFromFinal(cut, probe)
        return
    modules = dict(_network(backbone).named_modules())
    if layer not in modules:
        raise UserError(f"no module is called {layer!r}: {nearest(layer, [*modules][1:400])}")
    spec, layout = cut.spec, getattr(_network(backbone), "output_fmt", "NCHW")
    hook = modules[layer].register_forward_hook(lambda _m, _i, output: _through(probe, output, spec, layout, count))
    try:
        yield Logits(backbone)
    finally:
        hook.remove()


def _through(probe: nn.Module, output: Any, spec: FeatureSpec, layout: str, count: int) -> Tensor:
    """The layer's output in its own layout, its map having passed through `probe`.

    Within its blocks many a model leaves the layout that it has outside, which counts where the shape does not tell.
    """
    if not isinstance(output, Tensor) or len(output) != count:
        raise UserError(f"layer {spec.layer!r} gives no map of each whole image; choose a block or a stage.")
    if output.ndim == 3:
        prefix = output.shape[1] - spec.height * spec.width
        grid = output[:, prefix:].transpose(1, 2).unflatten(2, (spec.height, spec.width))
        return torch.cat([output[:, :prefix], probe(grid).flatten(2).transpose(1, 2)], 1)
    shapes = {"NCHW": (spec.channels, spec.height, spec.width), "NHWC": (spec.height, spec.width, spec.channels)}
    found = [name for name, shape in shapes.items() if tuple(output.shape[1:]) == shape]
    if not found:
        raise UserError(f"layer {spec.layer!r} gives {tuple(output.shape[1:])}, not the map that it gives elsewhere.")
    nhwc = (layout if layout in found else found[0]) == "NHWC"
    return probe(output.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if nhwc else probe(output)
