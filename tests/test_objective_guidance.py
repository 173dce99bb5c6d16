import pytest
import torch
from conftest import tiny_prior

from featinv.attribution.prior_maximisation import maximise_with_prior
from featinv.diffusion import objective_guidance
from featinv.diffusion.objective_guidance import ObjectiveGuidance, pictures_together
from featinv.errors import UserError


def _clean(prior, model_pred, noisy, step):
    """The estimate of the clean latents as the diffusers scheduler computes it."""
    return prior.scheduler.step(model_pred, step, noisy).pred_original_sample


def _brightness(images):
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_the_estimate_moves_by_strength_along_the_gradient(kind) -> None:
    prior = tiny_prior(kind)
    prior.scheduler.register_to_config(clip_sample=False)
    guidance = ObjectiveGuidance(_brightness, prior.first_stage, prior.scheduler, strength=0.3)
    noisy, model_pred, step = torch.randn(2, *prior.latent_shape), torch.randn(2, *prior.latent_shape), 400
    moved = guidance.shift(model_pred, noisy, torch.tensor(step))
    before, after = (_clean(prior, p, noisy, step) for p in (model_pred, moved))
    latents = before.clone().requires_grad_(True)
    _brightness(prior.first_stage.decode(latents, clamp=False)).sum().backward()
    wanted = latents.grad / latents.grad.square().mean((1, 2, 3), keepdim=True).sqrt() * 0.3
    assert torch.allclose(after - before, wanted, atol=1e-3)
    assert (
        _brightness(prior.first_stage.decode(after, clamp=False))
        > _brightness(prior.first_stage.decode(before, clamp=False))
    ).all()


def test_gradients_that_are_not_finite_are_skipped_and_counted() -> None:
    prior = tiny_prior()
    guidance = ObjectiveGuidance(
        lambda images: images.mean((1, 2, 3)) * torch.tensor([float("inf"), 1.0, float("nan")]),
        prior.first_stage,
        prior.scheduler,
        iterations=2,
    )
    noisy, model_pred = torch.randn(3, *prior.latent_shape), torch.randn(3, *prior.latent_shape)
    moved = guidance.shift(model_pred, noisy, torch.tensor(500))
    assert guidance.skipped == 4 and moved.isfinite().all()
    assert torch.equal(moved[[0, 2]], model_pred[[0, 2]]) and not torch.equal(moved[1], model_pred[1])


def test_a_gradient_is_taken_of_as_many_pictures_as_the_memory_allows(monkeypatch) -> None:
    assert [pictures_together(side**2) for side in (64, 128, 256, 512, 2048)] == [64, 16, 4, 1, 1]
    monkeypatch.setattr(objective_guidance, "GRADIENT_PIXELS", 2 * 32**2 + 1)
    prior, asked = tiny_prior(), []
    wanted, step = torch.rand(5, 3, 32, 32), 400
    noisy, model_pred = torch.randn(2, 5, *prior.latent_shape)
    decode = prior.first_stage.decode

    def score(images, wanted):
        asked.append(("objective", len(images)))
        return -(images - wanted).square().mean((1, 2, 3)) / wanted[:, 0, 0, 0]

    def counting(latents, clamp=True):
        asked.append(("decoder", len(latents)))
        return decode(latents, clamp)

    monkeypatch.setattr(prior.first_stage, "decode", counting)
    settings = {"strength": 0.3, "iterations": 2, "wanted": wanted}
    guidance = ObjectiveGuidance(score, prior.first_stage, prior.scheduler, **settings)
    moved = guidance.shift(model_pred, noisy, torch.tensor(step))
    rows = [2, 2, 2, 2, 1, 1]  # both steps of some rows, then of the next
    assert asked == [(what, n) for n in rows for what in ("decoder", "objective")]

    alpha = prior.scheduler.alphas_cumprod[step]
    for row in range(5):
        clean = start = alpha.sqrt() * noisy[row : row + 1] - (1 - alpha).sqrt() * model_pred[row : row + 1]
        for _ in range(2):
            latents = clean.clone().requires_grad_(True)
            score(decode(latents, False), wanted[row : row + 1]).sum().backward()
            clean = clean + 0.3 * latents.grad / latents.grad.square().mean().sqrt()
        by_hand = model_pred[row] - (clean - start)[0] / (1 - alpha).sqrt()
        torch.testing.assert_close(moved[row], by_hand, atol=1e-6, rtol=1e-6)


def test_an_objective_without_rows_of_its_own_sees_all_pictures_at_once(monkeypatch) -> None:
    monkeypatch.setattr(objective_guidance, "GRADIENT_PIXELS", 1)
    prior, asked = tiny_prior(), []
    guidance = ObjectiveGuidance(
        lambda images: asked.append(len(images)) or _brightness(images), prior.first_stage, prior.scheduler
    )
    guidance.shift(torch.randn(3, *prior.latent_shape), torch.randn(3, *prior.latent_shape), torch.tensor(500))
    assert asked == [3]


def test_it_acts_in_its_interval_only() -> None:
    prior = tiny_prior()
    noisy, model_pred = torch.randn(1, *prior.latent_shape), torch.randn(1, *prior.latent_shape)
    guidance = ObjectiveGuidance(_brightness, prior.first_stage, prior.scheduler, interval=(0.3, 0.6))
    for step, inside in ((299, False), (300, True), (600, True), (601, False)):
        assert torch.equal(guidance.shift(model_pred, noisy, torch.tensor(step)), model_pred) != inside
    for settings in ({"strength": -1.0}, {"iterations": 0}, {"interval": (0.5, 0.5)}):
        with pytest.raises(UserError):
            ObjectiveGuidance(_brightness, prior.first_stage, prior.scheduler, **settings)


def test_pictures_drawn_with_an_objective_score_higher_and_depend_on_their_seed_alone() -> None:
    prior = tiny_prior()
    settings = {"prior": prior, "steps": 4, "interval": (0.0, 1.0)}
    plain = maximise_with_prior(_brightness, [1, 2], strength=0.0, **settings)
    found = maximise_with_prior(_brightness, [1, 2], strength=0.5, **settings)
    assert plain.images.shape == (2, 3, 32, 32) and found.skipped == 0
    assert (_brightness(found.images) > _brightness(plain.images)).all()
    alone = maximise_with_prior(_brightness, [2], strength=0.5, **settings)
    assert torch.allclose(alone.images[0], found.images[1], atol=1e-4)
