"""Per-image comparisons of pixels, and the diversity of several samples of the same features."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from featinv.errors import UserError

PSNR_CAP = 100.0
"""dB given to identical images, so that a mean and its bootstrap stay finite.

One 8-bit step in one channel of one pixel of a 256 x 256 image is 101 dB: the cap hides nothing visible.
"""

SSIM_MIN_SIZE = 11


def check_images(original: Tensor, reconstruction: Tensor) -> None:
    """Raise `UserError` unless both are images of one shape (N, 3, H, W)."""
    if original.shape != reconstruction.shape or original.ndim != 4:
        raise UserError(
            f"Originals {tuple(original.shape)} and reconstructions {tuple(reconstruction.shape)} must have "
            "one shape (N, 3, H, W); resize one of them first."
        )


def psnr(original: Tensor, reconstruction: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image, capped at `PSNR_CAP` = 100 dB.

    Args:
        original: Images (N, 3, H, W) in [0, 1].
        reconstruction: Same shape.

    Returns:
        (N,) float64 in dB.

    Raises:
        UserError: If the shapes differ.
    """
    check_images(original, reconstruction)
    values = peak_signal_noise_ratio(
        reconstruction.double(), original.double(), data_range=1.0, dim=(1, 2, 3), reduction="none"
    )
    return values.clamp(max=PSNR_CAP)


def ssim(original: Tensor, reconstruction: Tensor) -> Tensor:
    """Structural similarity per image (Wang et al. 2004), 11 x 11 Gaussian window, mean over channels.

    Args:
        original: Images (N, 3, H, W) in [0, 1], at least 11 pixels on each side.
        reconstruction: Same shape.

    Returns:
        (N,) float64, 1 for identical images.

    Raises:
        UserError: If the shapes differ or the images are smaller than the window.
    """
    check_images(original, reconstruction)
    if min(original.shape[2:]) < SSIM_MIN_SIZE:
        raise UserError(f"SSIM needs images of at least 11 x 11 pixels, not {tuple(original.shape[2:])}.")
    # In float32, a tenth of float64's time on a CPU and the same to 1e-4: the window's convolution is the whole cost.
    values = structural_similarity_index_measure(
        reconstruction.float(), original.float(), data_range=1.0, reduction="none"
    )
    assert isinstance(values, Tensor)
    return values.double()


def _check_samples(samples: Tensor, ndim: int, shape: str) -> None:
    if samples.ndim != ndim or samples.shape[1] < 2:
        raise UserError(f"Diversity needs {shape} with K >= 2 samples of each image, not {tuple(samples.shape)}.")


def pixel_diversity(samples: Tensor) -> Tensor:
    """Mean over pairs of samples of their root mean squared pixel difference.

    Args:
        samples: K samples of each of N feature maps, (N, K, 3, H, W) in [0, 1].

    Returns:
        (N,) float64 in [0, 1]; 0 when all samples of an image are equal.

    Raises:
        UserError: If there are fewer than two samples.
    """
    _check_samples(samples, 5, "(N, K, 3, H, W)")
    flat = samples.flatten(2).double()
    return torch.stack([torch.pdist(rows).mean() for rows in flat]) / flat.shape[2] ** 0.5


def embedding_diversity(embeddings: Tensor) -> Tensor:
    """Mean over pairs of samples of the cosine distance between their embeddings.

    Args:
        embeddings: (N, K, D), K samples of each of N feature maps.

    Returns:
        (N,) float64 in [0, 2].

    Raises:
        UserError: If there are fewer than two samples.
    """
    _check_samples(embeddings, 3, "(N, K, D)")
    unit = torch.nn.functional.normalize(embeddings.double(), dim=2)
    cosines = unit @ unit.transpose(1, 2)
    first, second = torch.triu_indices(unit.shape[1], unit.shape[1], offset=1)
    return (1.0 - cosines[:, first, second]).mean(1)
