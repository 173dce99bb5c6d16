"""FusedAdamW: the steps of PyTorch's AdamW, without copies of channels_last weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from featinv.training.optimizers import FusedAdamW, match_layout

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 1e-2}


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.LazyLinear(4))
    layers(torch.rand(1, 3, 8, 8))
    return layers.to(memory_format=torch.channels_last)


def losses(network: nn.Module, steps: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield network(torch.rand(2, 3, 8, 8, generator=generator)).square().mean()


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    for loss in losses(network, steps):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_steps_are_those_of_the_plain_loop(network: nn.Module) -> None:
    other = copy.deepcopy(network)
    network.requires_grad_(True)[1].requires_grad_(False)  # a frozen layer has no gradient
    other[1].requires_grad_(False)
    train(network, FusedAdamW(network.parameters(), **SETTINGS))
    train(other, torch.optim.AdamW(other.parameters(), foreach=False, fused=False, **SETTINGS))
    for ours, theirs in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_weights_gradients_and_state_keep_shape_and_layout(network: nn.Module) -> None:
    optimizer = FusedAdamW(network.parameters(), **SETTINGS)
    before = [(p.shape, p.stride(), p.data_ptr()) for p in network.parameters()]
    train(network, optimizer, 2)
    assert [(p.shape, p.stride(), p.data_ptr()) for p in network.parameters()] == before
    for p in network.parameters():
        state = optimizer.state[p]
        assert p.grad is not None
        assert {p.grad.stride(), state["exp_avg"].stride(), state["exp_avg_sq"].stride()} == {p.stride()}


def test_no_weight_is_copied(network: nn.Module) -> None:
    def clones(optimizer: torch.optim.Optimizer) -> int:
        train(network, optimizer, 1)
        with torch.profiler.profile() as profile:
            optimizer.step()
        return sum(event.name == "aten::clone" for event in profile.events())

    assert clones(torch.optim.AdamW(network.parameters(), fused=True)) > 0  # once this fails the class can go
    assert clones(FusedAdamW(network.parameters())) == 0


def test_a_closure_sees_weights_as_they_are_and_may_differentiate(network: nn.Module) -> None:
    optimizer = FusedAdamW(network.parameters(), lr=1e-4)

    def closure() -> torch.Tensor:
        assert network[0].weight.shape == (8, 3, 3, 3)
        optimizer.zero_grad()
        loss = next(losses(network, 1))
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_weights_are_put_back_when_the_step_fails(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = FusedAdamW(network.parameters(), **SETTINGS)
    train(network, optimizer, 1)

    def fail(self: object) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(RuntimeError, match="injected"):
        optimizer.step()
    assert network[0].weight.shape == network[0].weight.grad.shape == (8, 3, 3, 3)
    assert optimizer.state[network[0].weight]["exp_avg"].shape == (8, 3, 3, 3)


def test_state_restored_in_another_layout_goes_on_the_same(network: nn.Module) -> None:
    optimizer = FusedAdamW(network.parameters(), **SETTINGS)
    train(network, optimizer, 2)
    resumed = copy.deepcopy(network)
    other = FusedAdamW(resumed.parameters(), **SETTINGS)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state.update({k: v.contiguous() for k, v in state.items() if v.dim() == 4})
    other.load_state_dict(saved)
    match_layout(other)
    train(network, optimizer, 2)
    train(resumed, other, 2)
    for ours, theirs in zip(network.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
