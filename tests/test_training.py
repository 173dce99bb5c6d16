import math
import tarfile
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_BACKBONE, save_tiny, tiny_config, tiny_first_stage, tiny_prior
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch.utils.data import IterableDataset

from featinv.backbones import load_backbone
from featinv.checkpoint import load_checkpoint, save_checkpoint
from featinv.conditioning.encoders import SpatialEncoder
from featinv.config import CONFIG_ROOT, load_config
from featinv.data.folders import FlatFolder
from featinv.data.scenes import ScenesDataset
from featinv.errors import UserError
from featinv.files import load_safetensors
from featinv.inverters.diffusion import DiffusionInverter
from featinv.training.batches import BatchedRows, Epochs
from featinv.training.cache import build_cache
from featinv.training.consistency import (
    EstimateConsistency,
    SampleConsistency,
    _log_power,
    _moved,
    _statistics_distance,
)
from featinv.training.module import InversionModule
from featinv.training.prior_modules import FirstStageModule, PriorModule
from featinv.training.rows import held_out_images, keep_config, on_device, prepare, training_rows
from featinv.training.runner import SafetensorsCheckpointIO, fit, last_checkpoint
from featinv.training.teacher import EmbeddingTeacher
from tools.train_prior import check_order, train_first_stage, write_prior
from train import train


def _module(backbone, max_steps: int = 6, **settings) -> InversionModule:
    torch.manual_seed(5)
    prior = tiny_prior()
    encoder = SpatialEncoder(backbone.spec, prior.latent_shape, 16, components=16, hidden=16, blocks=1)
    inverter = DiffusionInverter(prior, encoder)
    return InversionModule(inverter, backbone, max_steps=max_steps, warmup_steps=2, **settings)


@pytest.fixture
def cache(tmp_path, backbone):
    return build_cache(tmp_path / "cache", {}, ScenesDataset(12, size=32), tiny_prior().first_stage, backbone, 4)


def test_a_cache_keeps_the_crops_and_flips_of_as_many_epochs_as_are_asked(tmp_path, backbone) -> None:
    for name, color in (("a", (200, 40, 10)), ("b", (0, 90, 220))):
        image = Image.new("RGB", (40, 40), color)
        image.paste((255, 255, 255), (0, 0, 12, 25))
        image.save(tmp_path / f"{name}.png")
    images = FlatFolder(tmp_path, size=32, augment=True)
    cached = build_cache(tmp_path / "cache", {}, Epochs(images, 3), None, backbone)[range(6)]["image"]
    for epoch in range(3):
        images.set_epoch(epoch)
        drawn = torch.stack([images[0]["image"], images[1]["image"]])
        assert (cached[2 * epoch : 2 * epoch + 2] - drawn).abs().max() <= 0.5 / 255 + 1e-6
    assert (cached[0] - cached[2]).abs().max() > 0.1 < (cached[2] - cached[4]).abs().max()
    with pytest.raises(UserError, match="cache_epochs must be at least 1"):
        Epochs(images, 0)


class _Killed(Exception):
    pass


def _dies_at(module: InversionModule, step: int) -> InversionModule:
    whole = module.training_step

    def training_step(batch, batch_idx):
        if module.global_step == step:
            raise _Killed
        return whole(batch, batch_idx)

    module.training_step = training_step
    return module


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, backbone, cache) -> None:
    settings = {"max_steps": 6, "batch_size": 4, "checkpoint_every": 2, "progress": False, "precision": "fp32"}
    whole = _module(backbone, feature_noise=0.1)
    fit(whole, cache, tmp_path / "whole", **settings)
    with pytest.raises(_Killed):
        fit(_dies_at(_module(backbone, feature_noise=0.1), 5), cache, tmp_path / "cut", **settings)
    assert last_checkpoint(tmp_path / "cut") is not None
    resumed = _module(backbone, feature_noise=0.1)
    fit(resumed, cache, tmp_path / "cut", **settings)
    assert resumed.global_step == whole.global_step == 6
    for name, value in whole.inverter.trainable_state().items():
        assert torch.equal(value, resumed.inverter.trainable_state()[name]), name
    for name, value in whole.ema.averages.items():
        assert torch.equal(value, resumed.ema.averages[name]), name


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(tmp_path, backbone, cache) -> None:
    settings = {"batch_size": 4, "checkpoint_every": 2, "progress": False, "precision": "fp32"}
    fit(_module(backbone), cache, tmp_path / "run", max_steps=6, **settings)
    last = tmp_path / "run/last.safetensors"
    assert last_checkpoint(tmp_path / "run") == last
    last.write_bytes(last.read_bytes()[:2000])
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run/previous.safetensors"
    (tmp_path / "run/previous.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no whole checkpoint"):
        last_checkpoint(tmp_path / "run")


def test_a_checkpoint_holds_no_frozen_weight(tmp_path, backbone, cache) -> None:
    from featinv.checkpoint import load_checkpoint

    fit(_module(backbone, 2), cache, tmp_path / "run", max_steps=2, batch_size=4, progress=False, precision="fp32")
    checkpoint = load_checkpoint(tmp_path / "run/last.safetensors")
    assert checkpoint["state_dict"] and not any(k.startswith(("prior.", "_backbone")) for k in checkpoint["state_dict"])


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, backbone, cache) -> None:
    module = _module(backbone)
    with torch.no_grad():
        module.inverter.encoder.latents_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"the loss is nan at step 0.*--changed"):
        fit(module, cache, tmp_path / "run", max_steps=2, batch_size=4, progress=False, precision="fp32")
    (kept,) = (tmp_path / "run").glob("nonfinite_*.safetensors")
    tensors, _ = load_safetensors(kept)
    assert len(tensors["features"]) == len(tensors["latents"]) == len(tensors["seeds"]) == 4


def test_a_run_goes_on_with_the_configuration_it_began_with(tmp_path, backbone, cache) -> None:
    config = OmegaConf.create({"prior": "a", "training": {"max_steps": 2, "num_workers": 0}})
    keep_config(config, tmp_path)
    keep_config(OmegaConf.merge(config, {"prior": "b"}), tmp_path)  # nothing is trained yet
    fit(_module(backbone, 2), cache, tmp_path, max_steps=2, batch_size=4, progress=False, precision="fp32")
    keep_config(OmegaConf.merge(config, {"prior": "b", "training": {"num_workers": 3}}), tmp_path)
    other = OmegaConf.merge(config, {"prior": "c", "more": 1})
    with pytest.raises(UserError, match=r"prior: b -> c; more: \(absent\) -> 1"):
        keep_config(other, tmp_path)
    keep_config(other, tmp_path, changed=True)
    assert OmegaConf.load(tmp_path / "config.yaml").prior == "c"
    with pytest.raises(UserError, match="accumulate .* cannot change within a run: .* training.start="):
        keep_config(OmegaConf.merge(other, {"training": {"accumulate": 4}}), tmp_path, changed=True)


def test_a_run_of_several_stages_has_begun_with_the_first_of_them(tmp_path, backbone, cache) -> None:
    config = OmegaConf.create({"start": None})
    keep_config(config, tmp_path, stages=["one", "two"])
    fit(_module(backbone, 1), cache, tmp_path / "two", max_steps=1, batch_size=4, progress=False, precision="fp32")
    keep_config(config, tmp_path, stages=["one", "two"])
    with pytest.raises(UserError, match="start: None -> scenes64"):
        keep_config(OmegaConf.create({"start": "scenes64"}), tmp_path, stages=["one", "two"])


def _experiment(tmp_path, *words: str) -> DictConfig:
    """scenes64 with a tiny prior, backbone and data set."""
    tiny_prior().save_pretrained(tmp_path / "prior")
    config = load_config("scenes64", [f"prior={tmp_path / 'prior'}", *words])
    config.backbone = {"target": "featinv.backbones.timm_backbone.TimmBackbone", "params": TINY_BACKBONE}
    if "params" in config.conditioning and "components" in config.conditioning.params:
        config.conditioning.params |= {"components": 16, "hidden": 16, "blocks": 1}
    for part in ("train", "val"):
        config.data.params[part].params |= {"length": 4, "size": config.data.params[part].params.size // 2}
    config.training |= {"cache_root": str(tmp_path / "cache"), "max_steps": 1, "batch_size": 2, "probe_every": 1}
    return config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inverter=upconv"], "consistency needs an inverter that samples by diffusion.*consistency=null"),
        (
            ["inverter=upconv", "training.module.params.consistency=null", "training.module.params.estimate_steps=1"],
            "UpconvInverter estimates no latents; leave estimate_steps at 0",
        ),
        (["inverter=retrieval"], "RetrievalInverter has nothing to train"),
        (["inverter=optimisation"], "OptimizationInverter has nothing to train"),
        (["training.probe_images=0"], "probe_images must be at least 1, not 0"),
        (["data.params.train.params.size=128"], "pictures of 64 px, the inverter draws 32"),
    ],
)
def test_settings_that_cannot_work_are_named_before_anything_is_computed(tmp_path, words, message) -> None:
    with pytest.raises(UserError, match=message):
        train(_experiment(tmp_path, *words), tmp_path / "run")
    assert not (tmp_path / "cache").exists()


def test_the_size_of_a_picture_is_looked_at_where_no_setting_says_it(tmp_path, backbone) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    config = _experiment(tmp_path)
    config.data.params.train = {"target": "test_training.whole_pictures", "params": {"folder": str(tmp_path)}}
    with pytest.raises(UserError, match="pictures of 64 px, the inverter draws 32"):
        training_rows(config, _module(backbone), tmp_path)


def test_a_cache_is_of_the_weights_and_the_latent_scale_that_made_it(tmp_path, backbone) -> None:
    config = _experiment(tmp_path)
    config.training.cache, config.training.cache_root = True, str(tmp_path / "cache")

    module = _module(backbone)
    first = training_rows(config, module, tmp_path).folder
    assert training_rows(config, _module(backbone), tmp_path).folder == first
    other = load_backbone(**TINY_BACKBONE)
    next(other.parameters()).data.mul_(2)  # as if its file had been replaced
    rows = training_rows(config, _module(other), tmp_path)
    assert rows.folder != first
    expected = other(ScenesDataset(**config.data.params.train.params)[0]["image"][None])
    assert torch.allclose(rows[[0]]["features"], expected, atol=2e-3 * float(expected.abs().max()))
    module.inverter.prior.first_stage.vae.register_to_config(scaling_factor=0.5)
    assert training_rows(config, module, tmp_path).folder != first


def test_training_images_may_be_named_by_a_folder_alone(tmp_path, backbone) -> None:
    for name in ("a", "b", "c"):
        Image.new("RGB", (32, 32), "red").save(tmp_path / f"{name}.png")
    config = _experiment(tmp_path)
    config.training.cache, config.training.cache_root = True, str(tmp_path / "cache")
    config.data.params.train = str(tmp_path)
    module = _module(backbone)
    with pytest.raises(UserError, match=r"the inverter draws 32: .*\{target, params\} in the place of a path"):
        training_rows(config, module, tmp_path)
    module.inverter.size = FlatFolder(tmp_path)[0]["image"].shape[-1]
    assert len(training_rows(config, module, tmp_path)) == 3


def test_a_stream_is_trained_on_uncached_with_a_word_and_not_held_out(tmp_path, backbone, caplog) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        Image.new("RGB", (32, 32), "red").save(tmp_path / "a.jpg")
        shard.add(tmp_path / "a.jpg", "a.jpg")
    node = {"target": "featinv.data.shards.WebDatasetShards", "params": {"urls": str(tmp_path / "a.tar"), "size": 32}}
    config = _experiment(tmp_path)
    config.data.params.train = config.data.params.val = node
    config.training.cache = True
    assert isinstance(training_rows(config, _module(backbone), tmp_path), IterableDataset)
    assert "streamed images are not cached" in caplog.text
    with pytest.raises(UserError, match="val is a stream"):
        held_out_images(config, 1)


def whole_pictures(folder: str) -> FlatFolder:
    return FlatFolder(folder, size=64)


def test_a_run_without_warm_up_begins_at_its_peak(backbone) -> None:
    module = _module(backbone)
    module.warmup_steps = 0
    prior = PriorModule(tiny_prior(), learning_rate=1e-3, warmup_steps=0)
    for part in (module, prior):
        configured = part.configure_optimizers()
        assert configured["optimizer"].param_groups[0]["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize(("linear", "calls"), [(False, 0), (True, 1)])
def test_latents_are_computed_only_for_an_encoder_that_asks_for_them(tmp_path, backbone, linear, calls) -> None:
    module, encoded = _module(backbone), []
    prior = module.inverter.prior
    module.inverter.encoder = SpatialEncoder(backbone.spec, prior.latent_shape, 16, 16, 16, 1, linear=linear)
    whole = prior.first_stage.encode
    prior.first_stage.encode = lambda images: encoded.append(len(images)) or whole(images)
    prepare(module, BatchedRows(ScenesDataset(6, size=32)), 4, tmp_path)
    assert encoded == [4] * calls and module.inverter.encoder.whitening.fitted
    if linear:
        assert module.inverter.encoder.linear.weight.abs().sum() > 0


def test_rows_are_prepared_on_the_device_and_training_finds_all_where_it_was(tmp_path, backbone, monkeypatch) -> None:
    module, moves = _module(backbone), []
    parts = {"backbone": backbone, "first stage": module.inverter.prior.first_stage}
    for name, part in parts.items():
        monkeypatch.setattr(part, "to", lambda device, name=name: moves.append((name, device)))
    device = torch.device("meta")
    with on_device(module, device):
        assert moves == [(name, device) for name in parts]
    assert moves[2:] == [(name, torch.device("cpu")) for name in parts]


@pytest.mark.parametrize(
    "term", [EstimateConsistency(rows=2, max_timestep=1.0), SampleConsistency(rows=2), SampleConsistency(grad_steps=2)]
)
def test_consistency_terms_reach_the_branch(backbone, term) -> None:
    module = _module(backbone, consistency=term)
    for block in module.inverter.branch.controlnet_down_blocks:
        torch.nn.init.normal_(block.weight, std=0.1)
    latents, features = torch.randn(2, 4, 4, 4), torch.rand(2, 512, 2, 2)
    losses = module.inverter.training_losses(None, features, seeds=[1, 2], latents=latents)
    term(module.inverter, backbone, losses, features, [1, 2]).backward()
    gradient = module.inverter.branch.controlnet_down_blocks[0].weight.grad
    assert gradient is not None and gradient.abs().sum() > 0
    assert all(p.grad is None for p in module.inverter.prior.parameters())


def test_sample_consistency_judges_what_invert_draws(backbone) -> None:
    module = _module(backbone)
    features = torch.rand(3, 512, 2, 2)
    images = module.inverter.invert(features, seeds=[1, 2, 3])
    cosine = torch.nn.functional.cosine_similarity(backbone(images).flatten(1), features.flatten(1))
    distance = SampleConsistency(rows=3)(module.inverter, backbone, {}, features, [1, 2, 3])
    assert float(distance) == pytest.approx(1 - float(cosine.mean()), abs=1e-5)


def test_consistency_in_earlier_layers_adds_their_weighted_distances(backbone) -> None:
    module, images = _module(backbone), torch.rand(3, 3, 16, 16)
    features, seeds = backbone(images), [1, 2, 3]
    drawn = module.inverter.invert(features, seeds=seeds)
    expected = 1 - torch.nn.functional.cosine_similarity(backbone(drawn).flatten(1), features.flatten(1)).mean()
    for layer, weight in (("layer1", 0.25), ("layer3", 2.0)):
        cut = backbone.at(layer)
        cosine = torch.nn.functional.cosine_similarity(cut(drawn).flatten(1), cut(images).flatten(1))
        expected = expected + weight * (1 - cosine.mean())
    term = SampleConsistency(rows=3, earlier={"layer1": 0.25, "layer3": 2.0})
    found = term(module.inverter, backbone, {"images": images}, features, seeds)
    assert float(found.detach()) == pytest.approx(float(expected), abs=1e-4)


def test_consistency_in_the_last_map_adds_its_own_distance() -> None:
    images = torch.rand(3, 3, 32, 32)
    early = load_backbone("resnet18", layer="layer2", pretrained=False, input_size=32)
    module = _module(early)
    features = early(images)
    term = SampleConsistency(rows=3, last_weight=0.5)
    drawn = module.inverter.invert(features, seeds=[1, 2, 3])
    cosines = [
        torch.nn.functional.cosine_similarity(b(drawn).flatten(1), b(images).flatten(1)).mean()
        for b in (early, early.at("final"))
    ]
    expected = 1 - float(cosines[0]) + 0.5 * (1 - float(cosines[1]))
    assert float(term(module.inverter, early, {}, features, [1, 2, 3])) == pytest.approx(expected, abs=1e-4)


def test_the_first_steps_may_train_the_estimate_alone(backbone) -> None:
    module = _module(backbone, estimate_steps=1)
    batch = {"latents": torch.randn(2, 4, 4, 4), "features": torch.rand(2, 512, 2, 2)}
    loss = module.training_step(batch, 0)
    expected = (module.inverter.encoder(batch["features"])[1] - batch["latents"]).square().mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()))
    loss.backward()
    assert module.inverter.encoder.latents_head.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in module.inverter.branch.parameters())
    module.estimate_steps = 0
    module.training_step(batch, 0).backward()
    assert any(p.grad is not None for p in module.inverter.branch.parameters())


def test_a_teacher_gives_the_embedding_of_its_own_layer(tmp_path, backbone) -> None:
    tiny_prior().save_pretrained(tmp_path / "prior")
    taught = save_tiny(tmp_path / "run" / "inverter.safetensors", tiny_config(tmp_path / "prior"), backbone)
    teacher, images = EmbeddingTeacher(tmp_path / "run"), torch.rand(2, 3, 32, 32)
    teacher.backbone = backbone  # its own has other random weights
    wanted = taught.encoder(backbone(images))[0]
    torch.testing.assert_close(teacher(images), wanted, atol=1e-4, rtol=1e-3)
    module = _module(backbone, estimate_steps=1, teacher=teacher)
    batch = {"image": images, "features": backbone(images), "latents": torch.randn(2, 4, 4, 4)}
    module.inverter.encoder.load_state_dict(taught.encoder.state_dict())
    alone = _module(backbone, estimate_steps=1)
    alone.inverter.encoder.load_state_dict(taught.encoder.state_dict())
    assert float(module.training_step(batch, 0)) == pytest.approx(float(alone.training_step(batch, 0)), abs=1e-4)
    with torch.no_grad():
        module.inverter.encoder.embedding_head.weight.mul_(0)
        module.inverter.encoder.embedding_head.bias.zero_()
    error = float(wanted.square().mean() / wanted.var())
    assert float(module.training_step(batch, 0) - alone.training_step(batch, 0)) == pytest.approx(error, rel=1e-2)
    with pytest.raises(UserError, match="cache=false"):
        module.training_step({k: v for k, v in batch.items() if k != "image"}, 0)


def test_jitter_judges_both_pictures_moved_alike() -> None:
    backbone = load_backbone("resnet18", layer="layer1", pretrained=False, input_size=32)
    module, images = _module(backbone), torch.rand(3, 3, 32, 32)
    features, term = backbone(images), SampleConsistency(rows=3, jitter=5)
    shifts = {seed: term._shift(seed) for seed in range(40)}
    assert 10 < sum(shift == (0, 0) for shift in shifts.values()) < 30
    assert all(max(map(abs, shift)) <= 5 for shift in shifts.values())
    seed = next(seed for seed, (down, right) in shifts.items() if down > 0 > right)
    down, right = shifts[seed]
    seeds = [seed, 1, 2]
    drawn = module.inverter.invert(features, seeds=seeds)
    inside = (slice(None), slice(None), slice(down, None), slice(None, right))
    for image in (drawn, images):  # moved: what was at (y, x) is at (y + down, x + right)
        moved = _moved(image, [(down, right)] * 3)
        assert torch.equal(moved[inside], image[:, :, : 32 - down, -right:])
    judged = [_moved(x, [shifts[s] for s in seeds]) for x in (drawn, images)]
    cosine = torch.nn.functional.cosine_similarity(*(backbone(x).flatten(1) for x in judged))
    found = term(module.inverter, backbone, {"images": images}, features, seeds)
    assert float(found) == pytest.approx(1 - float(cosine.mean()), abs=1e-4)
    alone = [
        float(term(module.inverter, backbone, {"images": images[i : i + 1]}, features[i : i + 1], [s]))
        for i, s in enumerate(seeds)
    ]
    assert float(found) == pytest.approx(sum(alone) / 3, abs=1e-4)  # no picture's move depends on its neighbours


def test_statistics_see_what_all_pictures_lack_and_not_where_things_are(backbone) -> None:
    module, images = _module(backbone), torch.rand(4, 3, 32, 32)
    features, seeds = backbone(images), [1, 2, 3, 4]
    term = SampleConsistency(rows=4, statistics={"layer1": 30.0})
    drawn = module.inverter.invert(features, seeds=seeds)
    found = float(term(module.inverter, backbone, {"images": images}, features, seeds))
    plain = float(SampleConsistency(rows=4)(module.inverter, backbone, {"images": images}, features, seeds))
    maps = [backbone.at("layer1")(x).double() for x in (drawn, images)]
    expected = 0.0
    for c in range(64):
        scale = max(maps[1][:, c].std(), 0.01 * maps[1].transpose(0, 1).flatten(1).std(1).mean())
        for statistic in (torch.mean, lambda x: x.std(correction=0)):
            values = [sum(statistic(x[i, c]) for i in range(4)) / 4 for x in maps]
            expected += float((values[0] - values[1]) / scale) ** 2 / 128
    assert found - plain == pytest.approx(30 * expected, rel=1e-2)

    wanted = torch.randn(6, 5, 8, 8)
    assert float(_statistics_distance(wanted.flip(0).roll(3, 3), wanted)) < 1e-10
    assert float(_statistics_distance(0.9 * wanted, wanted)) == pytest.approx(0.005, rel=0.05)
    noise = torch.randn(600, 5, 8, 8)  # what differs from picture to picture cancels
    assert float(_statistics_distance(noise, torch.randn(600, 5, 8, 8))) < 1e-4


def test_spectra_tell_grain_and_contrast_but_not_places(backbone) -> None:
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    smooth = (0.5 + 0.2 * torch.sin(2 * torch.pi * (x + 2 * y) / 32)).expand(1, 3, 32, 32)
    own = _log_power(smooth)
    torch.testing.assert_close(_log_power(smooth.roll((3, 5), (2, 3)) + 0.1), own, atol=1e-3, rtol=1e-3)
    grain = 0.1 * torch.cos(2 * torch.pi * x / 4)  # one frequency, 8 of 32: its band is the third to the right
    rise = _log_power(smooth + grain) - own
    assert rise[0, 0, 0, 2] > 3 and rise.flatten(2).sum(2).allclose(rise[..., 0, 2], atol=0.01)
    half = _log_power((smooth - 0.5) / 2)  # a quarter of the power in the band that holds it
    assert float((own - half).max()) == pytest.approx(math.log(4), abs=0.01)
    module, images = _module(backbone), torch.rand(2, 3, 32, 32)
    features, losses = backbone(images), {"images": images}
    drawn = module.inverter.invert(features, seeds=[1, 2])
    plain, with_spectra = (
        float(SampleConsistency(spectrum_weight=weight)(module.inverter, backbone, losses, features, [1, 2]))
        for weight in (0.0, 0.5)
    )
    expected = 0.5 * float((_log_power(drawn) - _log_power(images)).square().mean())
    assert with_spectra - plain == pytest.approx(expected, rel=1e-4)


class _Latents:
    def __len__(self) -> int:
        return 8

    def __getitem__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return {"latents": torch.ones(len(rows), 4, 4, 4)}


def test_a_resumed_prior_keeps_the_first_stage_it_is_given(tmp_path) -> None:
    def trained(max_steps: int, brighter: float) -> torch.Tensor:
        prior = tiny_prior()
        with torch.no_grad():
            prior.first_stage.vae.decoder.conv_out.bias.fill_(brighter)
        fit(PriorModule(prior), _Latents(), tmp_path, max_steps=max_steps, batch_size=2, progress=False)  # type: ignore[arg-type]
        return prior.first_stage.vae.decoder.conv_out.bias

    trained(1, 0.25)
    assert (trained(2, 0.5) == 0.5).all(), "its decoder was trained on meanwhile"
    assert all(name.startswith("prior.unet.") for name in load_checkpoint(tmp_path / "last.safetensors")["state_dict"])


def test_a_first_stages_backbone_comes_back_from_lightnings_device(tmp_path, backbone, monkeypatch) -> None:
    moves: list[torch.device] = []
    monkeypatch.setattr(backbone, "to", lambda device: moves.append(torch.device(device)) or backbone)
    module = FirstStageModule(tiny_first_stage(), backbone, max_steps=1, warmup_steps=0)
    images = BatchedRows(ScenesDataset(4, size=32))
    monkeypatch.setattr(type(module), "device", torch.device("cpu", 0))
    fit(module, images, tmp_path, max_steps=1, batch_size=2, progress=False, precision="fp32", accelerator="cpu")
    assert moves == [torch.device("cpu", 0), torch.device("cpu")]


def test_the_first_process_alone_writes_a_prior(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    write_prior(tiny_prior(), tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("RANK", "0")
    write_prior(tiny_prior(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prior", "samples.png"]


def _settings(module) -> list[tuple[float, float]]:
    optimizer = module.trainer.optimizers[0]
    return [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]


def test_a_resumed_run_goes_on_at_a_changed_rate_and_weight_decay(tmp_path, backbone, cache) -> None:
    settings = {"batch_size": 4, "progress": False, "precision": "fp32"}
    fit(_module(backbone, learning_rate=1e-3), cache, tmp_path, max_steps=3, **settings)
    module, used = _module(backbone, learning_rate=1e-4, weight_decay=0.5), []
    step = module.optimizer_step
    module.optimizer_step = lambda *args, **kwargs: used.append(_settings(module)[0]) or step(*args, **kwargs)
    fit(module, cache, tmp_path, max_steps=5, **settings)
    whole = _module(backbone, learning_rate=1e-4).configure_optimizers()["lr_scheduler"]["scheduler"]
    expected = [1e-4 * whole.lr_lambdas[0](step) for step in (3, 4)]
    assert [rate for rate, _ in used] == expected and [decay for _, decay in used] == [0.5, 0.5]


def test_a_resumed_first_stage_goes_on_at_the_changed_rate_of_each_part(tmp_path) -> None:
    def trained(max_steps: int, rate: float) -> FirstStageModule:
        module = FirstStageModule(tiny_first_stage(shortcut=True), None, 4, learning_rate=rate, warmup_steps=0)
        rows = BatchedRows(ScenesDataset(4, size=32))
        fit(module, rows, tmp_path, max_steps=max_steps, batch_size=2, progress=False, precision="fp32")  # type: ignore[arg-type]
        return module

    trained(1, 1e-3)
    rates = [rate for rate, _ in _settings(trained(2, 1e-4))]
    factor = 0.02 + 0.98 * 0.5  # half way
    assert rates == pytest.approx([1e-4 * factor, 5e-6 * factor])


def test_a_resumed_run_saves_no_half_of_an_accumulated_step(tmp_path, backbone, cache, monkeypatch) -> None:
    settings = {"batch_size": 2, "accumulate": 2, "checkpoint_every": 2, "progress": False, "precision": "fp32"}
    fit(_module(backbone), cache, tmp_path, max_steps=2, **settings)
    saved, save = [], SafetensorsCheckpointIO.save_checkpoint

    def saving(self, checkpoint, path, storage_options=None) -> None:
        saved.append(checkpoint["global_step"])
        save(self, checkpoint, path)

    monkeypatch.setattr(SafetensorsCheckpointIO, "save_checkpoint", saving)
    fit(_module(backbone), cache, tmp_path, max_steps=4, **settings)
    assert set(saved) == {4}


def test_a_run_does_not_go_on_with_another_prior(tmp_path, backbone, cache) -> None:
    settings = {"batch_size": 4, "progress": False, "precision": "fp32"}
    fit(_module(backbone, described={"prior": "a"}), cache, tmp_path, max_steps=1, **settings)
    with pytest.raises(UserError, match="begun with another prior"):
        fit(_module(backbone, described={"prior": "b"}), cache, tmp_path, max_steps=2, **settings)
    fit(_module(backbone, described={"prior": "a"}), cache, tmp_path, max_steps=2, **settings)


@pytest.mark.parametrize(
    ("stage", "max_steps", "undone"),
    [
        ("module", 5, ["decoder", "unet"]),
        ("finishing", 5, ["decoder"]),
        ("polish", 9, []),
        ("module", 3, []),  # has no steps to go
    ],
)
def test_a_stage_is_not_trained_on_under_those_that_came_after_it(tmp_path, stage, max_steps, undone) -> None:
    config = load_config(CONFIG_ROOT / "prior" / "scenes64.yaml")
    check_order(config, tmp_path, stage, max_steps)
    for folder in ("first_stage", "decoder", "unet"):
        save_checkpoint(tmp_path / folder / "last.safetensors", {"global_step": 3})
    if undone:
        folders = " and ".join(str(tmp_path / name) for name in undone)
        with pytest.raises(UserError, match=f"first_stage.{stage} has steps to go.*delete {folders}, or"):
            check_order(config, tmp_path, stage, max_steps)
        config.first_stage.polish = config.unet.module = None  # then nobody reads their checkpoints
    check_order(config, tmp_path, stage, max_steps)


def test_train_prior_looks_at_the_order_of_its_stages_before_it_trains_any(tmp_path, backbone, monkeypatch) -> None:
    config = load_config(CONFIG_ROOT / "prior" / "scenes64.yaml")
    save_checkpoint(tmp_path / "finish" / "last.safetensors", {"global_step": 3})
    monkeypatch.setattr("tools.train_prior.instantiate", lambda *_, **__: SimpleNamespace(max_steps=5))
    monkeypatch.setattr("tools.train_prior.new_first_stage", lambda *_: tiny_first_stage())
    images = BatchedRows(ScenesDataset(2, size=32))
    with pytest.raises(UserError, match="first_stage.module has steps to go"):
        train_first_stage(config, images, torch.rand(2, 3, 32, 32), tmp_path)  # type: ignore[arg-type]
