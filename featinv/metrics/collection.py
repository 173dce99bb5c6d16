"""The list of metrics, and the one pass over image pairs that computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from featinv.errors import UserError
from featinv.metrics import distribution, features, images
from featinv.metrics.views import Embedder, ImagePairs, Network, View

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


class PairedEvaluation(NamedTuple):
    """Per-image values (N,) by metric, and embeddings (N, D) of both sides by network name."""

    per_image: dict[str, Tensor]
    embeddings_real: dict[str, Tensor]
    embeddings_fake: dict[str, Tensor]


def _single_images(source: Iterable[Tensor]) -> Iterator[Tensor]:
    for item in source:
        yield from item if item.ndim == 4 else item[None]


def _stacked(images_: list[Tensor]) -> Tensor:
    sizes = {tuple(image.shape) for image in images_}
    if len(sizes) > 1:
        raise UserError(f"Images of several sizes, {sorted(sizes)}, cannot be compared in one run; resize them first.")
    return torch.stack(images_)


def _batches(
    originals: Iterable[Tensor], reconstructions: Iterable[Tensor], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of pairs; the last one may be smaller."""
    pairs = zip_longest(_single_images(originals), _single_images(reconstructions))
    while batch := list(islice(pairs, batch_size)):
        first, second = [pair[0] for pair in batch], [pair[1] for pair in batch]
        if any(image is None for image in first + second):
            raise UserError("There are not as many reconstructions as originals; make the missing ones first.")
        yield _stacked(first), _stacked(second)


def possible_metrics(*, referee: bool, labels: bool, own: bool = False, perceptual: bool = False) -> list[str]:
    """Names in `METRICS` that these parts allow."""
    refused = {"referee_": not referee, "own_": not own, "lpips": not perceptual}
    names = [name for name in METRICS if not any(name.startswith(k) and off for k, off in refused.items())]
    return [name for name in names if labels or "label" not in name]


@torch.no_grad()
def evaluate_images(
    originals: Iterable[Tensor],
    reconstructions: Iterable[Tensor],
    backbone: Network,
    referee: Network | None = None,
    *,
    referee_name: str = "mobilenetv2",
    embedders: Mapping[str, Embedder] | None = None,
    labels: Tensor | None = None,
    metrics: Sequence[str] | None = None,
    batch_size: int = 32,
    device: torch.device | str | None = None,
) -> PairedEvaluation:
    """Compute every per-image metric, and the embeddings for the distribution metrics, in one pass.

    Each network sees each image once. Only values and embeddings are kept, so memory does not grow with the
    pictures.

    Args:
        originals: Images in [0, 1]: a tensor (N, 3, H, W), or an iterable of images (3, H, W) or batches.
        reconstructions: Their reconstructions in the same order.
        backbone: The inverted network.
        referee: A network that the inverter never saw; its pooled features are embeddings named
            `referee_name`.
        referee_name: Name of the referee, as in `fd_mobilenetv2`.
        embedders: More embedding networks: name -> function of images giving (N, D).
        labels: Class indices (N,), -1 where unknown.
        metrics: Names out of `METRICS`; by default all that the arguments allow. A network without class
            scores must be given a list without the agreements.
        batch_size: Images per forward; changes nothing but speed and memory.
        device: Where the networks are; images are moved there.

    Returns:
        Per-image values and both sides' embeddings, on the CPU.

    Raises:
        UserError: If a metric is unknown or cannot be computed, lengths or sizes differ, or there are no
            images.
    """
    allowed = possible_metrics(referee=referee is not None, labels=labels is not None)
    names = list(metrics) if metrics is not None else allowed
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise UserError(f"Unknown metric {unknown[0]!r}; choose from {', '.join(METRICS)}.")
    if embedders and referee is not None and referee_name in embedders:
        raise UserError(f"Two embedding networks are named {referee_name!r}; rename one of them.")
    values: dict[str, list[Tensor]] = {name: [] for name in names}
    real: dict[str, list[Tensor]] = {}
    fake: dict[str, list[Tensor]] = {}
    done = 0
    for original, reconstruction in _batches(originals, reconstructions, batch_size):
        pair = original.to(device), reconstruction.to(device)
        seen = View(backbone, pair[0]).against(pair[1])
        judged = View(referee, pair[0]).against(pair[1]) if referee is not None else None
        batch_labels = None if labels is None else labels[done : done + len(original)]
        pairs = ImagePairs(*pair, seen, judged, batch_labels)
        for name in names:
            values[name].append(METRICS[name](pairs).cpu())
        for side, images_, number in ((real, pair[0], 0), (fake, pair[1], 1)):
            view = None if judged is None else judged[number]
            for name, rows in embed(images_, view, referee_name, embedders or {}).items():
                side.setdefault(name, []).append(rows)
        done += len(original)
    if done == 0:
        raise UserError("There are no images to evaluate; check the folder or the filter that chose them.")
    if labels is not None and len(labels) != done:
        raise UserError(f"{done} images but {len(labels)} labels; give one label per image.")
    return PairedEvaluation(_joined(values), _joined(real), _joined(fake))


def _joined(parts: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


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


def evaluate_floor(
    originals: Sequence[Tensor] | Tensor,
    backbone: Network,
    referee: Network | None = None,
    *,
    seed: int = 0,
    metrics: Sequence[str] | None = None,
    batch_size: int = 32,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Per-image metrics of each original against another original: what a reconstruction gets for nothing.

    There is no distribution metric in a floor: both sides are the same images.

    Args:
        originals: Images that can be indexed, (N, 3, H, W) or a sequence of (3, H, W).
        backbone: The inverted network.
        referee: The referee network.
        seed: Seed of the pairing.
        metrics: Names out of `METRICS`.
        batch_size: Images per forward.
        device: Where the networks are.

    Returns:
        Metric -> (N,) values.
    """
    others = (originals[i] for i in derangement(len(originals), seed).tolist())
    return evaluate_images(
        originals, others, backbone, referee, metrics=metrics, batch_size=batch_size, device=device
    ).per_image
