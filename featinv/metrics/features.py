"""Per-image comparisons of features and of class scores.

Computed in float64: `torchmetrics.functional.cosine_similarity` casts to float32 and is NaN for a zero
vector.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from featinv.errors import UserError

Number = TypeVar("Number", float, Tensor)


def _check_pair(original: Tensor, reconstruction: Tensor, what: str) -> None:
    if original.shape != reconstruction.shape:
        raise UserError(
            f"{what} of original and reconstruction differ in shape ({tuple(original.shape)} and "
            f"{tuple(reconstruction.shape)}); compute both with the same network and image size."
        )


def _cosine(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Cosine along `dim`; 1 where both vectors are zero (they are equal), 0 where only one is."""
    a, b = a.double(), b.double()
    a_norm, b_norm = a.norm(dim=dim), b.norm(dim=dim)
    # Dividing first keeps the product of two large norms out of the computation.
    cosine = (a / a_norm.unsqueeze(dim) * (b / b_norm.unsqueeze(dim))).sum(dim).clamp(-1.0, 1.0)
    one_zero = ((a_norm == 0) & b_norm.isfinite()) | ((b_norm == 0) & a_norm.isfinite())
    both_zero = (a_norm == 0) & (b_norm == 0)
    return cosine.masked_fill(one_zero, 0.0).masked_fill(both_zero, 1.0)


def feature_cosine(original: Tensor, reconstruction: Tensor) -> Tensor:
    """Cosine of the flattened feature maps, the headline metric.

    Args:
        original: Features of the originals (N, ...).
        reconstruction: Features of the reconstructions, same shape.

    Returns:
        (N,) float64 in [-1, 1]; two zero maps count as equal (1), one zero map as unrelated (0).

    Raises:
        UserError: If the shapes differ.
    """
    _check_pair(original, reconstruction, "Features")
    return _cosine(original.flatten(1), reconstruction.flatten(1), dim=1)


def position_cosine(original: Tensor, reconstruction: Tensor, quantile: float = 0.5) -> Tensor:
    """Quantile over positions of the cosine between the feature vectors at one position.

    The median and the 5 % quantile are the figures of FeatMap (arXiv 2605.11203). Quantiles interpolate
    linearly.

    Args:
        original: Features of the originals (N, C, H, W).
        reconstruction: Features of the reconstructions, same shape.
        quantile: In [0, 1]; 0.5 is the median.

    Returns:
        (N,) float64 in [-1, 1].

    Raises:
        UserError: If the shapes differ.
    """
    _check_pair(original, reconstruction, "Features")
    cosines = _cosine(original.flatten(2), reconstruction.flatten(2), dim=1)  # (N, H * W)
    return torch.quantile(cosines, quantile, dim=1)


def normalised_l2(original: Tensor, reconstruction: Tensor) -> Tensor:
    """Distance of the feature maps relative to the original, ||reconstruction - original|| / ||original||.

    Args:
        original: Features of the originals (N, ...).
        reconstruction: Features of the reconstructions, same shape.

    Returns:
        (N,) float64, at least 0; infinite where only the original's map is zero, 0 where both are.

    Raises:
        UserError: If the shapes differ.
    """
    _check_pair(original, reconstruction, "Features")
    a, b = original.double().flatten(1), reconstruction.double().flatten(1)
    distance = (b - a).norm(dim=1)
    return torch.where(distance == 0, distance, distance / a.norm(dim=1))


def _in_top_k(logits: Tensor, classes: Tensor, k: int) -> Tensor:
    """Whether `classes` (N,) are among the k largest of `logits` (N, K); ties go to the lower index."""
    if not 1 <= k <= logits.shape[1]:
        raise UserError(f"k={k} must lie between 1 and the number of classes, {logits.shape[1]}.")
    chosen = logits.gather(1, classes[:, None])
    index = torch.arange(logits.shape[1], device=logits.device)
    ahead = (logits > chosen) | ((logits == chosen) & (index < classes[:, None]))
    hit = (ahead.sum(1) < k).double()
    return hit.masked_fill(~logits.isfinite().all(1), torch.nan)


def topk_agreement(original_logits: Tensor, reconstruction_logits: Tensor, k: int = 1) -> Tensor:
    """Whether the class predicted for the original is among the k best of its reconstruction.

    Args:
        original_logits: Class scores of the originals (N, K).
        reconstruction_logits: Class scores of the reconstructions (N, K).
        k: Number of best classes looked at.

    Returns:
        (N,) float64, 0 or 1; NaN where a score is not finite.

    Raises:
        UserError: If the shapes differ or k is not in 1..K.
    """
    _check_pair(original_logits, reconstruction_logits, "Logits")
    index = torch.arange(original_logits.shape[1], 0, -1, device=original_logits.device)
    # argmax does not promise which of several equal maxima it returns: take the first.
    is_best = original_logits == original_logits.amax(1, keepdim=True)
    hit = _in_top_k(reconstruction_logits, (is_best * index).argmax(1), k)
    return hit.masked_fill(~original_logits.isfinite().all(1), torch.nan)


def label_accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Whether the true label is among the k best classes.

    Args:
        logits: Class scores (N, K).
        labels: Class indices (N,); -1 where unknown.
        k: Number of best classes looked at.

    Returns:
        (N,) float64, 0 or 1; NaN where the label is unknown or a score is not finite.

    Raises:
        UserError: If a label is not below K, the lengths differ or k is not in 1..K.
    """
    if labels.shape != logits.shape[:1]:
        raise UserError(f"{logits.shape[0]} images but {labels.numel()} labels; give one label per image.")
    if len(labels) and int(labels.max()) >= logits.shape[1]:
        raise UserError(f"Label {int(labels.max())} is beyond the network's {logits.shape[1]} classes.")
    labels = labels.to(logits.device)
    return _in_top_k(logits, labels.clamp_min(0), k).masked_fill(labels < 0, torch.nan)


def share_of_span(cosine: Number, floor: float, ceiling: float) -> Number:
    """Place of a cosine between the floor (shuffled pairs, 0) and the ceiling (first-stage round trip, 1).

    Args:
        cosine: Mean cosine, or per-image cosines.
        floor: Mean cosine of shuffled pairs.
        ceiling: Mean cosine of the round trip through the first stage.

    Returns:
        (cosine - floor) / (ceiling - floor), not clipped.

    Raises:
        UserError: If the ceiling is not above the floor.
    """
    if not ceiling > floor:
        raise UserError(
            f"The ceiling ({ceiling:.4f}) must be above the floor ({floor:.4f}) to give a share of the span."
        )
    return (cosine - floor) / (ceiling - floor)
