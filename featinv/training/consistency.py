"""Feature consistency: the decoded picture's own features should be those that were given."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from featinv.backbones.base import Backbone


class Consistency(Protocol):
    """A term beside the inverter's own loss."""

    weight: float

    def __call__(
        self,
        inverter: Any,
        backbone: Backbone,
        losses: dict[str, Tensor],
        features: Tensor,
        seeds: Sequence[int],
        images: Tensor | None = None,
    ) -> Tensor:
        """Return 1 - cosine, averaged over the rows that were judged; `images` (N, 3, H, W) if they are at hand."""
        ...


def _distance(backbone: Backbone, images: Tensor, features: Tensor, last_weight: float = 0.0) -> Tensor:
    drawn = backbone(images)
    distance = _one_minus_cosine(drawn, features)
    if last_weight:
        with torch.no_grad():
            target = backbone.final_from(features)
        distance = distance + last_weight * _one_minus_cosine(backbone.final_from(drawn), target)
    return distance


def _one_minus_cosine(features: Tensor, target: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(features.flatten(1), target.flatten(1)).mean()


def _moved(images: Tensor, down: int, right: int) -> Tensor:
    """Images moved by whole pixels, mirrored at the edges."""
    margin, (height, width) = max(abs(down), abs(right)), images.shape[2:]
    padded = F.pad(images, (margin,) * 4, mode="reflect")
    return padded[:, :, margin - down : margin - down + height, margin - right : margin - right + width]


def _moved_each(images: Tensor, shifts: Sequence[tuple[int, int]]) -> Tensor:
    return torch.cat([_moved(image, *shift) for image, shift in zip(images.split(1), shifts, strict=True)])


class EstimateConsistency:
    """Judge the one-step estimate of the clean latents (the reward of ControlNet++, arXiv 2404.07987, section 3.2).

    Args:
        weight: Weight of 1 - cosine.
        rows: Images of a batch that are judged, those with the least noise first.
        max_timestep: Above it the estimate is too blurred to judge, as a share of all timesteps.
    """

    def __init__(self, weight: float = 0.2, rows: int = 16, max_timestep: float = 0.6):
        self.weight, self.rows, self.max_timestep = weight, rows, max_timestep

    def __call__(
        self,
        inverter: Any,
        backbone: Backbone,
        losses: dict[str, Tensor],
        features: Tensor,
        seeds: Sequence[int],
        images: Tensor | None = None,
    ) -> Tensor:
        """Return 1 - cosine of the decoded estimates; 0 if every row is too noisy."""
        timesteps, estimate = losses["timesteps"], losses["estimate"]
        limit = self.max_timestep * inverter.prior.scheduler.config.num_train_timesteps
        rows = timesteps.argsort()[: self.rows]
        rows = rows[timesteps[rows] <= limit]
        if not len(rows):
            return estimate.sum() * 0.0
        return _distance(backbone, inverter.prior.first_stage.decode(estimate[rows].float()), features[rows])


class SampleConsistency:
    """Judge what sampling really draws: the gradient goes through the last steps alone (DRaFT-K, arXiv 2309.17400).

    Unlike the one-step estimate, which starts from a noised original, this sees the inverter's own mistakes.

    Args:
        weight: Weight of 1 - cosine.
        rows: Images of a batch that are drawn and judged.
        grad_steps: Sampling steps that the gradient goes through.
        num_inference_steps: Sampling steps; None takes the inverter's own.
        last_weight: Of the same distance in the network's last map, beside that of an earlier layer. What the last map
            sees is decided by small parts of an earlier one.
        jitter: Every other picture and its original are moved by up to so many pixels before they are judged. A
            network samples its maps on a grid, and grain that is fixed to that grid can please it; moved, it cannot.
            (Jitter as in activation maximisation, Olah et al. 2017.)
    """

    def __init__(
        self,
        weight: float = 0.2,
        rows: int = 8,
        grad_steps: int = 1,
        num_inference_steps: int | None = None,
        last_weight: float = 0.0,
        jitter: int = 0,
    ):
        self.weight, self.rows, self.grad_steps = weight, rows, grad_steps
        self.num_inference_steps, self.last_weight, self.jitter = num_inference_steps, last_weight, jitter

    def __call__(
        self,
        inverter: Any,
        backbone: Backbone,
        losses: dict[str, Tensor],
        features: Tensor,
        seeds: Sequence[int],
        images: Tensor | None = None,
    ) -> Tensor:
        """Return 1 - cosine of the drawn pictures, and `last_weight` times that in the last map."""
        features, seeds = features[: self.rows], seeds[: self.rows]
        latents = inverter.draw(
            features, seeds, num_inference_steps=self.num_inference_steps, grad_steps=self.grad_steps
        )
        first_stage = inverter.prior.first_stage
        drawn = first_stage.decode(latents.float())
        shifts = {row: shift for row, seed in enumerate(seeds) if (shift := self._shift(seed)) != (0, 0)}
        if rows := list(shifts):
            with torch.no_grad():
                original = first_stage.decode(losses["latents"][rows]) if images is None else images[rows]
                target = backbone(_moved_each(original, list(shifts.values()))).float()
            features = features.clone()
            features[rows] = target
            drawn = _moved_each(drawn, [self._shift(seed) for seed in seeds])
        return _distance(backbone, drawn, features, self.last_weight)

    def _shift(self, seed: int) -> tuple[int, int]:
        """(down, right) of one picture in pixels; none for every other one."""
        rng = random.Random(seed)
        if not self.jitter or rng.random() < 0.5:
            return 0, 0
        return rng.randint(-self.jitter, self.jitter), rng.randint(-self.jitter, self.jitter)
