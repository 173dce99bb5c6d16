"""What gradient descent moves: pixels, a spectrum, or latents of the first stage."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from featinv.diffusion.first_stage import FirstStage


class Parametrisation(Protocol):
    """Images as a function of a free tensor."""

    tensor: Tensor

    def images(self) -> Tensor:
        """Images (N, 3, H, W) with their gradient."""
        ...

    def project(self) -> None:
        """Return to the allowed set after a step."""
        ...


class Pixels:
    """The images themselves, kept in [0, 1] by clamping.

    Args:
        start: (N, 3, H, W) in [0, 1].
    """

    def __init__(self, start: Tensor):
        self.tensor = start.clone().requires_grad_(True)

    def images(self) -> Tensor:
        """The images (N, 3, H, W)."""
        return self.tensor

    @torch.no_grad()
    def project(self) -> None:
        """Clamp to [0, 1]."""
        self.tensor.clamp_(0, 1)


class Fourier:
    """A spectrum whose high frequencies move slowly (Olah et al. 2017, Feature Visualization), through a sigmoid.

    Args:
        start: (N, 3, H, W) in [0, 1].
        decay: Exponent of 1 / frequency.
    """

    def __init__(self, start: Tensor, decay: float = 1.0):
        height, self._width = start.shape[-2:]
        fy = torch.fft.fftfreq(height, device=start.device)[:, None]
        fx = torch.fft.rfftfreq(self._width, device=start.device)
        radius = (fx.square() + fy.square()).sqrt().clamp(min=1 / max(height, self._width))
        self._scale = radius.pow(-decay)
        spectrum = torch.fft.rfft2(torch.logit(start.clamp(0.01, 0.99)), norm="ortho") / self._scale
        self.tensor = torch.view_as_real(spectrum).contiguous().requires_grad_(True)

    def images(self) -> Tensor:
        """The images (N, 3, H, W)."""
        spectrum = torch.view_as_complex(self.tensor) * self._scale
        return torch.sigmoid(torch.fft.irfft2(spectrum, s=(spectrum.shape[-2], self._width), norm="ortho"))

    def project(self) -> None:
        """Every spectrum is allowed."""


class Latents:
    """Latents of a first stage: its decoder is the regulariser.

    Args:
        start: (N, 3, H, W) in [0, 1], encoded to begin with.
        first_stage: Frozen.
    """

    def __init__(self, start: Tensor, first_stage: FirstStage):
        self._first_stage = first_stage
        with torch.no_grad():
            self.tensor = first_stage.encode(start)
        self.tensor.requires_grad_(True)

    def images(self) -> Tensor:
        """The images (N, 3, H, W)."""
        return self._first_stage.decode(self.tensor)

    def project(self) -> None:
        """Every latent is allowed."""
