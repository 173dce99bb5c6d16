"""An adversary for drawn pictures: small networks on a frozen backbone's maps that tell them from photographs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from featinv.backbones.base import Backbone
from featinv.errors import UserError
from featinv.training.optimizers import match_layout

PIXELS = "pixels"


class Adversary(nn.Module):
    """Judges whether pictures are drawn, at every position of several maps of a frozen network.

    A feature cosine says whether the network takes a picture for the original, not whether it is a photograph: grain
    and missing texture can please it. Small heads on its maps find such differences after a few hundred pictures
    (Projected GAN, Sauer et al. 2021, arXiv 2111.01007; on what a diffusion model draws, Adversarial Diffusion
    Distillation, Sauer et al. 2023, arXiv 2311.17042). They are trained here, beside the inverter, with their own
    optimizer, on the pictures that the consistency term has drawn anyway.

    Args:
        layers: Of the inverted backbone, whose maps are looked at; "pixels" looks at patches of the picture itself.
        weight: Of the inverter's term, beside 1 - cosine.
        width: Channels of the heads.
        learning_rate: Of their AdamW.
        warmup_steps: In so many steps at the start only the heads learn: untrained ones have nothing to say.
        seed: Of their initial weights.

    Attributes:
        hinge: The heads' own loss at their last step, between 2 (they cannot tell) and 0.
    """

    def __init__(
        self,
        layers: Sequence[str],
        weight: float = 0.1,
        width: int = 48,
        learning_rate: float = 1e-3,
        warmup_steps: int = 50,
        seed: int = 0,
    ):
        super().__init__()
        if not layers:
            raise UserError("an adversary needs layers to look at.")
        self.names, self.weight, self.width = list(layers), weight, width
        self.learning_rate, self.warmup_steps, self.seed = learning_rate, warmup_steps, seed
        self.heads, self.steps, self.hinge = nn.ModuleList(), 0, 2.0
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def maps(self) -> list[str]:
        """The layers of the backbone that are looked at."""
        return [name for name in self.names if name != PIXELS]

    def build(self, backbone: Backbone) -> None:
        """Make the heads, whose sizes the backbone's layers say; done once."""
        if len(self.heads):
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for name in self.names:
                self.heads.append(_patches(self.width) if name == PIXELS else _head(backbone.at(name), self.width))
        self.to(backbone.mean.device)
        self._optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate, betas=(0.5, 0.99), weight_decay=1e-3)

    def logits(self, images: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        """Scores (N, 1, h, w) of each head, high for photographs.

        Args:
            images: (N, 3, H, W) in [0, 1].
            maps: Of these images at `self.maps`.
        """
        given = iter(maps)
        inputs = [2 * images - 1 if name == PIXELS else next(given) for name in self.names]
        return [head(x) for head, x in zip(self.heads, inputs, strict=True)]

    def forward(self, images: Tensor, maps: Sequence[Tensor], originals: Tensor, wanted: Sequence[Tensor]) -> Tensor:
        """Train the heads on drawn pictures and originals, then judge the drawn ones.

        Args:
            images: Drawn, (N, 3, H, W), with their gradient.
            maps: Of the drawn ones at `self.maps`, with their gradient.
            originals: (N, 3, H, W).
            wanted: Of the originals at `self.maps`.

        Returns:
            The mean of the heads' hinge losses for the inverter (), unweighted; 0 while the heads warm up.
        """
        self.improve(images.detach(), [x.detach() for x in maps], originals, wanted)
        if self.steps <= self.warmup_steps:
            return images.sum() * 0.0
        self.requires_grad_(False)
        loss = -torch.stack([scores.mean() for scores in self.logits(images, maps)]).mean()
        self.requires_grad_(True)
        return loss

    def improve(self, images: Tensor, maps: Sequence[Tensor], originals: Tensor, wanted: Sequence[Tensor]) -> None:
        """One step of the heads on drawn pictures and originals, as in a call but without any gradient."""
        assert self._optimizer is not None, "build(backbone) comes first"
        with torch.enable_grad():
            false, true = self.logits(images, maps), self.logits(originals, wanted)
            pairs = zip(false, true, strict=True)
            loss = torch.stack([F.relu(1 + f).mean() + F.relu(1 - t).mean() for f, t in pairs]).mean()
            self._optimizer.zero_grad()
            loss.backward()
        self._share_gradients()
        self._optimizer.step()
        self.steps, self.hinge = self.steps + 1, float(loss.detach())

    def _share_gradients(self) -> None:
        """Several processes see different pictures and keep the same heads."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        for parameter in self.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()

    def follow(self, device: torch.device) -> None:
        """Move heads and optimizer to a device."""
        self.to(device)
        if self._optimizer is not None:
            match_layout(self._optimizer)

    def training_state(self) -> dict[str, Any]:
        """Weights, optimizer and number of steps, for a checkpoint."""
        assert self._optimizer is not None
        return {"steps": self.steps, "heads": self.state_dict(), "optimizer": self._optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Invert `training_state`, after `build`; the learning rate is the configured one."""
        assert self._optimizer is not None
        self.steps = state["steps"]
        self.load_state_dict(state["heads"])
        self._optimizer.load_state_dict(state["optimizer"])
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate


def _head(backbone: Backbone, width: int) -> nn.Module:
    """A map (N, C, h, w) -> scores (N, 1, h, w); maps have very different ranges, each is normalised by its own."""
    return nn.Sequential(
        nn.GroupNorm(1, backbone.spec.channels),
        spectral_norm(nn.Conv2d(backbone.spec.channels, width, 1)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(width, width, 3, padding=1)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(width, 1, 1)),
    )


def _patches(width: int) -> nn.Module:
    """Pictures (N, 3, H, W) in [-1, 1] -> scores (N, 1, H / 4, W / 4) of patches of about 18 pixels."""
    return nn.Sequential(
        spectral_norm(nn.Conv2d(3, width, 4, stride=2, padding=1)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(width, width, 4, stride=2, padding=1)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(width, width, 3, padding=1)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(width, 1, 1)),
    )
