"""ConvolutionBySize: the same convolution in each of its ways, the fastest one where it is the fastest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_prior
from torch import Tensor, nn

from featinv.diffusion import winograd_float as large_blocks
from featinv.diffusion.convolution import (
    CHANNELS,
    FEWEST,
    LARGE,
    LARGEST,
    WIDE,
    WIDER,
    ConvolutionBySize,
    convolve_by_size,
    convolve_plainly,
)
from featinv.diffusion.winograd import transformed, winograd
from featinv.diffusion.winograd_float import winograd_float


def convolution(kernel: Any = 3, channels: int = WIDE, **settings: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    padding = settings.pop("padding", 1 if kernel == 3 else 0)
    outputs = settings.pop("outputs", 24)
    layer = nn.Conv2d(channels, outputs, kernel, padding=padding, **settings).to(memory_format=torch.channels_last)
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


def test_small_wide_maps_are_products_in_bfloat16_and_for_trained_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConvolutionBySize, "_product", lambda *_: "product")
    layer, images = convolution(channels=WIDER), torch.randn(1, WIDER, 8, 8)
    assert layer(images) == "product"
    assert isinstance(layer.requires_grad_(False)(images), Tensor)
    assert isinstance(convolution(channels=WIDER).double()(images.double()), Tensor)
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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 2), (4, 6), (12, 2)], ids=str)
def test_winograds_way_is_the_convolution_and_has_its_gradient(shape: tuple[int, int], bias: bool) -> None:
    layer, images = nn.Conv2d(5, 7, 3, padding=1, bias=bias), torch.randn(3, 5, *shape, requires_grad=True)
    found = winograd(images, transformed(layer.weight.detach()), None if layer.bias is None else layer.bias.detach())
    assert found.is_contiguous(memory_format=torch.channels_last)
    weight = torch.randn(found.shape)
    (gradient,) = torch.autograd.grad((found * weight).sum(), images)
    expected = layer(images)
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-5)


def test_frozen_kernels_on_large_maps_go_winograds_way(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, side = convolution(channels=CHANNELS, outputs=CHANNELS), int(LARGE**0.5)
    images = torch.randn(1, CHANNELS, side, side)
    used: list[Tensor] = []
    monkeypatch.setattr(
        "featinv.diffusion.convolution.winograd", lambda *given: used.append(given[1]) or winograd(*given)
    )
    with torch.autocast("cpu", torch.bfloat16):
        layer(images)
        assert not used, "a kernel that is trained"
        layer.requires_grad_(False)
        layer(images[..., :-2])
        layer(F.pad(images, (0, 1)))
        convolution(channels=CHANNELS).requires_grad_(False)(images)
        narrow = convolution(channels=CHANNELS - 1, outputs=CHANNELS).requires_grad_(False)
        narrow(images[:, 1:])
        assert not used, "a small map, an odd side, or few inputs or outputs"
        with torch.inference_mode():
            found = layer(images)
        assert (found - exact(layer, images)).norm() < 1e-2 * found.norm() and len(used) == 1
        layer(images.clone().requires_grad_()).sum().backward()
        assert used[1] is used[0], "transformed twice"
        layer.weight.mul_(2)
        twice = layer(images) - layer.bias.view(-1, 1, 1)
        assert (twice - 2 * (found - layer.bias.view(-1, 1, 1))).norm() < 1e-2 * twice.norm(), "old weights"
        strided = convolution(channels=CHANNELS, outputs=CHANNELS, stride=2).requires_grad_(False)
        assert strided(images).shape[-1] == side // 2
        assert len(used) == 3
    layer(images)
    assert len(used) == 3, "in float32"


@pytest.mark.parametrize("blocks", [1, 3, 100])
@pytest.mark.parametrize("shape", [(4, 4), (8, 12), (16, 4)], ids=str)
def test_large_blocks_are_the_convolution_and_have_its_gradients(
    shape: tuple[int, int], blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large_blocks, "BLOCKS", blocks)
    monkeypatch.setattr(large_blocks, "_KERNELS", 3)
    layer = nn.Conv2d(5, 7, 3, padding=1).double().to(memory_format=torch.channels_last)
    images = torch.randn(3, 5, *shape, dtype=torch.float64, requires_grad=True)
    given = [images, layer.weight, layer.bias]
    found = winograd_float(*given)
    assert found.is_contiguous(memory_format=torch.channels_last)
    weight = torch.randn_like(found)
    gradients = torch.autograd.grad((found * weight).sum(), given)
    assert gradients[1].stride() == layer.weight.stride(), "of another memory order than the weight"
    expected = layer(images)
    torch.testing.assert_close([found, *gradients], [expected, *torch.autograd.grad((expected * weight).sum(), given)])
    assert winograd_float(images, layer.weight, None).allclose(found - layer.bias.view(-1, 1, 1))
    with torch.no_grad():
        frozen = winograd_float(images, layer.weight.detach(), layer.bias.detach())
    assert frozen.equal(found)


def test_large_blocks_round_in_float32_a_few_times_as_much_as_the_convolution() -> None:
    layer, images = convolution(channels=CHANNELS, outputs=CHANNELS), torch.randn(2, CHANNELS, 16, 16)
    expected = exact(layer, images)
    found = winograd_float(images, layer.weight, layer.bias)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_large_maps_in_float32_are_computed_in_large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Tensor] = []
    monkeypatch.setattr(
        "featinv.diffusion.convolution.winograd_float", lambda *given: used.append(given[1]) or winograd_float(*given)
    )
    layer, side = convolution(channels=CHANNELS, outputs=CHANNELS), int(LARGE**0.5)
    images = torch.randn(1, CHANNELS, side, side)
    assert (layer(images) - exact(layer, images)).norm() < 1e-5 * images.norm() and len(used) == 1
    layer.requires_grad_(False)(images)
    assert len(used) == 2
    narrow = convolution(channels=FEWEST, outputs=FEWEST)
    narrow(torch.randn(1, FEWEST, side, side))
    narrow(torch.randn(1, FEWEST, side, LARGEST // side + 2))
    convolution(channels=FEWEST)(torch.randn(1, FEWEST, side, LARGEST // side))
    layer(images[:, :, 4:])
    with torch.autocast("cpu", torch.bfloat16):
        layer(images)
    layer.double()(images.double())
    assert len(used) == 2, "a small map, an odd side, few outputs, or other numbers"
    narrow(torch.randn(1, FEWEST, side, LARGEST // side))
    assert len(used) == 3


def test_convolutions_can_be_plain_again() -> None:
    layer = convolution()
    weight = layer.weight
    convolve_plainly(layer)
    assert type(layer) is nn.Conv2d and layer.weight is weight


@pytest.mark.parametrize(
    "settings",
    [
        {"channels": FEWEST - 1},
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
    monkeypatch.setattr("featinv.diffusion.convolution.FEWEST", 16)
    prior = tiny_prior()
    assert any(isinstance(layer, ConvolutionBySize) for layer in prior.unet.modules())
    monkeypatch.undo()
    plain = tiny_prior()
    assert not any(isinstance(layer, ConvolutionBySize) for layer in plain.unet.modules())
    plain.unet.load_state_dict(prior.unet.state_dict())
