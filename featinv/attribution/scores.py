"""A backbone's class scores as the attribution methods need them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from featinv.backbones.base import Backbone
from featinv.errors import UserError


class Logits(nn.Module):
    """Captum's view of a backbone: images (N, 3, H, W) -> class scores (N, K) on the images' device."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone.logits(images.to(self.backbone.mean.device)).to(images.device)


class LogitsFromFinal(Logits):
    """The same through the final map, which passes by `probe`."""

    def __init__(self, backbone: Backbone, probe: nn.Module):
        super().__init__(backbone)
        self.probe = probe

    def forward(self, images: Tensor) -> Tensor:
        features = self.probe(self.backbone(images.to(self.backbone.mean.device)))
        return self.backbone.logits_from(features).to(images.device)


def class_indices(logits: Tensor, target: Tensor | Sequence[int] | None = None) -> Tensor:
    """Class indices (N,) on the logits' device: the given ones, checked, or the predicted ones.

    Args:
        logits: Class scores (N, K).
        target: Class indices (N,), each in 0..K-1; None takes the best class of each row.

    Raises:
        UserError: If there is not one index in range for each row.
    """
    if target is None:
        return logits.detach().argmax(1)
    indices = torch.as_tensor(target, device=logits.device)
    count, classes = logits.shape
    if indices.shape != (count,) or indices.is_floating_point() or indices.dtype == torch.bool:
        raise UserError(
            f"{count} images need {count} integer class indices, not {indices.dtype} {tuple(indices.shape)}."
        )
    wrong = indices[(indices < 0) | (indices >= classes)]
    if len(wrong):
        raise UserError(f"there is no class {int(wrong[0])}; the network has {classes}, numbered from 0.")
    return indices.long()


def prepare(backbone: Backbone, images: Tensor, target: Tensor | Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """A copy of the images that records gradients, and checked class indices (N,) on the same device."""
    if not len(images):
        raise UserError("attribution needs at least one image.")
    with torch.no_grad():
        logits = Logits(backbone)(images)
    return images.detach().clone().requires_grad_(), class_indices(logits, target)
