"""Pixels <-> latents: the one place that knows the picture's range, the patch size and the latent scale."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from featinv.diffusion.half import multiplies_float_on_cpu
from featinv.errors import UserError

LARGE_PIXELS = 2**16
"""A picture of so many pixels keeps a CPU busy by itself; in float32 one after the other takes 1.2 GB less for four."""


def _columns(latents: Tensor) -> Tensor:
    """(N, C, h, w) -> (N h w, C), in double precision."""
    return latents.permute(0, 2, 3, 1).flatten(0, 2).double()


class PatchShortcut(nn.Module):
    """A linear codec beside the autoencoder: patches <-> principal components, both directions trainable.

    Started from the principal components of training patches, it already reaches most of the final PSNR, so that the
    convolutions learn only what a linear map cannot do. (Residual autoencoding as in DC-AE, arXiv 2410.10733, section
    3.2, with a fitted instead of a fixed shortcut.)

    Args:
        channels: Latent channels.
        factor: Pixels per latent position along one side.
    """

    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.analysis = nn.Conv2d(3, channels, factor, stride=factor)
        self.synthesis = nn.ConvTranspose2d(channels, 3, factor, stride=factor)

    @torch.no_grad()
    def fit(self, images: Tensor, whiten: float = 0.5) -> None:
        """Start from the principal components of images (N, 3, H, W) in [0, 1].

        Args:
            images: Training images.
            whiten: 0 keeps each component's variance, 1 makes all variances equal. Halfway, fine detail is neither lost
                under the diffusion noise nor as loud as the brightness.
        """
        assert self.analysis.bias is not None and self.synthesis.bias is not None
        channels, factor = self.analysis.out_channels, self.analysis.kernel_size[0]
        patches = F.pixel_unshuffle(images * 2 - 1, factor).permute(0, 2, 3, 1).flatten(0, 2)  # (n, 3 factor^2)
        mean = patches.mean(0)
        centred = (patches - mean).double()
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        values, vectors = values.flip(0)[:channels], vectors.flip(1)[:, :channels]
        scale = values.sqrt() ** -whiten
        shape = (channels, 3, factor, factor)
        self.analysis.weight.copy_((vectors * scale).T.reshape(shape))
        self.analysis.bias.copy_(-(mean.double() @ (vectors * scale)))
        self.synthesis.weight.copy_((vectors / scale).T.reshape(shape))
        # One bias per colour cannot hold the mean patch, but scene patches have hardly any structure in the mean.
        self.synthesis.bias.copy_(mean.reshape(3, -1).mean(1))

    @torch.no_grad()
    def fit_like(self, images: Tensor, latents: Tensor, least: float = 0.9) -> None:
        """Start from the principal components of images, mixed into the language of given latents.

        A channel of `latents` that is a linear function of the components stays what it is; the others take the
        components that are left over. What was trained on the old latents finds most of them again.

        Args:
            images: Training images (N, 3, H, W) in [0, 1].
            latents: Unscaled latents (N, C, h, w) of the same images in another first stage.
            least: R2 from which a channel is kept.
        """
        assert self.analysis.bias is not None and self.synthesis.bias is not None
        self.fit(images)
        components, theirs = (_columns(x) for x in (self.analysis(images * 2 - 1), latents))
        centred = theirs - theirs.mean(0)
        mixing = torch.linalg.lstsq(components, centred).solution  # the components' own mean is zero
        kept = 1 - (centred - components @ mixing).var(0) / centred.var(0) > least
        deviation = components.std(0)[:, None]
        # Of whitened components, an orthonormal rest is uncorrelated with the channels that are kept.
        basis, _ = torch.linalg.qr(mixing[:, kept] * deviation, mode="complete")
        mixing[:, ~kept] = basis[:, int(kept.sum()) :] / deviation * centred.std(0)[kept].median()
        offset, inverse = theirs.mean(0) * kept, torch.linalg.inv(mixing)
        self.analysis.weight.copy_(torch.einsum("kchw,kl->lchw", self.analysis.weight.double(), mixing))
        self.analysis.bias.copy_(self.analysis.bias.double() @ mixing + offset)
        self.synthesis.weight.copy_(torch.einsum("lk,kchw->lchw", inverse, self.synthesis.weight.double()))
        self.synthesis.bias.sub_(torch.einsum("l,lchw->chw", offset, self.synthesis.weight.double()).mean((1, 2)))


class Finish(nn.Module):
    """Adds to decoded pictures what a decoder that makes whole patches misses: edges, and no seams between patches.

    A residual network at half of the resolution, whose output starts at zero. It sees the picture alone, so that
    latents, and whatever draws them, stay what they are.

    Args:
        width: Channels.
        layers: Residual blocks.
    """

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        self.width, self.layers = width, layers
        self.enter = nn.Conv2d(12, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            ResnetBlock2D(in_channels=width, temb_channels=None, groups=8) for _ in range(layers)
        )
        self.leave = nn.Conv2d(width, 12, 3, padding=1)
        _zero(self.leave)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W), about [0, 1] -> the same, finished; H and W even."""
        hidden = self.enter(F.pixel_unshuffle(images * 2 - 1, 2))
        for block in self.blocks:
            hidden = block(hidden, None)
        return images + F.pixel_shuffle(self.leave(hidden), 2) / 2


class FirstStage(nn.Module):
    """A diffusers `AutoencoderKL` seen from pixels in [0, 1] and latents of about unit variance.

    Args:
        vae: The autoencoder; its config owns `scaling_factor` and `shift_factor`.
        patch_size: Pixels per side that are folded into channels before the autoencoder (1 for Stable Diffusion).
            A patch of 4 keeps every convolution at a quarter of the resolution, which is what makes a CPU enough.
        shortcut: Whether a `PatchShortcut` works beside the autoencoder, whose own output then starts at zero.
        finish: Works on decoded pictures, or None.
    """

    def __init__(self, vae: AutoencoderKL, patch_size: int = 1, shortcut: bool = False, finish: Finish | None = None):
        super().__init__()
        if vae.config.in_channels != 3 * patch_size**2:
            raise UserError(
                f"an autoencoder with {vae.config.in_channels} input channels does not fit patch_size {patch_size} "
                f"(3 * patch_size^2 = {3 * patch_size**2})."
            )
        self.vae, self.patch_size, self.finish = vae, patch_size, finish
        self.shortcut = PatchShortcut(vae.config.latent_channels, self.factor) if shortcut else None
        if shortcut:
            _start_at_zero(vae)

    @property
    def factor(self) -> int:
        """Pixels per latent position along one side."""
        return self.patch_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """Shape (C, H, W) of the latents of a picture with `size` pixels a side."""
        if size % self.factor:
            raise UserError(
                f"a picture side of {size} is not a multiple of {self.factor}, which this first stage needs."
            )
        return self.vae.config.latent_channels, size // self.factor, size // self.factor

    def latent_scale(self) -> tuple[float, float]:
        """Factor and shift: scaled latents are (latents - shift) * factor."""
        return self.vae.config.scaling_factor, getattr(self.vae.config, "shift_factor", None) or 0.0

    def fold(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> the autoencoder's input in [-1, 1]."""
        return F.pixel_unshuffle(images * 2 - 1, self.patch_size)

    def distribution(self, images: Tensor) -> DiagonalGaussianDistribution:
        """The unscaled posterior over latents of images (N, 3, H, W) in [0, 1]."""
        posterior = self.vae.encode(self.fold(images)).latent_dist
        if self.shortcut is None:
            return posterior
        mean = posterior.mean + self.shortcut.analysis(images * 2 - 1)
        return DiagonalGaussianDistribution(torch.cat([mean, posterior.logvar], 1))

    def synthesise(self, latents: Tensor) -> Tensor:
        """Unscaled latents -> images, not clamped, so that a loss keeps its gradient."""
        images = (F.pixel_shuffle(self.vae.decode(latents).sample, self.patch_size) + 1) / 2
        if self.shortcut is not None:
            images = images + self.shortcut.synthesis(latents) / 2
        return images if self.finish is None else self.finish(images)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each (N, C, h, w), of the scaled latents of images (N, 3, H, W) in [0, 1]."""
        scale, shift = self.latent_scale()
        distribution = self.distribution(images)
        return (distribution.mean - shift) * scale, distribution.std * scale

    def encode(self, images: Tensor) -> Tensor:
        """The posterior mean (N, C, h, w) of the scaled latents of images (N, 3, H, W) in [0, 1]."""
        return self.posterior(images)[0]

    def unscale(self, latents: Tensor) -> Tensor:
        """Scaled latents (N, C, h, w) -> unscaled, as `synthesise` takes them."""
        scale, shift = self.latent_scale()
        return latents / scale + shift

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        """Scaled latents (N, C, h, w) -> float32 images (N, 3, H, W), in [0, 1] if `clamp`."""
        together = len(latents)
        if multiplies_float_on_cpu(latents) and latents.shape[2:].numel() * self.factor**2 >= LARGE_PIXELS:
            together = 1
        images = torch.cat([self.synthesise(self.unscale(rows)) for rows in latents.split(together)]).float()
        return images.clamp(0, 1) if clamp else images


@torch.no_grad()
def _start_at_zero(vae: AutoencoderKL, log_variance: float = -6.0) -> None:
    """Make the autoencoder's mean and picture zero, and its variance small, before training."""
    quant = vae.quant_conv if vae.quant_conv is not None else vae.encoder.conv_out
    for layer in (quant, vae.decoder.conv_out):
        _zero(layer)
    quant.bias[vae.config.latent_channels :] = log_variance


def _zero(layer: nn.Conv2d) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def normalise_latents(first_stage: FirstStage, images: Tensor) -> None:
    """Set the scale so that the latents of `images` have zero mean and unit variance over all elements."""
    with torch.no_grad():
        first_stage.vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
        latents = first_stage.encode(images)
    first_stage.vae.register_to_config(scaling_factor=1.0 / float(latents.std()), shift_factor=float(latents.mean()))
