"""Training the prior itself: first the autoencoder, then the unconditional UNet on its latents."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featinv.backbones.base import Backbone
from featinv.diffusion.controlled_unet import unconditional
from featinv.diffusion.first_stage import FirstStage
from featinv.diffusion.half import full_arithmetic
from featinv.diffusion.loss import DiffusionLoss
from featinv.diffusion.prior import DiffusionPrior
from featinv.errors import UserError
from featinv.inverters.build import load_trained
from featinv.inverters.diffusion import DiffusionInverter
from featinv.inverters.fingerprints import first_stage_fingerprint
from featinv.training.adversary import Adversary
from featinv.training.ema import EMA
from featinv.training.module import check_fits, row_seeds
from featinv.training.optimizers import FusedAdamW, check_optimizer, clip_gradients, cosine_schedule, match_layout


def _trainable(part: nn.Module) -> list[nn.Parameter]:
    return [p for p in part.parameters() if p.requires_grad]


class FirstStageModule(pl.LightningModule):
    """Train a first stage on pictures: squared error, a little KL, and the cosine of a backbone's features.

    Features of a deep layer are far more sensitive to fine errors than PSNR is (white noise at 34 dB leaves a cosine of
    0.67 in EfficientNet-Lite0's last map), and the first stage's round trip is the ceiling of everything downstream.

    Args:
        first_stage: Trained in place.
        backbone: Judges the feature term; None leaves it out.
        max_steps: Optimizer steps of the whole run.
        learning_rate: Peak of the autoencoder's; its linear shortcut, nearly right from the start,
            gets a twentieth.
        warmup_steps: Linear rise before the peak.
        kl_weight: Weight of the KL divergence per latent element.
        feature_weight: Weight of 1 - cosine.
        feature_rows: Images of each batch that get the feature term; 0 leaves it out.
        latent_noise: Every other image is decoded from latents with extra noise, whose standard deviation is
            |N(0, latent_noise^2)| of the latents' own: what a diffusion model draws is never exact, and a decoder that
            only ever saw exact latents turns a hundredth of error into visible grain (noise-augmented decoding as in
            RAE, arXiv 2510.11690, section 4.3). 0 leaves it out.
        trained: "all"; "decoder", which leaves the encoder as it is, so that latents stay what they are; or "finish",
            the decoder's last part alone.
        adversary: Tells round trips from pictures (`Adversary`, on the rows of the feature term): grain that squared
            error and one layer's cosine do not mind.
        drawn_by: A diffusion inverter of these latents (name, folder or checkpoint). It draws the latents of half of
            the rows of the feature term from their features, and the squared error leaves these rows out: a decoder is
            for what is drawn, whose latents differ from encoded ones in their own way, unlike noise.
        max_grad_norm: Gradients are clipped to this norm; None does not clip.
        seed: Of the posterior draws.

    Raises:
        UserError: If there is an adversary but no backbone, on whose maps it looks, if `drawn_by` draws no latents or
            those of another first stage, or none of the rows of the feature term, if there is nothing to train of that
            name, or nothing can be learned.
    """

    def __init__(
        self,
        first_stage: FirstStage,
        backbone: Backbone | None,
        max_steps: int = 3000,
        learning_rate: float = 1e-3,
        warmup_steps: int = 200,
        kl_weight: float = 1e-5,
        feature_weight: float = 0.03,
        feature_rows: int = 6,
        latent_noise: float = 0.0,
        trained: str = "all",
        adversary: Adversary | None = None,
        drawn_by: str | None = None,
        max_grad_norm: float | None = 1.0,
        seed: int = 0,
    ):
        super().__init__()
        check_optimizer(learning_rate, max_grad_norm)
        if drawn_by and feature_rows < 2:
            raise UserError(f"drawn_by draws half of feature_rows, which must be at least 2 then, not {feature_rows}.")
        # In a list: no part of the module tree, which the autoencoder's optimizer and checkpoints are of.
        self.first_stage, self._backbone, self._adversary = first_stage, [backbone], [adversary]
        self._drawer = [_Drawer(drawn_by, first_stage) if drawn_by else None]
        if adversary is not None:
            if backbone is None:
                raise UserError("an adversary looks at a backbone's maps; give one, or leave the adversary out.")
            adversary.build(backbone)
        self.max_steps, self.learning_rate, self.warmup_steps = max_steps, learning_rate, warmup_steps
        self.kl_weight, self.feature_weight, self.feature_rows = kl_weight, feature_weight, feature_rows
        self.latent_noise, self.max_grad_norm, self.seed = latent_noise, max_grad_norm, seed
        _train_only(first_stage, trained)

    def on_fit_start(self) -> None:
        """Follow Lightning's device with what is no part of this module's tree."""
        if self._backbone[0] is not None:
            self._backbone[0] = self._backbone[0].to(self.device)
        if self._adversary[0] is not None:
            self._adversary[0].follow(self.device)

    def on_fit_end(self) -> None:
        """Return the backbone to the CPU, as Lightning does with this module: what comes next uses both."""
        if self._backbone[0] is not None:
            self._backbone[0] = self._backbone[0].to("cpu")

    def _disturb(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Latents (N, C, h, w) with noise of a random strength on every second row."""
        strength = torch.randn(len(latents), 1, 1, 1, generator=generator, device=latents.device).abs()
        strength[::2] = 0
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        return latents + noise * strength * self.latent_noise * latents.detach().std()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One step on batch["image"] (N, 3, H, W)."""
        images, backbone = batch["image"], self._backbone[0]
        posterior = self.first_stage.distribution(images)
        seed = self.seed + 1_009 * self.global_rank  # else every process would draw the same
        generator = torch.Generator(self.device).manual_seed(seed * 1_000_003 + self.global_step)
        latents, drawn = self._disturb(posterior.sample(generator), generator), 0
        if self._drawer[0] is not None:
            drawn = min(self.feature_rows, len(images)) // 2
            seeds = row_seeds(self, self.seed, batch_idx, drawn)
            latents = torch.cat([self._drawer[0](images[:drawn], seeds).to(latents), latents[drawn:]])
        again = self.first_stage.synthesise(latents)
        error = (again[drawn:] - images[drawn:]).square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = 4 * error + self.kl_weight * kl  # 4: the error on the autoencoder's own range [-1, 1]
        self.log("train/psnr", -10 * error.detach().log10(), prog_bar=True)
        if backbone is not None and self.feature_rows:
            loss = loss + self._judge(backbone, images[: self.feature_rows], again[: self.feature_rows].float())
        return loss

    def _judge(self, backbone: Backbone, images: Tensor, again: Tensor) -> Tensor:
        """The weighted feature term and the adversary's, of originals and round trips (N, 3, H, W)."""
        adversary, again = self._adversary[0], again.clamp(0, 1)
        layers = [backbone.layer, *(adversary.maps if adversary is not None else [])]
        # In float32: differences of maps are small beside the maps.
        with full_arithmetic(images.device):
            with torch.no_grad():
                wanted, *originals = backbone.maps(images, layers)
            own, *maps = backbone.maps(again, layers)
            cosine = F.cosine_similarity(own.flatten(1), wanted.flatten(1)).mean()
            self.log("train/cosine", cosine.detach(), prog_bar=True)
            term = self.feature_weight * (1 - cosine)
            if adversary is not None:
                term = term + adversary.weight * adversary(again, maps, images, originals)
                self.log("train/adversary", adversary.hinge, prog_bar=True)
        return term

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adversary beside the autoencoder."""
        checkpoint["adversary"] = self._adversary[0].training_state() if self._adversary[0] is not None else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the adversary; Lightning restores the rest."""
        if self._adversary[0] is not None and checkpoint.get("adversary") is not None:
            check_fits("adversary", self._adversary[0].state_dict(), checkpoint["adversary"]["heads"])
            self._adversary[0].restore(checkpoint["adversary"])

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip: one batch in some hundreds else undoes what the others have learned."""
        norm = float(clip_gradients(_trainable(self.first_stage), self.max_grad_norm))
        if not math.isfinite(norm):
            raise UserError(
                f"the norm of the gradients is {norm} at step {self.global_step}; go on from the last checkpoint with "
                f"a lower learning_rate (now {self.learning_rate}) and --changed."
            )

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW, the shortcut at a twentieth of the rate, cosine schedule."""
        stage, rate = self.first_stage, self.learning_rate
        rates = [(stage.vae, rate), (stage.shortcut, rate / 20), (stage.finish, rate)]
        groups = [{"params": _trainable(part), "lr": rate} for part, rate in rates if part is not None]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=1e-4)
        return cosine_schedule(optimizer, self.warmup_steps, self.max_steps, least=0.02)


def _train_only(first_stage: FirstStage, trained: str) -> None:
    """Let gradients reach that part of the first stage alone."""
    shortcut = first_stage.shortcut
    kept = {
        "all": [],
        "decoder": [first_stage.vae.encoder, first_stage.vae.quant_conv, shortcut and shortcut.analysis],
        "finish": [first_stage.vae, shortcut],
    }
    if trained not in kept:
        raise UserError(f"trained={trained!r} is none of {', '.join(kept)}.")
    if trained == "finish" and first_stage.finish is None:
        raise UserError("trained=finish: this first stage has none; give it one by first_stage.finish.")
    first_stage.requires_grad_(True)
    for part in kept[trained]:
        if part is not None:
            part.requires_grad_(False)


class _Drawer:
    """Latents of a first stage that an inverter draws for pictures."""

    def __init__(self, inverter: str, first_stage: FirstStage):
        trained = load_trained(inverter)
        if not isinstance(trained.inverter, DiffusionInverter):
            raise UserError(f"drawn_by={inverter} draws no latents.")
        if first_stage_fingerprint(trained.inverter.prior.first_stage) != first_stage_fingerprint(first_stage):
            raise UserError(f"drawn_by={inverter} draws latents of another first stage than the one to train.")
        self.inverter, self.backbone = trained.inverter.eval(), trained.load_backbone()

    @torch.no_grad()
    def __call__(self, images: Tensor, seeds: list[int]) -> Tensor:
        """Unscaled latents (N, c, h, w), drawn from the features of images (N, 3, H, W)."""
        self.inverter, self.backbone = self.inverter.to(images.device), self.backbone.to(images.device)
        with full_arithmetic(images.device):
            features = self.backbone(images).float()
        latents = self.inverter.draw(features, seeds)
        # By its own prior's scale: that of the first stage in training is not set before the end.
        return self.inverter.prior.first_stage.unscale(latents.float())


class PriorModule(pl.LightningModule):
    """Train a prior's UNet on cached latents, unconditionally.

    Args:
        prior: Its UNet is trained in place; the rest stays frozen.
        max_steps: Optimizer steps of the whole run.
        learning_rate: Peak of AdamW's.
        warmup_steps: Linear rise before the peak.
        ema_decay: Largest decay of the weight average.
        snr_gamma: Min-SNR gamma; None weighs all timesteps alike. For velocity prediction min-SNR all but leaves out
            the noisiest timesteps, where the layout of a picture is decided.
        seed: Of noise and timesteps.
    """

    def __init__(
        self,
        prior: DiffusionPrior,
        max_steps: int = 3000,
        learning_rate: float = 1e-3,
        warmup_steps: int = 100,
        ema_decay: float = 0.999,
        snr_gamma: float | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.prior, self.loss, self.seed = prior, DiffusionLoss(prior.scheduler, snr_gamma), seed
        self.max_steps, self.learning_rate, self.warmup_steps = max_steps, learning_rate, warmup_steps
        prior.unet.requires_grad_(True)
        prior.unet.to(memory_format=torch.channels_last)
        self.ema = EMA(dict(prior.unet.named_parameters()), ema_decay)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One step on batch["latents"] (N, C, h, w)."""
        latents = batch["latents"]
        noise, timesteps = self.loss.draw(latents, row_seeds(self, self.seed, batch_idx, len(latents)))

        def denoiser(noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
            return unconditional(self.prior.unet, self.prior.text["null"], noisy_latents, timesteps)

        loss = self.loss(denoiser, latents, noise, timesteps)[0].mean()
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def on_fit_start(self) -> None:
        """Follow Lightning's device with what is no part of this module's tree."""
        self.ema.follow()

    def on_train_start(self) -> None:
        """Repair the layout of restored optimizer state."""
        match_layout(self.optimizers(use_pl_optimizer=False))  # type: ignore[arg-type]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update the average with the step itself, before any checkpoint of that step is written."""
        super().optimizer_step(*args, **kwargs)
        self.ema.update()

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with a cosine schedule."""
        optimizer = FusedAdamW(
            self.prior.unet.parameters(), lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2
        )
        return cosine_schedule(optimizer, self.warmup_steps, self.max_steps, least=0.02)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the UNet and its average only: the first stage has its own checkpoint, and may have changed since."""
        checkpoint["state_dict"] = _of_unet(checkpoint["state_dict"])
        checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore UNet and average."""
        self.ema.load_state_dict(checkpoint["ema"])
        # Lightning loads this dict strictly into the whole module.
        checkpoint["state_dict"] = self.state_dict() | _of_unet(checkpoint["state_dict"])


def _of_unet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith("prior.unet.")}
