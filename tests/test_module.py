"""The training module: gradients and weights that are no numbers, checkpoints that do not fit, settings, judgements."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_first_stage, tiny_prior, wake
from test_training import _module

from featinv.checkpoint import load_checkpoint
from featinv.conditioning.dropout import ConditionDropout
from featinv.conditioning.encoders import SpatialEncoder
from featinv.config import load_config
from featinv.data.scenes import ScenesDataset
from featinv.errors import UserError
from featinv.files import load_safetensors
from featinv.inverters.diffusion import DiffusionInverter
from featinv.training.adversary import Adversary
from featinv.training.batches import BatchedRows
from featinv.training.cache import build_cache
from featinv.training.consistency import EstimateConsistency, SampleConsistency
from featinv.training.module import InversionModule, sample_seeds
from featinv.training.prior_modules import FirstStageModule
from featinv.training.probe import FeatureProbe
from featinv.training.runner import fit

SHORT = {"batch_size": 4, "checkpoint_every": 1, "progress": False, "precision": "fp32", "accelerator": "cpu"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory, backbone):
    folder, scenes = tmp_path_factory.mktemp("cache"), ScenesDataset(12, size=32)
    return build_cache(folder, {}, scenes, tiny_first_stage(), backbone, 4)


def _with_an_infinite_gradient_at(module, step: int, weight: torch.Tensor):
    clip = module.configure_gradient_clipping

    def configure_gradient_clipping(*args, **kwargs) -> None:
        if module.global_step == step:
            weight.grad.view(-1)[0] = math.inf
        clip(*args, **kwargs)

    module.configure_gradient_clipping = configure_gradient_clipping
    return module


def _assert_finite_at(folder: Path, step: int) -> None:
    tree = load_checkpoint(folder / "last.safetensors")
    assert tree["global_step"] == step
    for name, value in (tree["state_dict"] | tree["ema"]["averages"]).items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_an_infinite_gradient_stops_the_run_before_it_reaches_a_weight(
    tmp_path, backbone, cache, max_grad_norm
) -> None:
    module = _module(backbone, max_grad_norm=max_grad_norm)
    weight = module.inverter.encoder.mix[0].weight
    _with_an_infinite_gradient_at(module, 1, weight)
    with pytest.raises(UserError, match=r"the norm of the gradients is inf at step 1; its batch .*--changed"):
        fit(module, cache, tmp_path, max_steps=2, accumulate=2, **SHORT)
    _assert_finite_at(tmp_path, 1)
    assert weight.isfinite().all() and all(value.isfinite().all() for value in module.ema.averages.values())
    (kept,) = tmp_path.glob("nonfinite_*.safetensors")
    tensors, _ = load_safetensors(kept)  # of both batches of the step, and of no other
    assert tensors["seeds"].tolist() == sample_seeds(0, 2, 4) + sample_seeds(0, 3, 4)
    assert len(tensors["features"]) == len(tensors["latents"]) == 8


def test_weights_that_are_no_numbers_are_written_nowhere(tmp_path, backbone, cache) -> None:
    module = _module(backbone)
    step = module.optimizer_step

    def optimizer_step(*args, **kwargs) -> None:
        step(*args, **kwargs)
        if module.global_step == 1:  # nobody looks at a loss after the last step
            module.inverter.encoder.mix[0].weight.data.view(-1)[0] = math.nan

    module.optimizer_step = optimizer_step
    with pytest.raises(UserError, match=r"mix.0.weight is not finite, and is not written"):
        fit(module, cache, tmp_path, max_steps=2, **SHORT)
    _assert_finite_at(tmp_path, 1)
    module.ema = None
    with pytest.raises(UserError, match=r"mix.0.weight is not finite"):
        module.apply_average()


def test_an_infinite_gradient_does_not_reach_a_first_stage(tmp_path) -> None:
    stage = tiny_first_stage()
    weight = stage.vae.decoder.conv_out.weight
    module = _with_an_infinite_gradient_at(FirstStageModule(stage, None, 4, warmup_steps=0), 1, weight)
    with pytest.raises(UserError, match="the norm of the gradients is inf at step 1"):
        fit(module, BatchedRows(ScenesDataset(4, size=32)), tmp_path, max_steps=2, **SHORT | {"batch_size": 2})  # type: ignore[arg-type]
    assert weight.isfinite().all()


def test_a_checkpoint_of_another_width_is_named(tmp_path, backbone, cache) -> None:
    fit(_module(backbone), cache, tmp_path, max_steps=1, **SHORT)
    prior = tiny_prior()
    encoder = SpatialEncoder(backbone.spec, prior.latent_shape, 16, components=16, hidden=32, blocks=1)
    wider = InversionModule(DiffusionInverter(prior, encoder), backbone, warmup_steps=2)
    with pytest.raises(UserError, match="does not fit this inverter; it differs in 'encoder.*Choose another out"):
        fit(wider, cache, tmp_path, max_steps=2, **SHORT)


def test_a_checkpoint_of_another_adversary_is_named(tmp_path, backbone, cache) -> None:
    def module(layer: str) -> InversionModule:
        adversary = Adversary(layers=[layer], width=4)
        return _module(backbone, consistency=SampleConsistency(rows=1, adversary=adversary), consistency_from=9)

    fit(module("layer1"), cache, tmp_path, max_steps=1, **SHORT)
    with pytest.raises(UserError, match="does not fit this adversary"):
        fit(module("layer2"), cache, tmp_path, max_steps=2, **SHORT)


def test_an_average_that_is_switched_on_begins_with_the_trained_weights(tmp_path, backbone, cache) -> None:
    trained = _module(backbone, ema_decay=0.0)
    fit(trained, cache, tmp_path, max_steps=2, **SHORT)
    averaged = _module(backbone, ema_decay=0.999)
    fit(averaged, cache, tmp_path, max_steps=2, **SHORT)  # has no step to go
    for name, value in averaged.apply_average().items():
        assert torch.equal(value, trained.inverter.trainable_state()[name]), name


def _adamw(module: InversionModule) -> tuple[torch.optim.Optimizer, list[float]]:
    """The module's optimizer and its schedule's factors at the first step, in the middle and at the end."""
    configured = module.configure_optimizers()
    (factor,) = configured["lr_scheduler"]["scheduler"].lr_lambdas
    return configured["optimizer"], [factor(step) for step in (0, module.max_steps // 2, module.max_steps)]


def _clipped_norm(module: InversionModule) -> float:
    """The norm of gradients of norm 1000 after clipping."""
    module.log = lambda *_, **__: None
    parameters = list(module.inverter.trainable_parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    parameters[0].grad.view(-1)[0] = 1000.0
    module.configure_gradient_clipping(torch.optim.SGD(parameters))
    return float(torch.stack([p.grad.norm() for p in parameters]).norm())


def test_the_reference_trains_as_the_published_code_does(inverter, backbone) -> None:
    config = load_config("reference")
    settings, params = config.training, config.training.module.params
    module = InversionModule(inverter, backbone, settings.max_steps, **params)
    plain = torch.optim.AdamW(inverter.trainable_parameters(), lr=1e-5)  # all that the published code says
    optimizer, factors = _adamw(module)
    same = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")
    assert {k: optimizer.defaults[k] for k in same} == {k: plain.defaults[k] for k in same} and factors == [1, 1, 1]
    assert _clipped_norm(module) == pytest.approx(1000) and module.ema is None
    assert (settings.precision, settings.batch_size, settings.accumulate) == ("fp32", 8, 1)
    assert params.get("consistency") is None and not params.get("estimate_steps") and not params.get("feature_noise")
    inverter_params = config.inverter.params
    assert (inverter_params.snr_gamma, inverter_params.regression_weight, inverter_params.gated) == (None, 0, False)
    features, text = ConditionDropout(**inverter_params.dropout.params).draw(range(4000))
    assert torch.equal(features, text) and float(features.float().mean()) == pytest.approx(0.15, abs=0.02)


def test_what_is_not_set_is_as_it_was(inverter, backbone) -> None:
    module = InversionModule(inverter, backbone, 1000, warmup_steps=0)
    optimizer, factors = _adamw(module)
    assert optimizer.defaults["betas"] == (0.9, 0.99) and optimizer.defaults["weight_decay"] == 0.01
    assert factors == pytest.approx([1, 0.525, 0.05]) and _clipped_norm(module) == pytest.approx(1, rel=1e-3)


def test_a_resumed_run_goes_on_with_changed_betas(tmp_path, backbone, cache) -> None:
    fit(_module(backbone), cache, tmp_path, max_steps=1, **SHORT)
    module = _module(backbone, betas=[0.8, 0.95])
    fit(module, cache, tmp_path, max_steps=2, **SHORT)
    assert [group["betas"] for group in module.trainer.optimizers[0].param_groups] == [(0.8, 0.95)]


def test_rows_whose_features_were_dropped_are_not_judged_by_them(prior, backbone) -> None:
    def losses(p: float):
        encoder = SpatialEncoder(backbone.spec, prior.latent_shape, 16, components=16, hidden=16, blocks=1)
        inverter = wake(DiffusionInverter(prior, encoder, dropout=ConditionDropout(p, p)))
        return inverter, inverter.training_losses(None, features, seeds=seeds, latents=torch.randn(8, 4, 4, 4))

    features, seeds, term = torch.rand(8, 512, 2, 2), list(range(8)), EstimateConsistency(rows=2, max_timestep=1.0)
    inverter, found = losses(1.0)
    term(inverter, backbone, found, features, seeds).backward()
    assert not inverter.null_embedding.grad.any()

    inverter, found = losses(0.5)
    told = [row for row, dropped in enumerate(inverter.dropout.draw(seeds)[0].tolist()) if not dropped]
    assert 2 < len(told) < 6 and int(found["timesteps"].argmin()) not in told
    rows = sorted(told, key=lambda row: int(found["timesteps"][row]))[:2]  # as many as if none had been dropped
    drawn = prior.first_stage.decode(found["estimate"][rows])
    expected = 1 - F.cosine_similarity(backbone(drawn).flatten(1), features[rows].flatten(1)).mean()
    assert float(term(inverter, backbone, found, features, seeds)) == pytest.approx(float(expected), abs=1e-6)


def test_one_held_out_picture_has_a_cosine_but_no_share_of_a_span(tmp_path, backbone, cache) -> None:
    probe = FeatureProbe(ScenesDataset(1, size=32)[0]["image"][None], backbone, tmp_path, every=1, batch_images=4)
    fit(_module(backbone), cache, tmp_path, max_steps=2, callbacks=[probe], **SHORT)
    lines = [json.loads(line) for line in (tmp_path / "probe.jsonl").read_text().splitlines()]
    assert [(line["share"], line["floor"]) for line in lines] == [(None, None)] * 2
    assert all(-1 <= line["cosine"] <= 1 for line in lines) and (tmp_path / "probe.png").is_file()
