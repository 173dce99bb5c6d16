import pytest
import torch
from conftest import tiny_first_stage, tiny_prior, wake
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)

from featinv.conditioning.dropout import ConditionDropout
from featinv.conditioning.encoders import PooledEncoder, PublishedEncoder, SpatialEncoder, Whitening
from featinv.config import CONFIG_ROOT, load_config
from featinv.diffusion.clean import clean_latents
from featinv.diffusion.controlled_unet import EstimateGate, unconditional
from featinv.diffusion.first_stage import Finish, normalise_latents
from featinv.diffusion.guidance import ClassifierFreeGuidance, NoGuidance
from featinv.diffusion.loss import DiffusionLoss
from featinv.diffusion.prior import DiffusionPrior, load_prior
from featinv.diffusion.samplers import SAMPLERS, make_stepper, sample
from featinv.errors import UserError
from tools.train_prior import check_start


def test_untrained_branch_equals_the_prior_bit_for_bit(inverter) -> None:
    noisy, timesteps = torch.randn(3, 4, 4, 4), torch.tensor([0, 500, 999])
    conditions = inverter.conditions(torch.randn(3, 512, 2, 2))
    prior = inverter.prior
    alone = unconditional(prior.unet, prior.text["prompt"], noisy, timesteps)
    assert torch.equal(inverter.unet(noisy, timesteps, conditions), alone)
    wake(inverter)
    assert not torch.allclose(inverter.unet(noisy, timesteps, conditions), alone, atol=1e-3)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_an_image_depends_on_its_own_seed_alone(inverter, sampler: str) -> None:
    wake(inverter)
    inverter.sampler = sampler
    features = torch.randn(8, 512, 2, 2)
    together = inverter.invert(features, seeds=range(8))
    assert together.shape == (8, 3, 32, 32) and together.min() >= 0 and together.max() <= 1
    assert torch.allclose(inverter.invert(features[5:6], seeds=[5]), together[5:6], atol=1e-4)
    assert not torch.allclose(inverter.invert(features[5:6], seeds=[6]), together[5:6], atol=1e-4)
    with pytest.raises(UserError, match="seeds"):
        inverter.invert(features, seeds=[1])


def test_samplers_recover_a_point_mass() -> None:
    """Where all data are one point x0, the exact prediction is known and every sampler must end at x0."""
    scheduler = tiny_prior("epsilon").scheduler
    x0, noise = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    alphas = scheduler.alphas_cumprod

    for name in ("ddim", "dpmpp_2m", "unipc"):

        def denoise(x, t):
            return (x - alphas[int(t)].sqrt() * x0) / (1 - alphas[int(t)]).sqrt()

        assert torch.allclose(sample(denoise, noise, scheduler, name, 10), x0, atol=2e-2), name
    with pytest.raises(UserError, match="unipc"):
        sample(denoise, noise, scheduler, "nope")


def test_noise_is_not_predicted_where_there_is_nothing_else() -> None:
    """Of zero terminal SNR; the first stage's hours must not go by before that is said."""
    zero = {"rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear"}
    with pytest.raises(UserError, match="v_prediction"):
        DiffusionLoss(DDPMScheduler(prediction_type="epsilon", **zero))
    with pytest.raises(UserError, match="v_prediction"):
        DiffusionLoss(DDPMScheduler(trained_betas=DDPMScheduler(**zero).betas.tolist()))
    for path in sorted((CONFIG_ROOT / "prior").glob("*.yaml")):
        check_start(load_config(path))
        with pytest.raises(UserError, match="v_prediction"):
            check_start(load_config(path, ["unet.scheduler.prediction_type=epsilon"]))


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_every_number_of_steps_has_as_many_timesteps_or_is_refused(sampler) -> None:
    scheduler, refused = tiny_prior().scheduler, []
    for n in range(1, 1001):
        try:
            stepper = make_stepper(scheduler, sampler, n)
        except UserError:
            refused.append(n)
            continue
        timesteps = stepper.timesteps.tolist()
        assert len(set(timesteps)) == len(timesteps) == n and 0 <= timesteps[-1] < timesteps[0] + 1 <= 1000, n
        assert timesteps == sorted(timesteps, reverse=True)
        if hasattr(stepper, "sigmas"):
            assert len(stepper.sigmas) == n + 1 and float(stepper.sigmas[-1]) == 0
    assert refused == (list(range(501, 1001)) if sampler == "ddim_leading" else [])
    with pytest.raises(UserError, match="1001 steps"):
        make_stepper(scheduler, sampler, 1001)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_each_step_evaluates_the_network_once_and_draws_nothing(sampler) -> None:
    scheduler, noise, seen = tiny_prior("epsilon").scheduler, torch.randn(1, 1, 2, 2), []

    def denoise(x, t):
        seen.append(int(t))
        return 0.5 * x

    for n in range(1, 61):
        seen.clear()
        before = torch.get_rng_state()
        assert sample(denoise, noise, scheduler, sampler, n).isfinite().all() and len(seen) == n
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "kind,extra,fewest,reason",
    [
        (HeunDiscreteScheduler, {}, 2, "once a step"),
        (PNDMScheduler, {}, 4, "once a step"),  # which diffusers itself refuses with fewer
        (PNDMScheduler, {"skip_prk_steps": True}, 2, "once a step"),  # one timestep more, whatever the number
        (EulerAncestralDiscreteScheduler, {}, 1, "fresh noise"),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, 1, "fresh noise"),
        (LCMScheduler, {}, 2, "fresh noise"),
    ],
)
def test_schedulers_that_the_loop_would_run_wrongly_are_refused(monkeypatch, kind, extra, fewest, reason) -> None:
    monkeypatch.setitem(SAMPLERS, "new", (kind, extra))
    for n in (fewest, 10, 50):
        with pytest.raises(UserError, match=rf"new \({kind.__name__}\).*{reason}"):
            make_stepper(tiny_prior("epsilon").scheduler, "new", n)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m", "unipc"])
def test_61_steps_draw_what_60_do(sampler) -> None:
    """61 is a number from which diffusers makes one timestep more, -1."""
    scheduler, noise = tiny_prior("epsilon").scheduler, torch.randn(1, 4, 4, 4)
    alphas, seen = scheduler.alphas_cumprod, []

    def denoise(x, t):  # of data with a standard deviation of 0.5
        seen.append(int(t))
        a = alphas[int(t)]
        return (1 - a).sqrt() * x / (1 - 0.75 * a)

    found = [sample(denoise, noise, scheduler, sampler, n) for n in (60, 61)]
    assert len(seen) == 121 and min(seen) >= 0
    torch.testing.assert_close(*found, atol=0.02, rtol=0)


@pytest.mark.parametrize("n", [7, 334])
def test_ddim_goes_from_each_timestep_to_the_next(n) -> None:
    """x0 = (x - sqrt(1 - a) e) / sqrt(a), next = sqrt(a') x0 + sqrt(1 - a') e, also where n does not divide 1000."""
    scheduler, noise, seen = tiny_prior("epsilon").scheduler, torch.randn(1, 4, 4, 4), []

    def model(x, t):
        seen.append(int(t))
        return torch.sin(x * (1 + t / 500))

    found, x = sample(model, noise, scheduler, "ddim", n), noise.double()
    assert seen == [round(1000 - k * 1000 / n) - 1 for k in range(n)]
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    for t, after in zip(seen[:], [*seen[1:], None], strict=True):
        a, b = alphas[t], torch.tensor(1.0) if after is None else alphas[after]
        e = torch.sin(x * (1 + t / 500))
        x = b.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - b).sqrt() * e
    torch.testing.assert_close(found.double(), x, atol=1e-2, rtol=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_loss_equals_the_formula(kind: str) -> None:
    scheduler = tiny_prior(kind).scheduler
    latents, noise, timesteps = torch.randn(4, 4, 4, 4), torch.randn(4, 4, 4, 4), torch.tensor([3, 250, 600, 990])
    prediction = torch.randn(4, 4, 4, 4)
    loss, estimate = DiffusionLoss(scheduler, snr_gamma=5.0)(lambda x, t: prediction, latents, noise, timesteps)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    for i, t in enumerate(timesteps.tolist()):
        a = float((1 - betas[: t + 1]).prod())
        snr = a / (1 - a)
        noisy = a**0.5 * latents[i] + (1 - a) ** 0.5 * noise[i]
        if kind == "epsilon":
            target, weight = noise[i], min(snr, 5.0) / snr
            clean = (noisy - (1 - a) ** 0.5 * prediction[i]) / a**0.5
        else:
            target, weight = a**0.5 * noise[i] - (1 - a) ** 0.5 * latents[i], min(snr, 5.0) / (snr + 1)
            clean = a**0.5 * noisy - (1 - a) ** 0.5 * prediction[i]
        assert float(loss[i]) == pytest.approx(weight * float((prediction[i] - target).square().mean()), rel=1e-3)
        assert torch.allclose(estimate[i], clean, rtol=1e-3, atol=1e-3)


def test_loss_draws_depend_on_the_row_alone() -> None:
    loss = DiffusionLoss(tiny_prior().scheduler)
    noise, timesteps = loss.draw(torch.zeros(3, 4, 4, 4), [10, 11, 12])
    one_noise, one_timestep = loss.draw(torch.zeros(1, 4, 4, 4), [11])
    assert torch.equal(noise[1:2], one_noise) and timesteps[1] == one_timestep[0]


@pytest.mark.parametrize("drop", [["features"], ["text"], ["branch"], ["features", "text"]])
def test_guidance_is_the_textbook_combination(inverter, drop: list[str]) -> None:
    wake(inverter)
    noisy, timestep = torch.randn(2, 4, 4, 4), torch.tensor(400)
    conditions = inverter.conditions(torch.randn(2, 512, 2, 2))
    on = NoGuidance().denoise(inverter.unet, noisy, timestep, conditions)
    off = ClassifierFreeGuidance(0.0, drop).denoise(inverter.unet, noisy, timestep, conditions)
    assert torch.equal(ClassifierFreeGuidance(1.0, drop).denoise(inverter.unet, noisy, timestep, conditions), on)
    assert not torch.allclose(on, off, atol=1e-4)
    guided = ClassifierFreeGuidance(2.5, drop).denoise(inverter.unet, noisy, timestep, conditions)
    assert torch.allclose(guided, off + 2.5 * (on - off), atol=1e-4)
    outside = ClassifierFreeGuidance(2.5, drop, interval=(0.5, 1.0))
    assert torch.equal(outside.denoise(inverter.unet, noisy, timestep, conditions), on)
    if drop == ["branch"]:
        prior = inverter.prior
        assert torch.allclose(off, unconditional(prior.unet, prior.text["prompt"], noisy, timestep), atol=1e-6)


def test_guidance_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="features, text, branch"):
        ClassifierFreeGuidance(drop=["prompt"])
    with pytest.raises(UserError, match="interval"):
        ClassifierFreeGuidance(interval=[0.8, 0.2])


def test_training_changes_the_branch_and_nothing_else(inverter) -> None:
    frozen = {k: v.clone() for k, v in inverter.prior.state_dict().items()}
    trained = {k: v.clone() for k, v in inverter.trainable_state().items()}
    optimizer = torch.optim.AdamW(inverter.trainable_parameters(), lr=1e-2)
    images, features = torch.rand(4, 3, 32, 32), torch.randn(4, 512, 2, 2)
    for step in range(3):
        optimizer.zero_grad()
        inverter.training_losses(images, features, seeds=range(step * 4, step * 4 + 4))["loss"].backward()
        optimizer.step()
    assert all(torch.equal(v, inverter.prior.state_dict()[k]) for k, v in frozen.items())
    state = inverter.trainable_state()
    for part in ("branch.controlnet_mid_block", "branch.conv_in", "encoder.mix", "encoder.embedding_head"):
        assert any(k.startswith(part) and not torch.equal(v, state[k]) for k, v in trained.items()), part


def test_whitening_decorrelates_and_agrees_with_a_naive_computation() -> None:
    features = torch.randn(64, 6, 3, 3)
    features[:, 1] = 5 * features[:, 0] + 0.1 * features[:, 1] + 2
    whitening = Whitening(6, 4)
    whitening.fit(features, floor=0.0)
    out = whitening(features).permute(0, 2, 3, 1).reshape(-1, 4)
    assert torch.allclose(out.T @ out / len(out), torch.eye(4), atol=1e-3)
    assert torch.allclose(out.mean(0), torch.zeros(4), atol=1e-3)


def test_pooled_encoder_sees_the_mean_alone(backbone, prior) -> None:
    encoder = PooledEncoder(backbone.spec, prior.latent_shape, 16, components=16, hidden=16, blocks=1)
    features = torch.randn(1, 512, 2, 2)
    assert torch.allclose(encoder(features)[0], encoder(features.flip(2, 3))[0], atol=1e-5)
    spatial = SpatialEncoder(backbone.spec, prior.latent_shape, 16, components=16, hidden=16, blocks=1)
    assert not torch.allclose(spatial(features)[0], spatial(features.flip(2, 3))[0], atol=1e-3)


def test_published_encoder_starts_at_zero_and_rejects_other_channels(backbone, prior) -> None:
    encoder = PublishedEncoder(backbone.spec, prior.latent_shape, 16, hidden=8)
    embedding, latents = encoder(torch.randn(2, 512, 2, 2))
    assert embedding.shape == (2, 16, 4, 4) and not embedding.any() and latents is None
    with pytest.raises(UserError, match="512"):
        encoder(torch.randn(2, 300, 2, 2))


def test_dropout_is_independent_or_joint_as_asked() -> None:
    features, text = ConditionDropout(0.3, 0.5).draw(range(4000))
    assert float(features.float().mean()) == pytest.approx(0.3, abs=0.03)
    assert float((features & text).float().mean()) == pytest.approx(0.15, abs=0.03)
    features, text = ConditionDropout(0.3, 0.3, joint=True).draw(range(200))
    assert torch.equal(features, text)


def test_prior_survives_saving(tmp_path, prior) -> None:
    prior.save_pretrained(tmp_path / "p")
    again = load_prior(tmp_path / "p")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in prior.state_dict().items())
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(prior.first_stage.encode(images), again.first_stage.encode(images))
    weights = tmp_path / "p/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="whole"):
        load_prior(tmp_path / "p")


def test_a_finish_changes_nothing_before_it_is_trained_and_is_saved_with_its_prior(tmp_path, prior) -> None:
    latents = torch.randn(2, 4, 4, 4)
    plain = prior.first_stage.decode(latents, clamp=False)
    prior.first_stage.finish = finish = Finish(width=8, layers=2).eval()
    assert torch.equal(prior.first_stage.decode(latents, clamp=False), plain)
    torch.nn.init.normal_(finish.leave.weight)
    finished = prior.first_stage.decode(latents, clamp=False)
    assert not torch.allclose(finished, plain, atol=1e-3)
    prior.save_pretrained(tmp_path / "p")
    again = load_prior(tmp_path / "p").first_stage
    assert (again.finish.width, again.finish.layers) == (8, 2)
    assert torch.equal(again.decode(latents, clamp=False), finished)


def test_a_prompt_without_dropped_rows_is_one_row_in_memory(prior) -> None:
    prompt = prior.encoder_hidden_states(3, torch.tensor([False, False, False]))
    assert prompt.shape == (3, 3, 8) and prompt.stride(0) == 0
    mixed = prior.encoder_hidden_states(3, torch.tensor([False, True, False]))
    assert torch.equal(mixed[::2], prompt[::2]) and torch.equal(mixed[1:2], prior.text["null"])


def test_parts_that_do_not_belong_together_are_refused(prior) -> None:
    with pytest.raises(UserError, match="prompt embeddings"):
        DiffusionPrior(prior.first_stage, prior.unet, prior.scheduler, {"prompt": torch.zeros(1, 1, 5)}, 32)
    with pytest.raises(UserError, match="multiple of 8"):
        prior.first_stage.latent_shape(30)
    with pytest.raises(UserError, match="no prior"):
        load_prior("no/such-prior")


def test_shortcut_alone_is_principal_component_coding() -> None:
    images = torch.rand(24, 3, 16, 16).cumsum(3).div(16)
    stage = tiny_first_stage(shortcut=True)
    stage.shortcut.fit(images)
    again = stage.decode(stage.encode(images), clamp=False)
    patches = torch.nn.functional.pixel_unshuffle(images * 2 - 1, 8).permute(0, 2, 3, 1).reshape(-1, 192).double()
    centred = patches - patches.mean(0)
    _, _, components = torch.linalg.svd(centred, full_matrices=False)
    # The mean patch survives only through its projection and one bias a colour, so compare what varies.
    kept = centred @ components[:4].T @ components[:4]
    ours = torch.nn.functional.pixel_unshuffle(again * 2 - 1, 8).permute(0, 2, 3, 1).reshape(-1, 192).double()
    assert torch.allclose(ours - ours.mean(0), kept, atol=1e-3)


@torch.no_grad()
def test_a_shortcut_fitted_to_other_latents_keeps_the_channels_that_suit_and_loses_no_component() -> None:
    images = torch.rand(40, 3, 16, 16).cumsum(3).div(16)
    own, other = tiny_first_stage(shortcut=True), tiny_first_stage(shortcut=True)
    own.shortcut.fit(images)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(3)))[0]
    latents = torch.einsum("kc,nchw->nkhw", rotation, own.distribution(images).mean) + torch.arange(4.0)[:, None, None]
    latents[:, 2] = torch.randn(latents[:, 2].shape)  # no function of the pictures: this channel is free
    other.shortcut.fit_like(images, latents)
    found = other.distribution(images).mean
    assert torch.allclose(found[:, [0, 1, 3]], latents[:, [0, 1, 3]], atol=1e-3)
    # The same principal components, so the same pictures but for the one bias a colour, which cannot hold a patch.
    one, two = (stage.synthesise(stage.distribution(images).mean) for stage in (own, other))
    assert torch.allclose(one - one.mean(0), two - two.mean(0), atol=1e-3)
    columns = found.permute(1, 0, 2, 3).flatten(1)
    assert torch.corrcoef(columns)[2, [0, 1, 3]].abs().max() < 1e-3


def test_large_pictures_are_decoded_one_after_the_other_on_a_cpu_in_float32(monkeypatch) -> None:
    stage, latents = tiny_first_stage(), torch.randn(3, *tiny_first_stage().latent_shape(16), requires_grad=True)
    whole = stage.decode(latents)
    (gradient,) = torch.autograd.grad(whole.square().sum(), latents)
    monkeypatch.setattr("featinv.diffusion.first_stage.LARGE_PIXELS", 16 * 16)
    rows: list[int] = []
    synthesise = stage.synthesise
    monkeypatch.setattr(stage, "synthesise", lambda x: rows.append(len(x)) or synthesise(x))
    found = stage.decode(latents)
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), latents)[0], gradient)
    with torch.autocast("cpu", torch.bfloat16):
        stage.decode(latents)
    assert rows == [1, 1, 1, 3]
    assert stage.decode(latents[:0]).shape == (0, 3, 16, 16)


def test_latents_are_normalised() -> None:
    stage, images = tiny_first_stage(), torch.rand(16, 3, 32, 32)
    normalise_latents(stage, images)
    latents = stage.encode(images)
    assert float(latents.mean()) == pytest.approx(0, abs=1e-3) and float(latents.std()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_an_open_gate_predicts_the_estimate_and_a_closed_one_nothing(kind: str) -> None:
    scheduler = DDPMScheduler(prediction_type=kind)
    gate = EstimateGate(scheduler, channels=4)
    noisy, model_pred, estimate = (torch.randn(3, 4, 2, 2) for _ in range(3))
    timesteps = torch.tensor([0, 437, 999])
    assert torch.equal(gate(model_pred, noisy, timesteps, estimate), model_pred)
    with torch.no_grad():
        gate.values.fill_(1 / gate.SPEED)
    alphas = scheduler.alphas_cumprod[timesteps]
    moved = clean_latents(noisy, gate(model_pred, noisy, timesteps, estimate), alphas, kind)
    before = clean_latents(noisy, model_pred, alphas, kind)
    share = (1 - scheduler.alphas_cumprod[timesteps]).view(-1, 1, 1, 1)  # how far an open gate goes: the noise's share
    assert torch.allclose(moved, before + share * (estimate - before), rtol=1e-3, atol=1e-3)
    estimate[1] = torch.nan
    again = gate(model_pred, noisy, timesteps, estimate)
    assert torch.equal(again[1], model_pred[1]) and again.isfinite().all()


def test_a_gate_learns_within_a_few_hundred_steps(prior) -> None:
    gate = EstimateGate(prior.scheduler, channels=4)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=1e-3)
    loss = DiffusionLoss(prior.scheduler)
    for step in range(300):
        latents = torch.randn(16, 4, 2, 2)
        noise, _ = loss.draw(latents, range(step * 16, step * 16 + 16))
        timesteps = torch.full((16,), 999)
        value = loss(lambda x, t, y=latents: gate(torch.zeros_like(x), x, t, y), latents, noise, timesteps)[0].mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert 0.8 < float(gate.SPEED * gate.values[-1].mean()) < 1.2
