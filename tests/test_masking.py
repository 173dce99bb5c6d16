import pytest
import torch
from conftest import tiny_prior

from featinv.conditioning.encoders import PublishedEncoder, SpatialEncoder
from featinv.conditioning.masking import FeatureMasking, masked, mean_feature
from featinv.errors import UserError
from featinv.inverters.diffusion import DiffusionInverter
from featinv.training.module import InversionModule


def test_nothing_is_masked_by_default() -> None:
    features = torch.randn(3, 8, 4, 4)
    assert FeatureMasking()(features, torch.zeros(8), [1, 2, 3]) is features
    assert FeatureMasking().draw((8, 4, 4), [1, 2]).all()


def test_a_row_depends_on_its_seed_alone() -> None:
    masking, shape = FeatureMasking(0.7, 0.7), (8, 4, 4)
    whole = masking.draw(shape, range(20))
    alone = torch.cat([masking.draw(shape, [seed]) for seed in reversed(range(20))]).flip(0)
    assert torch.equal(whole, alone)
    assert len(torch.unique(whole.flatten(1), dim=0)) > 10


def test_masks_come_as_often_as_asked_and_keep_whole_positions_and_channels() -> None:
    keep = FeatureMasking(0.4, 0.0).draw((6, 5, 5), range(2000))
    assert torch.equal(keep, keep[:, :1].expand_as(keep))
    assert float((~keep).flatten(1).any(1).float().mean()) == pytest.approx(0.4, abs=0.05)
    keep = FeatureMasking(0.0, 0.4).draw((6, 5, 5), range(2000))
    assert torch.equal(keep, keep[..., :1, :1].expand_as(keep))
    shares = FeatureMasking(0.0, 1.0).draw((200, 1, 1), range(2000)).float().mean((1, 2, 3))
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(shares.var()) == pytest.approx(1 / 12, abs=0.01)  # uniform


def test_a_masked_value_is_zero_after_whitening(prior, backbone) -> None:
    encoder = SpatialEncoder(backbone.spec, prior.latent_shape, 16, components=16, hidden=16, blocks=1)
    inverter = DiffusionInverter(prior, encoder)
    features = torch.rand(5, backbone.spec.channels, 2, 2) + 3
    encoder.whitening.fit(features)
    mean = mean_feature(inverter, backbone.spec.channels)
    assert torch.allclose(mean, features.mean((0, 2, 3)), atol=1e-5)
    keep = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    keep[..., 0, 1] = True
    given = masked(features, keep, mean)
    assert torch.equal(given[..., 0, 1], features[..., 0, 1])
    assert encoder.whitening(given)[..., 1, :].abs().max() < 1e-4
    plain = DiffusionInverter(tiny_prior(), PublishedEncoder(backbone.spec, prior.latent_shape, 16, hidden=8))
    assert not mean_feature(plain, 512).any()


def test_training_masks_the_features_it_gives(prior, backbone) -> None:
    encoder = SpatialEncoder(backbone.spec, prior.latent_shape, 16, components=16, hidden=16, blocks=1)
    inverter, told = DiffusionInverter(prior, encoder), []
    inverter.training_losses = lambda images, features, **_: told.append(features) or {"loss": torch.zeros(())}
    features = torch.rand(2, 512, 2, 2)
    for probability in (0.0, 1.0):
        module = InversionModule(inverter, backbone, mask_channels=probability, feature_noise=0.1)
        module._trainer = None
        module.log = module.log_dict = lambda *_, **__: None
        module.training_step({"features": features, "latents": torch.zeros(2, 4, 4, 4)}, 0)
    gone = told[1] == 0
    assert gone.any() and (~gone).any()
    assert torch.equal(told[1][~gone], told[0][~gone])


def test_a_wrong_probability_is_the_users_error() -> None:
    with pytest.raises(UserError, match="masking probabilities"):
        FeatureMasking(1.5)
