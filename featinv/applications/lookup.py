"""Concepts by a word such as "mean:object0_colour=red", "nmf:3" or "text:a red ball"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featinv.applications.batches import encode, probabilities
from featinv.applications.composites import covered, mean_over
from featinv.applications.concepts import Concept, class_means, linear_probe
from featinv.applications.discovery import encode_texts, nmf_concepts, subspace_concepts, text_directions
from featinv.backbones.base import Backbone
from featinv.config import nearest
from featinv.data.scene_factors import FACTOR_INDEX, FACTORS
from featinv.errors import UserError

KINDS = ("mean", "probe", "nmf", "subspace", "text")


@dataclass(frozen=True)
class Examples:
    """Pictures that concepts are found in.

    Attributes:
        images: (N, 3, H, W) in [0, 1].
        factors: (N, F) by the columns of `FACTORS` where they are scenes, else None.
        masks: (N, K, H, W) of the scenes' objects, largest first.
    """

    images: Tensor
    factors: Tensor | None = None
    masks: Tensor | None = None


def find_concept(
    word: str,
    backbone: Backbone,
    examples: Examples,
    count: int = 8,
    text_weights: str | None = "laion2b_s34b_b79k",
    seed: int = 0,
) -> Concept:
    """Find the concept that a word names.

    Args:
        word: "mean:FACTOR=CLASS" and "probe:FACTOR=CLASS" (a class mean, of an object's factor over the positions that
            the object covers, and a linear probe; FACTOR of scenes, or "class" for the backbone's own predicted class
            index), "nmf:K" and "subspace:K" (the K-th of `count`), or "text:PROMPT" (OpenCLIP).
        backbone: Of whose features.
        examples: Pictures to find it in.
        count: Factors or subspaces that the features are taken apart into.
        text_weights: OpenCLIP's weight tag of the text tower.
        seed: Of the search.

    Raises:
        UserError: If the word cannot be understood or the concept is not in the pictures.
    """
    kind, _, rest = word.partition(":")
    if kind not in KINDS or not rest:
        raise UserError(
            f"a concept is KIND:NAME, as in mean:object0_colour=red, not {word!r}; kinds: {', '.join(KINDS)}."
        )
    if kind == "text":
        if not hasattr(backbone, "embed"):
            raise UserError("text:PROMPT needs an OpenCLIP backbone, whose text tower shares its space.")
        texts = encode_texts(getattr(backbone, "name", ""), [rest, "a picture"], text_weights)
        return text_directions(backbone, examples.images, [rest], texts[:1], texts[1])[0]
    features = encode(backbone, examples.images)
    if kind in ("nmf", "subspace"):
        return _numbered(rest, (nmf_concepts if kind == "nmf" else subspace_concepts)(features, count, seed=seed))
    present = _present(rest, backbone, examples)
    if kind == "probe":
        return linear_probe(rest, features, present, seed=seed)
    if examples.masks is not None and (number := re.match(r"object(\d)_", rest)):
        where = covered(examples.masks[:, int(number[1]), None], (features.shape[2], features.shape[3]))
        seen = where.flatten(1).any(1)
        features, present = mean_over(features, where)[seen], present[seen]
    found = class_means(features, present.long() - 1, [rest])
    if not found:
        raise UserError(f"{rest} is in none or in all of the {len(features)} pictures; give more or other ones.")
    return found[0]


def _numbered(number: str, concepts: Sequence[Concept]) -> Concept:
    if not number.isdigit() or int(number) >= len(concepts):
        raise UserError(f"concepts are numbered 0 to {len(concepts) - 1}, not {number!r}; raise the count for more.")
    return concepts[int(number)]


def _present(name: str, backbone: Backbone, examples: Examples) -> Tensor:
    """Which pictures show "FACTOR=CLASS", (N,) bool."""
    factor, _, value = name.partition("=")
    if factor == "class":
        chances = probabilities(backbone, examples.images)
        if chances is None or not value.isdigit() or int(value) >= chances.shape[1]:
            raise UserError(f"class={value} needs a backbone with a classifier and the index of one of its classes.")
        return chances.argmax(1) == int(value)
    if examples.factors is None:
        raise UserError(f"only scenes have the factor {factor!r}; for other pictures use class=INDEX, nmf or subspace.")
    known = [f.name for f in FACTORS if f.kind == "categorical"]
    if factor not in known:
        raise UserError(f"scenes have no factor {factor!r} with classes: {nearest(factor, known)}")
    column = FACTOR_INDEX[factor]
    classes = FACTORS[column].classes
    if value not in classes:
        raise UserError(f"{factor} has no class {value!r}: {nearest(value, classes)}")
    return torch.as_tensor(examples.factors[:, column] == classes.index(value))
