"""Inverters whose pictures are matched to the features: NAME+corrected, NAME+guided, NAME+best, NAME+refined."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from featinv.applications.refine import refine
from featinv.backbones.base import Backbone
from featinv.config import nearest
from featinv.diffusion.first_stage import FirstStage
from featinv.diffusion.objective_guidance import ObjectiveGuidance
from featinv.errors import UserError
from featinv.files import given_path
from featinv.inverters.base import Inverter
from featinv.inverters.diffusion import DiffusionInverter

_SPREAD = 0x9E3779B1  # over the 32 bits of a seed that torch's generator reads


class FeatureGuidedInverter:
    """A diffusion inverter that also climbs the feature cosine while it samples (training-free guidance).

    Behind the guidance contract: `ObjectiveGuidance` with the cosine as its objective, on top of the inverter's own
    guidance. The inverter itself is left as it is.

    Args:
        inverter: Draws.
        backbone: Whose features are matched.
        strength: Root mean square of one uphill step, in units of the latents' standard deviation.
        iterations: Uphill steps at each sampling step.
        interval: Noise levels where it acts, as fractions of the training timesteps.
        sampler: None keeps the inverter's own; a first-order one does not mix predictions moved by different amounts.

    Attributes:
        skipped: Gradients of one image that were not finite, in all calls so far.

    Raises:
        UserError: If the inverter does not sample by diffusion.
    """

    def __init__(
        self,
        inverter: Inverter,
        backbone: Backbone,
        strength: float = 0.02,
        iterations: int = 3,
        interval: Sequence[float] = (0.0, 0.7),
        sampler: str | None = "ddim",
    ):
        if not isinstance(inverter, DiffusionInverter):
            raise UserError(f"a {type(inverter).__name__} has no sampling steps to guide; it can be +refined.")
        self.inverter, self.backbone, self.size, self.prior = inverter, backbone, inverter.size, inverter.prior
        self.strength, self.iterations, self.interval = strength, iterations, tuple(interval)
        self.sampler = sampler or inverter.sampler
        self.skipped = 0

    def invert(self, features: Tensor, *, seeds: Sequence[int]) -> Tensor:
        """Features (N, C, H, W) and N seeds -> images (N, 3, size, size) in [0, 1]."""
        prior = self.prior

        def objective(images: Tensor, wanted: Tensor) -> Tensor:
            return F.cosine_similarity(self.backbone(images).flatten(1), wanted)

        # A shallow copy shares every weight; only its guidance and sampler are other ones.
        guided = copy.copy(self.inverter)
        guided.sampler = self.sampler
        guided.guidance = guidance = ObjectiveGuidance(
            objective,
            prior.first_stage,
            prior.scheduler,
            self.strength,
            self.iterations,
            self.interval,
            self.inverter.guidance,
            wanted=features.flatten(1),
        )
        images = guided.invert(features, seeds=seeds)
        self.skipped += guidance.skipped
        return images


class RefinedInverter:
    """An inverter whose pictures are then moved, a few gradient steps in latents, towards the features (`refine`).

    A few steps from a good start end near it; from noise the same descent is inversion by optimisation.

    Args:
        inverter: Draws.
        backbone: Whose features are matched.
        first_stage: Whose latents are moved where the inverter has no prior of its own; None then moves pixels.
        steps: At most.
        learning_rate: Adam's, as in `refine`.
        tolerance: Feature cosine at which a picture is left as it is. About what the first stage's round trip of an
            original reaches: beyond, there is nothing that the features could still say.

    Attributes:
        skipped: Gradients of one image that were not finite, in all calls so far.
    """

    def __init__(
        self,
        inverter: Inverter,
        backbone: Backbone,
        first_stage: FirstStage | None = None,
        steps: int = 20,
        learning_rate: float = 0.01,
        tolerance: float = 0.9,
    ):
        prior = getattr(inverter, "prior", None)
        self.inverter, self.backbone, self.size = inverter, backbone, inverter.size
        self.first_stage = first_stage if prior is None else prior.first_stage
        self.steps, self.learning_rate, self.tolerance = steps, learning_rate, tolerance
        self.skipped = 0

    def invert(self, features: Tensor, *, seeds: Sequence[int]) -> Tensor:
        """Features (N, C, H, W) and N seeds -> images (N, 3, size, size) in [0, 1]."""
        found = refine(
            self.backbone,
            features,
            self.inverter.invert(features, seeds=seeds).detach(),
            first_stage=self.first_stage,
            tolerance=self.tolerance,
            steps=self.steps,
            learning_rate=self.learning_rate,
        )
        self.skipped += int(found.skipped.sum())
        return found.images


class BestInverter:
    """An inverter that draws several pictures and keeps the one whose features are nearest, of each map.

    Every picture is one that the inverter draws: there is no gradient, and nothing that it has not learned.

    Args:
        inverter: Draws.
        backbone: Whose features it inverts.
        count: Of pictures drawn for each map, the first one with the seed that is given.

    Raises:
        UserError: If there are none to choose from.
    """

    def __init__(self, inverter: Inverter, backbone: Backbone, count: int = 4):
        if count < 1:
            raise UserError(f"the best of {count} pictures is none; draw one at least.")
        self.inverter, self.backbone, self.size, self.count = inverter, backbone, inverter.size, count
        self.prior = getattr(inverter, "prior", None)

    @torch.no_grad()
    def invert(self, features: Tensor, *, seeds: Sequence[int]) -> Tensor:
        """Features (N, C, H, W) and N seeds -> images (N, 3, size, size) in [0, 1]."""
        best, highest = torch.empty(0), torch.full((len(features),), -torch.inf, device=features.device)
        for draw in range(self.count):
            images = self.inverter.invert(features, seeds=[seed ^ draw * _SPREAD for seed in seeds])
            images = images.to(features.device)  # others than networks give theirs on the CPU
            found = F.cosine_similarity(self.backbone(images.float()).flatten(1), features.flatten(1))
            better = found > highest  # not where it is NaN
            best = images if draw == 0 else torch.where(better[:, None, None, None], images, best)
            highest = torch.where(better, found, highest)
        return best


class CorrectedInverter:
    """An inverter that looks at what it has drawn, is told more of what is missing there, and draws again.

    told <- told + gain (features - backbone(picture)), iterative back-projection (Irani & Peleg 1991, "Improving
    resolution by image registration") with the inverter in the place of the linear one. No gradient goes through
    pixels; but what the inverter is told then is no picture's map, and some realism is lost. Behind a lift, whose own
    maps no picture has quite, the picture's earlier map is moved towards the given last one (`FeatureLift.nearer`), and
    the way it went is added.

    Args:
        inverter: Draws, with the same seeds each time.
        backbone: Whose features it inverts.
        rounds: How often it looks; it draws once more than that.
        gain: Share of the difference that is added.
        lift_gain: The same where there is a lift.

    Raises:
        UserError: If the pictures have already been matched, or there are no rounds.
    """

    def __init__(
        self, inverter: Inverter, backbone: Backbone, rounds: int = 2, gain: float = 0.25, lift_gain: float = 1.0
    ):
        if isinstance(inverter, (BestInverter, CorrectedInverter, FeatureGuidedInverter, RefinedInverter)):
            raise UserError("+corrected draws again, and comes first: NAME+corrected+best+refined.")
        if rounds < 1:
            raise UserError(f"correcting takes a round at least, not {rounds}.")
        self.inverter, self.backbone, self.size = inverter, backbone, inverter.size
        self.prior, self.lift = getattr(inverter, "prior", None), getattr(inverter, "lift", None)
        self.rounds, self.gain, self.lift_gain = rounds, gain, lift_gain

    @torch.no_grad()
    def invert(self, features: Tensor, *, seeds: Sequence[int]) -> Tensor:
        """Features (N, C, H, W) and N seeds -> images (N, 3, size, size) in [0, 1]."""
        told = features if self.lift is None else self.inverter.lifted(features, seeds)  # type: ignore[attr-defined]
        for _ in range(self.rounds):
            told = told + self._missing(features, self._draw(features, seeds, told))
        return self._draw(features, seeds, told)

    def _draw(self, features: Tensor, seeds: Sequence[int], told: Tensor) -> Tensor:
        if self.lift is None:
            return self.inverter.invert(told, seeds=seeds).to(features.device)
        return self.inverter.invert(features, seeds=seeds, told=told)  # type: ignore[call-arg]

    def _missing(self, features: Tensor, images: Tensor) -> Tensor:
        """What to add to what the inverter has been told, after a look at its images (N, 3, H, W)."""
        if self.lift is None:
            return self.gain * (features - self.backbone(images.float()))
        seen = self.lift.backbone.to(images.device)(images.float())
        return self.lift_gain * (self.lift.nearer(seen, features) - seen)


MATCHING: dict[str, type] = {
    "corrected": CorrectedInverter,
    "guided": FeatureGuidedInverter,
    "best": BestInverter,
    "refined": RefinedInverter,
}
"""Suffix -> inverter around another one, called as kind(inverter, backbone, **params)."""


def settings_of(kind: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Every number and word that a wrapper of `MATCHING` works with, defaults and all, as JSON keeps them."""
    known = inspect.signature(MATCHING[kind]).parameters.values()
    defaults = {p.name: p.default for p in known if p.default is not p.empty and p.name != "first_stage"}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in {**defaults, **(params or {})}.items()}


def split_name(name: str) -> tuple[str, tuple[str, ...]]:
    """NAME+guided+refined -> (NAME, ("guided", "refined")); a path that is there is a name as a whole.

    Raises:
        UserError: If a suffix is not one of `MATCHING`, naming the nearest.
    """
    base, plus, last = name.rpartition("+")
    if not plus or "/" in last or given_path(name).exists():
        return name, ()
    if last not in MATCHING:
        raise UserError(f"+{last} of {name!r}: {nearest(last, list(MATCHING))}")
    inner, kinds = split_name(base)
    return inner, (*kinds, last)


def matched(
    inverter: Inverter,
    backbone: Backbone,
    kinds: Sequence[str],
    params: Mapping[str, Mapping[str, Any]] | None = None,
    first_stage: FirstStage | None = None,
) -> Inverter:
    """Put an inverter into the wrappers that its name asks for, the first innermost.

    Args:
        inverter: Drawn from; on the backbone's device.
        backbone: Whose features it inverts.
        kinds: From `split_name`.
        params: Of each kind, by its name.
        first_stage: In whose latents inverters without a prior of their own are refined.

    Raises:
        UserError: If an inverter cannot be guided, or a parameter does not exist.
    """
    for kind in kinds:
        given = dict((params or {}).get(kind) or {})
        if kind == "refined":
            given.setdefault("first_stage", first_stage)
        try:
            inverter = MATCHING[kind](inverter, backbone, **given)
        except TypeError as error:
            raise UserError(f"params.{kind}: {error}") from error
    return inverter
