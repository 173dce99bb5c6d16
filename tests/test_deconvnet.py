import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featinv.attribution.deconvnet import deconvnet
from featinv.backbones import load_backbone
from featinv.backbones.base import Backbone
from featinv.errors import UserError
from featinv.inverters.masks import top_channels


class _Small(Backbone):
    def __init__(self) -> None:
        super().__init__("final", 12, (0.0,) * 3, (1.0,) * 3)
        self.conv1, self.relu1, self.pool = nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        self.conv2, self.relu2 = nn.Conv2d(5, 4, 3, padding=1), nn.ReLU(inplace=True)
        self.freeze()

    def forward(self, images):
        return self.relu2(self.conv2(self.pool(self.relu1(self.conv1(self.preprocess(images))))))


def _by_hand(net: _Small, images: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    first = F.relu(net.conv1(images))
    pooled, switches = F.max_pool2d(first, 2, return_indices=True)
    signal = F.relu(net.conv2(pooled))
    signal = signal if mask is None else signal * mask
    signal = F.conv_transpose2d(F.relu(signal), net.conv2.weight, padding=1)
    signal = F.max_unpool2d(signal, switches, 2)
    return F.conv_transpose2d(F.relu(signal), net.conv1.weight, padding=1)


@pytest.mark.parametrize("masked", [False, True])
def test_it_equals_unpooling_rectifying_and_transposed_filters(masked: bool) -> None:
    net, images = _Small(), torch.rand(2, 3, 12, 12)
    mask = top_channels(net(images), 1) if masked else None
    assert torch.allclose(deconvnet(net, images, mask), _by_hand(net, images, mask), atol=1e-5)


def test_it_leaves_the_network_as_it_was() -> None:
    backbone, images = load_backbone("resnet10t", pretrained=False, input_size=64), torch.rand(1, 3, 48, 56)
    before = backbone(images)
    assert deconvnet(backbone, images).shape == images.shape
    with pytest.raises(RuntimeError):
        deconvnet(backbone, images, torch.ones(7))
    assert torch.equal(backbone(images), before)
    assert not any(m._backward_hooks or m._forward_hooks for m in backbone.modules())


def test_images_come_to_the_network_and_the_result_goes_back_to_them() -> None:
    net, seen = _Small().to("meta"), []
    net.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].device.type))
    with pytest.raises(NotImplementedError, match="out of meta"):  # there and back, if meta tensors had numbers
        deconvnet(net, torch.rand(1, 3, 12, 12))
    assert seen == ["meta"] and deconvnet(net, torch.rand(1, 3, 12, 12, device="meta")).device.type == "meta"


def test_networks_without_pooling_get_a_clear_error() -> None:
    with pytest.raises(UserError, match="max-pooling"):
        deconvnet(load_backbone("vit_tiny_patch16_224", pretrained=False, input_size=32), torch.rand(1, 3, 32, 32))
