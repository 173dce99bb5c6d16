"""Condition dropout in training: each condition on its own, or both at once as the published recipe does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from featinv.errors import UserError


class ConditionDropout:
    """Decide per image which conditions are dropped.

    Args:
        p_features: Probability of dropping the features.
        p_text: Probability of dropping the prompt.
        joint: Drop both together with probability `p_features` (the published recipe; `p_text` must equal it).
    """

    def __init__(self, p_features: float = 0.1, p_text: float = 0.1, joint: bool = False):
        if not (0 <= p_features <= 1 and 0 <= p_text <= 1):
            raise UserError(f"dropout probabilities must be in [0, 1], not {p_features} and {p_text}.")
        if joint and p_features != p_text:
            raise UserError("joint dropout needs p_features = p_text.")
        self.p_features, self.p_text, self.joint = p_features, p_text, joint

    def draw(self, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Two (N,) bool masks, True where the features and where the text are dropped; row i depends on seeds[i]."""
        u = torch.stack([torch.rand(2, generator=torch.Generator().manual_seed(s ^ 0xD20)) for s in seeds])
        features = u[:, 0] < self.p_features
        return features, features if self.joint else u[:, 1] < self.p_text
