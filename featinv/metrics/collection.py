"""The list of metrics, and the one pass over image pairs that computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, zip_longest
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from featinv.errors import UserError
from featinv.metrics import distribution, features, images

Embedder = Callable[[Tensor], Tensor]


class Network(Protocol):
    """What a metric asks of a backbone."""

    def __call__(self, images: Tensor) -> Tensor: ...

    def logits_from(self, features: Tensor) -> Tensor: ...

    def logits(self, images: Tensor) -> Tensor: ...


class NetworkView:
    """A batch of pairs as one network sees it; each forward runs once, and only if a metric asks for it."""

    def __init__(self, network: Network, pair: tuple[Tensor, Tensor]) -> None:
        self._network, self._pair = network, pair

    @cached_property
    def features(self) -> tuple[Tensor, Tensor]:
        """Features of originals and reconstructions, each (N, C, H, W)."""
        original, reconstruction = self._pair
        return self._network(original), self._network(reconstruction)

    @cached_property
    def logits(self) -> tuple[Tensor, Tensor]:
        """Class scores of originals and reconstructions, each (N, K)."""
        try:
            original, reconstruction = self.features
            return self._network.logits_from(original), self._network.logits_from(reconstruction)
        except UserError:  # the layer does not lead to the head: a forward from the image does
            original, reconstruction = self._pair
            return self._network.logits(original), self._network.logits(reconstruction)


@dataclass(frozen=True)
class ImagePairs:
    """A batch of originals and reconstructions (N, 3, H, W) and the networks' views of them."""

    originals: Tensor
    reconstructions: Tensor
    backbone: NetworkView
    referee: NetworkView | None = None
    labels: Tensor | None = None

    def seen_by_referee(self) -> NetworkView:
        """The referee's view.

        Raises:
            UserError: If there is no referee.
        """
        if self.referee is None:
            raise UserError("This metric needs a referee network; pass one or leave the metric out.")
        return self.referee

    def known_labels(self) -> Tensor:
        """The labels (N,).

        Raises:
            UserError: If there are none.
        """
        if self.labels is None:
            raise UserError("This metric needs labels; pass one per image or leave the metric out.")
        return self.labels


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
    "psnr": lambda p: images.psnr(p.originals, p.reconstructions),
    "ssim": lambda p: images.ssim(p.originals, p.reconstructions),
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


def _default_metrics(has_referee: bool, has_labels: bool) -> list[str]:
    names = [name for name in METRICS if has_referee or not name.startswith("referee_")]
    return [name for name in names if has_labels or name != "label_accuracy"]


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
    names = list(metrics) if metrics is not None else _default_metrics(referee is not None, labels is not None)
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
        views = NetworkView(backbone, pair), NetworkView(referee, pair) if referee is not None else None
        batch_labels = None if labels is None else labels[done : done + len(original)]
        pairs = ImagePairs(*pair, *views, labels=batch_labels)
        for name in names:
            values[name].append(METRICS[name](pairs).cpu())
        for name, (a, b) in _embed(pairs, referee_name, embedders or {}).items():
            real.setdefault(name, []).append(a.float().cpu())
            fake.setdefault(name, []).append(b.float().cpu())
        done += len(original)
    if done == 0:
        raise UserError("There are no images to evaluate; check the folder or the filter that chose them.")
    if labels is not None and len(labels) != done:
        raise UserError(f"{done} images but {len(labels)} labels; give one label per image.")
    return PairedEvaluation(_joined(values), _joined(real), _joined(fake))


def _joined(parts: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def _embed(pairs: ImagePairs, referee_name: str, embedders: Mapping[str, Embedder]) -> dict[str, tuple[Tensor, Tensor]]:
    found = {name: (embed(pairs.originals), embed(pairs.reconstructions)) for name, embed in embedders.items()}
    if pairs.referee is not None:
        original, reconstruction = pairs.referee.features
        found[referee_name] = distribution.pooled(original), distribution.pooled(reconstruction)
    return found


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
