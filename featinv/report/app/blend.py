"""Several concepts moved at once, as one concept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from featinv.applications.concepts import Concept


class Blend:
    """A concept that moves others, each by its own strength.

    `move` by 1 moves every concept by its strength. The score is the least-squares estimate of how far features have
    been moved, sum_i s_i score_i / sum_i s_i^2: it rises by 1 under a move by 1 if the concepts do not overlap.

    Args:
        concepts: At least one.
        strengths: One for each, not all 0.
    """

    def __init__(self, concepts: Sequence[Concept], strengths: Sequence[float]):
        self._pairs = list(zip(concepts, strengths, strict=True))
        self._energy = sum(strength**2 for strength in strengths)

    @property
    def name(self) -> str:
        """Names and strengths."""
        return ", ".join(f"{concept.name} {strength:+g}" for concept, strength in self._pairs)

    @property
    def basis(self) -> Tensor:
        """Vectors (D, C) that span all of them."""
        return torch.cat([concept.basis for concept, _ in self._pairs])

    def score(self, features: Tensor) -> Tensor:
        """Of every position: features (N, C, H, W) -> (N, H, W)."""
        scores = [strength * concept.score(features) for concept, strength in self._pairs]
        return torch.stack(scores).sum(0) / self._energy

    def move(self, features: Tensor, strength: float) -> Tensor:
        """Features (N, C, H, W) with every concept moved by `strength` times its own."""
        for concept, own in self._pairs:
            features = concept.move(features, strength * own)
        return features
