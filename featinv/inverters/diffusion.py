"""The FeatInv inverter: a frozen latent-diffusion prior steered by a trainable branch (arXiv 2505.21032)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from featinv.conditioning.dropout import ConditionDropout
from featinv.diffusion.controlled_unet import Conditions, ControlledUNet, EstimateGate, control_branch
from featinv.diffusion.guidance import Guidance, NoGuidance
from featinv.diffusion.half import half_arithmetic, store_half
from featinv.diffusion.lift import FeatureLift
from featinv.diffusion.light_branch import LightBranch
from featinv.diffusion.loss import DiffusionLoss
from featinv.diffusion.prior import DiffusionPrior
from featinv.diffusion.samplers import sample
from featinv.errors import UserError
from featinv.image import seeded_noise

BRANCHES = {"controlnet": control_branch, "light": LightBranch}


class DiffusionInverter(nn.Module):
    """Draws images from p(image | features).

    Args:
        prior: Frozen.
        encoder: Features -> (embedding on the latent grid, regression estimate of the latents or None).
        guidance: How predictions with and without conditions are combined when sampling.
        sampler: A key of `featinv.diffusion.samplers.SAMPLERS`.
        num_inference_steps: Sampling steps.
        dropout: Condition dropout in training.
        snr_gamma: Min-SNR gamma, None for the plain loss.
        regression_weight: Weight of the encoder's own latent regression loss (0 leaves it out).
        strength: Factor on the branch's residuals when sampling.
        branch: "controlnet", a copy of the UNet's encoder that runs in every step, or "light" (`LightBranch`), a small
            network that runs once per image.
        gated: Whether predictions are pulled towards the encoder's regression estimate (`EstimateGate`).
        lift: Draws the map of an earlier layer from the one that is given; encoder and branch are then that layer's,
            and only the lift is trained, on maps of the earlier layer.
    """

    def __init__(
        self,
        prior: DiffusionPrior,
        encoder: nn.Module,
        guidance: Guidance | None = None,
        sampler: str = "unipc",
        num_inference_steps: int = 6,
        dropout: ConditionDropout | None = None,
        snr_gamma: float | None = None,
        regression_weight: float = 0.5,
        strength: float = 1.0,
        gated: bool = True,
        branch: str = "controlnet",
        lift: FeatureLift | None = None,
    ):
        super().__init__()
        self.prior, self.size = prior.freeze(), prior.size
        self.encoder, self.lift = encoder, lift
        if branch not in BRANCHES:
            raise UserError(f"branch {branch!r}: choose one of {', '.join(BRANCHES)}.")
        self.branch: nn.Module = BRANCHES[branch](prior.unet)
        # Shares the prior's UNet and the branch; kept out of the module tree so that nothing is saved twice.
        self.gate = EstimateGate(prior.scheduler, prior.latent_shape[0]) if gated else None
        self._unet = [ControlledUNet(prior.unet, self.branch, prior.scheduler.config.num_train_timesteps, self.gate)]
        self._unet[0].to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        channels = prior.unet.config.block_out_channels[0]
        self.null_embedding = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.guidance = guidance or NoGuidance()
        self.sampler, self.num_inference_steps, self.strength = sampler, num_inference_steps, strength
        self.dropout = dropout or ConditionDropout(0.0, 0.0)
        self.loss = DiffusionLoss(prior.scheduler, snr_gamma)
        self.regression_weight = regression_weight
        self._foreign: tuple[str, ...] = ("prior.",)  # neither trained nor saved with this inverter

    @property
    def unet(self) -> ControlledUNet:
        """The prior's UNet with this inverter's branch."""
        return self._unet[0]

    def compile_networks(self, backend: str = "inductor") -> None:
        """Let torch.compile fuse UNet and branch, in place: minutes before the first step, faster ones afterwards."""
        self.prior.unet.compile(backend=backend)
        self.branch.compile(backend=backend)
        if self.lift is not None:
            self.lift.unet.compile(backend=backend)

    def halve(self) -> None:
        """Draw in bfloat16 from now on, with half the memory for UNet and branch; not for training."""
        store_half(self.prior.unet)
        store_half(self.branch)
        if self.lift is not None:
            store_half(self.lift.unet)
        self.unet.halved = True

    def prepare(self, features: Tensor, latents: Tensor | None) -> None:
        """Fit what is solved in closed form before training, from features (N, C, H, W) and latents (N, c, h, w)."""
        if self.lift is not None:
            self.lift.fit(features)
        else:
            self.encoder.fit(features, latents)  # type: ignore[operator]

    def trainable_state(self) -> dict[str, Tensor]:
        """Parameters and buffers of everything but the prior and a borrowed branch: what a checkpoint holds."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith(self._foreign)}

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that training changes."""
        return (p for k, p in self.named_parameters() if not k.startswith(self._foreign) and p.requires_grad)

    def borrow_branch(self, state: dict[str, Tensor]) -> None:
        """Take all but the encoder from another inverter's state, and keep it as it is: only the encoder is trained.

        With a lift the encoder is taken, too, and only the lift is trained.

        Raises:
            UserError: If the state is that of another kind of branch, or, with a lift, of another encoder.
        """
        trained = "encoder." if self.lift is None else "lift."
        own = {k: v.shape for k, v in self.trainable_state().items() if not k.startswith(trained)}
        given = {k: v for k, v in state.items() if not k.startswith(trained)}
        if own != {k: v.shape for k, v in given.items()}:
            raise UserError("its branch, or with a lift its encoder, is of another kind or size than this inverter's.")
        self.load_state_dict(given, strict=False)
        self._foreign = ("prior.", *given)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name not in given)

    def lifted(
        self, features: Tensor, seeds: Sequence[int], callback: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """What the encoder is told (N, C, H, W): the features, or what a lift draws from them.

        Args:
            features: (N, C', H', W').
            seeds: N seeds of what the lift draws.
            callback: Called as callback(step, maps) after each of a lift's steps.
        """
        if self.lift is None:
            return features
        with half_arithmetic(features.device, self.unet.halved):
            return self.lift(features, seeds, callback)

    def conditions(self, told: Tensor) -> Conditions:
        """Embed maps (N, C, H, W) from `lifted` once per image."""
        with half_arithmetic(told.device, self.unet.halved):
            return self._conditions(told)

    def _conditions(self, features: Tensor) -> Conditions:
        embedding, estimate = self.encoder(features)
        n = len(features)
        null_embedding = self.null_embedding.expand_as(embedding)
        text, null_text = self.prior.encoder_hidden_states(n), self.prior.text["null"].expand(n, -1, -1)
        if not isinstance(self.branch, LightBranch):
            return Conditions(embedding, null_embedding, text, null_text, estimate, self.strength)
        down, middle = self.branch(null_embedding[:1])  # the same for all images
        null = tuple(x.expand(n, -1, -1, -1) for x in down), middle.expand(n, -1, -1, -1)
        return Conditions(None, None, text, null_text, estimate, self.strength, self.branch(embedding), null)

    @torch.no_grad()
    def invert(
        self,
        features: Tensor,
        *,
        seeds: Sequence[int],
        told: Tensor | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Draw one image for each row of features.

        Args:
            features: (N, C, H, W) from the backbone this inverter was trained for.
            seeds: N seeds; image i depends on features[i] and seeds[i] alone.
            told: As of `draw`.
            callback: Called as callback(step, latents) after every sampling step, and before them as
                callback(step, maps) after each of a lift's.

        Returns:
            Images (N, 3, H, W) in [0, 1].
        """
        latents = self.draw(features, seeds, told=told, callback=callback)
        with half_arithmetic(features.device, self.unet.halved):
            return self.prior.first_stage.decode(latents)

    def draw(
        self,
        features: Tensor,
        seeds: Sequence[int],
        *,
        told: Tensor | None = None,
        num_inference_steps: int | None = None,
        grad_steps: int = 0,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Draw latents (N, c, h, w).

        Args:
            features: (N, C, H, W).
            seeds: N seeds.
            told: What the encoder is told in place of `lifted(features, seeds)`, (N, C, H, W) of its own layer.
            num_inference_steps: Sampling steps; None takes the inverter's own.
            grad_steps: How many of the last steps keep their gradient, for training on what is drawn.
            callback: Called as callback(step, latents) after every sampling step, and before them as
                callback(step, maps) after each of a lift's.
        """
        if len(seeds) != len(features):
            raise UserError(f"{len(features)} feature maps need as many seeds, not {len(seeds)}.")
        conditions = self.conditions(self.lifted(features, seeds, callback) if told is None else told)
        noise = seeded_noise(seeds, self.prior.latent_shape).to(features)

        def denoise(noisy_latents: Tensor, timestep: Tensor) -> Tensor:
            return self.guidance.denoise(self.unet, noisy_latents, timestep, conditions)

        steps = num_inference_steps or self.num_inference_steps
        return sample(denoise, noise, self.prior.scheduler, self.sampler, steps, callback, grad_steps)

    @torch.no_grad()
    def posterior_mean(self, features: Tensor) -> Tensor:
        """Decode the encoder's regression estimate: the one blurred picture without a draw, (N, 3, H, W) in [0, 1]."""
        _, latents = self.encoder(features if self.lift is None else self.lift.estimate(features))
        if latents is None:
            raise UserError(f"{type(self.encoder).__name__} has no regression estimate of the latents.")
        return self.prior.first_stage.decode(latents)

    def estimate_losses(
        self, images: Tensor | None, features: Tensor, *, latents: Tensor | None = None, embedding: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The encoder's losses alone.

        Args:
            images: As of `training_losses`.
            features: As of `training_losses`.
            latents: As of `training_losses`.
            embedding: What the embedding (N, C0, h, w) should be, if that is known.

        Returns:
            "loss" (), "regression" of the latents and, in units of its variance, of the "embedding".

        Raises:
            UserError: If the encoder estimates no latents.
        """
        found, regressed = self.encoder(features)
        if regressed is None:
            raise UserError(f"{type(self.encoder).__name__} has no regression estimate of the latents.")
        if latents is None:
            assert images is not None
            with torch.no_grad():
                latents = self.prior.first_stage.encode(images).float()
        loss = (regressed.float() - latents).square().mean()
        losses = {"loss": loss, "regression": loss.detach()}
        if embedding is not None:
            error = (found.float() - embedding).square().mean() / embedding.var()
            losses |= {"loss": loss + error, "embedding": error.detach()}
        return losses

    def training_losses(
        self,
        images: Tensor | None,
        features: Tensor,
        *,
        seeds: Sequence[int],
        latents: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the training loss.

        Args:
            images: (N, 3, H, W) in [0, 1]; unused where `latents` are given.
            features: (N, C, H, W).
            seeds: N seeds of noise, timestep and dropout.
            latents: Cached latents (N, c, h, w), which save the first stage's encoder.

        With a lift the features are those of `lift.backbone`, and its own losses are all there is.

        Returns:
            "loss" (), its parts, the clean "latents" (N, c, h, w), their one-step "estimate" (N, c, h, w), which rows'
            features were "dropped" (N,) and, where they were given, the "images".
        """
        if self.lift is not None:
            return self.lift.training_losses(features, seeds)
        if latents is None:
            assert images is not None
            with torch.no_grad():
                latents = self.prior.first_stage.encode(images).float()  # the schedule is rounded to their format
        noise, timesteps = self.loss.draw(latents, seeds)
        no_features, no_text = self.dropout.draw(seeds)
        embedding, regressed = self.encoder(features)
        dropped = no_features.to(embedding.device)
        mask = dropped[:, None, None, None]
        embedding = torch.where(mask, self.null_embedding.to(embedding.dtype), embedding)
        text = self.prior.encoder_hidden_states(len(latents), no_text)
        # Rows whose features are dropped have no estimate either: NaN tells the gate.
        told = None if regressed is None else torch.where(mask, torch.nan, regressed.detach())
        conditions = Conditions(embedding, None, text, text, told)
        if isinstance(self.branch, LightBranch):
            conditions = Conditions(None, None, text, text, told, residuals=self.branch(embedding))

        def denoiser(noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
            return self.unet(noisy_latents, timesteps, conditions)

        per_image, estimate = self.loss(denoiser, latents, noise, timesteps)
        losses = {"loss": per_image.mean(), "diffusion": per_image.detach().mean(), "estimate": estimate}
        if regressed is not None and self.regression_weight:
            regression = (regressed.float() - latents).square().mean()
            losses |= {
                "loss": losses["loss"] + self.regression_weight * regression,
                "regression": regression.detach(),
            }
        losses |= {"timesteps": timesteps, "latents": latents, "dropped": dropped}
        return losses if images is None else losses | {"images": images}


class PosteriorMean:
    """A diffusion inverter's regression estimate as an inverter of its own: one evaluation, no draw, blurred.

    Args:
        inverter: Whose encoder estimates the latents.
    """

    def __init__(self, inverter: DiffusionInverter):
        self.inverter, self.prior, self.size = inverter, inverter.prior, inverter.size

    def invert(self, features: Tensor, *, seeds: Sequence[int]) -> Tensor:
        """Features (N, C, H, W) -> images (N, 3, H, W) in [0, 1]; the seeds change nothing."""
        return self.inverter.posterior_mean(features)
