"""DeconvNet (Zeiler & Fergus 2014, arXiv 1311.2901): project a feature map to pixels through the network itself."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featinv.attribution.guided import replaced_rectifiers
from featinv.backbones.base import Backbone
from featinv.errors import UserError


def deconvnet(backbone: Backbone, images: Tensor, mask: Tensor | None = None) -> Tensor:
    """Project (part of) the feature maps of images back to pixel space.

    Unpooling with the switches of the forward pass, inverse rectification (the signal coming down is rectified,
    whatever the unit itself did) and transposed filters. This is the network's own backward pass with another rule at
    each ReLU (Simonyan et al. 2014, arXiv 1312.6034, section 4), so skip connections and any layer work.

    Args:
        backbone: A convolutional network with max-pooling and ReLU layers, at any layer.
        images: (N, 3, H, W) in [0, 1].
        mask: Weights that broadcast to the features: which filters or positions are projected, all others being zero
            (see `featinv.inverters.masks`).

    Returns:
        (N, 3, H, W), signed, at the images' own resolution and on their device.

    Raises:
        UserError: If the network has no max-pooling or no ReLU layers, whose switches and rule the method needs.
    """
    name = getattr(backbone, "name", type(backbone).__name__)
    if not any(isinstance(module, nn.MaxPool2d) for module in backbone.modules()):
        raise UserError(f"a DeconvNet follows the switches of max-pooling, and {name} has none; use another network.")
    inputs = images.detach().clone().to(backbone.mean.device).requires_grad_(True)
    with replaced_rectifiers(backbone) as stand_ins, warnings.catch_warnings(), torch.enable_grad():
        if not stand_ins:
            raise UserError(f"a DeconvNet needs ReLU layers, and {name} has none; use another network.")
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        handles = [unit.register_full_backward_hook(_rectify_signal) for unit in stand_ins]
        try:
            features = backbone(inputs)
            signal = features.detach() if mask is None else features.detach() * mask.to(features)
            (projected,) = torch.autograd.grad(features, inputs, signal)
        finally:
            for handle in handles:
                handle.remove()
    return projected.to(images.device)


def _rectify_signal(
    module: nn.Module, grad_input: tuple[Tensor, ...], grad_output: tuple[Tensor, ...]
) -> tuple[Tensor]:
    return (F.relu(grad_output[0]),)
