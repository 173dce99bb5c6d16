"""Activation maximisation: a picture that a unit, a channel, a class or a direction answers to most."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from featinv.attribution.redirected import redirected_features, redirected_logits
from featinv.backbones.base import Backbone
from featinv.diffusion.objective_guidance import Objective
from featinv.diffusion.prior import DiffusionPrior
from featinv.errors import UserError
from featinv.image import seeded_noise
from featinv.inverters.parametrisations import parametrise, shaken
from featinv.inverters.regularisers import Regulariser


def _check_channel(backbone: Backbone, channel: int) -> None:
    if not 0 <= channel < backbone.spec.channels:
        raise UserError(f"channel must be 0 to {backbone.spec.channels - 1}, not {channel}.")


def channel_objective(backbone: Backbone, channel: int) -> Objective:
    """Mean of one channel of the feature map over all positions."""
    _check_channel(backbone, channel)
    return lambda images: redirected_features(backbone, images)[:, channel].mean((1, 2))


def unit_objective(backbone: Backbone, channel: int, row: int | None = None, column: int | None = None) -> Objective:
    """One channel at one position (the centre unless given)."""
    _check_channel(backbone, channel)
    spec = backbone.spec
    y, x = spec.height // 2 if row is None else row, spec.width // 2 if column is None else column
    if not (0 <= y < spec.height and 0 <= x < spec.width):
        raise UserError(f"position ({y}, {x}) is outside the {spec.height} x {spec.width} map.")
    return lambda images: redirected_features(backbone, images)[:, channel, y, x]


def class_objective(backbone: Backbone, index: int) -> Objective:
    """The logit of one class."""
    with torch.no_grad():
        size = backbone.input_size
        classes = backbone.logits(torch.zeros(1, 3, size, size, device=backbone.mean.device)).shape[1]
    if not 0 <= index < classes:
        raise UserError(f"class must be 0 to {classes - 1}, not {index}.")
    return lambda images: redirected_logits(backbone, images)[:, index]


def direction_objective(backbone: Backbone, direction: Tensor) -> Objective:
    """Mean over positions of the feature map's dot product with a direction (C,), taken at unit length."""
    if direction.shape != (backbone.spec.channels,) or float(direction.norm()) == 0:
        raise UserError(f"a direction needs {backbone.spec.channels} numbers, not all 0; got {tuple(direction.shape)}.")
    unit = (direction / direction.norm()).to(backbone.mean.device)
    return lambda images: torch.einsum("nchw,c->nhw", redirected_features(backbone, images), unit).mean((1, 2))


def maximise(
    objective: Objective,
    seeds: Sequence[int],
    *,
    size: int = 128,
    steps: int = 256,
    learning_rate: float = 0.05,
    parametrisation: str = "fourier",
    regulariser: Regulariser | None = None,
    prior: DiffusionPrior | None = None,
    jitter: int = 8,
    scale: float = 0.1,
    callback: Callable[[int, Tensor], None] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Gradient ascent on an objective (Erhan et al. 2009; Olah et al. 2017), one picture a seed.

    Args:
        objective: Images -> scores (N,); see the functions above.
        seeds: Of the starting noise; image i depends on its seed alone.
        size: Side of the pictures in pixels (the prior's own where there is one).
        steps: Gradient steps.
        learning_rate: Adam's, in units of the parametrisation.
        parametrisation: "pixel", "fourier" or "latent" (through the first stage of `prior`).
        regulariser: Penalties; None takes total variation 0.05 and L2 0.05.
        prior: For "latent".
        jitter: Shift by up to so many pixels at every step.
        scale: Resize by up to this share at every step.
        callback: Called as callback(step, images) after every step.
        device: Where the objective's network is; None takes the prior's, without one the CPU.

    Returns:
        Images (N, 3, size, size) in [0, 1], on that device.

    Raises:
        UserError: If the parametrisation is unknown or lacks its prior.
    """
    size = prior.size if prior is not None else size
    if device is None:
        device = "cpu" if prior is None else prior.text["prompt"].device
    start = (0.5 + 0.05 * seeded_noise(seeds, (3, size, size))).clamp(0, 1).to(device)
    free = parametrise(parametrisation, start, prior.first_stage if prior is not None else None)
    penalty = regulariser or Regulariser(tv_weight=0.05, l2_weight=0.05)
    optimizer = torch.optim.Adam([free.tensor], lr=learning_rate)
    with torch.enable_grad():
        for step in range(steps):
            images = free.images()
            score = objective(shaken(images, step, jitter, scale))
            optimizer.zero_grad()
            (penalty(images) - score).sum().backward()
            optimizer.step()
            free.project()
            if callback is not None:
                callback(step, free.images().detach().clone())
    return free.images().detach().clamp(0, 1)
