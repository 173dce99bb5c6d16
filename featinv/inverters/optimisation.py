"""Inversion by optimisation (Mahendran & Vedaldi 2015, arXiv 1412.0035): the classic baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from featinv.backbones.base import Backbone
from featinv.diffusion.prior import DiffusionPrior, load_prior
from featinv.errors import UserError
from featinv.image import resize, seeded_noise
from featinv.inverters.parametrisations import PARAMETRISATIONS, parametrise, shaken
from featinv.inverters.regularisers import Regulariser

Progress = Callable[[int, Tensor], None]
OPTIMIZERS = ("adam", "lbfgs")


def _half_cosine(share: float) -> float:
    """1 at share 0, falling to 0 at share 1."""
    return (1 + math.cos(math.pi * share)) / 2


class OptimizationInverter:
    """Gradient descent on a picture until its features match.

    Minimises ||m (phi(x) - phi_0)||^2 / ||m phi_0||^2 + R(x), m an optional mask, every image on its own: neither batch
    size nor order changes a result.

    Args:
        backbone: Whose features are matched; differentiable in the image.
        size: Side of the pictures in pixels.
        steps: Gradient steps (of L-BFGS: outer iterations).
        learning_rate: Adam's at the first step, in units of the parametrisation, from where it falls to 0 along half a
            cosine; L-BFGS's first step length.
        tv_weight: Weight of the total variation.
        tv_beta: Its exponent.
        l2_weight: Pull towards mid-grey.
        regulariser: Instead of the three above.
        parametrisation: "pixel", "fourier" or "latent" (through the first stage of `prior`).
        prior: A prior or its name, for "latent".
        optimizer: "adam" or "lbfgs" (one image at a time).
        jitter: Shift by up to so many pixels at every step.
        scale: Resize by up to this share, up or down, at every step.
        start: "noise" or "grey"; `invert` also takes pictures to start from.
        batch_size: Images optimised at a time (memory, not result).

    Raises:
        UserError: If an argument is out of range.
    """

    def __init__(
        self,
        backbone: Backbone,
        size: int = 64,
        steps: int = 500,
        learning_rate: float = 0.05,
        tv_weight: float = 10.0,
        tv_beta: float = 2.0,
        l2_weight: float = 0.02,
        regulariser: Regulariser | None = None,
        parametrisation: str = "pixel",
        prior: DiffusionPrior | str | None = None,
        optimizer: str = "adam",
        jitter: int = 0,
        scale: float = 0.0,
        start: str = "noise",
        batch_size: int = 32,
    ):
        if steps < 1 or size < 1 or batch_size < 1 or jitter < 0 or not 0 <= scale < 1:
            raise UserError("steps, size and batch_size must be at least 1, jitter at least 0, scale in [0, 1).")
        for name, value, valid in (
            ("parametrisation", parametrisation, PARAMETRISATIONS),
            ("optimizer", optimizer, OPTIMIZERS),
            ("start", start, ("noise", "grey")),
        ):
            if value not in valid:
                raise UserError(f"{name} must be one of {', '.join(valid)}, not {value!r}.")
        if parametrisation == "latent" and prior is None:
            raise UserError("the latent parametrisation needs a prior, whose first stage decodes the latents.")
        self.backbone, self.size, self.steps, self.learning_rate = backbone, size, steps, learning_rate
        self.regulariser = regulariser or Regulariser(tv_weight, tv_beta, l2_weight=l2_weight)
        self.parametrisation, self.optimizer = parametrisation, optimizer
        self.start, self.batch_size = start, batch_size
        self.jitter, self.scale = jitter, scale
        loaded = load_prior(prior) if isinstance(prior, str) else prior
        self._prior = loaded if parametrisation == "latent" else None

    def invert(
        self,
        features: Tensor,
        *,
        seeds: Sequence[int],
        callback: Progress | None = None,
        mask: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Find one image for each row of features.

        Args:
            features: (N, C, H, W) from the same backbone.
            seeds: N seeds of the starting noise.
            callback: Called as callback(step, images) after every step.
            mask: Weights in [0, 1] that broadcast to (N, C, H, W): which channels or positions must match.
            start: Pictures (N, 3, H, W) in [0, 1] to start from.

        Returns:
            Images (N, 3, size, size) in [0, 1].
        """
        if len(seeds) != len(features):
            raise UserError(f"{len(features)} feature maps need as many seeds, not {len(seeds)}.")
        if self._prior is not None:
            self._prior.first_stage.to(features.device)
        begin = self._start(seeds, start).to(features)
        weights = None if mask is None else mask.to(features).expand_as(features)
        step = 1 if self.optimizer == "lbfgs" else self.batch_size
        parts = []
        for i in range(0, len(features), step):
            rows = slice(i, i + step)
            chosen = None if weights is None else weights[rows]
            parts.append(self._descend(features[rows], begin[rows], chosen, callback))
        return torch.cat(parts)

    def _start(self, seeds: Sequence[int], start: Tensor | None) -> Tensor:
        if start is not None:
            return resize(start, self.size)
        noise = seeded_noise(seeds, (3, self.size, self.size))
        return (0.5 + (0.1 if self.start == "noise" else 0.001) * noise).clamp(0, 1)

    def _objective(self, images: Tensor, features: Tensor, mask: Tensor | None, step: int) -> Tensor:
        difference, wanted = self.backbone(shaken(images, step, self.jitter, self.scale)) - features, features
        if mask is not None:
            difference, wanted = difference * mask, wanted * mask
        energy = wanted.square().flatten(1).sum(1).clamp(min=1e-12)
        # A sum, not a mean: Adam's step on one image must not depend on how many others there are.
        return (difference.square().flatten(1).sum(1) / energy + self.regulariser(images)).sum()

    def _descend(self, features: Tensor, start: Tensor, mask: Tensor | None, callback: Progress | None) -> Tensor:
        first_stage = None if self._prior is None else self._prior.first_stage
        free = parametrise(self.parametrisation, start, first_stage)
        optimizer: torch.optim.Optimizer
        if self.optimizer == "adam":
            optimizer = torch.optim.Adam([free.tensor], lr=self.learning_rate)
        else:
            optimizer = torch.optim.LBFGS(
                [free.tensor],
                lr=self.learning_rate,
                max_iter=1,
                history_size=20,
                line_search_fn="strong_wolfe",
                tolerance_grad=0.0,  # the normalised objective is small long before it is done
                tolerance_change=0.0,
            )
        with torch.enable_grad():
            for step in range(self.steps):

                def closure(step: int = step) -> float:
                    optimizer.zero_grad()
                    loss = self._objective(free.images(), features, mask, step)
                    loss.backward()  # type: ignore[no-untyped-call]
                    return float(loss.detach())

                if self.optimizer == "adam":
                    # At a constant rate the last steps still jump about the optimum, which shows as grain.
                    optimizer.param_groups[0]["lr"] = self.learning_rate * _half_cosine(step / self.steps)
                optimizer.step(closure)
                free.project()
                if callback is not None:
                    callback(step, free.images().detach().clone())
        return free.images().detach().clamp(0, 1)
