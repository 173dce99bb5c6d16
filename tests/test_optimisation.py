import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_prior

from featinv.backbones import load_backbone
from featinv.backbones.base import Backbone
from featinv.errors import UserError
from featinv.inverters.masks import channel_mask, region_mask, top_channels
from featinv.inverters.optimisation import OptimizationInverter
from featinv.inverters.parametrisations import Fourier, Latents, Pixels
from featinv.inverters.regularisers import Regulariser, alpha_norm, high_frequencies, total_variation


class _Identity(Backbone):
    """Its features are the picture: the known optimum of an inversion is the picture itself."""

    def __init__(self) -> None:
        super().__init__("final", 16, (0.0,) * 3, (1.0,) * 3)
        self.freeze()

    def forward(self, images):
        return self.preprocess(images)


def _smooth(n: int = 2, size: int = 16) -> torch.Tensor:
    axis = torch.linspace(0, math.pi, size)
    wave = 0.5 + 0.3 * torch.sin(axis)[:, None] * torch.cos(axis * 2)
    return torch.stack([wave, wave.T, 1 - wave]).expand(n, 3, size, size).clone()


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
@pytest.mark.parametrize("kind", ["pixel", "fourier"])
def test_the_identity_is_inverted_to_the_picture_itself(kind, optimizer) -> None:
    steps, rate = (300, 0.05) if optimizer == "adam" else (150, 1.0)
    inverter = OptimizationInverter(
        _Identity(), 16, steps, rate, tv_weight=0, l2_weight=0, parametrisation=kind, optimizer=optimizer
    )
    images = _smooth()
    difference = inverter.invert(images, seeds=[1, 2]) - images
    assert difference.square().sum() / images.square().sum() < 1e-4  # the objective, whose optimum is 0


@pytest.mark.parametrize("kind", ["pixel", "fourier", "latent"])
def test_a_parametrisation_begins_at_its_start(kind) -> None:
    start = _smooth(size=32)
    first_stage = tiny_prior().first_stage
    free = {"pixel": Pixels, "fourier": Fourier}.get(kind, lambda s: Latents(s, first_stage))(start)
    wanted = first_stage.decode(first_stage.encode(start)) if kind == "latent" else start
    assert torch.allclose(free.images(), wanted, atol=1e-3)
    free.images().sum().backward()
    assert free.tensor.grad is not None and free.tensor.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "settings", [{"parametrisation": "fourier"}, {"jitter": 2, "scale": 0.1}, {"optimizer": "lbfgs"}]
)
def test_an_image_does_not_depend_on_its_neighbours(settings) -> None:
    backbone = load_backbone("resnet10t", "layer1", pretrained=False, input_size=32)
    features = backbone(torch.rand(3, 3, 32, 32))
    inverter = OptimizationInverter(backbone, 32, steps=3, learning_rate=0.02, **settings)
    together = inverter.invert(features, seeds=[1, 2, 3])
    alone = torch.cat([inverter.invert(features[i : i + 1], seeds=[i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-3)


def test_latent_parametrisation_lowers_the_objective() -> None:
    backbone = load_backbone("resnet10t", "layer1", pretrained=False, input_size=32)
    features = backbone(_smooth(size=32))
    inverter = OptimizationInverter(backbone, 32, 30, 0.1, parametrisation="latent", prior=tiny_prior())
    found = []
    inverter.invert(features, seeds=[1, 2], callback=lambda step, images: found.append(images))
    first, last = (F.mse_loss(backbone(images), features) for images in (found[0], found[-1]))
    assert len(found) == 30 and last < first


def test_the_first_stage_follows_the_features(monkeypatch) -> None:
    prior, moved = tiny_prior(), []
    monkeypatch.setattr(prior.first_stage, "to", lambda device: moved.append(device))
    inverter = OptimizationInverter(_Identity(), 32, 1, parametrisation="latent", prior=prior)
    features = _smooth(1)
    inverter.invert(features, seeds=[1])
    assert moved == [features.device]


def test_a_mask_leaves_the_rest_free() -> None:
    images = _smooth()
    mask = channel_mask(images, [1])
    inverter = OptimizationInverter(_Identity(), 16, 300, 0.05, tv_weight=0, l2_weight=0)
    found = inverter.invert(images, seeds=[1, 2], mask=mask)
    assert (found[:, 1] - images[:, 1]).abs().max() < 0.02
    assert (found[:, 0] - images[:, 0]).abs().mean() > 0.05
    region = region_mask(images, (0.0, 0.0, 0.5, 0.5))
    found = inverter.invert(images, seeds=[1, 2], mask=region)
    assert (found - images)[..., :8, :8].abs().max() < 0.02 < (found - images)[..., 8:, 8:].abs().mean()


def test_masks_choose_what_they_say() -> None:
    features = torch.zeros(2, 5, 4, 4)
    features[0, 3], features[1, 1] = 2.0, 3.0
    assert top_channels(features, 1).flatten(1).argmax(1).tolist() == [3, 1]
    assert region_mask(features, (0.5, 0.0, 1.0, 1.0)).sum() == 8
    for call in (
        lambda: channel_mask(features, [5]),
        lambda: channel_mask(features, []),
        lambda: top_channels(features, 0),
        lambda: region_mask(features, (0.5, 0, 0.4, 1)),
        lambda: region_mask(features, (0.0, 0.0, 0.01, 0.01)),
    ):
        with pytest.raises(UserError):
            call()


def test_it_starts_where_it_is_told() -> None:
    start = _smooth()
    still = OptimizationInverter(_Identity(), 16, 1, 0.0)
    assert torch.equal(still.invert(torch.rand(2, 3, 16, 16), seeds=[1, 2], start=start), start)
    grey = OptimizationInverter(_Identity(), 16, 1, 0.0, start="grey").invert(start, seeds=[1, 2])
    assert (grey - 0.5).abs().max() < 0.01


def test_regularisers_agree_with_their_formulas() -> None:
    images = torch.rand(2, 3, 6, 6)
    dx, dy = images.diff(dim=3), images.diff(dim=2)
    loop = (dx.abs().sum((1, 2, 3)) + dy.abs().sum((1, 2, 3))) / images[0].numel()
    assert torch.allclose(total_variation(images, 1.0, isotropic=False), loop, atol=1e-3)
    assert torch.allclose(alpha_norm(images, 2.0), (2 * images - 1).square().mean((1, 2, 3)))
    constant, noise = torch.full((1, 3, 8, 8), 0.3), torch.rand(1, 3, 8, 8)
    assert high_frequencies(constant) < 1e-9 < high_frequencies(_smooth(1, 8)) < high_frequencies(noise)
    both = Regulariser(tv_weight=0.5, l2_weight=2.0)(images)
    wanted = 0.5 * total_variation(images) + 2.0 * (images - 0.5).square().mean((1, 2, 3))
    assert torch.allclose(both, wanted)


@pytest.mark.parametrize(
    "settings",
    [{"steps": 0}, {"parametrisation": "wavelet"}, {"parametrisation": "latent"}, {"optimizer": "sgd"}, {"scale": 1.0}],
)
def test_mistakes_are_named(settings) -> None:
    with pytest.raises(UserError):
        OptimizationInverter(_Identity(), 16, **settings)
