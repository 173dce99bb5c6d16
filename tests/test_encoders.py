import pytest
import torch

from featinv.backbones.base import FeatureSpec
from featinv.conditioning.encoders import PooledEncoder, PublishedEncoder, RidgeEstimate, SpatialEncoder, Whitening
from featinv.errors import UserError

SPEC = FeatureSpec(12, 4, 4, "final")
LATENTS = (3, 8, 8)


def test_whitened_features_are_uncorrelated_with_unit_variance() -> None:
    mixing = torch.randn(12, 12)
    features = torch.einsum("kc,nchw->nkhw", mixing, torch.randn(200, 12, 4, 4)) + 3
    whitening = Whitening(12, 12)
    whitening.fit(features, floor=0.0)
    columns = whitening(features).permute(0, 2, 3, 1).flatten(0, 2)
    assert torch.allclose(columns.T @ columns / len(columns), torch.eye(12), atol=2e-2)
    assert torch.allclose(columns.mean(0), torch.zeros(12), atol=1e-3)


def test_ridge_estimate_finds_a_linear_map_exactly() -> None:
    convolution = torch.nn.Conv2d(12, 3 * 4, 3, padding=1)
    features = torch.randn(60, 12, 4, 4)
    with torch.no_grad():
        latents = torch.nn.functional.pixel_shuffle(convolution(features), 2)
    estimate = RidgeEstimate(12, (4, 4), LATENTS)
    estimate.fit(features, latents, ridge=1e-7)
    assert torch.allclose(estimate(features), latents, atol=1e-3)


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (16, 16), (7, 7), (3, 3), (4, 8)])
def test_ridge_estimate_fits_any_feature_grid(grid) -> None:
    estimate = RidgeEstimate(5, grid, LATENTS)
    features, latents = torch.randn(30, 5, *grid), torch.randn(30, *LATENTS)
    estimate.fit(features, latents)
    assert estimate(features).shape == latents.shape
    assert (estimate(features) - latents).square().mean() < latents.square().mean()


@pytest.mark.parametrize("kind", [SpatialEncoder, PooledEncoder, PublishedEncoder])
@pytest.mark.parametrize("grid", [(4, 4), (7, 7), (16, 16)])
def test_encoders_give_an_embedding_on_the_latent_grid(kind, grid) -> None:
    spec = FeatureSpec(12, *grid, "final")
    encoder = kind(spec, LATENTS, 16, hidden=16)
    features = torch.randn(3, 12, *grid)
    encoder.fit(features, torch.randn(3, *LATENTS))
    embedding, latents = encoder(features)
    assert embedding.shape == (3, 16, 8, 8)
    assert latents is None or latents.shape == (3, *LATENTS)
    with pytest.raises(UserError, match="do not fit this inverter"):
        encoder(torch.randn(3, 13, *grid))


def test_pooled_encoder_cannot_tell_positions_and_the_spatial_one_can() -> None:
    features = torch.randn(2, 12, 4, 4)
    shuffled = features.flatten(2)[:, :, torch.randperm(16)].unflatten(2, (4, 4))
    pooled, spatial = (k(SPEC, LATENTS, 16, hidden=16).eval() for k in (PooledEncoder, SpatialEncoder))
    assert torch.allclose(pooled(features)[0], pooled(shuffled)[0], atol=1e-5)
    assert not torch.allclose(spatial(features)[0], spatial(shuffled)[0], atol=1e-3)


def test_an_unfitted_head_adds_nothing_to_the_linear_estimate() -> None:
    encoder = SpatialEncoder(SPEC, LATENTS, 16, hidden=16, linear=True)
    features, latents = torch.randn(40, 12, 4, 4), torch.randn(40, *LATENTS)
    encoder.fit(features, latents)
    with torch.no_grad():
        encoder.latents_head.bias.zero_()
    assert torch.allclose(encoder(features)[1], encoder.linear(encoder.whitening(features)), atol=1e-6)
