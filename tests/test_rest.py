"""The second half of a network by itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from featinv.backbones import load_backbone
from featinv.backbones.rest import RestOfNetwork


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
