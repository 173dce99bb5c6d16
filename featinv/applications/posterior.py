"""Posterior maps: where K samples of one feature map agree was reconstructed, where they differ was invented."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from featinv.applications.batches import Progress, decode, encode
from featinv.backbones.base import Backbone
from featinv.errors import UserError
from featinv.image import resize
from featinv.inverters.base import Inverter
from featinv.inverters.reconstruct import sample_seed
from featinv.metrics.features import feature_cosine
from featinv.metrics.intervals import Interval, bootstrap_mean


def draw_samples(
    inverter: Inverter,
    features: Tensor,
    samples: int,
    ids: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Tensor:
    """K pictures of each feature map.

    Args:
        inverter: Any.
        features: (N, C, H, W).
        samples: K, at least 2.
        ids: Of the N images; sample k of an image follows from (seed, id, k), as in sample.py. None numbers them.
        seed: Of all samples.
        batch_size: Pictures drawn at a time.
        progress: Told after every batch.

    Returns:
        (N, K, 3, H', W') in [0, 1].

    Raises:
        UserError: If there are fewer than two samples.
    """
    if samples < 2:
        raise UserError(f"a posterior map needs at least two samples, not {samples}.")
    names = [str(i) for i in range(len(features))] if ids is None else list(ids)
    seeds = [sample_seed(seed, name, k) for name in names for k in range(samples)]
    images = decode(inverter, features.repeat_interleave(samples, 0), seeds, batch_size, progress)
    return images.unflatten(0, (len(features), samples))


def pixel_map(samples: Tensor) -> Tensor:
    """Deviation over the samples (N, K, 3, H, W), root mean square over colours: (N, 1, H, W) in [0, 1]."""
    return samples.double().var(1).mean(1, keepdim=True).sqrt().float()


def perceptual_map(samples: Tensor, backbone: Backbone, batch_size: int = 64) -> Tensor:
    """How far the samples' features differ at each position, relative to the features' own size.

    sqrt(sum_c var_k phi_c / sum_c mean_k phi_c^2): 0 where all samples look alike to the backbone, near 1 where they
    have nothing in common.

    Args:
        samples: (N, K, 3, H, W) in [0, 1].
        backbone: Any; one that the inverter never saw tells invention from what is merely lost on the inverted one.
        batch_size: Pictures at a time.

    Returns:
        (N, 1, H, W), resized from the backbone's grid to the pictures.
    """
    features = encode(backbone, samples.flatten(0, 1), batch_size).double().unflatten(0, samples.shape[:2])
    energy = features.square().mean(1).sum(1, keepdim=True).clamp(min=1e-30)
    spread = (features.var(1, correction=0).sum(1, keepdim=True) / energy).sqrt().float()
    return resize(spread, (samples.shape[-2], samples.shape[-1]))


def sample_cosines(samples: Tensor, features: Tensor, backbone: Backbone, batch_size: int = 64) -> Tensor:
    """Feature cosine (N, K) of each sample (N, K, 3, H, W) with the features (N, C, H, W) it was drawn from."""
    again = encode(backbone, samples.flatten(0, 1), batch_size)
    return feature_cosine(features.cpu().repeat_interleave(samples.shape[1], 0), again).unflatten(0, samples.shape[:2])


@dataclass(frozen=True)
class PixelIntervals:
    """Intervals mean +- factor * (deviation + floor) for every colour of every pixel, calibrated.

    Attributes:
        factor: Set on held-out images so that the expected share of values outside is at most 1 - level.
        floor: Added to the deviation, so that samples which agree exactly still have an interval; in [0, 1] units.
        level: The nominal coverage.
        images: How many images it was calibrated on.
    """

    factor: float
    floor: float
    level: float
    images: int

    def bounds(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds (N, 3, H, W) from samples (N, K, 3, H, W)."""
        centre, spread = _moments(samples, self.floor)
        return (centre - self.factor * spread).clamp(0, 1), (centre + self.factor * spread).clamp(0, 1)

    def coverage(self, truth: Tensor, samples: Tensor, seed: int = 0) -> Interval:
        """Share of values of the originals (N, 3, H, W) within the bounds, its interval by resampling images."""
        return bootstrap_mean((_residuals(truth, samples, self.floor) <= self.factor).double().mean(1), seed=seed)

    def width(self, samples: Tensor) -> Tensor:
        """Mean width (N,) of the intervals: coverage alone could be had by intervals that say nothing."""
        low, high = self.bounds(samples)
        return (high - low).flatten(1).mean(1)


def calibrate(truth: Tensor, samples: Tensor, level: float = 0.9, floor: float = 0.02) -> PixelIntervals:
    """Conformal risk control (Angelopoulos et al. 2022, arXiv 2208.02814) of the share of values outside.

    With residuals r = |x - mean| / (deviation + floor), the smallest factor for which
    n / (n + 1) share(r > factor) + 1 / (n + 1) <= 1 - level: for a new image that is exchangeable with the n images of
    the calibration, the expected share outside is then at most 1 - level. The image is the unit, not the pixel: pixels
    of one image are not exchangeable with those of another. With one value an image this is split conformal prediction.

    Args:
        truth: Originals (N, 3, H, W), held out from training.
        samples: (N, K, 3, H, W) drawn from their features.
        level: Nominal coverage.
        floor: See `PixelIntervals`.

    Raises:
        UserError: If there are too few images for the level.
    """
    residuals = _residuals(truth, samples, floor)
    return PixelIntervals(risk_factor(residuals, level), floor, level, len(residuals))


def risk_factor(residuals: Tensor, level: float) -> float:
    """The smallest factor of `calibrate` for residuals (n, M), M values of each of n images.

    Raises:
        UserError: If the level is not in (0, 1), or n < level / (1 - level).
    """
    count, values = residuals.shape
    if not 0 < level < 1:
        raise UserError(f"the level of an interval must lie between 0 and 1, not {level}.")
    # Rounding must not turn "exactly enough images" into "too few".
    outside = math.floor(((count + 1) * (1 - level) - 1) * values + 1e-9)
    if outside < 0:
        fewest = math.ceil(level / (1 - level) - 1e-9)
        raise UserError(f"{count} images cannot calibrate {level:.0%} intervals; take at least {fewest}.")
    return float(residuals.flatten().sort(descending=True).values[min(outside, count * values - 1)])


def _moments(samples: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    samples = samples.double()
    return samples.mean(1), samples.std(1) + floor


def _residuals(truth: Tensor, samples: Tensor, floor: float) -> Tensor:
    """(N, M) float64, one row for each image."""
    if truth.shape != samples[:, 0].shape:
        raise UserError(f"originals {tuple(truth.shape)} and samples {tuple(samples.shape)} do not belong together.")
    centre, spread = _moments(samples, floor)
    return ((truth.double() - centre).abs() / spread).flatten(1)
