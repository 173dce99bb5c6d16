"""A trained inverter of another layer teaches a new encoder what its branch understands."""

from __future__ import annotations

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
