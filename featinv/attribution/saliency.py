"""Saliency: which pixels a class score depends on, by Captum wherever Captum does it (arXiv 2009.07896).

Every method is a function of (backbone, images, target) and returns a signed attribution (N, 3, H, W), Grad-CAM a
non-negative one (N, 1, H, W), at the images' own resolution. `to_map` and `overlay` turn it into pictures.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from captum.attr import GuidedBackprop, InputXGradient, IntegratedGradients, LayerGradCam, NoiseTunnel, Saliency
from torch import Tensor, nn

from featinv.backbones.base import Backbone, FeatureSpec
from featinv.config import nearest
from featinv.errors import UserError
from featinv.image import resize


class _Logits(nn.Module):
    """Captum's view of a backbone: images (N, 3, H, W) -> class scores (N, K) on the images' device."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone.logits(images.to(self.backbone.mean.device)).to(images.device)


class _LogitsFromFinal(_Logits):
    """The same through the final map, which passes by `probe`."""

    def __init__(self, backbone: Backbone, probe: nn.Module):
        super().__init__(backbone)
        self.probe = probe

    def forward(self, images: Tensor) -> Tensor:
        features = self.probe(self.backbone(images.to(self.backbone.mean.device)))
        return self.backbone.logits_from(features).to(images.device)


def class_indices(logits: Tensor, target: Tensor | Sequence[int] | None = None) -> Tensor:
    """Class indices (N,) on the logits' device: the given ones, checked, or the predicted ones.

    Args:
        logits: Class scores (N, K).
        target: Class indices (N,), each in 0..K-1; None takes the best class of each row.

    Raises:
        UserError: If there is not one index in range for each row.
    """
    if target is None:
        return logits.detach().argmax(1)
    indices = torch.as_tensor(target, device=logits.device)
    count, classes = logits.shape
    if indices.shape != (count,) or indices.is_floating_point() or indices.dtype == torch.bool:
        raise UserError(
            f"{count} images need {count} integer class indices, not {indices.dtype} {tuple(indices.shape)}."
        )
    wrong = indices[(indices < 0) | (indices >= classes)]
    if len(wrong):
        raise UserError(f"there is no class {int(wrong[0])}; the network has {classes}, numbered from 0.")
    return indices.long()


def _prepare(backbone: Backbone, images: Tensor, target: Tensor | Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """A copy of the images that records gradients, and checked class indices (N,) on the same device."""
    if not len(images):
        raise UserError("attribution needs at least one image.")
    with torch.no_grad():
        logits = _Logits(backbone)(images)
    return images.detach().clone().requires_grad_(), class_indices(logits, target)


def gradient(backbone: Backbone, images: Tensor, target: Tensor | Sequence[int] | None = None) -> Tensor:
    """Gradient of the class score (Simonyan et al. 2014, arXiv 1312.6034), signed.

    Args:
        backbone: A backbone with a classifier.
        images: (N, 3, H, W) in [0, 1].
        target: Class indices (N,); None takes the predicted classes.

    Returns:
        (N, 3, H, W), score per unit of pixel value.

    Raises:
        UserError: If the images or class indices do not fit, or the backbone has no classifier.
    """
    images, target = _prepare(backbone, images, target)
    return Saliency(_Logits(backbone)).attribute(images, target, abs=False).detach()


def input_x_gradient(backbone: Backbone, images: Tensor, target: Tensor | Sequence[int] | None = None) -> Tensor:
    """Pixel value times gradient (Shrikumar et al. 2016, arXiv 1605.01713), signed; black pixels get 0.

    Args:
        backbone: A backbone with a classifier.
        images: (N, 3, H, W) in [0, 1].
        target: Class indices (N,); None takes the predicted classes.

    Returns:
        (N, 3, H, W), in units of the score.

    Raises:
        UserError: As `gradient`.
    """
    images, target = _prepare(backbone, images, target)
    return InputXGradient(_Logits(backbone)).attribute(images, target).detach()


def smooth_grad(
    backbone: Backbone,
    images: Tensor,
    target: Tensor | Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    samples: int = 25,
    noise: float = 0.15,
    batch_size: int = 32,
) -> Tensor:
    """Gradient averaged over noisy copies (Smilkov et al. 2017, arXiv 1706.03825), signed.

    Args:
        backbone: A backbone with a classifier.
        images: (N, 3, H, W) in [0, 1].
        target: Class indices (N,); None takes the classes predicted without noise.
        seeds: N seeds of the noise; None takes 0 for every image.
        samples: Noisy copies of each image.
        noise: Standard deviation in pixel units.
        batch_size: Copies evaluated at a time (memory).

    Returns:
        (N, 3, H, W), score per unit of pixel value; row i depends on image i and seed i alone.

    Raises:
        UserError: As `gradient`, or if the number of seeds differs from N.
    """
    images, target = _prepare(backbone, images, target)
    seeds = [0] * len(images) if seeds is None else seeds
    if len(seeds) != len(images) or samples < 1 or batch_size < 1 or noise < 0:
        raise UserError(f"SmoothGrad needs {len(images)} seeds, samples and batch_size >= 1 and noise >= 0.")
    tunnel = NoiseTunnel(Saliency(_Logits(backbone)))
    rows = []
    for image, klass, seed in zip(images.detach().cpu(), target.cpu(), seeds, strict=True):
        # NoiseTunnel draws from the global generator: on the CPU, one image at a time, with its state put back
        # afterwards, the noise depends on the seed alone.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed))
            rows.append(
                tunnel.attribute(
                    image[None],
                    nt_samples=samples,
                    nt_samples_batch_size=batch_size,
                    stdevs=float(noise),
                    target=klass[None],
                    abs=False,
                )
            )
    return torch.cat(rows).detach().to(images.device)


def integrated_gradients(
    backbone: Backbone,
    images: Tensor,
    target: Tensor | Sequence[int] | None = None,
    baseline: float | Tensor = 0.0,
    steps: int = 32,
    batch_size: int = 64,
) -> Tensor:
    """Gradient integrated from a baseline to the image (Sundararajan et al. 2017, arXiv 1703.01365), signed.

    Args:
        backbone: A backbone with a classifier.
        images: (N, 3, H, W) in [0, 1].
        target: Class indices (N,); None takes the predicted classes.
        baseline: Where the path starts: one pixel value, or pictures that broadcast to (N, 3, H, W).
        steps: Points of the Gauss-Legendre quadrature.
        batch_size: Pictures evaluated at a time, at least N (memory).

    Returns:
        (N, 3, H, W), in units of the score; sums to score(image) - score(baseline) as steps grows.

    Raises:
        UserError: As `gradient`, or if the baseline does not broadcast.
    """
    images, target = _prepare(backbone, images, target)
    if steps < 1 or batch_size < 1:
        raise UserError("integrated gradients need steps and batch_size of at least 1.")
    try:
        start = torch.as_tensor(baseline).to(images).expand_as(images)
    except RuntimeError as error:
        shape = tuple(torch.as_tensor(baseline).shape)
        raise UserError(f"a baseline {shape} does not broadcast to {tuple(images.shape)}; give one value.") from error
    # Captum takes whole steps of all N images at a time and warns below one.
    size = max(batch_size, len(images))
    attribute = IntegratedGradients(_Logits(backbone)).attribute
    return attribute(images, start, target, n_steps=steps, internal_batch_size=size).detach()


class _Copy(nn.Module):
    """Gives its successor a tensor of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


class _Rectifier(nn.ReLU):
    """A ReLU or ReLU6 in the one form that Captum hooks; never in place; counts its calls."""

    def __init__(self, six: bool):
        super().__init__(inplace=False)
        self.six, self.calls = six, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.relu6(x) if self.six else F.relu(x)


@contextmanager
def replaced_rectifiers(model: nn.Module) -> Iterator[list[_Rectifier]]:
    """Within the context every nn.ReLU and nn.ReLU6 of the model is a stand-in that Captum's hooks reach.

    The model's own modules are set aside untouched and put back at the end, also after an exception.

    Args:
        model: Any module.

    Yields:
        The stand-ins.
    """
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()  # named_children leaves out a module's second name
        if isinstance(child, nn.ReLU | nn.ReLU6)
    ]
    stand_ins = {child: _Rectifier(isinstance(child, nn.ReLU6)) for _, _, child in places}
    try:
        for parent, name, child in places:
            # Captum rectifies the whole gradient of a ReLU's input; where others read that tensor too, as in
            # pre-activation networks, it would rectify theirs as well without the copy.
            setattr(parent, name, nn.Sequential(_Copy(), stand_ins[child]))
        yield list(stand_ins.values())
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)


def _graph_names(output: Tensor) -> list[str]:
    """Names of all nodes behind a tensor in the autograd graph."""
    seen: set[Any] = set()
    open_nodes: list[Any] = [output.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            open_nodes += [following for following, _ in node.next_functions]
    return [node.name() for node in seen]


def _check_rectifiers(logits: _Logits, image: Tensor, stand_ins: list[_Rectifier]) -> None:
    name = getattr(logits.backbone, "name", type(logits.backbone).__name__)
    advice = "use gradient, smooth_grad, integrated_gradients or grad_cam instead."
    if not stand_ins:
        raise UserError(f"guided backpropagation needs ReLU layers, and {name} has none; {advice}")
    with torch.enable_grad():
        names = _graph_names(logits(image))
    called = sum(stand_in.calls for stand_in in stand_ins if not stand_in.six)
    if sum(name.startswith("ReluBackward") for name in names) > called:
        raise UserError(f"{name} calls ReLU as a function, out of guided backpropagation's reach; {advice}")


def guided_backprop(backbone: Backbone, images: Tensor, target: Tensor | Sequence[int] | None = None) -> Tensor:
    """Guided backpropagation (Springenberg et al. 2015, arXiv 1412.6806), signed.

    Negative gradients stop at every ReLU and ReLU6; other activations (GELU, SiLU, the gates of squeeze-excitation)
    keep their derivative. Known to depend little on the weights (Adebayo et al. 2018, arXiv 1810.03292).

    Args:
        backbone: A backbone with a classifier and ReLU layers.
        images: (N, 3, H, W) in [0, 1].
        target: Class indices (N,); None takes the predicted classes.

    Returns:
        (N, 3, H, W), score per unit of pixel value.

    Raises:
        UserError: As `gradient`, or if the network has no ReLU layer or calls ReLU as a function.
    """
    images, target = _prepare(backbone, images, target)
    logits = _Logits(backbone)
    with replaced_rectifiers(backbone) as stand_ins, warnings.catch_warnings():
        _check_rectifiers(logits, images[:1], stand_ins)
        warnings.filterwarnings("ignore", message="Setting backward hooks")
        return GuidedBackprop(logits).attribute(images, target).detach()


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
    images, target = _prepare(backbone, images, target)
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
def _probed(backbone: Backbone, layer: str, probe: nn.Module, count: int) -> Iterator[_Logits]:
    """Class scores whose computation passes the layer's map, as (N, C, H, W), through `probe`."""
    cut = backbone if layer == backbone.layer else backbone.at(layer)
    if layer == "final":
        yield _LogitsFromFinal(cut, probe)
        return
    modules = dict(_network(backbone).named_modules())
    if layer not in modules:
        raise UserError(f"no module is called {layer!r}: {nearest(layer, [*modules][1:400])}")
    spec, nhwc = cut.spec, getattr(_network(backbone), "output_fmt", "NCHW") == "NHWC"
    hook = modules[layer].register_forward_hook(lambda _m, _i, output: _through(probe, output, spec, nhwc, count))
    try:
        yield _Logits(backbone)
    finally:
        hook.remove()


def _through(probe: nn.Module, output: Any, spec: FeatureSpec, nhwc: bool, count: int) -> Tensor:
    """The layer's output in its own layout, its map having passed through `probe`."""
    if not isinstance(output, Tensor) or len(output) != count:
        raise UserError(f"layer {spec.layer!r} gives no map of each whole image; choose a block or a stage.")
    if output.ndim == 3:
        prefix = output.shape[1] - spec.height * spec.width
        grid = output[:, prefix:].transpose(1, 2).unflatten(2, (spec.height, spec.width))
        return torch.cat([output[:, :prefix], probe(grid).flatten(2).transpose(1, 2)], 1)
    return probe(output.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if nhwc else probe(output)


SALIENCY: dict[str, Callable[..., Tensor]] = {
    "gradient": gradient,
    "input_x_gradient": input_x_gradient,
    "smooth_grad": smooth_grad,
    "integrated_gradients": integrated_gradients,
    "guided_backprop": guided_backprop,
    "grad_cam": grad_cam,
}


def to_map(attribution: Tensor, quantile: float = 0.99) -> Tensor:
    """An attribution as one grey picture an image: largest magnitude over channels, scaled for each image.

    Args:
        attribution: (N, C, H, W), any sign and scale.
        quantile: In (0, 1]: the share of pixels below full brightness; under 1, a few extreme ones do not darken the
            rest.

    Returns:
        (N, 1, H, W) in [0, 1]; all 0 where the attribution is.

    Raises:
        UserError: If the attribution is not (N, C, H, W) or the quantile not in (0, 1].
    """
    if attribution.ndim != 4 or not 0 < quantile <= 1:
        raise UserError("to_map needs an attribution (N, C, H, W) and a quantile in (0, 1].")
    magnitude = attribution.detach().abs().amax(1, keepdim=True)
    flat = magnitude.flatten(1)
    scale = flat.kthvalue(max(1, math.ceil(quantile * flat.shape[1])), dim=1).values
    # Where so few pixels count that the quantile is 0, the largest value scales the map.
    scale = torch.where(scale > 0, scale, flat.amax(1)).view(-1, 1, 1, 1)
    return torch.where(scale > 0, magnitude / scale, 0.0).clamp(0, 1)


def overlay(images: Tensor, maps: Tensor, alpha: float = 0.5, colormap: str = "inferno") -> Tensor:
    """Heat maps laid over the pictures.

    Args:
        images: (N, 3, H, W) in [0, 1].
        maps: (N, 1, H', W') in [0, 1], resized to the images.
        alpha: Weight of the heat map in [0, 1].
        colormap: A name of matplotlib's.

    Returns:
        (N, 3, H, W) in [0, 1], on the CPU.

    Raises:
        UserError: If the shapes do not belong together or there is no such colormap, naming the nearest.
    """
    if colormap not in matplotlib.colormaps:
        raise UserError(f"matplotlib has no colormap {colormap!r}: {nearest(colormap, list(matplotlib.colormaps))}")
    if maps.ndim != 4 or maps.shape[:2] != (len(images), 1):
        raise UserError(f"{len(images)} images need maps ({len(images)}, 1, H, W), not {tuple(maps.shape)}.")
    height, width = images.shape[-2:]
    values = resize(maps.detach().cpu().float(), (height, width))[:, 0].clamp(0, 1)
    heat = torch.from_numpy(matplotlib.colormaps[colormap](values.numpy())[..., :3]).permute(0, 3, 1, 2).float()
    return ((1 - alpha) * images.detach().cpu().float() + alpha * heat).clamp(0, 1)
