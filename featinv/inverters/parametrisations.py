"""What gradient descent moves: pixels, a spectrum, or latents of the first stage."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from featinv.diffusion.first_stage import FirstStage
from featinv.errors import UserError
from featinv.image import resize

PARAMETRISATIONS = ("pixel", "fourier", "latent")


class Parametrisation(Protocol):
    """Images as a function of a free tensor."""

    tensor: Tensor

    def images(self, rows: Tensor | None = None) -> Tensor:
        """Images (N, 3, H, W) with their gradient; of some `rows` (indices) alone, or of all."""
        ...

    def project(self) -> None:
        """Return to the allowed set after a step."""
        ...


def _of(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


class Pixels:
    """The images themselves, kept in [0, 1] by clamping.

    Args:
        start: (N, 3, H, W) in [0, 1].
    """

    def __init__(self, start: Tensor):
        self.tensor = start.clone().requires_grad_(True)

    def images(self, rows: Tensor | None = None) -> Tensor:
        """The images (N, 3, H, W)."""
        return _of(self.tensor, rows)

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

    def images(self, rows: Tensor | None = None) -> Tensor:
        """The images (N, 3, H, W)."""
        spectrum = torch.view_as_complex(_of(self.tensor, rows)) * self._scale
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

    def images(self, rows: Tensor | None = None) -> Tensor:
        """The images (N, 3, H, W)."""
        return self._first_stage.decode(_of(self.tensor, rows))

    def project(self) -> None:
        """Every latent is allowed."""


def parametrise(kind: str, start: Tensor, first_stage: FirstStage | None = None) -> Parametrisation:
    """A parametrisation by name.

    Args:
        kind: One of `PARAMETRISATIONS`.
        start: (N, 3, H, W) in [0, 1].
        first_stage: For "latent".

    Raises:
        UserError: If the name is unknown, or "latent" has no first stage.
    """
    if kind not in PARAMETRISATIONS:
        raise UserError(f"parametrisation must be one of {', '.join(PARAMETRISATIONS)}, not {kind!r}.")
    if kind == "latent":
        if first_stage is None:
            raise UserError("the latent parametrisation needs a prior, whose first stage decodes the latents.")
        return Latents(start, first_stage)
    return Fourier(start) if kind == "fourier" else Pixels(start)


def shaken(images: Tensor, step: int, jitter: int, scale: float) -> Tensor:
    """Shift and rescale images (N, 3, H, W) by amounts that the step alone decides: no image depends on its neighbours.

    Args:
        images: (N, 3, H, W).
        step: Seeds the amounts.
        jitter: Largest shift in pixels, cyclic.
        scale: Largest change of size, as a share.
    """
    generator = torch.Generator().manual_seed(step)
    if scale:
        factor = 1 + scale * float(2 * torch.rand((), generator=generator) - 1)
        images = resize(images, max(8, round(images.shape[-1] * factor)))
    if jitter:
        dx, dy = torch.randint(-jitter, jitter + 1, (2,), generator=generator).tolist()
        images = images.roll((dy, dx), (2, 3))
    return images
