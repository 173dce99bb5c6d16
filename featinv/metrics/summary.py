"""From per-image values and embeddings to the figures of `metrics.json`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from torch import Tensor

from featinv.errors import UserError
from featinv.metrics import distribution
from featinv.metrics.intervals import Interval, bootstrap_mean, resample_indices, resampled_interval

log = logging.getLogger(__name__)

DistributionMetric = Callable[[Tensor, Tensor, int, int], Interval]


def _frechet(real: Tensor, fake: Tensor, resamples: int, seed: int) -> Interval:
    value, paired = distribution.frechet_distance(real, fake), len(real) == len(fake)
    picks = resample_indices(len(real), len(fake), paired=paired, resamples=resamples, seed=seed)
    samples = distribution.frechet_resampled(real, fake, *picks)
    return resampled_interval(value, samples, min(len(real), len(fake)))


def _kernel(real: Tensor, fake: Tensor, resamples: int, seed: int) -> Interval:
    paired = len(real) == len(fake)
    value = distribution.kernel_distance(real, fake, paired=paired, seed=seed)
    resamples = max(resamples, KERNEL_RESAMPLES) if resamples else 0
    picks = resample_indices(len(real), len(fake), paired=paired, resamples=resamples, seed=seed)
    samples = distribution.kernel_resampled(real, fake, *picks, paired=paired)
    return resampled_interval(value, samples, min(len(real), len(fake)))


def _precision(real: Tensor, fake: Tensor, resamples: int, seed: int) -> Interval:
    return bootstrap_mean(distribution.precision_recall(real, fake)[0], seed=seed)


def _recall(real: Tensor, fake: Tensor, resamples: int, seed: int) -> Interval:
    return bootstrap_mean(distribution.precision_recall(real, fake)[1], seed=seed)


def _identified(real: Tensor, fake: Tensor, resamples: int, seed: int) -> Interval:
    if len(real) != len(fake):
        return Interval(value=None, low=None, high=None, n=0)
    return bootstrap_mean(distribution.identification(real, fake), seed=seed)


DISTRIBUTION_METRICS: dict[str, DistributionMetric] = {
    "fd": _frechet,
    "kid": _kernel,
    "precision": _precision,
    "recall": _recall,
    "identified": _identified,
}
"""Distribution metrics: name -> function of (real, fake, resamples, seed) giving an interval."""

KERNEL_RESAMPLES = 200
"""At least so many for a kernel distance, if any: one pass serves them all."""

SMALLEST_SET = 4
"""Images below which no distribution metric is given: precision and recall look at the third neighbour."""


def metric_name(kind: str, network: str) -> str:
    """Name of a distribution metric: `fid` and `kid` for Inception, else as in `fd_mobilenetv2`."""
    if network == "inception":
        return "fid" if kind == "fd" else kind
    return f"{kind}_{network}"


def _summarise_distributions(
    network: str, real: Tensor, fake: Tensor, resamples: int, seed: int
) -> dict[str, Interval]:
    n = min(len(real), len(fake))
    n_nonfinite = sum(int((~rows.isfinite().all(1)).sum()) for rows in (real, fake))
    if n_nonfinite or n < SMALLEST_SET:
        log.error(
            "no distribution metric in %s: %d embeddings are not finite, %d images (at least %d are needed)",
            *(network, n_nonfinite, n, SMALLEST_SET),
        )
        missing = Interval(value=None, low=None, high=None, n=n)
        if n_nonfinite:
            missing["n_nonfinite"] = n_nonfinite
        return {metric_name(kind, network): missing for kind in DISTRIBUTION_METRICS}
    return {
        metric_name(kind, network): metric(real, fake, resamples, seed) for kind, metric in DISTRIBUTION_METRICS.items()
    }


def summarise(
    per_image: Mapping[str, Tensor],
    embeddings_real: Mapping[str, Tensor] | None = None,
    embeddings_fake: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    *,
    resamples: int = 1000,
    distribution_resamples: int = 50,
) -> dict[str, Interval]:
    """Turn values and embeddings into the figures of `metrics.json`.

    Two sets of equal size are taken as pairs and resampled together.

    Args:
        per_image: Metric -> (N,) values.
        embeddings_real: Network -> (N, D), originals.
        embeddings_fake: Network -> (M, D), reconstructions.
        seed: Seed of every resampling.
        resamples: Bootstrap resamples of a mean.
        distribution_resamples: Resamples of a Frechet or kernel distance; each resample of a Frechet distance
            costs as much as the distance. 0 leaves their bounds None.

    Returns:
        METRIC -> {"value", "low", "high", "n"}. Values that are not finite are counted in `n_nonfinite`; a
        distribution metric over embeddings that are not all finite is None, since leaving images out would
        flatter it.

    Raises:
        UserError: If a metric has no images or the two sides name different networks.
    """
    real, fake = embeddings_real or {}, embeddings_fake or {}
    if set(real) != set(fake):
        raise UserError("Originals and reconstructions are embedded by different networks; use the same for both.")
    figures = {name: bootstrap_mean(values, resamples=resamples, seed=seed) for name, values in per_image.items()}
    for network in real:
        figures |= _summarise_distributions(network, real[network], fake[network], distribution_resamples, seed)
    return figures
