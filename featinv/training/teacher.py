"""What a trained inverter gives to another's training: the words that its branch knows, or maps that its lift draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

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
        return self.encoder(self.backbone(images).float())[0]


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
