from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import save_tiny, tiny_config, tiny_first_stage, tiny_prior
from forks import in_two_processes
from test_training import _dies_at, _Killed, _module

from featinv.backbones import load_backbone
from featinv.diffusion.first_stage import Finish
from featinv.diffusion.prior import load_prior
from featinv.errors import UserError
from featinv.inverters.build import load_inverter
from featinv.processes import process_rank
from featinv.training.adversary import PIXELS, Adversary
from featinv.training.batches import BatchedRows
from featinv.training.consistency import SampleConsistency
from featinv.training.module import sample_seeds
from featinv.training.prior_modules import FirstStageModule
from featinv.training.runner import fit


@pytest.fixture
def adversary(backbone) -> Adversary:
    adversary = Adversary(layers=[PIXELS, "layer1", "layer2"], width=8, warmup_steps=2)
    adversary.build(backbone)
    return adversary


def test_maps_of_many_layers_are_those_of_each_layer_alone(backbone) -> None:
    images = torch.rand(2, 3, 32, 32)
    for layers in (["layer3", "layer1"], ["final", "layer2", "final"], ["final"], ["layer1", "layer1.0.conv1"]):
        for found, layer in zip(backbone.maps(images, layers), layers, strict=True):
            torch.testing.assert_close(found, backbone.at(layer)(images), atol=1e-5, rtol=1e-4)
    tokens = load_backbone("vit_tiny_patch16_224", pretrained=False, input_size=64)
    for found, layer in zip(tokens.maps(images, ["final", "blocks.3"]), ["final", "blocks.3"], strict=True):
        torch.testing.assert_close(found, tokens.at(layer)(images), atol=1e-4, rtol=1e-3)
    with pytest.raises(UserError, match="layer1"):
        backbone.maps(images, ["layer1", "layre1"])


def test_heads_learn_to_tell_grain_from_smooth_pictures(backbone, adversary) -> None:
    smooth = torch.nn.functional.interpolate(torch.rand(8, 3, 4, 4), size=32, mode="bilinear")
    grain = smooth + 0.05 * torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        maps = [backbone.maps(x, adversary.maps) for x in (grain, smooth)]
    hinges = []
    for _ in range(120):
        adversary.improve(grain, maps[0], smooth, maps[1])
        hinges.append(adversary.hinge)
    assert hinges[0] == pytest.approx(2, abs=0.1) and hinges[-1] < 1.5
    with torch.no_grad():
        for drawn, real in zip(adversary.logits(grain, maps[0]), adversary.logits(smooth, maps[1]), strict=True):
            assert drawn.shape[1] == 1 and float(drawn.mean()) < float(real.mean()) - 0.2


def test_losses_are_the_hinges(backbone, adversary) -> None:
    drawn, real = torch.rand(3, 3, 32, 32), torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        maps = [backbone.maps(x, adversary.maps) for x in (drawn, real)]
        adversary.eval()  # a spectral norm's estimate moves at every look while it trains
        false, true = adversary.logits(drawn, maps[0]), adversary.logits(real, maps[1])
    expected = sum(float(F.relu(1 + f).mean() + F.relu(1 - t).mean()) for f, t in zip(false, true, strict=True)) / 3
    adversary.improve(drawn, maps[0], real, maps[1])
    assert adversary.hinge == pytest.approx(expected, rel=1e-4)
    assert float(adversary(drawn, maps[0], real, maps[1])) == 0  # the last of two steps in which only the heads learn
    judged = adversary(drawn, maps[0], real, maps[1])
    with torch.no_grad():
        expected = -sum(float(s.mean()) for s in adversary.logits(drawn, maps[0])) / 3
    assert adversary.steps == 3 and float(judged) == pytest.approx(expected, rel=1e-4)


def test_the_inverter_is_pulled_and_the_heads_are_not_trained_by_its_loss(backbone, adversary) -> None:
    drawn = torch.rand(2, 3, 32, 32, requires_grad=True)
    real = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        wanted = backbone.maps(real, adversary.maps)
    for _ in range(3):
        adversary.zero_grad()
        loss = adversary(drawn, backbone.maps(drawn, adversary.maps), real, wanted)
    adversary.zero_grad()
    loss.backward()
    assert float(drawn.grad.abs().sum()) > 0
    assert all(p.grad is None and p.requires_grad for p in adversary.parameters())


def test_consistency_adds_the_weighted_judgement(backbone, adversary) -> None:
    module, images = _module(backbone), torch.rand(3, 3, 32, 32)
    features, losses, seeds = backbone(images), {"images": images}, [1, 2, 3]
    plain = SampleConsistency(rows=3)(module.inverter, backbone, losses, features, seeds)
    adversary.steps, adversary.weight = 5, 0.25
    drawn = module.inverter.invert(features, seeds=seeds)
    term = SampleConsistency(rows=3, adversary=adversary)
    found = term(module.inverter, backbone, losses, features, seeds)
    assert adversary.steps == 6
    with torch.no_grad():
        scores = adversary.eval().logits(drawn, backbone.maps(drawn, adversary.maps))
    judged = -float(torch.stack([s.mean() for s in scores]).mean())
    assert float(found - plain) == pytest.approx(0.25 * judged, abs=5e-3)


class _Pictures:
    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> dict[str, object]:
        return {
            "image": torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(row)),
            "label": 0,
            "id": str(row),
        }


def _whole_and_resumed(module, tmp_path) -> list:
    """Two trainings of what `module` makes, the second killed in its fourth step and begun again."""
    settings = {"max_steps": 4, "batch_size": 2, "checkpoint_every": 2, "progress": False, "precision": "fp32"}
    (whole, resumed), rows = (module(), module()), BatchedRows(_Pictures())
    fit(whole, rows, tmp_path / "whole", **settings)
    with pytest.raises(_Killed):
        fit(_dies_at(module(), 3), rows, tmp_path / "cut", **settings)
    fit(resumed, rows, tmp_path / "cut", **settings)
    return [whole, resumed]


def _assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_a_resumed_run_has_the_adversary_of_an_uninterrupted_one(tmp_path, backbone) -> None:
    def module():
        adversary = Adversary(layers=[PIXELS, "layer1"], width=4, warmup_steps=1)
        return _module(backbone, consistency=SampleConsistency(rows=2, adversary=adversary))

    modules = _whole_and_resumed(module, tmp_path)
    judges = [x.consistency.adversary for x in modules]
    assert judges[0].steps == judges[1].steps == 4
    _assert_equal(*(judge.state_dict() for judge in judges))
    _assert_equal(*(x.inverter.trainable_state() for x in modules))
    assert not any("heads" in name for name in modules[0].state_dict())


def _decoder_module(backbone, adversary: Adversary | None) -> FirstStageModule:
    torch.manual_seed(0)
    stage = tiny_first_stage(shortcut=True)
    stage.shortcut.fit(_batch()["image"])
    return FirstStageModule(stage, backbone, max_steps=4, warmup_steps=1, trained="decoder", adversary=adversary)


def _batch() -> dict[str, torch.Tensor]:
    return {"image": torch.stack([_Pictures()[row]["image"] for row in range(8)])}


def test_a_decoder_is_pulled_by_the_weighted_judgement_alone(backbone, adversary) -> None:
    plain, judged = _decoder_module(backbone, None), _decoder_module(backbone, adversary)
    adversary.steps, adversary.weight = 5, 0.25
    for module in (plain, judged):
        module.log = lambda *_, **__: None
    without, term = (float(module.training_step(_batch(), 0)) for module in (plain, judged))
    stage, rows = judged.first_stage, judged.feature_rows
    with torch.no_grad():
        latents = stage.distribution(_batch()["image"]).sample(torch.Generator().manual_seed(0))
        again = stage.synthesise(latents)[:rows].clamp(0, 1)
        scores = adversary.eval().logits(again, backbone.maps(again, adversary.maps))
    assert adversary.steps == 6
    expected = -float(torch.stack([s.mean() for s in scores]).mean())
    assert term - without == pytest.approx(0.25 * expected, abs=5e-3)
    with pytest.raises(UserError, match="backbone"):
        _decoder_module(None, Adversary(layers=[PIXELS]))


def test_a_finish_learns_alone_without_any_judgement() -> None:
    stage = tiny_first_stage(shortcut=True)
    with pytest.raises(UserError, match="first_stage.finish"):
        FirstStageModule(stage, None, trained="finish")
    with pytest.raises(UserError, match="all, decoder, finish"):
        FirstStageModule(stage, None, trained="encoder")
    stage.finish = Finish(width=8, layers=1)
    module = FirstStageModule(stage, _never, trained="finish", feature_rows=0, learning_rate=1e-2, warmup_steps=1)
    module.log = lambda *_, **__: None
    before = {k: v.clone() for k, v in stage.state_dict().items()}
    optimizer = module.configure_optimizers()["optimizer"]
    losses = []
    for _ in range(20):
        losses.append(module.training_step(_batch(), 0))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {k.split(".")[0] for k, v in stage.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"finish"} and losses[-1] < 0.95 * losses[0]


def _never(*_: Any) -> torch.Tensor:
    raise AssertionError("the backbone is not asked")


def test_a_decoder_learns_from_what_an_inverter_draws_and_leaves_it_out_of_the_squared_error(
    tmp_path, backbone, monkeypatch
) -> None:
    tiny_prior().save_pretrained(tmp_path / "prior")
    save_tiny(tmp_path / "a.safetensors", tiny_config(tmp_path / "prior"), backbone)
    module = FirstStageModule(
        load_prior(tmp_path / "prior").first_stage,
        backbone,
        trained="decoder",
        feature_weight=0.5,
        feature_rows=4,
        drawn_by=str(tmp_path / "a.safetensors"),
    )
    logged: dict[str, float] = {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})
    images, stage, inverter = _batch()["image"], module.first_stage, load_inverter(tmp_path / "a.safetensors")
    loss = module.training_step({"image": images}, 0)
    with torch.no_grad():
        drawn = inverter.invert(backbone(images[:2]), seeds=sample_seeds(0, 0, 2))
        again = stage.synthesise(stage.distribution(images).sample(torch.Generator().manual_seed(0)))
        seen = torch.cat([drawn, again[2:4].clamp(0, 1)])
        cosine = F.cosine_similarity(backbone(seen).flatten(1), backbone(images[:4]).flatten(1)).mean()
        error = (again[2:] - images[2:]).square().mean()
    assert logged["train/cosine"] == pytest.approx(float(cosine), abs=1e-4)
    assert logged["train/psnr"] == pytest.approx(float(-10 * error.log10()), abs=1e-3)
    loss.backward()
    assert all(p.grad is not None for p in stage.vae.decoder.parameters())
    assert all(p.grad is None for p in module._drawer[0].inverter.parameters())
    monkeypatch.setattr("featinv.training.prior_modules.load_trained", lambda _: SimpleNamespace(inverter=object()))
    with pytest.raises(UserError, match="draws no latents"):
        FirstStageModule(stage, backbone, drawn_by="upconv")


def test_a_resumed_decoder_has_the_adversary_of_an_uninterrupted_one(tmp_path, backbone) -> None:
    def module() -> FirstStageModule:
        return _decoder_module(backbone, Adversary(layers=[PIXELS, "layer1"], width=4, warmup_steps=1))

    modules = _whole_and_resumed(module, tmp_path)
    judges = [x._adversary[0] for x in modules]
    assert judges[0].steps == judges[1].steps == 4
    _assert_equal(*(judge.state_dict() for judge in judges))
    _assert_equal(*(x.first_stage.state_dict() for x in modules))
    assert not any("heads" in name for name in modules[0].state_dict())


def test_a_resumed_adversary_goes_on_at_a_changed_rate(backbone) -> None:
    judges = [Adversary(layers=[PIXELS], width=4, learning_rate=rate) for rate in (1e-3, 1e-4)]
    for judge in judges:
        judge.build(backbone)
    judges[1].restore(judges[0].training_state())
    assert [group["lr"] for group in judges[1]._optimizer.param_groups] == [1e-4]


def test_a_decoder_is_shown_what_is_drawn_by_the_scale_that_it_is_drawn_in(tmp_path, backbone) -> None:
    prior, path = tiny_prior(), str(tmp_path / "a.safetensors")
    prior.first_stage.vae.register_to_config(scaling_factor=2.0, shift_factor=0.25)
    prior.save_pretrained(tmp_path / "prior")
    save_tiny(tmp_path / "a.safetensors", tiny_config(tmp_path / "prior"), backbone)
    stage, images = load_prior(tmp_path / "prior").first_stage, _batch()["image"][:2]
    stage.vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)  # as before the last stage has ended
    module = FirstStageModule(stage, backbone, drawn_by=path)
    module.log = lambda *_, **__: None
    seen, synthesise = [], stage.synthesise
    stage.synthesise = lambda latents: seen.append(synthesise(latents)) or seen[-1]
    module.training_step({"image": images}, 0)
    wanted = load_inverter(path).invert(backbone(images[:1]), seeds=sample_seeds(0, 0, 1))
    torch.testing.assert_close(seen[0][:1].detach().clamp(0, 1), wanted, atol=1e-4, rtol=0)
    with torch.no_grad():
        stage.vae.encoder.conv_in.weight.mul_(2)
    with pytest.raises(UserError, match="draws latents of another first stage"):
        FirstStageModule(stage, backbone, drawn_by=path)


def test_two_processes_keep_the_heads_of_one(tmp_path, backbone) -> None:
    drawn, real = torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        maps = [backbone.maps(x, ["layer1"]) for x in (drawn, real)]

    def trained() -> Adversary:
        rank, world = process_rank()
        adversary = Adversary(layers=[PIXELS, "layer1"], width=4)
        adversary.build(backbone)
        own = slice(rank, None, world)
        for _ in range(3):
            adversary.improve(drawn[own], [x[own] for x in maps[0]], real[own], [x[own] for x in maps[1]])
        return adversary

    def work() -> None:
        torch.save(trained().state_dict(), tmp_path / f"{process_rank()[0]}.pt")

    in_two_processes(work)
    one = trained().state_dict()
    for rank in (0, 1):
        for name, value in torch.load(tmp_path / f"{rank}.pt", weights_only=True).items():
            torch.testing.assert_close(value, one[name], atol=1e-4, rtol=1e-3)


def test_an_adversary_needs_something_to_look_at() -> None:
    with pytest.raises(UserError, match="layers"):
        Adversary(layers=[])
