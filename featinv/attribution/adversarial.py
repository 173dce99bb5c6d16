"""Adversarial examples: one signed step, and projected gradient descent in two norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from featinv.attribution.scores import class_indices
from featinv.backbones.base import Backbone
from featinv.errors import UserError

# By hand: the last releases of torchattacks (2023, pins requests 2.25) and foolbox (March 2024) are old, and both draw
# the random start from the global generator for the batch as a whole, so that an image would depend on its neighbours.

Norm = Literal["linf", "l2"]


def _check(images: Tensor, eps: float) -> None:
    if images.numel() and not (float(images.min()) >= 0 and float(images.max()) <= 1):
        raise UserError("an attack needs images in [0, 1]; clamp them first.")
    if not 0 <= eps < float("inf"):
        raise UserError(f"eps is a radius in [0, 1] pixel units (8 grey levels are 8 / 255), not {eps}.")


def _ascent(backbone: Backbone, images: Tensor, labels: Tensor | Sequence[int], targeted: bool) -> Tensor:
    """Direction (N, 3, H, W) of higher loss, or of lower loss to the target class."""
    pixels = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = backbone.logits(pixels.to(backbone.mean.device))
        # A sum, not a mean: an image's gradient must not depend on how many others there are.
        loss = F.cross_entropy(logits, class_indices(logits, labels), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, pixels)
    return -gradient if targeted else gradient


def _length(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def _linf_project(delta: Tensor, eps: float) -> Tensor:
    return delta.clamp(-eps, eps)


def _l2_project(delta: Tensor, eps: float) -> Tensor:
    return delta * (eps / _length(delta).clamp(min=1e-30)).clamp(max=1.0)


def _l2_direction(gradient: Tensor) -> Tensor:
    return gradient / _length(gradient).clamp(min=1e-30)


def _linf_start(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    return 2 * torch.rand(shape, generator=generator) - 1


def _l2_start(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    direction = torch.randn(shape, generator=generator)
    # Uniform in the ball, not on its rays: the volume within r grows as r^d.
    radius = torch.rand((), generator=generator) ** (1 / direction.numel())
    return radius * direction / direction.norm()


# For each norm: gradient -> step of length 1, projection on the ball, uniform point of the unit ball.
_BALLS: dict[
    str,
    tuple[
        Callable[[Tensor], Tensor],
        Callable[[Tensor, float], Tensor],
        Callable[[torch.Generator, tuple[int, ...]], Tensor],
    ],
] = {"linf": (torch.sign, _linf_project, _linf_start), "l2": (_l2_direction, _l2_project, _l2_start)}


def fgsm(
    backbone: Backbone, images: Tensor, labels: Tensor | Sequence[int], eps: float = 8 / 255, targeted: bool = False
) -> Tensor:
    """Fast gradient sign method (Goodfellow et al. 2015, arXiv 1412.6572): one step of size eps, L-infinity.

    Args:
        backbone: A backbone with a classifier.
        images: (N, 3, H, W) in [0, 1].
        labels: True classes (N,), or the wanted classes when targeted.
        eps: Largest change of a pixel, in [0, 1] units.
        targeted: Move towards `labels` instead of away from them.

    Returns:
        Images (N, 3, H, W) in [0, 1], within eps of the originals.

    Raises:
        UserError: If the images leave [0, 1], eps is negative, or the labels do not fit.
    """
    _check(images, eps)
    return (images + eps * _ascent(backbone, images, labels, targeted).sign()).clamp(0, 1).detach()


def pgd(
    backbone: Backbone,
    images: Tensor,
    labels: Tensor | Sequence[int],
    eps: float = 8 / 255,
    steps: int = 10,
    step_size: float | None = None,
    norm: Norm = "linf",
    targeted: bool = False,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """Projected gradient descent (Madry et al. 2018, arXiv 1706.06083), every image on its own.

    Args:
        backbone: A backbone with a classifier.
        images: (N, 3, H, W) in [0, 1].
        labels: True classes (N,), or the wanted classes when targeted.
        eps: Radius of the ball, in [0, 1] pixel units; for "l2" the length of the whole change.
        steps: Gradient steps.
        step_size: Length of one step in the norm; None takes 2.5 eps / steps.
        norm: "linf" or "l2".
        targeted: Move towards `labels` instead of away from them.
        seeds: N seeds of a random start, uniform in the ball; None starts at the images.

    Returns:
        Images (N, 3, H, W) in [0, 1], within eps of the originals: the last iterate.

    Raises:
        UserError: As `fgsm`, or if the norm, the steps or the number of seeds is wrong.
    """
    _check(images, eps)
    if norm not in _BALLS or steps < 1 or (step_size is not None and step_size <= 0):
        raise UserError(f"PGD needs norm linf or l2 (not {norm!r}), steps >= 1 and step_size > 0.")
    if seeds is not None and len(seeds) != len(images):
        raise UserError(f"{len(images)} images need as many seeds, not {len(seeds)}.")
    direction, project, start = _BALLS[norm]
    originals, size = images.detach(), 2.5 * eps / steps if step_size is None else step_size
    attacked = originals
    if seeds is not None and len(seeds):
        shape = tuple(originals.shape[1:])
        rows = [start(torch.Generator().manual_seed(int(seed)), shape) for seed in seeds]
        attacked = (originals + eps * torch.stack(rows).to(originals)).clamp(0, 1)
    for _ in range(steps):
        moved = attacked + size * direction(_ascent(backbone, attacked, labels, targeted)) - originals
        # Cutting to [0, 1] last brings a point nearer to its original, so it stays in the ball.
        attacked = (originals + project(moved, eps)).clamp(0, 1)
    return attacked
