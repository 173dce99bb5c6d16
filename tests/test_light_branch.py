"""The branch that runs once per image, behind the ControlNet's contract."""

import pytest
import torch

from featinv.conditioning.encoders import SpatialEncoder
from featinv.diffusion.controlled_unet import unconditional
from featinv.diffusion.guidance import ClassifierFreeGuidance
from featinv.errors import UserError
from featinv.inverters.diffusion import DiffusionInverter
from featinv.training.costs import step_cost


def _inverter(prior, backbone, branch="light"):
    encoder = SpatialEncoder(backbone.spec, prior.latent_shape, 16, components=16, hidden=16, blocks=1)
    return DiffusionInverter(prior, encoder, num_inference_steps=3, branch=branch)


def _wake(inverter):
    for convolution in [*inverter.branch.down, inverter.branch.middle]:
        torch.nn.init.normal_(convolution.weight, std=0.3)
    torch.nn.init.normal_(inverter.null_embedding)


def test_it_starts_as_the_prior_and_reaches_every_place_a_controlnet_reaches(prior, backbone) -> None:
    inverter, full = _inverter(prior, backbone), _inverter(prior, backbone, "controlnet")
    noisy, timesteps = torch.randn(2, 4, 4, 4), torch.tensor([0, 900])
    conditions = inverter.conditions(torch.randn(2, 512, 2, 2))
    alone = unconditional(prior.unet, prior.text["prompt"], noisy, timesteps)
    assert torch.equal(inverter.unet(noisy, timesteps, conditions), alone)
    text, embedding = prior.encoder_hidden_states(2), torch.randn(2, 16, 4, 4)
    down, middle = full.branch(noisy, timesteps, text, embedding, return_dict=False)
    assert [r.shape for r in conditions.residuals[0]] == [r.shape for r in down]
    assert conditions.residuals[1].shape == middle.shape
    _wake(inverter)
    conditions = inverter.conditions(torch.randn(2, 512, 2, 2))
    assert not torch.allclose(inverter.unet(noisy, timesteps, conditions), alone, atol=1e-3)
    assert torch.equal(inverter.unet(noisy, timesteps, conditions.without(["branch"])), alone)
    assert not torch.allclose(
        inverter.unet(noisy, timesteps, conditions), inverter.unet(noisy, timesteps, conditions.without(["features"]))
    )


def test_it_runs_once_per_image_however_many_steps(prior, backbone) -> None:
    inverter, runs = _inverter(prior, backbone), []
    inverter.guidance = ClassifierFreeGuidance(2.0, ["features"])
    inverter.branch.register_forward_hook(lambda *_: runs.append(1))
    features = torch.randn(2, 512, 2, 2)
    _wake(inverter)
    images = inverter.invert(features, seeds=[1, 2])
    assert len(runs) == 2  # the features' and the empty embedding's
    assert torch.allclose(inverter.invert(features[1:], seeds=[2]), images[1:], atol=1e-4)


def test_training_changes_it_and_costs_less(prior, backbone) -> None:
    inverter = _inverter(prior, backbone)
    before = {k: v.clone() for k, v in inverter.trainable_state().items()}
    optimizer = torch.optim.AdamW(inverter.trainable_parameters(), lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        losses = inverter.training_losses(torch.rand(2, 3, 32, 32), torch.randn(2, 512, 2, 2), seeds=[step, step + 9])
        losses["loss"].backward()
        optimizer.step()
    state = inverter.trainable_state()
    assert all(
        any(k.startswith(p) and not torch.equal(v, state[k]) for k, v in before.items())
        for p in ("branch.trunk", "branch.down")
    )
    full = step_cost(_inverter(prior, backbone, "controlnet").to("meta"), 2, (512, 2, 2))
    assert step_cost(inverter.to("meta"), 2, (512, 2, 2)).flops < full.flops


def test_an_unknown_branch_is_named(prior, backbone) -> None:
    with pytest.raises(UserError, match="controlnet, light"):
        _inverter(prior, backbone, "heavy")
