"""From a network's last map back to an earlier one: what later layers threw away is drawn anew, in feature space."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn

from featinv.backbones.base import Backbone, FeatureSpec
from featinv.conditioning.encoders import SpatialEncoder
from featinv.diffusion.first_stage import FirstStage
from featinv.diffusion.half import full_arithmetic
from featinv.diffusion.objective_guidance import climb
from featinv.diffusion.prior import DiffusionPrior
from featinv.errors import UserError
from featinv.image import seeded_noise


class FeatureLift(nn.Module):
    """Draws an earlier layer's map from p(earlier map | last map), for an inverter of that earlier layer to draw from.

    A last map leaves open most of an earlier one, and an inverter that must fill it in while it draws pictures learns
    from a few pictures a second. In feature space maps are small, and the rest of the network says for little more
    than nothing what the last map of a drawn one is: a velocity is learned by flow matching (Lipman et al. 2023, arXiv
    2210.02747), x_s = (1 - s) x + s noise, v = noise - x, and sampling climbs on the last map's cosine at every step.

    Args:
        spec: Of the last map.
        backbone: Whose last map is given; frozen, never saved.
        layer: The earlier layer, whose map determines the last one (`Backbone.final_from`).
        components: Whitened directions of the last map that are kept.
        hidden: Width of the encoder of the last map.
        condition_channels: Of what it tells the UNet.
        widths: Of the UNet, at the earlier map's resolution and at half of it.
        num_inference_steps: Euler steps.
        churn: Share of the noise that is drawn afresh after each step, 0 (follow the flow) to 1. A step then goes past
            the next level, and noise brings it back there, so that later steps mend what earlier ones got wrong
            (Karras et al. 2022, arXiv 2206.00364, section 4). It takes more steps.
        guidance_strength: Root mean square of one uphill step, in standard deviations of the earlier map's channels.
        guidance_iterations: Uphill steps at each Euler step; 0 leaves the last map to what was learned.
        regression_weight: Of the encoder's own estimate, the mean of all earlier maps.

    Raises:
        UserError: If the features are not of the last map, the layer's sides are odd, churn is out of range, or there
            is no step.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        spec: FeatureSpec,
        backbone: Backbone,
        layer: str,
        components: int = 384,
        hidden: int = 192,
        condition_channels: int = 128,
        widths: Sequence[int] = (256, 384),
        num_inference_steps: int = 30,
        churn: float = 0.85,
        guidance_strength: float = 0.1,
        guidance_iterations: int = 4,
        regression_weight: float = 0.5,
    ):
        super().__init__()
        if spec.layer != "final":
            raise UserError(f"a lift starts at the last map (layer=final), not at {spec.layer!r}.")
        if not 0 <= churn <= 1:
            raise UserError(f"churn must lie between 0 and 1, not {churn}.")
        if num_inference_steps < 1:
            raise UserError(f"a lift takes a step at least, not {num_inference_steps}.")
        self._backbone = [backbone.at(layer)]  # outside the module tree: never saved, never trained
        self.spec = earlier = self.backbone.spec
        if earlier.height % 2 or earlier.width % 2:
            raise UserError(f"a lift halves its maps; {layer!r} has {earlier.height} x {earlier.width} positions.")
        shape = (earlier.channels, earlier.height, earlier.width)
        self.condition = SpatialEncoder(spec, shape, condition_channels, components, hidden)
        self.unet = UNet2DModel(
            in_channels=earlier.channels + condition_channels,
            out_channels=earlier.channels,
            layers_per_block=1,
            block_out_channels=tuple(widths),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=math.gcd(32, *widths),
            attention_head_dim=16,
            add_attention=False,
        ).to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.zeros(earlier.channels, 1, 1))
        self.register_buffer("std", torch.ones(earlier.channels, 1, 1))
        self.num_inference_steps, self.churn, self.regression_weight = num_inference_steps, churn, regression_weight
        self.guidance_strength, self.guidance_iterations = guidance_strength, guidance_iterations

    @property
    def backbone(self) -> Backbone:
        """The backbone, cut at the earlier layer; on this module's device once it has been used."""
        return self._backbone[0]

    def last_map(self, earlier: Tensor) -> Tensor:
        """Earlier maps (N, C, H, W) -> the network's last maps (N, C', H', W'), in float32."""
        self._backbone[0] = self.backbone.to(earlier.device)
        with full_arithmetic(earlier.device):
            return self.backbone.final_from(earlier.float())

    @torch.no_grad()
    def fit(self, earlier: Tensor) -> None:
        """Set mean and deviation of the channels, and the encoder's whitening, from earlier maps (N, C, H, W)."""
        self.mean.copy_(earlier.mean((0, 2, 3))[:, None, None])
        self.std.copy_(earlier.transpose(0, 1).flatten(1).std(1).clamp(min=1e-6)[:, None, None])
        later = torch.cat([self.last_map(rows) for rows in earlier.split(256)])
        self.condition.fit(later, self._normalised(earlier))

    def _normalised(self, earlier: Tensor) -> Tensor:
        return (earlier - self.mean) / self.std

    def training_losses(self, earlier: Tensor, seeds: Sequence[int]) -> dict[str, Tensor]:
        """Compute the training loss of earlier maps (N, C, H, W) of photographs, given their own last maps.

        Args:
            earlier: From `backbone`.
            seeds: N seeds of noise and noise level.

        Returns:
            "loss" (), and its parts "flow" and "regression".
        """
        with torch.no_grad():
            later = self.last_map(earlier)
        clean = self._normalised(earlier)
        noise = seeded_noise(seeds, clean.shape[1:]).to(clean)
        # Logit-normal levels (Esser et al. 2024, arXiv 2403.03206, section 3.1), shifted to the noisy side.
        level = torch.sigmoid(seeded_noise([seed ^ 0x5EED for seed in seeds], (1, 1, 1)).to(clean) + 0.3)
        condition, estimate = self.condition(later)
        velocity = self._velocity((1 - level) * clean + level * noise, level.flatten(), condition)
        flow = (velocity - (noise - clean)).square().mean()
        regression = (estimate.float() - clean).square().mean()
        losses = {"loss": flow + self.regression_weight * regression}
        return losses | {"flow": flow.detach(), "regression": regression.detach()}

    def _velocity(self, noisy: Tensor, level: Tensor, condition: Tensor) -> Tensor:
        return self.unet(torch.cat([noisy, condition], 1), 1000 * level).sample.float()

    @torch.no_grad()
    def forward(
        self, features: Tensor, seeds: Sequence[int], callback: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """Last maps (N, C', H', W') and N seeds -> earlier maps (N, C, H, W), row i from features[i] and seeds[i].

        A callback is called as callback(step, maps) after every Euler step, with the normalised maps (N, C, H, W).
        """
        condition, _ = self.condition(features)
        steps, shape = self.num_inference_steps, (self.spec.channels, self.spec.height, self.spec.width)
        # Other numbers than the latents begin with: for the start, and for all steps but the last.
        noisy, *fresh = seeded_noise([seed ^ 0x11F7 for seed in seeds], (steps, *shape)).to(features).unbind(1)

        for step in range(steps, 0, -1):
            level, after = step / steps, (step - 1) / steps
            velocity = self._velocity(noisy, noisy.new_full((len(noisy),), level), condition)
            clean = self._climbed(noisy - level * velocity, features)
            noisy = clean if step == 1 else self._renoised(noisy, clean, level, after, fresh.pop())
            if callback is not None:
                callback(steps - step, noisy)
        return noisy * self.std + self.mean

    def _climbed(self, clean: Tensor, features: Tensor) -> Tensor:
        """Normalised maps, moved uphill on the cosine of their last map and the features."""

        def match(clean: Tensor) -> Tensor:
            return F.cosine_similarity(self.last_map(clean * self.std + self.mean).flatten(1), features.flatten(1))

        return climb(clean, match, self.guidance_strength, self.guidance_iterations)[0]

    @torch.no_grad()
    def nearer(self, earlier: Tensor, features: Tensor) -> Tensor:
        """Move earlier maps (N, C, H, W) towards last maps (N, C', H', W'), as far as sampling does in one step."""
        return self._climbed(self._normalised(earlier), features) * self.std + self.mean

    def _renoised(self, noisy: Tensor, clean: Tensor, level: float, after: float, fresh: Tensor) -> Tensor:
        """The clean estimate of a map at one noise level, brought to the next with a share of other noise."""
        noise = (noisy - (1 - level) * clean) / level
        return (1 - after) * clean + after * (math.sqrt(1 - self.churn**2) * noise + self.churn * fresh)

    def estimate(self, features: Tensor) -> Tensor:
        """Last maps (N, C', H', W') -> the mean of all earlier maps (N, C, H, W), as regression finds it."""
        return self.condition(features)[1].float() * self.std + self.mean


def training_backbone(inverter: Any, backbone: Backbone) -> Backbone:
    """The backbone whose maps an inverter's training reads: a lift's own, the later maps follow from them."""
    lift = getattr(inverter, "lift", None)
    return backbone if lift is None else lift.backbone


def training_first_stage(inverter: Any) -> FirstStage | None:
    """The first stage whose latents an inverter's training reads; None where it reads images, or features alone."""
    prior = getattr(inverter, "prior", None)
    return prior.first_stage if isinstance(prior, DiffusionPrior) and getattr(inverter, "lift", None) is None else None
