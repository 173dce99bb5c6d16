"""What every inverter offers; train.py, sample.py and eval/ know nothing else about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Inverter(Protocol):
    """Features -> images of `size` pixels a side."""

    size: int

    def invert(self, features: Tensor, *, seeds: Sequence[int]) -> Tensor:
        """Features (N, C, H, W) and N seeds -> images (N, 3, H, W) in [0, 1]."""
        ...


@runtime_checkable
class TrainableInverter(Inverter, Protocol):
    """An inverter with weights of its own."""

    def training_losses(
        self, images: Tensor | None, features: Tensor, *, seeds: Sequence[int], latents: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return a dict with "loss" (), a scalar to minimise, and parts to log."""
        ...

    def prepare(self, features: Tensor, latents: Tensor | None) -> None:
        """Fit what is solved in closed form before training, from features (N, C, H, W) and latents (N, c, h, w)."""
        ...

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that training changes."""
        ...

    def trainable_state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint holds."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As `nn.Module` has it."""
        ...

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True) -> Any:
        """As `nn.Module` has it."""
        ...
