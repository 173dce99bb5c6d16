"""Guidance by any differentiable score of a picture: the frozen prior draws, the objective decides what."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from featinv.diffusion.clean import clean_latents
from featinv.diffusion.controlled_unet import Conditions, ControlledUNet
from featinv.diffusion.first_stage import FirstStage
from featinv.diffusion.guidance import Guidance, NoGuidance
from featinv.errors import UserError

Objective = Callable[[Tensor], Tensor]
"""Images (N, 3, H, W) in [0, 1] (or whatever else is moved) -> a score (N,) to be raised."""

GRADIENT_PIXELS = 4 * 256**2
"""Pixels whose gradient is taken at a time; for it Stable Diffusion's decoder keeps 6 GB in float32."""


def pictures_together(pixels: int) -> int:
    """How many pictures of so many pixels have their gradient taken at a time, one at least."""
    return max(1, GRADIENT_PIXELS // pixels)


class ObjectiveGuidance:
    """Move each step's estimate of the clean latents uphill on an objective of the decoded picture.

    delta = strength * g / rms(g), where g is the gradient of the objective through the first stage at the one-step
    estimate (the "mean guidance" of training-free guidance, Ye et al. 2024, arXiv 2409.15761, section 3.2; the
    network itself is not differentiated, unlike in DPS, arXiv 2209.14687). A constant length in place of the raw
    gradient is DSG's remedy for steps that leave the manifold (Yang et al. 2024, arXiv 2402.03201). Rows whose gradient
    is not finite stay as they are and are counted; so do rows without any gradient, uncounted.

    Args:
        objective: Images -> scores; one row's score must not depend on the others. Called as objective(images, wanted)
            where `wanted` is given.
        first_stage: Decodes the estimate; frozen.
        scheduler: The schedule of the prior, and its kind of prediction.
        strength: Root mean square of one uphill step, in units of the latents' standard deviation.
        iterations: Uphill steps at each sampling step.
        interval: Noise levels where it acts, as fractions of the training timesteps. The least noisy steps are left
            to the prior, which then mends what the objective has put in against it.
        base: Guidance whose prediction is moved; None takes the conditional prediction.
        wanted: What the objective compares each picture with, (N, ...). The objective then sees `pictures_together` and
            their rows of it at a time, which bounds the memory; without, all pictures at once.

    Attributes:
        skipped: How many gradients of one image were not finite.

    Raises:
        UserError: If an argument is out of range.
    """

    def __init__(
        self,
        objective: Callable[..., Tensor],
        first_stage: FirstStage,
        scheduler: DDPMScheduler,
        strength: float = 0.1,
        iterations: int = 1,
        interval: Sequence[float] = (0.0, 1.0),
        base: Guidance | None = None,
        wanted: Tensor | None = None,
    ):
        if strength < 0 or iterations < 1:
            raise UserError(f"guidance needs strength >= 0 and iterations >= 1, not {strength} and {iterations}.")
        if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
            raise UserError(f"the guidance interval {list(interval)} must be two rising numbers in [0, 1].")
        self.objective, self.first_stage, self.scheduler = objective, first_stage, scheduler
        self.strength, self.iterations, self.interval = strength, iterations, tuple(interval)
        self.base: Guidance = base or NoGuidance()
        self.wanted = wanted
        self.skipped = 0

    def denoise(self, unet: ControlledUNet, noisy_latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """Return the guided model_pred (N, C, h, w): the contract of `Guidance`."""
        model_pred = self.base.denoise(unet, noisy_latents, timestep, conditions)
        return self.shift(model_pred, noisy_latents, timestep)

    def shift(self, model_pred: Tensor, noisy_latents: Tensor, timestep: Tensor) -> Tensor:
        """Change a prediction (N, C, h, w) so that its estimate of the clean latents moves uphill.

        From x0 = sqrt(a) x_t - sqrt(1 - a) v, a shift of x0 by delta changes v by -delta / sqrt(1 - a); from
        x0 = (x_t - sqrt(1 - a) eps) / sqrt(a) it changes eps by -delta sqrt(a) / sqrt(1 - a).

        Args:
            model_pred: Predicted velocity or noise.
            noisy_latents: x_t (N, C, h, w).
            timestep: () or (1,), the same for all rows.
        """
        step = int(timestep.flatten()[0])
        level = step / self.scheduler.config.num_train_timesteps
        if not self.strength or not self.interval[0] <= level <= self.interval[1]:
            return model_pred
        alpha, kind = self.scheduler.alphas_cumprod[step], self.scheduler.config.prediction_type
        clean = clean_latents(noisy_latents, model_pred, alpha, kind)
        delta = self._uphill(clean) - clean
        return model_pred - delta * ((1 if kind == "v_prediction" else float(alpha) ** 0.5) / float(1 - alpha) ** 0.5)

    def _uphill(self, clean: Tensor) -> Tensor:
        if self.wanted is None:
            return self._climbed(clean)
        together = pictures_together(clean.shape[2:].numel() * self.first_stage.factor**2)
        parts = zip(clean.split(together), self.wanted.split(together), strict=True)
        return torch.cat([self._climbed(*part) for part in parts])

    def _climbed(self, clean: Tensor, *wanted: Tensor) -> Tensor:
        # Not clamped while differentiating: a pixel out of range must be able to come back.
        def score(latents: Tensor) -> Tensor:
            return self.objective(self.first_stage.decode(latents, clamp=False), *wanted)

        clean, skipped = climb(clean, score, self.strength, self.iterations)
        self.skipped += skipped
        return clean


def climb(values: Tensor, score: Objective, strength: float, iterations: int) -> tuple[Tensor, int]:
    """Steps of one length along the gradient of a score.

    Args:
        values: (N, ...).
        score: Of values, (N,); one row's must not depend on the others.
        strength: Root mean square of a step.
        iterations: Steps.

    Returns:
        The moved values (N, ...), and how many gradients of one row were not finite; such rows stay as they are.
    """
    skipped = 0
    for _ in range(iterations):
        with torch.enable_grad():
            free = values.detach().clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(score(free).sum(), free)
        rows = (-1, *[1] * (values.ndim - 1))
        finite = gradient.flatten(1).isfinite().all(1)
        skipped += int((~finite).sum())
        gradient = torch.where(finite.view(rows), gradient, 0.0)
        size = gradient.flatten(1).square().mean(1).sqrt().view(rows)
        values = values + strength * gradient / size.clamp(min=1e-30)
    return values, skipped
