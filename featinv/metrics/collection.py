"""The list of metrics, how images are embedded, and which image is paired with which for a floor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from featinv.backbones.base import Backbone
from featinv.errors import UserError
from featinv.metrics import distribution, features, images
from featinv.metrics.views import Embedder, ImagePairs, View

METRICS: dict[str, Callable[[ImagePairs], Tensor]] = {
    "cosine": lambda p: features.feature_cosine(*p.backbone.features),
    "cosine_median": lambda p: features.position_cosine(*p.backbone.features, quantile=0.5),
    "cosine_q05": lambda p: features.position_cosine(*p.backbone.features, quantile=0.05),
    "l2": lambda p: features.normalised_l2(*p.backbone.features),
    "top1_agreement": lambda p: features.topk_agreement(*p.backbone.logits, k=1),
    "top5_agreement": lambda p: features.topk_agreement(*p.backbone.logits, k=5),
    "label_accuracy": lambda p: features.label_accuracy(p.backbone.logits[1], p.known_labels()),
    "referee_cosine": lambda p: features.feature_cosine(*p.seen_by_referee().features),
    "referee_top1_agreement": lambda p: features.topk_agreement(*p.seen_by_referee().logits, k=1),
    "referee_top5_agreement": lambda p: features.topk_agreement(*p.seen_by_referee().logits, k=5),
    "referee_label_accuracy": lambda p: features.label_accuracy(p.seen_by_referee().logits[1], p.known_labels()),
    "own_cosine": lambda p: features.feature_cosine(*p.seen_by_own().features),
    "psnr": lambda p: images.psnr(p.originals, p.reconstructions),
    "ssim": lambda p: images.ssim(p.originals, p.reconstructions),
    "lpips": lambda p: p.perceptual_distance(),
}
"""Per-image metrics: name -> function of a batch of pairs, giving one value per image (N,)."""

CLASSES_NEEDED = {"top5_agreement": 5, "agreement": 1, "label_accuracy": 1}
"""The class scores that a metric needs, by the end of its name; the largest that fits holds."""


def possible_metrics(
    *,
    referee: bool,
    labels: bool,
    own: bool = False,
    perceptual: bool = False,
    classes: float = math.inf,
    referee_classes: float = math.inf,
) -> list[str]:
    """Names in `METRICS` that these parts allow; the last two say how many class scores the networks give."""
    refused = {"referee_": not referee, "own_": not own, "lpips": not perceptual}
    names = [name for name in METRICS if not any(name.startswith(k) and off for k, off in refused.items())]
    names = [name for name in names if labels or "label" not in name]
    return [n for n in names if classes_needed(n) <= (referee_classes if "referee" in n else classes)]


def classes_needed(metric: str) -> int:
    """The class scores without which a metric does not exist."""
    return max((count for end, count in CLASSES_NEEDED.items() if metric.endswith(end)), default=0)


def seen_classes(view: View) -> int:
    """How many class scores a view's network gives, 0 without a classifier."""
    return view.logits.shape[1] if view.classifies else 0


def class_count(backbone: Backbone) -> int:
    """How many class scores a backbone gives, 0 without a classifier; one black picture tells."""
    return seen_classes(View(backbone, backbone.mean.new_zeros(1, 3, backbone.input_size, backbone.input_size)))


def embed(
    images_: Tensor, referee: View | None, referee_name: str, embedders: Mapping[str, Embedder]
) -> dict[str, Tensor]:
    """Embeddings (N, D) of images (N, 3, H, W) by network name, on the CPU; the referee's are its pooled features."""
    found = {name: embedder(images_) for name, embedder in embedders.items()}
    if referee is not None:
        found[referee_name] = distribution.pooled(referee.features)
    return {name: rows.float().cpu() for name, rows in found.items()}


def derangement(n: int, seed: int = 0) -> Tensor:
    """A seeded permutation (n,) without fixed points: one random cycle through all images.

    Raises:
        UserError: If n is below 2.
    """
    if n < 2:
        raise UserError("A floor needs at least two images to pair each with another.")
    cycle = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    partner = torch.empty_like(cycle)
    partner[cycle] = cycle.roll(1)
    return partner


def same_class_partner(labels: Tensor, seed: int = 0) -> Tensor:
    """Pair each image with another one of its class: one random cycle through each class.

    Args:
        labels: (N,), -1 where unknown.
        seed: Seed of the pairing.

    Returns:
        (N,) positions; -1 for images whose class is unknown or has no other image.
    """
    partner = torch.full((len(labels),), -1)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        if label >= 0 and len(members) > 1:
            partner[members] = members[derangement(len(members), seed)]
    return partner
