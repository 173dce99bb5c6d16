"""Subset inversion: a picture from some channels, some positions or some concepts of a feature map alone.

What is left out is replaced by the mean feature (`featinv.conditioning.masking`), as in training with masks
(`mask_positions`, `mask_channels` of the training module); an inverter trained without has never seen such maps.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from featinv.applications.concepts import Concept
from featinv.conditioning.masking import masked, mean_feature
from featinv.errors import UserError
from featinv.inverters.base import Inverter


def concepts_only(features: Tensor, concepts: Sequence[Concept], mean: Tensor) -> Tensor:
    """The part of features (N, C, H, W) that lies in the span of some concepts, the mean feature (C,) elsewhere.

    Raises:
        UserError: If there is no concept.
    """
    if not concepts:
        raise UserError("give at least one concept to keep.")
    vectors = torch.cat([concept.basis for concept in concepts]).double()
    _, values, right = torch.linalg.svd(vectors, full_matrices=False)
    span = right[values > 1e-6 * values[0]].to(features)  # orthonormal rows
    centre = mean.to(features)[:, None, None]
    return centre + torch.einsum("dc,dnhw->nchw", span, torch.einsum("dc,nchw->dnhw", span, features - centre))


def concepts_without(features: Tensor, concepts: Sequence[Concept], mean: Tensor) -> Tensor:
    """Features (N, C, H, W) without what lies in the span of some concepts (the mean feature's own part stays)."""
    centre = mean.to(features)[:, None, None]
    return features - concepts_only(features, concepts, mean) + centre


def invert_subset(inverter: Inverter, features: Tensor, keep: Tensor, *, seeds: Sequence[int]) -> Tensor:
    """Invert what a mask keeps.

    An inverter whose `invert` takes a mask (optimisation) is free in what is left out; any other is given the mean
    feature there.

    Args:
        inverter: Any.
        features: (N, C, H, W).
        keep: Bool or 0 / 1, broadcasting to the features: `featinv.inverters.masks` makes them.
        seeds: N seeds.

    Returns:
        Images (N, 3, H', W') in [0, 1].
    """
    if "mask" in inspect.signature(inverter.invert).parameters:
        return inverter.invert(features, seeds=seeds, mask=keep.to(features))  # type: ignore[call-arg]
    given = masked(features, keep, mean_feature(inverter, features.shape[1]))
    return inverter.invert(given, seeds=seeds)


class SubsetInverter:
    """An inverter that is told one subset of every map: takes the place of an inverter anywhere.

    Args:
        inverter: Any.
        keep: Bool or 0 / 1, broadcasting to (N, C, H, W) for any N.
    """

    def __init__(self, inverter: Inverter, keep: Tensor):
        self.inverter, self.keep, self.size = inverter, keep, inverter.size

    def invert(self, features: Tensor, *, seeds: Sequence[int]) -> Tensor:
        """Features (N, C, H, W) -> images (N, 3, H', W') in [0, 1]."""
        return invert_subset(self.inverter, features, self.keep, seeds=seeds)
