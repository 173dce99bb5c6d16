"""What training tells an inverter in place of a picture's own: a teacher's words, a lift's maps, a second look's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featinv.backbones.base import Backbone
from featinv.diffusion.half import full_arithmetic
from featinv.errors import UserError
from featinv.inverters.build import load_trained
from featinv.inverters.diffusion import DiffusionInverter


class EmbeddingTeacher:
    """The embedding that another inverter's encoder gives for the same pictures.

    A branch that was trained on one layer serves another (`training.start`) if it is told in the words that it knows.
    What the new features leave open, the new encoder then says in the mean.

    Args:
        inverter: A bundled name, a run's folder or a checkpoint of a diffusion inverter with the same prior.

    Raises:
        UserError: If it is no diffusion inverter.
    """

    def __init__(self, inverter: str | Path):
        trained = load_trained(inverter)
        if not isinstance(trained.inverter, DiffusionInverter):
            raise UserError(f"{inverter} has no branch, and so no embedding to teach.")
        self.encoder, self.backbone = trained.inverter.encoder, trained.load_backbone()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> embedding (N, C0, h, w)."""
        self.encoder, self.backbone = self.encoder.to(images.device), self.backbone.to(images.device)
        with full_arithmetic(images.device):
            features = self.backbone(images).float()
        return self.encoder(features)[0]


class LiftedMaps:
    """Maps that a lift has drawn from last maps, for the branch that will be told such ones.

    They are not quite maps of pictures. A branch that was trained on pictures' own alone draws their faults; one that
    has seen both, beside an adversary, need not.

    Args:
        inverter: A bundled name, a run's folder or a checkpoint of a diffusion inverter with a lift.
        share: Of the rows of each batch, the first ones; below 1.
        num_inference_steps: Steps of the lift, which take most of a training step's time; None takes its own.

    Raises:
        UserError: If the inverter has no lift, the share is none, there is no step, or, when called, the lift draws
            another layer's maps.
    """

    def __init__(self, inverter: str | Path, share: float = 0.5, num_inference_steps: int | None = None):
        trained = load_trained(inverter).inverter
        lift = getattr(trained, "lift", None)
        if lift is None:
            raise UserError(f"{inverter} has no lift, and so no maps to draw.")
        if not 0 < share < 1:
            raise UserError(f"the share of rows with lifted maps must lie between 0 and 1, not {share}.")
        if num_inference_steps is not None and num_inference_steps < 1:
            raise UserError(f"a lift takes a step at least, not {num_inference_steps}.")
        self.lift, self.share = lift.eval(), share
        if num_inference_steps is not None:
            self.lift.num_inference_steps = num_inference_steps

    def __call__(self, features: Tensor, seeds: Sequence[int]) -> Tensor:
        """Earlier maps of pictures (N, C, H, W), N seeds -> the first share of them, lifted from their last maps."""
        spec, rows = self.lift.spec, int(self.share * len(features))
        if tuple(features.shape[1:]) != (spec.channels, spec.height, spec.width):
            raise UserError(f"the lift draws maps of {spec.layer!r}, these are {tuple(features.shape[1:])}.")
        if not rows:
            return features[:0]
        self.lift = self.lift.to(features.device)
        with torch.no_grad():
            return self.lift(self.lift.last_map(features[:rows]), seeds[:rows]).to(features)


class SecondLooks:
    """Maps as a branch is told them after a look at what it has drawn (`CorrectedInverter`), for its training.

    They are no picture's maps: what a first draw lacked is exaggerated in them. A branch that has never seen them draws
    the features better and, told so twice, drifts from what pictures look like; beside an adversary it need not.

    Args:
        share: Of the rows of each batch, by chance of their seeds; below 1.
        gain: Of the difference that is added, in the mean: each row's lies between none and twice this, as after two
            looks.
        lift_gain: The same of rows that a lift has drawn.

    Raises:
        UserError: If the share is none, or all.
    """

    def __init__(self, share: float = 0.5, gain: float = 0.25, lift_gain: float = 1.0):
        if not 0 < share < 1:
            raise UserError(f"the share of rows that are drawn once more must lie between 0 and 1, not {share}.")
        self.share, self.gain, self.lift_gain = share, gain, lift_gain

    @torch.no_grad()
    def __call__(
        self,
        inverter: Any,
        backbone: Backbone,
        told: Tensor,
        features: Tensor,
        seeds: Sequence[int],
        lifted: LiftedMaps | None = None,
        first: int = 0,
        num_inference_steps: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw some rows, and tell them what was missing.

        Args:
            inverter: Draws, with the rows' own seeds.
            backbone: Whose features it inverts.
            told: Maps (N, C, H, W), of which the first come from a lift.
            features: Of the pictures themselves (N, C, H, W).
            seeds: N seeds.
            lifted: Whose lift that is.
            first: How many rows are from it.
            num_inference_steps: Sampling steps; None takes the inverter's own.

        Returns:
            What to tell, and what should be drawn, (N, C, H, W) both: for a row of a lift the map of its first picture,
            moved towards the last map; for others what they were told before.
        """
        chances = [random.Random(seed ^ 0x100C) for seed in seeds]
        rows = [row for row, chance in enumerate(chances) if chance.random() < self.share]
        if not rows:
            return told, told
        latents = inverter.draw(told[rows], [seeds[row] for row in rows], num_inference_steps=num_inference_steps)
        with full_arithmetic(told.device):
            seen = backbone(inverter.prior.first_stage.decode(latents.float()))
        wanted, early = told[rows].clone(), [place for place, row in enumerate(rows) if row < first]
        if lifted is not None and early:
            lift, last = lifted.lift, lifted.lift.last_map(features[[rows[place] for place in early]])
            wanted[early] = lift.nearer(seen[early], last)
        gains = [2 * chances[row].random() * (self.lift_gain if row < first else self.gain) for row in rows]
        gain = torch.tensor(gains, device=told.device)[:, None, None, None]
        index = torch.tensor(rows, device=told.device)
        return told.index_copy(0, index, told[rows] + gain * (wanted - seen)), told.index_copy(0, index, wanted)
