"""AdamW as inverters and priors are trained with it, and the layout of an optimizer's state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from featinv.errors import UserError
from featinv.training.sharding import placed_as

LAST, FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
"""(O, I, H, W) -> (O, H, W, I), and back."""


class FusedAdamW(torch.optim.AdamW):
    """AdamW in one pass over the weights.

    The CPU's fused step copies weights that are not contiguous, channels_last ones included, there and back: a
    twentieth of a training step at full size. Their storage is dense, so here it is shown to the step in its own order.
    """

    def __init__(self, parameters: Iterable[Any], **settings: Any):
        super().__init__(parameters, fused=True, **settings)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step, after the closure if there is one, whose result is returned."""
        with torch.enable_grad():
            result = closure() if closure is not None else None
        with self._in_storage_order():
            super().step()
        return result

    @contextmanager
    def _in_storage_order(self) -> Iterator[None]:
        kept = [
            (p, p.data, p.grad)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None and _only_channels_last(p)
        ]
        for p, data, grad in kept:
            _replace(p, data.permute(LAST), grad.permute(LAST))
            self._permute_state(p, LAST)
        try:
            yield
        finally:
            for p, data, grad in kept:
                _replace(p, data, grad)
                self._permute_state(p, FIRST)

    def _permute_state(self, parameter: nn.Parameter, order: tuple[int, ...]) -> None:
        state = self.state[parameter]
        state.update({k: v.permute(order) for k, v in state.items() if isinstance(v, Tensor) and v.dim() == 4})


def _only_channels_last(parameter: Tensor) -> bool:
    on_cpu = parameter.device.type == "cpu" and parameter.dim() == 4
    return on_cpu and not parameter.is_contiguous() and parameter.is_contiguous(memory_format=torch.channels_last)


def _replace(parameter: nn.Parameter, data: Tensor, grad: Tensor) -> None:
    parameter.grad = None  # which must have the shape of its parameter at all times
    parameter.data = data
    parameter.grad = grad


def check_optimizer(
    learning_rate: float, max_grad_norm: float | None, betas: Sequence[float] = (0.9, 0.99), least_rate: float = 0.0
) -> None:
    """Raise UserError if nothing can be learned with these settings, or not what they say."""
    if not learning_rate > 0:
        raise UserError(f"learning_rate must be above 0, not {learning_rate}.")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise UserError(f"max_grad_norm must be above 0, or null for no clipping, not {max_grad_norm}.")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"betas must be two numbers from 0 to below 1, not {list(betas)}.")
    if not 0 <= least_rate <= 1:
        raise UserError(f"least_rate is a share of learning_rate, from 0 to 1, not {least_rate}.")


def clip_gradients(parameters: Iterable[nn.Parameter], max_grad_norm: float | None) -> Tensor:
    """Scale gradients down to a norm of at most `max_grad_norm`, None leaves them; returns the norm before, ()."""
    norm = nn.utils.clip_grad_norm_(parameters, math.inf if max_grad_norm is None else max_grad_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def cosine_schedule(
    optimizer: torch.optim.Optimizer, warmup_steps: int, max_steps: int, least: float
) -> dict[str, Any]:
    """An optimizer, as Lightning takes it, with linear warm-up, then a cosine down to the share `least` of its rate."""

    def factor(step: int) -> float:
        progress = min(1.0, step / max_steps)
        warm = min(1.0, (step + 1) / max(1, warmup_steps))
        return warm * (least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def configured_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Rate, betas and weight decay of each parameter group, as a new optimizer with a schedule has them."""
    return [{name: group[name] for name in ("initial_lr", "betas", "weight_decay")} for group in optimizer.param_groups]


def restore_settings(schedule: torch.optim.lr_scheduler.LambdaLR, settings: list[dict[str, Any]]) -> None:
    """Put `configured_settings` back after a checkpoint's were loaded, at the step where the schedule is now.

    Equal settings change no bit: the rate is computed as the schedule does.
    """
    groups = schedule.optimizer.param_groups
    schedule.base_lrs = [own["initial_lr"] for own in settings]
    for group, own, factor in zip(groups, settings, schedule.lr_lambdas, strict=True):
        group.update(own, lr=own["initial_lr"] * factor(schedule.last_epoch))
    schedule._last_lr = [group["lr"] for group in groups]


@torch.no_grad()
def match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give restored optimizer state the memory layout of its parameter, which fused optimizers take for granted."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(placed_as(value, parameter))
