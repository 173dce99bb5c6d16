"""What a prediction says about the clean latents."""

from __future__ import annotations

from torch import Tensor


def clean_latents(noisy_latents: Tensor, model_pred: Tensor, alphas_cumprod: Tensor, prediction_type: str) -> Tensor:
    """The one-step estimate of the clean latents (DDIM, arXiv 2010.02502, equation 9; velocity: arXiv 2202.00512, D).

    Args:
        noisy_latents: (N, C, h, w).
        model_pred: Predicted noise or velocity, of the same shape.
        alphas_cumprod: Of the timestep of each row, (N,) or ().
        prediction_type: `epsilon` or `v_prediction`.
    """
    alphas = alphas_cumprod.to(noisy_latents).view(-1, 1, 1, 1)
    signal, noise = alphas.sqrt(), (1 - alphas).sqrt()
    if prediction_type == "v_prediction":
        return signal * noisy_latents - noise * model_pred
    return (noisy_latents - noise * model_pred) / signal
