"""Feature consistency: the decoded picture's own features should be those that were given."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from featinv.backbones.base import Backbone
from featinv.diffusion.half import full_arithmetic
from featinv.training.adversary import Adversary
from featinv.training.teacher import LiftedMaps, SecondLooks


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
    ) -> Tensor:
        """Return 1 - cosine, averaged over the rows that were judged; `losses` are those of `training_losses`."""
        ...


def _one_minus_cosine(features: Tensor, target: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(features.flatten(1), target.flatten(1)).mean()


def _moved(images: Tensor, shifts: Sequence[tuple[int, int]]) -> Tensor:
    """Each image (3, H, W) moved (down, right) by whole pixels, cyclically."""
    return torch.stack([image.roll(shift, (1, 2)) for image, shift in zip(images, shifts, strict=True)])


def _log_power(images: Tensor, band: int = 4, least: float = 1e-4) -> Tensor:
    """Log power spectra (N, 3, H / band, W / 2 / band), averaged over bands of frequencies; `least` hides rounding."""
    spectrum = torch.fft.rfft2(images - images.mean((2, 3), keepdim=True), norm="ortho")
    power = spectrum.abs().square()[..., : images.shape[-1] // 2]
    return (F.avg_pool2d(power, band) + least).log()


def _statistics_distance(drawn: Tensor, originals: Tensor) -> Tensor:
    """Mean square of the channels' differences in mean and deviation over positions, each averaged over the maps."""
    scale = originals.std((0, 2, 3))
    scale = scale.clamp(min=0.01 * scale.mean())  # silent channels have none
    means = (drawn.mean((2, 3)) - originals.mean((2, 3))).mean(0)
    deviations = (_deviations(drawn) - _deviations(originals)).mean(0)
    return (torch.stack([means, deviations]) / scale).square().mean()


def _deviations(maps: Tensor) -> Tensor:
    """Standard deviation of each channel over positions (N, C), with a gradient also where a channel is silent."""
    return (maps.var((2, 3), correction=0) + 1e-6).sqrt()


class EstimateConsistency:
    """Judge the one-step estimate of the clean latents (the reward of ControlNet++, arXiv 2404.07987, section 3.2).

    Args:
        weight: Weight of 1 - cosine.
        rows: Images of a batch that are judged, those with the least noise first; none whose features were dropped.
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
    ) -> Tensor:
        """Return 1 - cosine of the decoded estimates; 0 if every row is too noisy, or was not told its features."""
        timesteps, estimate = losses["timesteps"], losses["estimate"]
        limit = self.max_timestep * inverter.prior.scheduler.config.num_train_timesteps
        rows = timesteps.argsort()
        rows = rows[(timesteps <= limit)[rows] & ~losses["dropped"][rows]][: self.rows]
        if not len(rows):
            return estimate.sum() * 0.0
        drawn = inverter.prior.first_stage.decode(estimate[rows].float())
        with full_arithmetic(drawn.device):
            return _one_minus_cosine(backbone(drawn), features[rows])


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
        spectrum_weight: Of the squared distance between the log power spectra of picture and original: textures that
            the network overlooks should be as strong as the original's, and nothing regular should stand out. (Durall
            et al. 2020, arXiv 2003.01826, with bands instead of circles, in which a grid's peak would not show.)
        earlier: Layer -> weight of the distance to the original's map there. Very unlike pictures have nearly one last
            map, among them some that only this network takes for the original; an earlier layer tells them apart, and
            is easier to descend on. (Dosovitskiy & Brox 2016, arXiv 1602.02644, train on such distances.)
        statistics: Layer -> weight of the squared difference, in the mean of a process's rows, between each channel's
            mean and deviation over positions in drawn pictures and in originals, in units of the channel's deviation.
            What is missing in every picture, contrast or texture, is little in each and shows in the mean. (The
            moments of Li et al. 2015, arXiv 1502.02761, in the mean of paired pictures.)
        adversary: Tells what is drawn from photographs (`Adversary`), whatever the features say.
        lifted: Draws the maps that some rows are given instead of their own (`LiftedMaps`). Such a row is not moved,
            and what is drawn for it is compared with that map alone: the original is only one of many that it fits.
        second_looks: Tells some rows what a first draw of them lacked (`SecondLooks`).
    """

    def __init__(
        self,
        weight: float = 0.2,
        rows: int = 8,
        grad_steps: int = 1,
        num_inference_steps: int | None = None,
        last_weight: float = 0.0,
        jitter: int = 0,
        spectrum_weight: float = 0.0,
        earlier: Mapping[str, float] | None = None,
        statistics: Mapping[str, float] | None = None,
        adversary: Adversary | None = None,
        lifted: LiftedMaps | None = None,
        second_looks: SecondLooks | None = None,
    ):
        self.weight, self.rows, self.grad_steps = weight, rows, grad_steps
        self.num_inference_steps, self.last_weight = num_inference_steps, last_weight
        self.jitter, self.spectrum_weight, self.earlier = jitter, spectrum_weight, dict(earlier or {})
        self.statistics, self.adversary, self.lifted = dict(statistics or {}), adversary, lifted
        self.second_looks = second_looks

    def __call__(
        self,
        inverter: Any,
        backbone: Backbone,
        losses: dict[str, Tensor],
        features: Tensor,
        seeds: Sequence[int],
    ) -> Tensor:
        """Return 1 - cosine of the drawn pictures, and the weighted parts that were asked for."""
        features, seeds = features[: self.rows].float(), seeds[: self.rows]
        told, shifts, first = features, [self._shift(seed) for seed in seeds], 0
        if self.lifted is not None:
            lifted = self.lifted(features, seeds)
            first = len(lifted)
            told, shifts = torch.cat([lifted, features[first:]]), [(0, 0)] * first + shifts[first:]
        wanted, steps = told, self.num_inference_steps
        if self.second_looks is not None:
            told, wanted = self.second_looks(
                inverter, backbone, told, features, seeds, self.lifted, first, num_inference_steps=steps
            )
        latents = inverter.draw(told, seeds, num_inference_steps=steps, grad_steps=self.grad_steps)
        drawn = inverter.prior.first_stage.decode(latents.float())
        # Differences of maps are small beside the maps; and CPUs are slow at half-precision backbones.
        with full_arithmetic(drawn.device):
            return self._judge(inverter, backbone, losses, wanted, drawn, shifts, first)

    def _judge(
        self,
        inverter: Any,
        backbone: Backbone,
        losses: dict[str, Tensor],
        features: Tensor,
        drawn: Tensor,
        shifts: list[tuple[int, int]],
        first: int,
    ) -> Tensor:
        """The distances of drawn pictures (N, 3, H, W), moved by `shifts`, from features (N, C, h, w).

        From row `first` on they are also compared with their originals.
        """
        further, moved = self._further(), [row for row, shift in enumerate(shifts) if any(shift)]
        judged = _moved(drawn, shifts) if moved else drawn
        own, *maps = backbone.maps(judged, [backbone.layer, *further])
        originals = shown = drawn.detach()
        targets: list[Tensor] = []
        if moved or further or self.spectrum_weight or self.adversary is not None:
            originals = self._originals(inverter, losses)
            with torch.no_grad():
                shown = _moved(originals, shifts)
                target, *targets = backbone.maps(shown, [backbone.layer, *further])
            rows = torch.tensor(moved, dtype=torch.long, device=features.device)
            features = features.index_copy(0, rows, target[rows])
        distance = _one_minus_cosine(own, features) + self._last_distance(backbone, own, features)
        pairs = dict(zip(further, zip(maps, targets, strict=True), strict=True))
        for layer, weight in self.earlier.items():
            distance = distance + weight * _one_minus_cosine(*(x[first:] for x in pairs[layer]))
        for layer, weight in self.statistics.items():
            distance = distance + weight * _statistics_distance(*pairs[layer])
        if self.spectrum_weight:
            difference = _log_power(drawn[first:]) - _log_power(originals[first:])
            distance = distance + self.spectrum_weight * difference.square().mean()
        if self.adversary is not None:
            self.adversary.build(backbone)
            seen = [pairs[name] for name in self.adversary.maps]
            term = self.adversary(judged, [x for x, _ in seen], shown, [x for _, x in seen])
            distance = distance + self.adversary.weight * term
        return distance

    def _last_distance(self, backbone: Backbone, drawn: Tensor, features: Tensor) -> Tensor | float:
        """The same distance in the network's last map, of maps in the inverted layer."""
        if not self.last_weight:
            return 0.0
        with torch.no_grad():
            target = backbone.final_from(features)
        return self.last_weight * _one_minus_cosine(backbone.final_from(drawn), target)

    def _originals(self, inverter: Any, losses: dict[str, Tensor]) -> Tensor:
        """The pictures themselves (N, 3, H, W), or what the first stage makes of their latents."""
        if "images" in losses:
            return losses["images"][: self.rows]
        with torch.no_grad():
            return inverter.prior.first_stage.decode(losses["latents"][: self.rows])

    def _further(self) -> list[str]:
        """Layers that are looked at besides the inverted one."""
        judged = self.adversary.maps if self.adversary is not None else []
        return list(dict.fromkeys([*self.earlier, *self.statistics, *judged]))

    def _shift(self, seed: int) -> tuple[int, int]:
        """(down, right) of one picture in pixels; none for every other one."""
        rng = random.Random(seed)
        if not self.jitter or rng.random() < 0.5:
            return 0, 0
        return rng.randint(-self.jitter, self.jitter), rng.randint(-self.jitter, self.jitter)
