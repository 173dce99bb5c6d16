"""Saliency: which pixels a class score depends on, by Captum wherever Captum does it (arXiv 2009.07896).

Every method is a function of (backbone, images, target) and returns a signed attribution (N, 3, H, W), Grad-CAM a
non-negative one (N, 1, H, W), at the images' own resolution. `to_map` and `overlay` turn it into pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import matplotlib
import torch
from captum.attr import InputXGradient, IntegratedGradients, NoiseTunnel, Saliency
from torch import Tensor

from featinv.attribution.grad_cam import grad_cam
from featinv.attribution.guided import guided_backprop
from featinv.attribution.scores import Logits, prepare
from featinv.backbones.base import Backbone
from featinv.config import nearest
from featinv.errors import UserError
from featinv.image import resize


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
    images, target = prepare(backbone, images, target)
    return Saliency(Logits(backbone)).attribute(images, target, abs=False).detach()


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
    images, target = prepare(backbone, images, target)
    return InputXGradient(Logits(backbone)).attribute(images, target).detach()


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
    images, target = prepare(backbone, images, target)
    seeds = [0] * len(images) if seeds is None else seeds
    if len(seeds) != len(images) or samples < 1 or batch_size < 1 or noise < 0:
        raise UserError(f"SmoothGrad needs {len(images)} seeds, samples and batch_size >= 1 and noise >= 0.")
    tunnel = NoiseTunnel(Saliency(Logits(backbone)))
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
    images, target = prepare(backbone, images, target)
    if steps < 1 or batch_size < 1:
        raise UserError("integrated gradients need steps and batch_size of at least 1.")
    try:
        start = torch.as_tensor(baseline).to(images).expand_as(images)
    except RuntimeError as error:
        shape = tuple(torch.as_tensor(baseline).shape)
        raise UserError(f"a baseline {shape} does not broadcast to {tuple(images.shape)}; give one value.") from error
    # Captum takes whole steps of all N images at a time and warns below one.
    size = max(batch_size, len(images))
    attribute = IntegratedGradients(Logits(backbone)).attribute
    return attribute(images, start, target, n_steps=steps, internal_batch_size=size).detach()


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
