"""Bootstrap intervals: every figure leaves this package as {"value", "low", "high", "n"}."""

from __future__ import annotations

import logging
from typing import NotRequired, TypedDict

import torch
from scipy.special import stdtrit
from torch import Tensor

from featinv.errors import UserError

log = logging.getLogger(__name__)

_CHUNK = 2**22  # resampled values held at a time, so that memory does not grow with the number of images


class Interval(TypedDict):
    """A figure, its 95 % interval, the number of images behind it; `n_nonfinite` only when not 0."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    n_nonfinite: NotRequired[int]


def _quantiles(samples: Tensor, level: float) -> tuple[float, float]:
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=samples.dtype)
    low, high = torch.quantile(samples, tails).tolist()
    return low, high


def bootstrap_mean(values: Tensor, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean of per-image values with its bootstrap percentile interval (Efron 1979).

    Values that are not finite are left out of the mean, counted in `n_nonfinite` and logged. With none left,
    value and bounds are None.

    Args:
        values: (N,) per-image values.
        resamples: Number of resamples of the N images, drawn with replacement.
        level: Coverage of the interval.
        seed: Seed of the resampling.

    Returns:
        {"value", "low", "high", "n"}, n = number of finite values, and `n_nonfinite` where it is not 0.

    Raises:
        UserError: If there are no values at all.
    """
    if values.numel() == 0:
        raise UserError("There are no images to average over; check the folder or the filter that chose them.")
    values = values.detach().double().cpu().flatten()
    finite = values[values.isfinite()]
    n, n_nonfinite = len(finite), len(values) - len(finite)
    if n == 0:
        interval = Interval(value=None, low=None, high=None, n=0)
    else:
        generator = torch.Generator().manual_seed(seed)
        means, per_chunk = [], max(1, _CHUNK // n)
        for start in range(0, resamples, per_chunk):
            picks = torch.randint(n, (min(per_chunk, resamples - start), n), generator=generator)
            means.append(finite[picks].mean(1))
        low, high = _quantiles(torch.cat(means), level)
        interval = Interval(value=float(finite.mean()), low=low, high=high, n=n)
    if n_nonfinite:
        log.warning("%d of %d values are not finite and are left out of the mean", n_nonfinite, len(values))
        interval["n_nonfinite"] = n_nonfinite
    return interval


def bootstrap_r2(
    truth: Tensor, predicted: Tensor, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Coefficient of determination, 1 - mean squared error / variance, with its percentile interval.

    Args:
        truth: (N,) true values.
        predicted: (N,) predictions.
        resamples: Number of resamples of the N images, drawn with replacement.
        level: Coverage of the interval.
        seed: Seed of the resampling.

    Returns:
        The interval; value and bounds are None where the true values do not vary.
    """
    truth, predicted = truth.double(), predicted.double()
    n, squared_error = len(truth), (predicted - truth).square()
    if n < 2 or bool((truth == truth[0]).all()):
        return Interval(value=None, low=None, high=None, n=n)
    value = float(1 - squared_error.mean() / truth.var(correction=0))
    generator, values, per_chunk = torch.Generator().manual_seed(seed), [], max(1, _CHUNK // n)
    for start in range(0, resamples, per_chunk):
        picks = torch.randint(n, (min(per_chunk, resamples - start), n), generator=generator)
        drawn = truth[picks]
        varies = (drawn != drawn[:, :1]).any(1)
        values.append(1 - squared_error[picks][varies].mean(1) / drawn[varies].var(1, correction=0))
    r2 = torch.cat(values)
    low, high = _quantiles(r2, level) if len(r2) else (None, None)
    return Interval(value=value, low=low, high=high, n=n)


def resample_indices(n_real: int, n_fake: int, *, paired: bool, resamples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Index vectors of the resampled sets.

    Args:
        n_real: Number of originals.
        n_fake: Number of reconstructions.
        paired: Whether image i of both sets belongs together; then both are drawn by the same indices.
        resamples: Number of resamples.
        seed: Seed of the resampling.

    Returns:
        (resamples, n_real) and (resamples, n_fake).
    """
    generator = torch.Generator().manual_seed(seed)
    real = torch.randint(n_real, (resamples, n_real), generator=generator)
    return real, real if paired else torch.randint(n_fake, (resamples, n_fake), generator=generator)


def resampled_interval(value: float, samples: Tensor, n: int, level: float = 0.95) -> Interval:
    """Interval of a distance between two sets from its resampled values.

    An image drawn twice makes a distance between sets larger, so the spread of the resamples is used and their mean is
    not. A distance costs too much for many of them, and percentiles of few are far too near together (of five they
    cover 69 % instead of 95 %): the bounds are value +- t s, Student's t for as many values as gave the deviation s.

    Args:
        value: The distance of the full sets.
        samples: (resamples,) distances of the resampled sets; those that are not finite, of a few images drawn again
            and again, are left out. Fewer than two give no bounds.
        n: Number of images of the smaller set.
        level: Coverage of the interval.

    Returns:
        {"value", "low", "high", "n"}.
    """
    samples = samples.double()[samples.isfinite()]
    if len(samples) < 2:
        return Interval(value=value, low=None, high=None, n=n)
    reach = float(stdtrit(len(samples) - 1, (1 + level) / 2)) * float(samples.std())
    return Interval(value=value, low=value - reach, high=value + reach, n=n)
