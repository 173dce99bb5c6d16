"""What the app does, on tensors: no browser, no layout, nothing remembered but what is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from featinv.applications import composites
from featinv.applications.batches import Progress, decode, encode, probabilities, seeds_of
from featinv.applications.concepts import Concept
from featinv.applications.lookup import find_concept
from featinv.applications.posterior import draw_samples, perceptual_map, pixel_map, sample_cosines
from featinv.applications.steering import steer_strip
from featinv.attribution.saliency import SALIENCY, overlay, to_map
from featinv.config import nearest
from featinv.data.scene_factors import FACTOR_INDEX, FACTORS
from featinv.errors import UserError
from featinv.inverters.masks import region_mask
from featinv.metrics.features import feature_cosine
from featinv.report.app.blend import Blend
from featinv.report.app.models import Choice, Loaded, Models
from featinv.report.app.pictures import heat, square
from featinv.report.app.watching import part, quiet, steps_of, watched

BATCH = 8
"""Feature maps decoded at a time: small, so that a step is short and cancelling quick."""
SHARES = (0.5, 1.0)
"""How far along its sliders a steered picture is shown, beside the start."""
CONCEPTS = ("object0_colour", "object0_shape", "object0_texture", "sky", "floor_colour", "floor_texture")
"""Factors of scenes whose classes are offered as concepts; object0 is the largest."""
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Picture:
    """A picture (3, S, S) in [0, 1] and what to write under it."""

    image: Tensor
    caption: str


@dataclass(frozen=True)
class Samples:
    """Samples of one feature map.

    Attributes:
        seen: The original as the inverter's pictures are: cropped, and of their size.
        samples: One for each draw.
        pixels: Where the samples' pixels differ, as colours.
        features: Where their features differ, as colours.
    """

    seen: Picture
    samples: list[Picture]
    pixels: Picture
    features: Picture


class Session:
    """The app's verbs. Each takes pictures (3, H, W) in [0, 1] of any size and draws the same ones again for a seed.

    Args:
        models: What can be chosen.
    """

    def __init__(self, models: Models):
        self.models = models
        self._concepts: dict[tuple[str, str, str], Concept] = {}

    def sample(self, choice: Choice, image: Tensor, count: int, seed: int, progress: Progress = quiet) -> Samples:
        """Draw `count` pictures (at least 2) from one picture's features, and show where they differ."""
        loaded = self.models.load(choice)
        seen = square(image, loaded.inverter.size)
        features = encode(loaded.backbone, seen[None])
        inverter = watched(loaded.inverter, progress, count, BATCH)
        drawn = draw_samples(inverter, features, count, seed=seed, batch_size=BATCH)
        cosines = sample_cosines(drawn, features, loaded.backbone)[0].tolist()
        classes = self._classes(loaded, torch.cat([seen[None], drawn[0]]))
        pixels, felt = pixel_map(drawn)[0], perceptual_map(drawn, loaded.backbone)[0]
        return Samples(
            Picture(seen, _joined("original", classes[0])),
            [
                Picture(picture, _joined(f"sample {k + 1}, cosine {cosine:.2f}", label))
                for k, (picture, cosine, label) in enumerate(zip(drawn[0], cosines, classes[1:], strict=True))
            ],
            Picture(heat(pixels), f"pixels differ by {float(pixels.mean()):.3f} (deviation, mean over the picture)"),
            Picture(heat(felt), f"features differ by {float(felt.mean()):.2f} of their own size"),
        )

    def saliency(self, choice: Choice, images: Sequence[Tensor], method: str) -> list[Tensor]:
        """Heat maps of what the class score depends on, laid over the pictures.

        Raises:
            UserError: If there is no such method, or the backbone cannot do it.
        """
        if method not in SALIENCY:
            raise UserError(f"no saliency method {method!r}: {nearest(method, list(SALIENCY))}")
        loaded = self.models.load(choice)
        batch = torch.stack([square(image, loaded.inverter.size) for image in images])
        found = SALIENCY[method](loaded.backbone, batch.to(loaded.backbone.mean.device))
        return list(overlay(batch, to_map(found.cpu())))

    def concepts(self) -> list[str]:
        """Words of concepts to choose from; any other word of `find_concept` may be typed."""
        words = [f"mean:{name}={value}" for name in CONCEPTS for value in FACTORS[FACTOR_INDEX[name]].classes]
        return (words if self.models.has_scenes else []) + [f"subspace:{k}" for k in range(8)]

    def steer(
        self,
        choice: Choice,
        image: Tensor,
        moves: Sequence[tuple[str, float]],
        seed: int,
        box: Box | None = None,
        progress: Progress = quiet,
    ) -> list[Picture]:
        """Raise or lower concepts, all at once: as it was, half the way, all of it.

        Args:
            choice: Which inverter.
            image: (3, H, W).
            moves: Concepts' words and strengths, in the concepts' own units.
            seed: The same for all pictures.
            box: The region that is steered (left, top, right, bottom; fractions); None steers everything.
            progress: Told after every step.

        Raises:
            UserError: If nothing is to be moved, or a concept cannot be found.
        """
        moves = [(word, strength) for word, strength in moves if word and strength]
        if not moves:
            raise UserError("choose a concept and move its slider away from 0.")
        loaded = self.models.load(choice)
        features = encode(loaded.backbone, square(image, loaded.inverter.size)[None])
        blend = Blend([self._concept(choice, word) for word, _ in moves], [strength for _, strength in moves])
        keep = None if box is None else region_mask(features, box)
        inverter = watched(loaded.inverter, progress, 1 + len(SHARES), BATCH)
        seeds = seeds_of(seed, 1)
        strip = steer_strip(inverter, loaded.backbone, features, blend, SHARES, seeds, keep, batch_size=BATCH)
        classes = self._classes(loaded, strip.images[:, 0])
        return [
            Picture(strip.images[k, 0], _joined(f"{share:.0%}: {strip.verdict(k, 0)}", classes[k]))
            for k, share in enumerate(strip.strengths)
        ]

    def paste(
        self,
        choice: Choice,
        image: Tensor,
        other: Tensor,
        box: Box,
        seed: int,
        to: tuple[float, float] | None = None,
        progress: Progress = quiet,
    ) -> list[Picture]:
        """Lay a region of another picture's feature map into this one's, and decode both with one seed.

        Args:
            choice: Which inverter.
            image: (3, H, W), pasted into.
            other: (3, H, W), where the region is cut.
            box: (left, top, right, bottom) as fractions of the picture.
            seed: Of both decoded pictures.
            to: (left, top) of its new place; None leaves it where it was.
            progress: Told after every step.
        """
        loaded = self.models.load(choice)
        target, source = (square(x, loaded.inverter.size)[None] for x in (image, other))
        features, theirs = encode(loaded.backbone, target), encode(loaded.backbone, source)
        maps = torch.cat([features, composites.paste(features, theirs, box, to)])
        inverter = watched(loaded.inverter, progress, 2, BATCH)
        before, after = decode(inverter, maps, seeds_of(seed, 1) * 2, BATCH).split(1)
        cosine = feature_cosine(maps[1:], encode(loaded.backbone, after)).item()
        source, mask = _landed(source, features, box, to)
        judged = composites.placement(after, before, target, source, mask)
        changed = "nothing changed"
        if not torch.equal(before, after):
            changed = (
                f"{float(judged.inside):.0%} of the change is in the region, {float(judged.area):.0%} of the picture"
            )
        return [
            Picture(before[0], "before, decoded"),
            Picture(after[0], f"with the region, decoded; cosine {cosine:.2f} with the composite map"),
            Picture(heat((after - before).square().mean(1).sqrt()), changed),
        ]

    def compare(
        self, backbone: str, layer: str, names: Sequence[str], image: Tensor, seed: int, progress: Progress = quiet
    ) -> list[Picture]:
        """One picture's features through several inverters.

        Raises:
            UserError: If no inverter is named.
        """
        if not names:
            raise UserError("tick at least one method.")
        chosen = [self.models.load(Choice(backbone, layer, name)) for name in names]
        total, done, found = sum(steps_of(loaded.inverter) for loaded in chosen), 0, []
        for name, loaded in zip(names, chosen, strict=True):
            features = encode(loaded.backbone, square(image, loaded.inverter.size)[None])
            inverter = watched(loaded.inverter, part(progress, done, total), 1, BATCH)
            picture = decode(inverter, features, seeds_of(seed, 1), BATCH)
            cosine = feature_cosine(features, encode(loaded.backbone, picture)).item()
            found.append(
                Picture(picture[0], _joined(f"{name}, cosine {cosine:.2f}", self._classes(loaded, picture)[0]))
            )
            done += steps_of(loaded.inverter)
        return found

    def _concept(self, choice: Choice, word: str) -> Concept:
        key = (choice.backbone, choice.layer, word)
        if key not in self._concepts:
            loaded = self.models.load(choice)
            self._concepts[key] = find_concept(word, loaded.backbone, self.models.examples(loaded.inverter.size))
        return self._concepts[key]

    def _classes(self, loaded: Loaded, images: Tensor) -> list[str]:
        """The likeliest class of each picture (N, 3, H, W); empty words for a backbone without a classifier."""
        chances = probabilities(loaded.backbone, images)
        if chances is None:
            return [""] * len(images)
        best = chances.max(1)
        names = self._names if chances.shape[1] == 1000 else [f"class {k}" for k in range(chances.shape[1])]
        return [f"{names[int(k)]} {float(p):.0%}" for p, k in zip(best.values, best.indices, strict=True)]

    @cached_property
    def _names(self) -> list[str]:
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        return [info.index_to_description(k).partition(",")[0] for k in range(1000)]


def _joined(*words: str) -> str:
    return "; ".join(word for word in words if word)


def _landed(source: Tensor, features: Tensor, box: Box, to: tuple[float, float] | None) -> tuple[Tensor, Tensor]:
    """The other picture (1, 3, S, S) moved as `composites.paste` moves it, and the place (1, 1, S, S) it landed on."""
    height, width = features.shape[2:]
    left, top = (0, 0) if to is None else (round((to[0] - box[0]) * width), round((to[1] - box[1]) * height))
    side = source.shape[-1]
    landed = composites.shift(region_mask(features, box), left, top)
    moved = composites.shift(source, round(left * side / width), round(top * side / height))
    return moved, F.interpolate(landed.cpu(), (side, side), mode="nearest")
