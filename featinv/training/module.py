"""The one LightningModule: images -> features -> the inverter's own loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn

from featinv.backbones.base import Backbone
from featinv.conditioning.masking import FeatureMasking, mean_feature
from featinv.diffusion.half import full_arithmetic
from featinv.errors import UserError
from featinv.files import save_safetensors
from featinv.image import seeded_noise
from featinv.inverters.base import TrainableInverter
from featinv.inverters.diffusion import DiffusionInverter
from featinv.training.adversary import Adversary
from featinv.training.consistency import Consistency
from featinv.training.ema import EMA
from featinv.training.optimizers import FusedAdamW, check_optimizer, clip_gradients, cosine_schedule, match_layout
from featinv.training.sharding import gathered, placed_as, shard
from featinv.training.teacher import EmbeddingTeacher


def sample_seeds(seed: int, step: int, rows: int) -> list[int]:
    """Seeds of the rows of one training batch: a function of (seed, step, row), so that a resumed run repeats them."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) & 0x7FFF_FFFF_FFFF)
    return torch.randint(2**62, (rows,), generator=generator).tolist()


def row_seeds(module: pl.LightningModule, seed: int, batch_idx: int, rows: int) -> list[int]:
    """Seeds of this process's rows; the batch as a whole has the same ones on any number of processes."""
    accumulate, rank, world = 1, 0, 1
    if module._trainer is not None:
        accumulate, rank = module.trainer.accumulate_grad_batches, module.trainer.global_rank
        world = module.trainer.world_size
    step = module.global_step * accumulate + batch_idx % accumulate
    return sample_seeds(seed, step, rows * world)[rank::world]


def check_fits(what: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise UserError if a checkpoint's tensors have other names or shapes than what they are to be loaded into.

    Args:
        what: For the message.
        own: Name -> tensor.
        given: The checkpoint's.
    """
    differing = sorted(set(own) ^ set(given)) or [name for name in own if own[name].shape != given[name].shape]
    if differing:
        raise UserError(
            f"the checkpoint does not fit this {what}; it differs in {differing[0]!r}. Choose another out=FOLDER."
        )


def _check_finite(state: Mapping[str, Tensor]) -> None:
    """Raise UserError if trained weights are no numbers any more: they must not take the place of good ones."""
    for name, value in state.items():
        if not value.isfinite().all():
            raise UserError(
                f"{name} is not finite, and is not written. Go on from the last checkpoint with a lower "
                "training.module.params.learning_rate and --changed."
            )


def _check_trainable(inverter: Any, backbone: Backbone, consistency: Consistency | None, estimate_steps: int) -> None:
    """Raise UserError if there is nothing to train, or not by these terms."""
    name = type(inverter).__name__
    if not isinstance(inverter, nn.Module) or not _trained(inverter):
        raise UserError(f"{name} has nothing to train.")
    if not isinstance(inverter, DiffusionInverter) and consistency is not None:
        raise UserError(
            f"consistency needs an inverter that samples by diffusion, not a {name}; "
            "set training.module.params.consistency=null."
        )
    if not isinstance(inverter, DiffusionInverter) and estimate_steps:
        raise UserError(f"{name} estimates no latents; leave estimate_steps at 0.")
    if getattr(inverter, "lift", None) is not None and (consistency is not None or estimate_steps):
        raise UserError("a lift has a loss of its own; leave consistency at null and estimate_steps at 0.")
    if estimate_steps and _estimates_nothing(inverter, backbone):
        raise UserError(f"{type(inverter.encoder).__name__} estimates no latents; leave estimate_steps at 0.")


@torch.no_grad()
def _estimates_nothing(inverter: Any, backbone: Backbone) -> bool:
    spec, device = backbone.spec, inverter.null_embedding.device
    return inverter.encoder(torch.zeros(1, spec.channels, spec.height, spec.width, device=device))[1] is None


def _trained(inverter: Any) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    named = inverter.named_parameters()
    return {k: p for k, p in named if p.requires_grad and not k.startswith("prior.")}


class InversionModule(pl.LightningModule):
    """Train an inverter on the features of a frozen backbone.

    Args:
        inverter: Has `training_losses`, `trainable_parameters` and `trainable_state`.
        backbone: Frozen; of an inverter with a lift the lift's (`featinv.diffusion.lift.training_backbone`).
        max_steps: Optimizer steps of the whole run, over which the learning rate falls along a cosine.
        learning_rate: Peak of AdamW's.
        least_rate: Share of the peak that is left at the end; 1 keeps the rate.
        warmup_steps: Linear rise before the peak.
        betas: AdamW's.
        weight_decay: AdamW's.
        ema_decay: Largest decay of the weight average; 0 switches it off.
        ema_every: Steps between its updates (`EMA`).
        feature_noise: Standard deviation of noise on the features, in units of each map's own (RAE, arXiv 2510.11690:
            tolerates edited features).
        mask_positions: Probability that a map loses positions (`FeatureMasking`); 0 masks none.
        mask_channels: Probability that a map loses channels.
        estimate_steps: Optimizer steps at the start in which the encoder learns its estimate of the latents alone. They
            cost a fifth of the others, which look through a frozen UNet for what regression finds first.
        teacher: In these steps the embedding is learned too: it should be this one's (`EmbeddingTeacher`), which needs
            images, so `training.cache=false`.
        consistency: A term of `featinv.training.consistency`, or None.
        consistency_from: The optimizer step from which it counts: before the pictures are about right, it only costs.
        max_grad_norm: Gradients are clipped to this norm; None does not clip.
        seed: Of noise, timesteps and dropout.
        described: Written into every checkpoint, so that it can be loaded as an inverter (`featinv.inverters.build`).

    Raises:
        UserError: If the inverter has nothing to train, or not by the terms and settings that are asked for.
    """

    def __init__(
        self,
        inverter: TrainableInverter,
        backbone: Backbone,
        max_steps: int = 10_000,
        learning_rate: float = 1e-3,
        least_rate: float = 0.05,
        warmup_steps: int = 200,
        betas: Sequence[float] = (0.9, 0.99),
        weight_decay: float = 1e-2,
        ema_decay: float = 0.999,
        ema_every: int = 1,
        feature_noise: float = 0.0,
        mask_positions: float = 0.0,
        mask_channels: float = 0.0,
        estimate_steps: int = 0,
        teacher: EmbeddingTeacher | None = None,
        consistency: Consistency | None = None,
        consistency_from: int = 0,
        max_grad_norm: float | None = 1.0,
        seed: int = 0,
        described: dict[str, Any] | None = None,
    ):
        super().__init__()
        _check_trainable(inverter, backbone, consistency, estimate_steps)
        check_optimizer(learning_rate, max_grad_norm, betas, least_rate)
        self.inverter, self.described = inverter, described or {}
        self._backbone = [backbone]  # outside the module tree: never saved, never trained
        self.max_steps, self.learning_rate, self.warmup_steps = max_steps, learning_rate, warmup_steps
        self.weight_decay, self.max_grad_norm, self.seed = weight_decay, max_grad_norm, seed
        self.betas, self.least_rate = betas, least_rate
        self.feature_noise = feature_noise
        self.estimate_steps, self.teacher = estimate_steps, teacher
        self.consistency, self.consistency_from = consistency, consistency_from
        if (adversary := self._adversary) is not None:
            adversary.build(backbone)
        self.masking = FeatureMasking(mask_positions, mask_channels)
        self.ema = EMA(_trained(self.inverter), ema_decay, ema_every) if ema_decay else None
        self._step_batches: list[dict[str, Tensor]] = []  # the batches of the optimizer step that is under way

    @property
    def _adversary(self) -> Adversary | None:
        """What consistency trains beside the inverter; outside the module tree, it has an optimizer of its own."""
        return getattr(self.consistency, "adversary", None)

    def restart_average(self) -> None:
        """Begin the average anew from the weights as they are: they were changed from outside."""
        if self.ema is not None:
            self.ema = EMA(_trained(self.inverter), self.ema.decay, self.ema.every)

    @property
    def backbone(self) -> Backbone:
        """The frozen backbone, on this module's device."""
        return self._backbone[0]

    def configure_model(self) -> None:
        """Under `strategy=fsdp`, keep this process's part of the weights and of their average."""
        if self.device_mesh is None:
            return
        shard(self.inverter, self.device_mesh["data_parallel"])
        self.restart_average()

    def on_fit_start(self) -> None:
        """Follow Lightning's device with what is no part of this module's tree."""
        self._backbone[0] = self.backbone.to(self.device)
        if self.device_mesh is not None:
            # Fitted by every process, whose rounding may differ; DDP sends them, `fully_shard` does not.
            for buffer in self.inverter.buffers():  # type: ignore[attr-defined]
                dist.broadcast(buffer, 0)
        if self.ema is not None:
            self.ema.follow()
        if self._adversary is not None:
            self._adversary.follow(self.device)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One step: features of the batch (or from its cache), then the inverter's own loss."""
        features = self.features_of(batch)
        seeds = row_seeds(self, self.seed, batch_idx, len(features))
        kept = {name: batch[name] for name in ("image", "latents") if name in batch}
        self._step_batches.append(kept | {"features": features, "seeds": torch.tensor(seeds)})
        if estimating := self.global_step < self.estimate_steps:
            losses = self._estimate_losses(batch, self._given(features, seeds))
        else:
            losses = self.inverter.training_losses(
                batch.get("image"), self._given(features, seeds), seeds=seeds, latents=batch.get("latents")
            )
        loss = losses["loss"]
        if self.consistency is not None and not estimating and self.global_step >= self.consistency_from:
            distance = self.consistency(self.inverter, self.backbone, losses, features, seeds)
            loss = loss + self.consistency.weight * distance
            self.log("train/consistency", distance.detach())
            if self._adversary is not None:
                self.log("train/adversary", self._adversary.hinge)
        if self._trainer is not None and isinstance(self.trainer.strategy, DDPStrategy):
            # DDP waits for every gradient, also of what this step did not use.
            loss = loss + 0.0 * sum(p.sum() for p in self.inverter.trainable_parameters())
        scalars = {f"train/{k}": v.detach() for k, v in losses.items() if v.ndim == 0}
        self.log_dict(scalars, prog_bar=False)
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        if not math.isfinite(float(loss.detach())):
            self._stop(f"the loss is {float(loss.detach())}")
        return loss

    def _estimate_losses(self, batch: dict[str, Any], features: Tensor) -> dict[str, Tensor]:
        assert isinstance(self.inverter, DiffusionInverter)
        images, latents = batch.get("image"), batch.get("latents")
        if self.teacher is not None and images is None:
            raise UserError("a teacher looks at images, and the cache holds none; set training.cache=false.")
        wanted = self.teacher(images) if self.teacher is not None and images is not None else None
        return self.inverter.estimate_losses(images, features, latents=latents, embedding=wanted)

    def _stop(self, problem: str) -> NoReturn:
        """End the run at what is not finite, and keep the step's batches, one of which made it."""
        path, batches = Path(self.trainer.default_root_dir), self._step_batches
        path /= f"nonfinite_{self.global_step:07d}.safetensors"
        save_safetensors(path, {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]})
        raise UserError(
            f"{problem} at step {self.global_step}; its batch is in {path}. Go on from the last "
            f"checkpoint with a lower training.module.params.learning_rate (now {self.learning_rate}) and --changed."
        )

    def features_of(self, batch: dict[str, Any]) -> Tensor:
        """Features (N, C, H, W) of a batch, from its cache or computed, in float32 as when the inverter is used."""
        if "features" in batch:
            return batch["features"].float()
        with torch.no_grad(), full_arithmetic(batch["image"].device):
            return self.backbone(batch["image"]).float()

    def _given(self, features: Tensor, seeds: list[int]) -> Tensor:
        """What the inverter is told: noised, then masked, so that a masked value is the mean feature itself."""
        noised = self._noised(features, seeds)
        if not self.masking.active:
            return noised
        return self.masking(noised, mean_feature(self.inverter, features.shape[1]), seeds)

    def _noised(self, features: Tensor, seeds: list[int]) -> Tensor:
        if not self.feature_noise:
            return features
        noise = seeded_noise([seed ^ 0xF0 for seed in seeds], features.shape[1:]).to(features)
        return features + self.feature_noise * features.flatten(1).std(1)[:, None, None, None] * noise

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with linear warm-up, then a cosine to `least_rate`."""
        optimizer = FusedAdamW(
            list(self.inverter.trainable_parameters()),
            lr=self.learning_rate,
            betas=tuple(self.betas),
            weight_decay=self.weight_decay,
        )
        return cosine_schedule(optimizer, self.warmup_steps, self.max_steps, self.least_rate)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: Any = None,
        gradient_clip_algorithm: Any = None,
    ) -> None:
        """Clip, and log the norm: the first thing to look at when a run diverges."""
        norm = clip_gradients(self.inverter.trainable_parameters(), self.max_grad_norm)
        if not math.isfinite(float(norm)):  # the weights would be NaN, whose loss comes after a checkpoint, or never
            self._stop(f"the norm of the gradients is {float(norm)}")
        self._step_batches.clear()
        self.log("train/grad_norm", norm)

    def on_train_start(self) -> None:
        """Repair the layout of restored optimizer state."""
        match_layout(self.optimizers(use_pl_optimizer=False))  # type: ignore[arg-type]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update the average with the step itself, before any checkpoint of that step is written."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update()

    def apply_average(self) -> dict[str, Tensor]:
        """Put the averaged weights in place of the last ones, for good; all processes must call it.

        Returns:
            What a checkpoint holds, whole in the first process alone.

        Raises:
            UserError: If it is no numbers.
        """
        if self.ema is not None:
            self.ema.copy_to_parameters()
        state = gathered(self.inverter.trainable_state())
        _check_finite(state)
        return state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained weights only: the prior and the backbone never change."""
        checkpoint["state_dict"] = gathered(self.inverter.trainable_state())
        checkpoint["featinv"] = self.described
        checkpoint["ema"] = self.ema.state_dict() if self.ema is not None else None
        checkpoint["adversary"] = self._adversary.training_state() if self._adversary is not None else None
        for state in (checkpoint["state_dict"], (checkpoint["ema"] or {}).get("averages", {})):
            _check_finite(state)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the weights and their average; Lightning restores optimizer and schedule."""
        state = checkpoint["state_dict"]
        own = self.inverter.trainable_state()
        check_fits("inverter", own, state)
        begun = checkpoint.get("featinv") or {}
        if begun.get("prior") != self.described.get("prior"):
            raise UserError("the run was begun with another prior; restore that prior, or choose another out=FOLDER.")
        if begun.get("branch") != self.described.get("branch"):
            raise UserError("the run was begun with another branch than branch_of has now; choose another out=FOLDER.")
        self.inverter.load_state_dict({k: placed_as(v, own[k]) for k, v in state.items()}, strict=False)
        if self.ema is not None and checkpoint["ema"] is not None:
            self.ema.load_state_dict(checkpoint["ema"])
        else:
            self.restart_average()  # it was begun from other weights
        if self._adversary is not None and checkpoint.get("adversary") is not None:
            check_fits("adversary", self._adversary.state_dict(), checkpoint["adversary"]["heads"])
            self._adversary.restore(checkpoint["adversary"])
        # Lightning loads this dict once more, strictly, into the whole module.
        checkpoint["state_dict"] = self.state_dict()
