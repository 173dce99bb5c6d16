"""Settings that cannot work are named in one sentence, before anything is built or computed."""

import pytest
import torch
from conftest import tiny_prior
from omegaconf import OmegaConf
from test_training import _experiment, _module

from featinv.conditioning.encoders import PooledEncoder, PublishedEncoder, Whitening
from featinv.config import load_config
from featinv.errors import UserError
from featinv.inverters.diffusion import DiffusionInverter
from featinv.training.module import InversionModule
from featinv.training.prior_modules import FirstStageModule
from featinv.training.settings import check_settings
from train import train


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("max_steps=0", "training.max_steps must be at least 1, not 0"),
        ("max_steps=-1", "training.max_steps must be at least 1, not -1"),
        ("max_steps=1e4", "training.max_steps must be a whole number, not 10000.0"),
        ("max_steps=null", "training.max_steps must be a whole number, not None"),
        ("batch_size=0", "training.batch_size must be at least 1"),
        ("batch_size=true", "training.batch_size must be a whole number, not True"),
        ("accumulate=0", "training.accumulate must be at least 1"),
        ("checkpoint_every=0", "training.checkpoint_every must be at least 1"),
        ("cache_epochs=0", "training.cache_epochs must be at least 1"),
        ("probe_images=0", "training.probe_images must be at least 1"),
        ("probe_every=-1", "training.probe_every must be at least 0"),
        ("num_workers=two", "training.num_workers must be a whole number, not two"),
        ("prepare_images=-5", "training.prepare_images must be at least 0"),
        ("precision=fp16", "precision 'fp16' is not auto, bf16 or fp32"),
        ("devices=3", "batch_size 16 cannot be shared by 3 devices"),
    ],
)
def test_settings_are_looked_at_first(tmp_path, word, message, dry_run) -> None:
    config = load_config("scenes64", [f"training.{word}"])
    config.backbone = config.prior = "is not looked at"
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run", dry_run=dry_run)
    assert not (tmp_path / "run").exists()


def test_the_processes_of_torchrun_count_in_place_of_the_devices(monkeypatch) -> None:
    settings = load_config("scenes64", ["training.devices=3", "training.batch_size=4"]).training
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_settings(settings)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    with pytest.raises(UserError, match="batch_size 4 cannot be shared by 6 devices"):
        check_settings(settings)


@pytest.mark.parametrize(
    "name", ["scenes64", "scenes64_early", "demo", "photos64_direct", "reference", "convnext_base"]
)
def test_settings_that_work_pass(name) -> None:
    check_settings(load_config(name).training)


def test_a_teacher_and_a_cache_exclude_each_other_while_it_teaches() -> None:
    settings = load_config("photos64_direct", ["training.cache=true"]).training
    with pytest.raises(UserError, match="set training.cache=false"):
        check_settings(settings)
    settings.module.params.estimate_steps = 0
    check_settings(settings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["conditioning=published", "training.module.params.estimate_steps=2"],
            "PublishedEncoder estimates no latents; leave estimate_steps at 0",
        ),
        (
            ["inverter=upconv", "training.compile=true", "training.module.params.consistency=null"],
            "UpconvInverter has no UNet to compile",
        ),
    ],
)
def test_parts_that_lack_what_is_asked_of_them_are_named_before_the_cache_is_built(tmp_path, words, message) -> None:
    config = _experiment(tmp_path, *words)
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_grad_norm": 0}, "max_grad_norm must be above 0, or null for no clipping, not 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, not nan"),
        ({"least_rate": 1e-5}, None),
        ({"least_rate": 5}, "least_rate is a share of learning_rate"),
        ({"betas": [0.9, 1.0]}, "betas must be two numbers"),
        ({"betas": [0.9]}, "betas must be two numbers"),
        ({"ema_decay": 1.0}, "ema_decay must lie from 0 to below 1"),
        ({"ema_every": 0}, "ema_every must be at least 1"),
    ],
)
def test_a_module_in_which_nothing_could_be_learned_is_refused(backbone, setting, message) -> None:
    if message is None:
        _module(backbone, **setting)
        return
    with pytest.raises(UserError, match=message):
        _module(backbone, **setting)


@pytest.mark.parametrize("rows", [0, 1])
def test_an_inverter_that_would_draw_no_row_is_refused(rows) -> None:
    with pytest.raises(UserError, match=f"feature_rows, which must be at least 2 then, not {rows}"):
        FirstStageModule(None, None, drawn_by="is not looked at", feature_rows=rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("encoder", [PooledEncoder, PublishedEncoder])
def test_one_picture_is_enough_to_prepare_and_train(backbone, encoder) -> None:
    prior = tiny_prior()
    sizes = {"hidden": 16} | ({"components": 16, "blocks": 1} if encoder is PooledEncoder else {})
    inverter = DiffusionInverter(prior, encoder(backbone.spec, prior.latent_shape, 16, **sizes))
    features, latents = backbone(torch.rand(1, 3, 32, 32)), torch.randn(1, 4, 4, 4)
    inverter.prepare(features, latents)
    loss = InversionModule(inverter, backbone).training_step({"features": features, "latents": latents}, 0)
    assert loss.isfinite()


def test_what_does_not_vary_is_centred_and_not_scaled() -> None:
    vector, whitening = torch.randn(1, 6, 1, 1), Whitening(6, 4)
    whitening.fit(vector)
    assert whitening(vector).abs().max() < 1e-6
    other = torch.randn(1, 6, 1, 1)
    all_directions = Whitening(6, 6)
    all_directions.fit(vector)
    assert float(all_directions(other).norm()) == pytest.approx(float((other - vector).norm()), rel=1e-4)


def test_whole_experiments_may_leave_settings_out() -> None:
    settings = load_config("scenes64").training
    check_settings(OmegaConf.masked_copy(settings, [k for k in settings if k not in ("cache_epochs", "num_workers")]))
