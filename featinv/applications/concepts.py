"""Concepts of a layer: directions and subspaces of its feature space, how they are read and how features move along.

A direction has two vectors, and the difference matters (Haufe et al. 2014, NeuroImage 87; for concepts Pahde et al.
2022, arXiv 2202.03482): the *reader* predicts the concept from features and may lean on channels that merely cancel
noise; the *direction* is how features differ where the concept is present. One scores with the first and steers along
the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from featinv.errors import UserError
from featinv.metrics.distribution import pooled


class Concept(Protocol):
    """Something that can be read off a feature map, raised and lowered."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def basis(self) -> Tensor:
        """Vectors (D, C) that span it."""
        ...

    def score(self, features: Tensor) -> Tensor:
        """How much of it is at each position: features (N, C, H, W) -> (N, H, W)."""
        ...

    def move(self, features: Tensor, strength: float) -> Tensor:
        """Features (N, C, H, W) with more of it (less, if `strength` is negative)."""
        ...


@dataclass(frozen=True)
class Direction:
    """A concept along one direction.

    The score has mean 0 and deviation 1 over the positions it was found on, and a strength of s raises it by s.

    Attributes:
        name: What it is called.
        direction: (C,) how features change when the score rises by 1.
        reader: (C,) the score is features . reader + offset.
        offset: See `reader`.
        evidence: Figures about how it was found ("auc", "p_value", ...).
    """

    name: str
    direction: Tensor
    reader: Tensor
    offset: float
    evidence: dict[str, float] = field(default_factory=dict)

    @property
    def basis(self) -> Tensor:
        """The direction as (1, C)."""
        return self.direction[None]

    def score(self, features: Tensor) -> Tensor:
        """Score of every position: features (N, C, H, W) -> (N, H, W)."""
        return torch.einsum("nchw,c->nhw", features, self.reader.to(features)) + self.offset

    def move(self, features: Tensor, strength: float) -> Tensor:
        """Raise the score of every position of features (N, C, H, W) by `strength`."""
        return features + strength * self.direction.to(features)[:, None, None]


@dataclass(frozen=True)
class Subspace:
    """A concept of several dimensions (Vielhaben et al. 2023, arXiv 2301.11911): features have more or less in it.

    Attributes:
        name: What it is called.
        basis: (D, C) with orthonormal rows.
        scale: Root mean square length of the projection of the positions it was found on.
        evidence: Figures about how it was found.
    """

    name: str
    basis: Tensor
    scale: float
    evidence: dict[str, float] = field(default_factory=dict)

    def component(self, features: Tensor) -> Tensor:
        """The part of features (N, C, H, W) that lies in the subspace, same shape."""
        basis = self.basis.to(features)
        return torch.einsum("dc,dnhw->nchw", basis, torch.einsum("dc,nchw->dnhw", basis, features))

    def score(self, features: Tensor) -> Tensor:
        """Length of that part in units of `scale`, (N, H, W)."""
        return self.component(features).norm(dim=1) / self.scale

    def move(self, features: Tensor, strength: float) -> Tensor:
        """Features (N, C, H, W) with 1 + `strength` times that part: 1 doubles it, -1 removes it, less cannot be."""
        return features + max(strength, -1.0) * self.component(features)


def image_score(concept: Concept, features: Tensor, keep: Tensor | None = None) -> Tensor:
    """Mean score (N,) over the positions of features (N, C, H, W), or over those that `keep` (..., H, W) marks."""
    scores = concept.score(features)
    if keep is None:
        return scores.mean((1, 2))
    weights = keep.to(scores).expand(len(scores), 1, *scores.shape[1:])[:, 0]
    return (scores * weights).sum((1, 2)) / weights.sum((1, 2)).clamp(min=1e-12)


def columns_of(features: Tensor, limit: int | None = None, seed: int = 0) -> Tensor:
    """Feature vectors of all positions (M, C) of features (N, C, H, W), or `limit` of them drawn by `seed`."""
    columns = features.float().permute(0, 2, 3, 1).flatten(0, 2)
    if limit is None or len(columns) <= limit:
        return columns
    return columns[torch.randperm(len(columns), generator=torch.Generator().manual_seed(seed))[:limit]]


def make_direction(
    name: str, direction: Tensor, reader: Tensor, features: Tensor, evidence: dict[str, float] | None = None
) -> Direction:
    """A `Direction` in units of its score's deviation over the positions of features (N, C, H, W).

    Raises:
        UserError: If the score does not vary, or does not rise along the direction.
    """
    scores = columns_of(features) @ reader.float()
    spread = float(scores.std(correction=0))
    rise = float(direction.float() @ reader.float())
    if not (spread > 0 and rise > 0):
        raise UserError(f"the concept {name!r} cannot be told apart in these features; give more or other images.")
    reader = reader.float() / spread
    return Direction(name, direction.float() * (spread / rise), reader, -float(scores.mean()) / spread, evidence or {})


def class_means(features: Tensor, labels: Tensor, names: Sequence[str]) -> list[Direction]:
    """Each class's mean feature minus that of all others.

    Args:
        features: (N, C, H, W).
        labels: (N,) class indices; rows with another label (-1) belong to no class.
        names: Of the classes; a class without images, or with all of them, has no direction and is left out.
    """
    means, found = pooled(features).float(), []
    for index, name in enumerate(names):
        own = labels == index
        if own.any() and not own.all():
            difference = means[own].mean(0) - means[~own].mean(0)
            found.append(make_direction(name, difference, difference, features, {"images": float(own.sum())}))
    return found


def linear_probe(
    name: str,
    features: Tensor,
    values: Tensor,
    permutations: int = 200,
    folds: int = 5,
    ridge: float = 0.01,
    seed: int = 0,
) -> Direction:
    """A concept activation vector (Kim et al. 2018, arXiv 1711.11279) with its significance.

    Ridge regression on standardised means over positions, judged on held-out folds. The significance is a permutation
    test (Ojala & Garriga 2010, JMLR 11): the share of shuffled labellings that are predicted as well. All labellings go
    through one factorisation of each fold, so that hundreds cost no more than one.

    Args:
        name: Of the concept.
        features: (N, C, H, W).
        values: (N,) bool: present or not; or float, for a concept that has degrees.
        permutations: Shuffled labellings; the smallest p is 1 / (permutations + 1).
        folds: Of the cross-validation.
        ridge: Penalty on the squared weights per image.
        seed: Of shuffling and folds.

    Returns:
        With the evidence "auc", the held-out area under the ROC curve ("correlation" for degrees), and "p_value".

    Raises:
        UserError: If a side has fewer images than folds.
    """
    present = values.dtype == torch.bool
    fewest = int(min(values.sum(), (~values).sum())) if present else len(values)
    if fewest < folds:
        raise UserError(f"the concept {name!r} needs at least {folds} images on each side, not {fewest}.")
    inputs, targets = pooled(features).double(), values.double()
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(targets), generator=generator) for _ in range(permutations)]
    labellings = torch.stack([targets, *(targets[order] for order in orders)], 1)  # (N, 1 + permutations)
    predicted = _held_out(inputs, labellings, folds, ridge, generator)
    figures = _auc(predicted, labellings > 0.5) if present else _correlation(predicted, labellings)
    p_value = (1 + int((figures[1:] >= figures[0]).sum())) / (1 + permutations)
    reader, covariance = _ridge(inputs, targets[:, None], ridge)[:, 0], _covariance(inputs, targets)
    evidence = {"auc" if present else "correlation": float(figures[0]), "p_value": p_value}
    return make_direction(name, covariance.float(), reader.float(), features, evidence)


def linear_probes(features: Tensor, labels: Tensor, names: Sequence[str], **settings: Any) -> list[Direction]:
    """`linear_probe` of each class against all others, its "p_adjusted" for the number of classes tested.

    Args:
        features: (N, C, H, W).
        labels: (N,) class indices.
        names: Of the classes; those with fewer images than folds are left out.
        **settings: Of `linear_probe`.
    """
    from scipy.stats import false_discovery_control

    counts, folds = [int((labels == k).sum()) for k in range(len(names))], settings.get("folds", 5)
    usable = [k for k, count in enumerate(counts) if folds <= count <= len(labels) - folds]
    found = [linear_probe(names[k], features, labels == k, **settings) for k in usable]
    if found:
        adjusted = false_discovery_control([concept.evidence["p_value"] for concept in found])
        for concept, value in zip(found, adjusted, strict=True):
            concept.evidence["p_adjusted"] = float(value)
    return found


def _covariance(inputs: Tensor, targets: Tensor) -> Tensor:
    """Of each column of inputs (N, C) with targets (N,)."""
    return (inputs - inputs.mean(0)).T @ (targets - targets.mean()) / len(inputs)


def _ridge(inputs: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """Weights (C, T) of ridge regressions of targets (N, T) on standardised inputs (N, C), in the inputs' own units."""
    std = inputs.std(0, correction=0)
    std = torch.where(std > 1e-12 * (1 + inputs.mean(0).abs()), std, torch.inf)  # a constant column carries nothing
    x, y, n = (inputs - inputs.mean(0)) / std, targets - targets.mean(0), len(inputs)
    eye = torch.eye(min(x.shape), dtype=x.dtype)
    if n < x.shape[1]:  # the same solution from the smaller of the two Gram matrices
        return x.T @ torch.linalg.solve(x @ x.T + ridge * n * eye, y) / std[:, None]
    return torch.linalg.solve(x.T @ x + ridge * n * eye, x.T @ y) / std[:, None]


def _held_out(inputs: Tensor, labellings: Tensor, folds: int, ridge: float, generator: torch.Generator) -> Tensor:
    """Predictions (N, T) of every labelling, each row by a regression that did not see it."""
    predicted = torch.empty_like(labellings)
    for test in torch.randperm(len(inputs), generator=generator).chunk(folds):
        train = torch.ones(len(inputs), dtype=torch.bool)
        train[test] = False
        weights = _ridge(inputs[train], labellings[train], ridge)
        predicted[test] = (inputs[test] - inputs[train].mean(0)) @ weights + labellings[train].mean(0)
    return predicted


def _auc(scores: Tensor, present: Tensor) -> Tensor:
    """Area under the ROC curve of each column, by the rank sum (Mann & Whitney 1947); (N, T) -> (T,)."""
    ranks = scores.argsort(0).argsort(0).double() + 1
    positive = present.sum(0)
    below = (ranks * present).sum(0) - positive * (positive + 1) / 2
    return below / (positive * (len(scores) - positive))


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, of each column: (N, T) -> (T,)."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp(min=1e-300)
