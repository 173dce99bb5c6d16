"""Short hashes that tell which prior, latent space or branch an inverter was trained with."""

from __future__ import annotations

import hashlib

from torch import Tensor

from featinv.diffusion.first_stage import FirstStage
from featinv.diffusion.prior import DiffusionPrior
from featinv.inverters.base import Inverter
from featinv.inverters.diffusion import DiffusionInverter


def fingerprint(*tensors: Tensor) -> str:
    """A short hash of weights, the same before and after rounding to half precision."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().half().numpy().tobytes())
    return digest.hexdigest()[:16]


def first_stage_fingerprint(first_stage: FirstStage) -> str:
    """Tells one latent space from another, by its encoder's outermost layers: a decoder may be trained on by itself."""
    encoder, shortcut = first_stage.vae.encoder, first_stage.shortcut
    linear = [] if shortcut is None else [shortcut.analysis.weight]
    return fingerprint(encoder.conv_in.weight, encoder.conv_out.weight, *linear)


def prior_fingerprint(prior: DiffusionPrior) -> str:
    """Tells one prior from another, by its UNet's outermost layers and its latent space."""
    return fingerprint(prior.unet.conv_in.weight, prior.unet.conv_out.weight) + first_stage_fingerprint(
        prior.first_stage
    )


def branch_fingerprint(inverter: Inverter) -> str | None:
    """Tells whether the lender of a branch has been trained further since; None if that is all one.

    It is to an inverter without a branch, and to a lift, which learned without it what it tells it.
    """
    if not isinstance(inverter, DiffusionInverter) or inverter.lift is not None:
        return None
    return fingerprint(*inverter.branch.parameters())
