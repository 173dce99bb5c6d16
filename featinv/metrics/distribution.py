"""Distances between two sets of images, in the embedding space of a named network.

Every function takes embeddings (N, D), so the network runs once per image whatever is computed from them. A
figure carries its network's name (`fd_mobilenetv2`); only Inception with its own weights earns the name
`fid`.
"""

from __future__ import annotations

import logging

import torch
import torchmetrics
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from featinv.errors import UserError

log = logging.getLogger(__name__)

SMALL_N = 2048
"""Below this many images a Fréchet distance says little: its bias falls only as 1/N."""

_BLOCK = 1024  # rows of a pairwise matrix held at a time, so that memory grows with N and not with N^2


def pooled(features: Tensor) -> Tensor:
    """Mean of a feature map over its positions: (N, C, H, W) -> (N, C)."""
    return features.flatten(2).mean(2)


def _checked(real: Tensor, fake: Tensor, minimum: int) -> tuple[Tensor, Tensor]:
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise UserError(
            f"Embeddings {tuple(real.shape)} and {tuple(fake.shape)} must both be (N, D), from one network."
        )
    if min(len(real), len(fake)) < minimum:
        raise UserError(f"This needs at least {minimum} images in both sets, not {len(real)} and {len(fake)}.")
    for name, rows in (("original", real), ("reconstruction", fake)):
        bad = int((~rows.isfinite().all(1)).sum())
        if bad:
            raise UserError(f"{bad} of {len(rows)} {name} embeddings are not finite; remake those images first.")
    return real.detach().double().cpu(), fake.detach().double().cpu()


def _covariance_factor(embeddings: Tensor) -> Tensor:
    """A with A^T A = covariance, with min(N, D) rows."""
    centred = (embeddings - embeddings.mean(0)) / (len(embeddings) - 1) ** 0.5
    return centred if len(centred) <= centred.shape[1] else torch.linalg.qr(centred, mode="r").R


def _frechet(real: Tensor, fake: Tensor) -> float:
    """tr sqrt(S1 S2) is the sum of the singular values of A1 A2^T for any A_i^T A_i = S_i.

    So no matrix square root is taken, and singular covariances (N < D) lose no digits.
    """
    a, b = _covariance_factor(real), _covariance_factor(fake)
    mean_term = (real.mean(0) - fake.mean(0)).square().sum()
    distance = mean_term + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    return max(float(distance), 0.0)  # below zero only by rounding


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Fréchet distance of two Gaussians fitted to embeddings (Heusel et al. 2017), squared as in FID.

    Biased upwards by an amount that shrinks as 1/N, so compare only equal N; below 2,048 images a warning is
    logged and the kernel distance is the figure to read.

    Args:
        real: Embeddings of the originals (N, D).
        fake: Embeddings of the reconstructions (M, D).

    Returns:
        ||mean difference||^2 + tr(S1 + S2 - 2 sqrt(S1 S2)), at least 0.

    Raises:
        UserError: If the dimensions differ, a value is not finite, or a set has fewer than two images.
    """
    real, fake = _checked(real, fake, minimum=2)
    n = min(len(real), len(fake))
    if n < SMALL_N:
        log.warning("Frechet distance from %d images (< %d) is strongly biased; read the KID instead", n, SMALL_N)
    return _frechet(real, fake)


def frechet_resampled(real: Tensor, fake: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Fréchet distances of resampled sets.

    Args:
        real: Embeddings (N, D).
        fake: Embeddings (M, D).
        rows: Indices into `real`, (R, N).
        columns: Indices into `fake`, (R, M).

    Returns:
        (R,) float64.
    """
    real, fake = _checked(real, fake, minimum=2)
    pairs = zip(rows, columns, strict=True)
    return torch.tensor([_frechet(real[i], fake[j]) for i, j in pairs], dtype=torch.float64)


def kernel_distance(
    real: Tensor,
    fake: Tensor,
    *,
    paired: bool = False,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> float:
    """Kernel distance, KID (Binkowski et al. 2018): unbiased MMD^2 with the kernel (x.y / D + 1)^3.

    The mean over random subsets, or all at once where the sets are pairs. Unbiased, hence slightly below 0 at times.

    Args:
        real: Embeddings of the originals (N, D).
        fake: Embeddings of the reconstructions (M, D).
        paired: Whether image i of both sets belongs together. Then no image is compared with its own partner: it is
            nearer to that one than to others of the same kind, and N such terms of N^2 would take the more from the
            distance the better a reconstruction, and the fewer images there are.
        subsets: Number of subsets; only one is needed, and taken, when the subset is both whole sets.
        subset_size: Images per subset and side; at most the smaller set.
        seed: Seed of the subsets.

    Returns:
        Mean MMD^2.

    Raises:
        UserError: If the dimensions differ, a value is not finite, a set has fewer than two images, or pairs are not.
    """
    real, fake = _checked(real, fake, minimum=2)
    if paired:
        if len(real) != len(fake):
            raise UserError(f"{len(real)} and {len(fake)} images are no pairs.")
        everything = torch.arange(len(real))[None]
        return float(kernel_resampled(real, fake, everything, everything, paired=True))
    size = min(subset_size, len(real), len(fake))
    if size == len(real) == len(fake):
        return float(poly_mmd(real, fake))
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        rows = torch.randperm(len(real), generator=generator)[:size]
        columns = torch.randperm(len(fake), generator=generator)[:size]
        values.append(float(poly_mmd(real[rows], fake[columns])))
    return sum(values) / len(values)


def _weighted_kernel_mean(a: Tensor, b: Tensor, a_weights: Tensor, b_weights: Tensor, *, apart: bool) -> Tensor:
    """Mean of k(a_i, b_j), weighted by w_i v_j, per row of weights (R, N), (R, M); `apart` leaves out i = j."""
    total = torch.zeros(len(a_weights), dtype=torch.float64)
    for start in range(0, len(a), _BLOCK):
        kernel = (a[start : start + _BLOCK] @ b.T / a.shape[1] + 1) ** 3
        if apart:
            own = torch.arange(len(kernel))
            kernel[own, own + start] = 0.0
        total += (a_weights[:, start : start + _BLOCK] @ kernel * b_weights).sum(1)
    pairs = a_weights.sum(1) * b_weights.sum(1)
    return total / (pairs - (a_weights * b_weights).sum(1) if apart else pairs)


def _counts(picks: Tensor, n: int) -> Tensor:
    """How often each of n images was drawn, per resample: (R, N) indices -> (R, n) float64."""
    ones = torch.ones(picks.shape, dtype=torch.float64)
    return torch.zeros(len(picks), n, dtype=torch.float64).scatter_add_(1, picks, ones)


def kernel_resampled(real: Tensor, fake: Tensor, rows: Tensor, columns: Tensor, *, paired: bool = False) -> Tensor:
    """MMD^2 of resampled whole sets, through one pass over the kernel; no image meets its own copy.

    Args:
        real: Embeddings (N, D).
        fake: Embeddings (M, D).
        rows: Indices into `real`, (R, N).
        columns: Indices into `fake`, (R, M).
        paired: As of `kernel_distance`.

    Returns:
        (R,) float64; NaN where one image was drawn every time.
    """
    real, fake = _checked(real, fake, minimum=2)
    w, v = _counts(rows, len(real)), _counts(columns, len(fake))
    within = sum(_weighted_kernel_mean(x, x, c, c, apart=True) for x, c in ((real, w), (fake, v)))
    return within - 2 * _weighted_kernel_mean(real, fake, w, v, apart=paired)


def _in_manifold(points: Tensor, support: Tensor, k: int) -> Tensor:
    """Whether each point lies within the k-th-neighbour ball of some support point."""
    radii = []
    for start in range(0, len(support), _BLOCK):
        distances = torch.cdist(support[start : start + _BLOCK], support)
        own = torch.arange(len(distances))
        distances[own, own + start] = torch.inf
        radii.append(distances.kthvalue(k, dim=1).values)
    radius = torch.cat(radii)
    return torch.cat([(torch.cdist(rows, support) <= radius).any(1) for rows in points.split(_BLOCK)])


def precision_recall(real: Tensor, fake: Tensor, *, k: int = 3) -> tuple[Tensor, Tensor]:
    """Improved precision and recall (Kynkaanniemi et al. 2019), one indicator per image.

    Args:
        real: Embeddings of the originals (N, D).
        fake: Embeddings of the reconstructions (M, D).
        k: The neighbour whose distance is the radius of each ball.

    Returns:
        Precision (M,): 1 where a reconstruction lies in the originals' manifold; recall (N,): the other way
        round.

    Raises:
        UserError: If the dimensions differ, a value is not finite, or a set has no more than k images.
    """
    real, fake = _checked(real, fake, minimum=k + 1)
    return _in_manifold(fake, real, k).double(), _in_manifold(real, fake, k).double()


def identification(real: Tensor, fake: Tensor, candidates: int | None = None, seed: int = 0) -> Tensor:
    """Whether a reconstruction gives its original away: is that the nearest of all originals, by cosine?

    The mean is the leak rate. How much identifies the original depends on how many originals there are to confuse
    it with: chance is 1 / candidates.

    Args:
        real: Embeddings of the originals (M, D).
        fake: Embeddings of reconstructions (N, D), N <= M, row i from original i; further originals are candidates
            only.
        candidates: Originals to choose among, the own one and others drawn by `seed`; None takes all M.
        seed: Of the draw.

    Returns:
        (N,) float64: 1 where the own original is the nearest, 1 / k where it is one of k equally near, else 0.

    Raises:
        UserError: If the dimensions differ, there are fewer originals than reconstructions, candidates is not in
            2..M, or a value is not finite.
    """
    real, fake = _checked(real, fake, minimum=1)
    count, rows = len(real), len(fake)
    if count < rows:
        raise UserError(f"{rows} reconstructions need at least as many originals, not {count}.")
    if candidates is not None and not 2 <= candidates <= count:
        raise UserError(f"candidates must lie between 2 and the number of originals, {count}; it is {candidates}.")
    generator = torch.Generator().manual_seed(seed)
    real, hits = torch.nn.functional.normalize(real), []
    for start in range(0, rows, _BLOCK):
        cosines = torch.nn.functional.normalize(fake[start : start + _BLOCK]) @ real.T
        own = start + torch.arange(len(cosines))[:, None]
        if candidates is not None:  # the own original always first
            order = torch.rand(cosines.shape, generator=generator).scatter_(1, own, -1).argsort(1)
            cosines, own = cosines.gather(1, order[:, :candidates]), torch.zeros_like(own)
        best = cosines == cosines.amax(1, keepdim=True)
        hits.append(best.gather(1, own)[:, 0].double() / best.sum(1))
    return torch.cat(hits)


def distribution_meta(
    network: str, n_real: int, n_fake: int, antialias: bool | None
) -> dict[str, str | int | bool | None]:
    """What must be printed beside a distribution metric for the figure to mean anything.

    Args:
        network: Name of the embedding network.
        n_real: Number of originals.
        n_fake: Number of reconstructions.
        antialias: Whether the network's own resize antialiases; None if it does not resize.
    """
    return {
        "network": network,
        "n_real": n_real,
        "n_fake": n_fake,
        "antialias": antialias,
        "torch": str(torch.__version__),
        "torchmetrics": torchmetrics.__version__,
    }
