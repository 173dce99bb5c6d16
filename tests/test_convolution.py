"""ConvolutionBySize: the same convolution in either way, the faster one where it is faster."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_prior
from torch import Tensor, nn

from featinv.diffusion.convolution import WIDE, ConvolutionBySize, convolve_by_size


def convolution(kernel: Any = 3, channels: int = WIDE, **settings: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    padding = settings.pop("padding", 1 if kernel == 3 else 0)
    layer = nn.Conv2d(channels, 24, kernel, padding=padding, **settings).to(memory_format=torch.channels_last)
    convolve_by_size(layer)
    return layer


def exact(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """In float64, by PyTorch's own."""
    given = (x.double() for x in (images, layer.weight, layer.bias))
    return F.conv2d(*given, stride=layer.stride, padding=layer.padding)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (3, (1, 2)), (1, 1), (1, 2)])
@pytest.mark.parametrize("shape", [(4, 4), (7, 5), (1, 8)], ids=str)
def test_a_product_is_the_convolution_and_has_its_gradients(
    kernel: int, stride: Any, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, images = convolution(kernel, stride=stride), torch.randn(2, WIDE, *shape, requires_grad=True)
    used: list[int] = []
    product = ConvolutionBySize._product
    monkeypatch.setattr(ConvolutionBySize, "_product", lambda self, x: used.append(1) or product(self, x))
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(images)
    assert used and found.dtype == torch.bfloat16
    weight = torch.randn(found.shape)
    (found * weight).sum().backward()
    gradients = [images.grad, layer.weight.grad.clone(), layer.bias.grad.clone()]
    images.grad = None
    layer.zero_grad()
    expected = exact(layer, images)
    (expected * weight.double()).sum().backward()
    pairs = zip([found, *gradients], [expected, images.grad, layer.weight.grad, layer.bias.grad], strict=True)
    for half, whole in pairs:
        assert half.shape == whole.shape and (half - whole).norm() < 1e-2 * whole.norm()


def test_the_gradient_of_a_weight_lies_in_memory_as_the_weight_does() -> None:
    layer = convolution()
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(1, WIDE, 4, 4)).sum().backward()
    assert layer.weight.grad.stride() == layer.weight.stride()


def test_only_small_wide_maps_in_bfloat16_are_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConvolutionBySize, "_product", lambda *_: "product")
    layer, images = convolution(), torch.randn(1, WIDE, 8, 8)
    assert isinstance(layer(images), Tensor)
    with torch.autocast("cpu", torch.float16):
        assert isinstance(layer(images), Tensor)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(images) == "product"
        assert convolution(stride=2)(torch.randn(1, WIDE, 16, 16)) == "product"
        assert isinstance(layer(torch.randn(1, WIDE, 8, 9)), Tensor)
        assert isinstance(layer.to(memory_format=torch.contiguous_format)(images), Tensor)


def test_a_compiled_network_keeps_its_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConvolutionBySize, "_product", lambda *_: pytest.fail("a product was traced"))
    compiled = torch.compile(convolution(), backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(torch.randn(1, WIDE, 4, 4)).shape == (1, 24, 4, 4)


@pytest.mark.parametrize(
    "settings",
    [
        {"channels": WIDE - 1},
        {"padding": 0},
        {"dilation": 2, "padding": 2},
        {"groups": 2},
        {"padding_mode": "circular"},
        {"kernel": 2},
        {"padding": "same"},
    ],
    ids=str,
)
def test_other_convolutions_stay_what_they_are(settings: dict[str, Any]) -> None:
    assert type(convolution(**settings)) is nn.Conv2d


def test_weights_keep_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featinv.diffusion.convolution.WIDE", 16)
    prior = tiny_prior()
    assert any(isinstance(layer, ConvolutionBySize) for layer in prior.unet.modules())
    monkeypatch.undo()
    plain = tiny_prior()
    assert not any(isinstance(layer, ConvolutionBySize) for layer in plain.unet.modules())
    plain.unet.load_state_dict(prior.unet.state_dict())
