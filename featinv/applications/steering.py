"""Concept steering: raise or lower a concept in a feature map, decode, and see whether it stayed on the manifold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featinv.applications.batches import Progress, decode, encode, probabilities
from featinv.applications.concepts import Concept, image_score
from featinv.backbones.base import Backbone
from featinv.errors import UserError
from featinv.inverters.base import Inverter
from featinv.metrics.factors import FactorSpec
from featinv.metrics.features import feature_cosine


def steer(features: Tensor, concept: Concept, strength: float, keep: Tensor | None = None) -> Tensor:
    """Features (N, C, H, W) with more of a concept.

    Args:
        features: (N, C, H, W).
        concept: What is raised.
        strength: How much, in the concept's own units; negative lowers it.
        keep: Positions that are steered, a mask that broadcasts to (N, 1, H, W); None steers all.
    """
    moved = concept.move(features, strength)
    return moved if keep is None else torch.where(keep.to(features.device).bool(), moved, features)


@dataclass(frozen=True)
class Strip:
    """Pictures over S strengths for N feature maps, strength 0 among them, and what the backbone says about them.

    Attributes:
        strengths: S rising numbers.
        images: (S, N, 3, H, W) in [0, 1].
        asked: (S, N) the concept's score in the steered features, over the steered positions.
        found: (S, N) its score in the features of the decoded pictures.
        cosine: (S, N) of the steered features and those of the decoded pictures: the round trip.
        probabilities: (S, N, K) of the decoded pictures, None for a backbone without a classifier.
        tolerance: See `on_manifold`.
    """

    strengths: tuple[float, ...]
    images: Tensor
    asked: Tensor
    found: Tensor
    cosine: Tensor
    probabilities: Tensor | None
    tolerance: float

    @property
    def origin(self) -> int:
        """Index of strength 0."""
        return self.strengths.index(0.0)

    @property
    def moved(self) -> Tensor:
        """(S, N): how far the score moved in the picture, as a share of what was asked for; NaN where nothing was."""
        asked = self.asked - self.asked[self.origin]
        return torch.where(asked.abs() > 1e-9, (self.found - self.found[self.origin]) / asked, torch.nan)

    @property
    def on_manifold(self) -> Tensor:
        """(S, N) bool: the round trip is at most `tolerance` worse than that of the features as they were."""
        return self.cosine >= self.cosine[self.origin] - self.tolerance

    def verdict(self, strength: int, row: int) -> str:
        """What to tell a reader about one picture."""
        if strength == self.origin:
            return "as it was"
        cosine, start = float(self.cosine[strength, row]), float(self.cosine[self.origin, row])
        place = "on the manifold" if self.on_manifold[strength, row] else "has left the manifold"
        return f"{place} (cosine {cosine:.2f}, unsteered {start:.2f}){_request(self.moved[strength, row])}"

    def summary(self, strength: int) -> str:
        """The same about all N pictures."""
        count = self.images.shape[1]
        if count == 1 or strength == self.origin:
            return self.verdict(strength, 0)
        moved = self.moved[strength]
        median = moved[moved.isfinite()].median() if moved.isfinite().any() else moved[0]
        return f"{int(self.on_manifold[strength].sum())} of {count} on the manifold{_request(median, ' (median)')}"


def _request(moved: Tensor, kind: str = "") -> str:
    """How far a concept moved (); nothing where nothing was asked for."""
    return f"; concept moved by {100 * float(moved):.0f} % of the request{kind}" if moved.isfinite() else ""


@torch.no_grad()
def steer_strip(
    inverter: Inverter,
    backbone: Backbone,
    features: Tensor,
    concept: Concept,
    strengths: Sequence[float],
    seeds: Sequence[int],
    keep: Tensor | None = None,
    tolerance: float = 0.1,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Strip:
    """Steer, decode and re-encode at each strength, every time with the same seeds.

    Args:
        inverter: Any.
        backbone: Whose features are steered.
        features: (N, C, H, W).
        concept: What is raised.
        strengths: In the concept's own units; 0 is added.
        seeds: N seeds, one for each map.
        keep: Positions that are steered, broadcasting to (N, 1, H, W); None steers all.
        tolerance: Loss of cosine beyond which an edit counts as off the manifold.
        batch_size: Maps decoded at a time.
        progress: Told after every batch.
    """
    values = tuple(sorted({0.0, *map(float, strengths)}))
    steered = torch.cat([steer(features.cpu(), concept, value, keep) for value in values])
    images = decode(inverter, steered, list(seeds) * len(values), batch_size, progress)
    again = encode(backbone, images, batch_size)
    shape = (len(values), len(features))
    where = (
        None if keep is None else keep.cpu().expand(len(features), 1, *features.shape[2:]).repeat(len(values), 1, 1, 1)
    )
    chances = probabilities(backbone, images, batch_size)
    return Strip(
        values,
        images.unflatten(0, shape),
        image_score(concept, steered, where).view(shape),
        image_score(concept, again, where).view(shape),
        feature_cosine(steered, again).view(shape),
        None if chances is None else chances.unflatten(0, shape),
        tolerance,
    )


def factor_changes(before: Tensor, after: Tensor, schema: Sequence[FactorSpec], scale: Tensor) -> dict[str, Tensor]:
    """Which factors differ between two sets of probed scenes: (N,) bool by factor name.

    Args:
        before: Probed factors (N, F), of pictures decoded from the features as they were.
        after: The same of the steered ones, with the same seeds.
        schema: Of the F columns.
        scale: (F,) difference beyond which a continuous factor counts as changed, such as its deviation over scenes.

    Raises:
        UserError: If the shapes differ.
    """
    if before.shape != after.shape or before.shape[1] != len(schema):
        raise UserError(
            f"factors {tuple(before.shape)} and {tuple(after.shape)} must both be (N, {len(schema)}) to be compared."
        )
    limit = torch.tensor(
        [0.5 if spec.kind == "categorical" else float(s) for spec, s in zip(schema, scale, strict=True)]
    )
    differs = ((before - after).abs() > limit) | (before.isnan() != after.isnan())
    return {spec.name: differs[:, k] for k, spec in enumerate(schema)}


@dataclass(frozen=True)
class SteeringTest:
    """Whether steering towards a factor's class changed that factor and no other.

    Attributes:
        reached: (N,) bool: the probe reads the wanted class in the steered picture.
        changed: (N,) bool by factor name, see `factor_changes`.
        factor: The one that should change.
    """

    reached: Tensor
    changed: dict[str, Tensor]
    factor: str

    @property
    def own(self) -> float:
        """Share of pictures whose factor became what was asked for; the aim is at least 0.8."""
        return float(self.reached.double().mean())

    @property
    def others(self) -> float:
        """The mean share of pictures in which another factor changed; the aim is at most 0.2."""
        rest = [float(v.double().mean()) for name, v in self.changed.items() if name != self.factor]
        return sum(rest) / max(len(rest), 1)
