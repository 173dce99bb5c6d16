"""The second half of a network by itself."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from featinv.backbones import Backbone, load_backbone
from featinv.backbones.rest import RestOfNetwork
from featinv.errors import UserError


class Counted(nn.Conv2d):
    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return super().forward(x)


class Net(nn.Module):
    """One activation for all, and a late use of an early module: what a cut of a sequence would get wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = Counted(3, 4, 3, padding=1), nn.ReLU()
        self.body = nn.ModuleList([Counted(4, 4, 3, padding=1) for _ in range(3)])

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        for part in self.body:
            x = x + self.act(part(x))
        return self.stem(x[:, :3])


@pytest.mark.parametrize("index", [0, 1, 2])
def test_what_comes_before_does_not_run_and_what_comes_again_does(index: int) -> None:
    net = Net()
    given = torch.randn(2, 4, 8, 8, requires_grad=True)

    def by_hand(output: Tensor) -> Tensor:
        x = torch.zeros(1, 3, 8, 8)  # the blank picture up to the module, whose output is then replaced
        x = net.act(net.stem(x))
        for place, part in enumerate(net.body):
            made = output if place == index else part(x)
            x = x + net.act(made)
        return net.stem(x[:, :3])

    rest = RestOfNetwork(net, net.body[index], torch.zeros(1, 3, 8, 8))
    wanted = by_hand(given)
    (gradient,) = torch.autograd.grad(wanted.square().sum(), given)
    before = [part.runs for part in (net.stem, *net.body)]
    found = rest(given)
    ran = [part.runs - count for part, count in zip((net.stem, *net.body), before, strict=True)]
    assert ran == [2, *(int(place > index) for place in range(3))] and len(found) == 2
    assert torch.allclose(found, wanted, atol=1e-6)
    assert torch.allclose(torch.autograd.grad(found.square().sum(), given)[0], gradient, atol=1e-5)


def test_the_network_is_left_as_it_was_even_by_an_error() -> None:
    net = Net()
    picture = torch.rand(2, 3, 8, 8)
    before = net.forward_features(picture)
    rest = RestOfNetwork(net, net.body[1], picture[:1])
    with pytest.raises(RuntimeError):
        rest(torch.randn(2, 5, 8, 8))
    assert torch.equal(net.forward_features(picture), before)
    assert not any("forward" in vars(part) for part in net.modules())


def test_a_module_that_is_not_run_has_no_output() -> None:
    net = Net()
    assert RestOfNetwork(net, nn.Linear(1, 1), torch.zeros(1, 3, 8, 8)).output is None


def _random(name: str, layer: str) -> Backbone:
    """With random norms, too: timm starts the last one of a residual block at zero, which hides the shortcut."""
    backbone = load_backbone(name, layer, pretrained=False, input_size=64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in backbone.parameters():
            if weight.ndim == 1:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator) + 0.7)
    return backbone


@pytest.mark.parametrize(
    ("name", "layer", "determined"),
    [
        ("resnet18", "bn1", True),  # what follows works in place
        ("resnet18", "layer2", True),
        ("resnet18", "layer2.0.conv1", False),
        ("resnet18", "layer2.0.bn2", False),
        ("resnet18", "layer3.0.downsample", False),
        ("tf_efficientnet_lite0", "blocks.2.1.conv_pw", False),
        ("convnext_atto", "stages.1.blocks.0.conv_dw", False),
        ("densenet121", "features.denseblock1.denselayer1", False),
    ],
)
def test_a_map_goes_on_where_it_determines_the_last_one(name: str, layer: str, determined: bool) -> None:
    backbone = _random(name, layer)
    images = torch.rand(2, 3, 64, 64)
    features = backbone(images)
    before = features.clone()
    if determined:
        assert torch.allclose(backbone.final_from(features), backbone.at("final")(images), rtol=1e-3, atol=1e-4)
        assert torch.equal(features, before)
    else:
        with pytest.raises(UserError, match="not all that the next layer reads"):
            backbone.final_from(features)


@pytest.mark.parametrize("layer", ["bn1", "layer1.0.bn1", "layer2"])
def test_a_layers_map_is_what_the_module_gave(layer: str) -> None:
    backbone, kept = _random("resnet18", layer), []
    module = dict(backbone.model.named_modules())[layer]  # type: ignore[attr-defined]
    images = torch.rand(2, 3, 64, 64)
    handle = module.register_forward_hook(lambda *given: kept.append(given[2].clone()))
    features = backbone(images)
    handle.remove()
    assert torch.equal(features, kept[0])


def test_windows_are_no_images() -> None:
    swin = load_backbone("swin_tiny_patch4_window7_224", "layers.0.blocks.0.attn", pretrained=False)
    with pytest.raises(UserError, match="each whole image"):
        swin(torch.rand(1, 3, 224, 224))


@pytest.mark.parametrize("layer", ["blocks.4", "blocks.2.1.conv_pw", "final"])
def test_copies_have_their_own_weights(layer: str) -> None:
    backbone = load_backbone("efficientnet_lite0", layer, pretrained=False, input_size=64)
    images = torch.rand(2, 3, 64, 64)
    features = backbone(images)
    other = copy.deepcopy(backbone)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    assert not torch.allclose(other(images), features) and torch.equal(backbone(images), features)
    assert torch.equal(pickle.loads(pickle.dumps(backbone))(images), features)


def test_a_copy_of_a_backbone_goes_on_with_its_own_weights() -> None:
    backbone = load_backbone("efficientnet_lite0", "blocks.4", pretrained=False, input_size=64)
    features = torch.rand(2, 112, 4, 4)
    last = backbone.final_from(features)
    other = copy.deepcopy(backbone)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    assert not torch.allclose(other.final_from(features), last)
    assert torch.equal(backbone.final_from(features), last)
