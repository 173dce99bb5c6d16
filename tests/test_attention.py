"""AttentionBySize: the same attention in either way, the faster one where it is faster."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_prior
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor

from featinv.diffusion.attention import AttentionBySize, attend_by_size


def attention(**settings: Any) -> Attention:
    torch.manual_seed(0)
    return Attention(32, heads=2, dim_head=16, processor=AttentionBySize(), **settings)


def naive(layer: Attention, queries: Tensor, keys: Tensor) -> Tensor:
    """Head by head, in float64."""
    layer = layer.double()
    q, k, v = (project(x.double()) for project, x in ((layer.to_q, queries), (layer.to_k, keys), (layer.to_v, keys)))
    heads = [
        (q[..., at] @ k[..., at].transpose(1, 2) / 16**0.5).softmax(-1) @ v[..., at]
        for at in (slice(0, 16), slice(16, 32))
    ]
    return layer.to_out[0](torch.cat(heads, -1))


@pytest.mark.parametrize("length", [64, 400], ids=["small", "large"])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_agrees_with_a_naive_computation(length: int, half: bool) -> None:
    layer, images = attention(), torch.randn(2, length, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        found = layer(images)
    expected = naive(layer, images, images).float()
    assert (found - expected).norm() / expected.norm() < (1e-2 if half else 1e-5)


def test_text_is_attended_to() -> None:
    layer = attention(cross_attention_dim=24)
    images, text = torch.randn(2, 64, 32), torch.randn(2, 7, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = layer(images, text)
    expected = naive(layer, images, text).float()
    assert (found - expected).norm() / expected.norm() < 1e-2


def test_a_prompt_shared_by_all_rows_is_projected_once() -> None:
    layer, seen = attention(cross_attention_dim=24), []
    layer.to_k.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    images, text = torch.randn(3, 64, 32), torch.randn(1, 7, 24)
    gradients = []
    for shared in (text.expand(3, -1, -1), text.repeat(3, 1, 1)):
        with torch.autocast("cpu", torch.bfloat16):
            layer(images, shared).square().sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
        layer.zero_grad()
    assert seen == [1, 3]
    for once, thrice in zip(*gradients, strict=True):
        assert (once - thrice).norm() <= 2e-2 * thrice.norm()


def test_only_small_maps_in_bfloat16_are_multiplied_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    processor = AttentionBySize()
    for name in ("products", "kernel"):
        monkeypatch.setattr(processor, name, lambda *args, name=name: used.append(name))
    layer = attention()
    small, large = torch.zeros(1, 1024, 32), torch.zeros(1, 1025, 32)
    processor(layer, small)
    with torch.autocast("cpu", torch.bfloat16):
        processor(layer, small)
        processor(layer, large)
        processor(layer, large, torch.zeros(1, 77, 32))
        processor(layer, small, None, torch.zeros(1, 1024))  # a mask
        for unlike in (attention(norm_num_groups=4), attention(upcast_softmax=True), attention(qk_norm="layer_norm")):
            processor(unlike, small)
    assert used == ["kernel", "products", "kernel", "products"] + ["kernel"] * 4


def test_gradients_are_those_of_a_naive_computation() -> None:
    layer, images = attention(), torch.randn(2, 64, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        layer(images).square().sum().backward()
    found = [images.grad, *(p.grad.clone() for p in layer.parameters())]
    images.grad = None
    layer.zero_grad()
    naive(layer, images, images).square().sum().backward()
    for half, exact in zip(found, [images.grad, *(p.grad for p in layer.parameters())], strict=True):
        assert (half - exact).norm() <= 3e-2 * exact.norm()


def test_layers_with_a_way_of_their_own_keep_it() -> None:
    unet = tiny_prior().unet
    names = list(unet.attn_processors)
    own = AttnProcessor()
    unet.set_attn_processor({name: own if name == names[0] else AttnProcessor2_0() for name in names})
    attend_by_size(unet)
    assert unet.attn_processors[names[0]] is own
    assert {type(unet.attn_processors[name]) for name in names[1:]} == {AttentionBySize}
