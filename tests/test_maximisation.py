import pytest
import torch
from conftest import tiny_prior

from featinv.attribution.maximisation import (
    channel_objective,
    class_objective,
    direction_objective,
    maximise,
    unit_objective,
)
from featinv.attribution.redirected import redirected_features
from featinv.backbones import load_backbone
from featinv.errors import UserError
from featinv.inverters.regularisers import Regulariser


@pytest.fixture(scope="module")
def net():
    return load_backbone("resnet10t", pretrained=False, input_size=64)


@pytest.mark.parametrize("kind", ["pixel", "fourier", "latent"])
def test_each_objective_rises(net, kind) -> None:
    direction = torch.randn(net.spec.channels)
    active = int(net(torch.rand(4, 3, 64, 64))[:, :, 0, 1].amin(0).argmax())  # a silent unit has no gradient
    objectives = [
        channel_objective(net, active),
        unit_objective(net, active, 0, 1),
        class_objective(net, 7),
        direction_objective(net, direction),
    ]
    prior = tiny_prior() if kind == "latent" else None
    for objective in objectives:
        seen: list[torch.Tensor] = []
        images = maximise(
            objective,
            [1, 2],
            size=32,
            steps=12,
            parametrisation=kind,
            prior=prior,
            learning_rate=0.02,
            regulariser=Regulariser(tv_weight=0, l2_weight=0),
            jitter=0,
            scale=0,
            callback=lambda step, x, seen=seen: seen.append(x),
        )
        assert images.shape == (2, 3, 32, 32) and images.min() >= 0 and images.max() <= 1
        assert objective(images).mean() > objective(seen[0]).mean()


def test_a_silent_unit_is_woken(net) -> None:
    images = torch.rand(2, 3, 64, 64)
    silent = int((net(images).amax((0, 2, 3)) == 0).nonzero()[0, 0])
    images.requires_grad_(True)
    score = channel_objective(net, silent)(images)
    assert torch.equal(score, torch.zeros(2))
    (gradient,) = torch.autograd.grad(score.sum(), images)
    step = images.detach() + 0.2 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * 64
    before, after = (_before_the_last_relu(net, x)[:, silent].mean((1, 2)) for x in (images, step))
    assert (after > before).all()


def _before_the_last_relu(net, images):
    kept = []
    last = [m for m in net.modules() if isinstance(m, torch.nn.ReLU)][-1]
    handle = last.register_forward_pre_hook(lambda _m, inputs: kept.append(inputs[0].detach().clone()))
    net(images)
    handle.remove()
    return kept[0]


def test_redirection_changes_neither_features_nor_gradients_of_active_units(net) -> None:
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    active = int(net(images)[:, :, 0, 1].amin(0).argmax())
    modules = [id(m) for m in net.modules()]
    plain = torch.autograd.grad(net(images)[:, active].mean((1, 2)).sum(), images)[0]
    again = torch.autograd.grad(channel_objective(net, active)(images).sum(), images)[0]
    assert torch.allclose(plain, again, atol=1e-7)
    assert torch.equal(redirected_features(net, images), net(images)) and [id(m) for m in net.modules()] == modules


def test_direction_along_an_axis_is_that_channel(net) -> None:
    images, axis = torch.rand(2, 3, 64, 64), torch.zeros(net.spec.channels)
    axis[5] = 3.0
    assert torch.allclose(direction_objective(net, axis)(images), channel_objective(net, 5)(images), atol=1e-5)


def test_a_picture_depends_on_its_own_seed_alone(net) -> None:
    objective = channel_objective(net, 3)
    both = maximise(objective, [1, 2], size=32, steps=3)
    assert torch.allclose(both[1:], maximise(objective, [2], size=32, steps=3), atol=1e-4)


def test_it_starts_where_the_network_is(net) -> None:
    seen = []

    def objective(images):
        seen.append(images.device.type)
        return images.mean((1, 2, 3))

    assert maximise(objective, [1, 2], size=32, steps=1, device="meta").device.type == "meta"
    elsewhere = tiny_prior().to("meta")
    assert maximise(objective, [1], steps=1, parametrisation="latent", prior=elsewhere).device.type == "meta"
    assert maximise(objective, [1], size=32, steps=1).device.type == "cpu"
    assert seen == ["meta", "meta", "cpu"]


def test_mistakes_are_named(net) -> None:
    for call in (
        lambda: channel_objective(net, 512),
        lambda: unit_objective(net, 0, 9, 0),
        lambda: class_objective(net, 1000),
        lambda: direction_objective(net, torch.zeros(512)),
        lambda: maximise(channel_objective(net, 0), [1], parametrisation="latent"),
        lambda: maximise(channel_objective(net, 0), [1], parametrisation="wavelet"),
    ):
        with pytest.raises(UserError):
            call()
