"""The lift: an earlier layer's map drawn from the last one."""

import pytest
import torch
import torch.nn.functional as F
from conftest import save_tiny, tiny_config, tiny_prior, wake
from omegaconf import OmegaConf

from featinv.applications.matching import CorrectedInverter
from featinv.backbones.base import FeatureSpec
from featinv.checkpoint import load_checkpoint
from featinv.data.scenes import ScenesDataset
from featinv.diffusion.lift import FeatureLift, training_backbone
from featinv.errors import UserError
from featinv.inverters.build import about, build_inverter, load_inverter
from featinv.report.app.watching import Watched
from featinv.training.consistency import SampleConsistency
from featinv.training.module import InversionModule
from featinv.training.rows import prepare, training_rows
from featinv.training.teacher import LiftedMaps, SecondLooks

SIZES = {"layer": "layer3", "components": 16, "hidden": 16, "condition_channels": 8, "widths": [16, 16]}


@pytest.fixture
def lift(backbone):
    lift = FeatureLift(backbone.spec, backbone, **SIZES)
    lift.fit(lift.backbone(torch.rand(16, 3, 32, 32)))
    return lift.eval()


def _knowing(lift, clean):
    """The lift with the true velocity towards normalised maps in place of its UNet."""
    lift._velocity = lambda noisy, level, condition: (noisy - clean) / level[:, None, None, None]
    return lift


def test_the_rest_of_the_network_gives_the_last_map_and_fit_normalises(lift, backbone) -> None:
    images = torch.rand(4, 3, 32, 32)
    assert torch.allclose(lift.last_map(lift.backbone(images)), backbone(images), atol=1e-4)
    maps = lift.backbone(torch.rand(50, 3, 32, 32))
    lift.fit(maps)
    for channel in (0, 7):
        values = maps[:, channel].flatten()
        assert float(lift.mean[channel]) == pytest.approx(float(values.mean()), abs=1e-5)
        assert float(lift.std[channel]) == pytest.approx(float(values.std()), rel=1e-4)


def test_the_loss_is_the_squared_error_of_the_velocity(lift) -> None:
    seeds, maps = [3, 8], lift.backbone(torch.rand(2, 3, 32, 32))
    given = []

    def none(noisy, level, condition):
        given.append((noisy, level))
        return torch.zeros_like(noisy)

    lift._velocity = none
    losses = {name: value.detach() for name, value in lift.training_losses(maps, seeds).items()}
    clean = (maps - lift.mean) / lift.std
    noise = torch.stack([torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds])
    assert float(losses["flow"]) == pytest.approx(float((noise - clean).square().mean()), rel=1e-5)
    estimate = lift.condition(lift.last_map(maps))[1].detach()
    assert float(losses["regression"]) == pytest.approx(float((estimate - clean).square().mean()), rel=1e-5)
    assert float(losses["loss"]) == pytest.approx(float(losses["flow"] + 0.5 * losses["regression"]), rel=1e-5)
    (noisy, level), s = given[0], given[0][1][:, None, None, None]
    assert torch.allclose(noisy, (1 - s) * clean + s * noise, atol=1e-5) and ((level > 0) & (level < 1)).all()


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_with_the_true_velocity_sampling_ends_at_the_map_itself(lift, steps) -> None:
    maps = lift.backbone(torch.rand(2, 3, 32, 32))
    lift.num_inference_steps, lift.guidance_iterations = steps, 0
    drawn = _knowing(lift, (maps - lift.mean) / lift.std)(lift.last_map(maps), [1, 2])
    assert torch.allclose(drawn, maps, atol=1e-4)


def test_churn_steps_past_the_next_level_and_noises_back_to_it(lift) -> None:
    maps = lift.backbone(torch.rand(2, 3, 32, 32))
    lift.num_inference_steps, lift.guidance_iterations = 5, 0
    seen = []

    def half(noisy, level, condition):
        seen.append(noisy)
        return 0.5 * noisy + 0.1

    lift._velocity = half
    last = (lift(lift.last_map(maps), [1, 2]) - lift.mean) / lift.std
    for step, (noisy, found) in enumerate(zip(seen, [*seen[1:], last], strict=True)):
        level, after = 1 - step / 5, 1 - (step + 1) / 5
        kept = after * (1 - lift.churn**2) ** 0.5
        past = kept / (1 - after + kept)  # down to this level by the flow
        reached = noisy - (level - past) * (0.5 * noisy + 0.1)
        # and up again by the forward process, whose noise is of unit variance
        scale = (1 - after) / (1 - past)
        added = found - scale * reached
        deviation = (after**2 - (scale * past) ** 2) ** 0.5
        assert float(added.std()) == pytest.approx(deviation, abs=0.02)
        assert abs(float((added * noisy).mean())) < 0.02 * float(noisy.square().mean()) ** 0.5


def test_without_churn_every_step_follows_the_flow(lift) -> None:
    maps = lift.backbone(torch.rand(2, 3, 32, 32))
    lift.num_inference_steps, lift.guidance_iterations, lift.churn = 4, 0, 0.0
    seen = []
    lift._velocity = lambda noisy, level, condition: seen.append(noisy) or noisy.sin()
    last = (lift(lift.last_map(maps), [1, 2]) - lift.mean) / lift.std
    for noisy, after in zip(seen, [*seen[1:], last], strict=True):
        assert torch.allclose(after, noisy - noisy.sin() / 4, atol=1e-4)


def test_guidance_raises_the_cosine_of_the_last_map(lift) -> None:
    maps, others = (lift.backbone(torch.rand(3, 3, 32, 32) ** power) for power in (1, 3))
    wanted = lift.last_map(maps)
    _knowing(lift, (others - lift.mean) / lift.std)  # a velocity that is wrong

    def reached(iterations):
        lift.guidance_iterations = iterations
        return F.cosine_similarity(lift.last_map(lift(wanted, [1, 2, 3])).flatten(1), wanted.flatten(1))

    assert (reached(4) > reached(0)).all()


def test_a_row_depends_on_its_own_features_and_seed_alone(lift) -> None:
    features = lift.last_map(lift.backbone(torch.rand(3, 3, 32, 32)))
    together, alone = lift(features, [5, 6, 7]), lift(features[1:2], [6])
    assert torch.allclose(together[1:2], alone, atol=1e-3 * float(alone.abs().max()))
    assert not torch.allclose(together[1:2], lift(features[1:2], [9]), atol=1e-2)


def test_nearer_maps_have_last_maps_nearer_to_the_features(lift) -> None:
    maps, others = (lift.backbone(torch.rand(3, 3, 32, 32) ** power) for power in (1, 3))
    wanted = lift.last_map(maps)
    near = lift.nearer(others, wanted)

    def cosine(x):
        return F.cosine_similarity(lift.last_map(x).flatten(1), wanted.flatten(1))

    assert (cosine(near) > cosine(others)).all()
    # Four steps of one length each: no farther than their sum, in deviations of the channels.
    length = ((near - others) / lift.std).flatten(1).square().mean(1).sqrt()
    assert (length <= 4 * lift.guidance_strength + 1e-5).all() and (length > 0).all()


def test_layers_that_cannot_be_lifted_are_refused(backbone) -> None:
    with pytest.raises(UserError, match="starts at the last map"):
        FeatureLift(backbone.at("layer3").spec, backbone, **SIZES)
    with pytest.raises(UserError, match="churn must lie between 0 and 1"):
        FeatureLift(backbone.spec, backbone, **SIZES, churn=1.5)
    with pytest.raises(UserError, match="a step at least"):
        FeatureLift(backbone.spec, backbone, **SIZES, num_inference_steps=0)
    odd = backbone.at("layer3")
    odd._spec = FeatureSpec(256, 5, 5, "layer3")
    odd.at = lambda layer: odd
    with pytest.raises(UserError, match="5 x 5 positions"):
        FeatureLift(backbone.spec, odd, **SIZES)


@pytest.fixture
def lifted(tmp_path, backbone):
    """Configuration of a lift in front of the inverter of `layer3` in tmp_path/lender."""
    tiny_prior().save_pretrained(tmp_path / "prior")
    earlier = tiny_config(tmp_path / "prior")
    earlier.backbone.params = {**earlier.backbone.params, "layer": "layer3"}
    save_tiny(tmp_path / "lender" / "inverter.safetensors", earlier, backbone.at("layer3"))
    lift = {"target": "featinv.diffusion.lift.FeatureLift", "params": SIZES}
    return tiny_config(tmp_path / "prior", lift=lift, branch_of=str(tmp_path / "lender"))


def test_an_inverter_with_a_lift_trains_and_saves_the_lift_alone(tmp_path, lifted, backbone) -> None:
    inverter = save_tiny(tmp_path / "run" / "inverter.safetensors", lifted, backbone)
    state = load_checkpoint(tmp_path / "run" / "inverter.safetensors")["state_dict"]
    assert state and all(key.startswith("lift.") for key in state)

    features = backbone(torch.rand(2, 3, 32, 32))
    drawn, again = inverter.invert(features, seeds=[1, 2]), load_inverter(tmp_path / "run")
    assert (again.invert(features, seeds=[1, 2]) - drawn).abs().max() < 1e-4
    lender = load_inverter(tmp_path / "lender")  # draws the same from what the lift has drawn
    assert (lender.invert(inverter.lift(features, [1, 2]), seeds=[1, 2]) - drawn).abs().max() < 1e-4
    mean = lender.posterior_mean(inverter.lift.estimate(features))
    assert (inverter.posterior_mean(features) - mean).abs().max() < 1e-4

    assert training_backbone(inverter, backbone).layer == "layer3"
    fresh = build_inverter(lifted, backbone.spec)
    images = torch.rand(2, 3, 32, 32)
    fresh.training_losses(images, backbone.at("layer3")(images), seeds=[1, 2])["loss"].backward()
    trained = {name for name, p in fresh.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained and all(name.startswith("lift.") for name in trained)


def test_every_step_of_a_lift_is_told_too(lifted, backbone) -> None:
    inverter, told = build_inverter(lifted, backbone.spec, backbone).eval(), []
    watched = Watched(inverter, lambda done, total: told.append((done, total)))
    images = watched.invert(backbone(torch.rand(1, 3, 32, 32)), seeds=[1])
    steps = inverter.lift.num_inference_steps + inverter.num_inference_steps
    assert told == [(k, steps) for k in range(1, steps + 1)] and images.isfinite().all()


def test_what_a_lift_has_drawn_is_corrected_towards_the_last_map(lifted, backbone) -> None:
    inverter = wake(build_inverter(lifted, backbone.spec, backbone).eval())
    lift, seeds = inverter.lift, [3, 4]
    lift.fit(lift.backbone(torch.rand(16, 3, 32, 32)))
    features = backbone(torch.rand(2, 3, 32, 32))
    told = lift(features, seeds)
    assert torch.equal(inverter.invert(features, seeds=seeds, told=told), inverter.invert(features, seeds=seeds))
    seen = lift.backbone(inverter.invert(features, seeds=seeds))
    told = told + 0.5 * (lift.nearer(seen, features) - seen)
    by_hand = inverter.invert(features, seeds=seeds, told=told)
    corrected = CorrectedInverter(inverter, backbone, rounds=1, lift_gain=0.5).invert(features, seeds=seeds)
    assert torch.allclose(corrected, by_hand, atol=1e-5)
    assert not torch.allclose(corrected, inverter.invert(features, seeds=seeds), atol=1e-4)


def test_a_lift_goes_on_with_a_branch_that_was_trained_further(tmp_path, lifted, backbone) -> None:
    inverter = save_tiny(tmp_path / "run" / "inverter.safetensors", lifted, backbone)
    torch.manual_seed(9)
    earlier = OmegaConf.merge(lifted, {"lift": None, "branch_of": None})
    earlier.backbone.params = {**earlier.backbone.params, "layer": "layer3"}
    save_tiny(tmp_path / "lender" / "inverter.safetensors", earlier, backbone.at("layer3"))
    again, features = load_inverter(tmp_path / "run"), backbone(torch.rand(1, 3, 32, 32))
    assert torch.allclose(again.lift(features, [1]), inverter.lift(features, [1]), atol=1e-3)


def test_a_lift_stands_in_front_of_an_encoder_that_borrows_its_branch(tmp_path, lifted, backbone) -> None:
    second = tiny_config(tmp_path / "prior", branch_of=str(tmp_path / "lender"))
    second.backbone.params = {**second.backbone.params, "layer": "layer3"}
    second.conditioning.params.hidden = 32
    encoded = save_tiny(tmp_path / "second" / "inverter.safetensors", second, backbone.at("layer3"))
    chained = OmegaConf.merge(lifted, {"branch_of": str(tmp_path / "second")})
    with pytest.raises(UserError, match="of another kind or size"):
        build_inverter(chained, backbone.spec, backbone)  # the encoder of tmp_path/lender is another one
    chained.conditioning.params.hidden = 32
    inverter = save_tiny(tmp_path / "run" / "inverter.safetensors", chained, backbone)
    features = backbone(torch.rand(2, 3, 32, 32))
    told = inverter.lift(features, [1, 2])
    drawn = load_inverter(tmp_path / "run").invert(features, seeds=[1, 2])
    assert (encoded.invert(told, seeds=[1, 2]) - drawn).abs().max() < 1e-4


def test_a_lift_without_a_lender_is_refused(lifted, backbone) -> None:
    with pytest.raises(UserError, match="set branch_of"):
        build_inverter(OmegaConf.merge(lifted, {"branch_of": None}), backbone.spec)


def test_terms_that_a_lift_does_not_have_are_refused(lifted, backbone) -> None:
    inverter = build_inverter(lifted, backbone.spec)
    settings = {"described": about(lifted, inverter, backbone.spec)}
    InversionModule(inverter, backbone.at("layer3"), **settings)
    for more in ({"consistency": SampleConsistency()}, {"estimate_steps": 5}):
        with pytest.raises(UserError, match="a lift has a loss of its own"):
            InversionModule(inverter, backbone.at("layer3"), **settings, **more)


def test_a_lift_reads_no_latents_and_its_cache_of_two_epochs_holds_none(tmp_path, lifted, backbone) -> None:
    inverter = build_inverter(lifted, backbone.spec)
    module = InversionModule(inverter, training_backbone(inverter, backbone))
    train = {"target": "featinv.data.scenes.ScenesDataset", "params": {"length": 3, "size": 32}}
    data = {"target": "featinv.data.datamodule.ImageDataModule", "params": {"train": train}}
    settings = {"cache": True, "cache_epochs": 2, "cache_root": str(tmp_path / "cache")}
    rows = training_rows(OmegaConf.merge(lifted, {"data": data, "training": settings}), module, tmp_path)
    assert len(rows) == 6 and set(rows[[0, 1]]) == {"features", "image"}
    prepare(module, rows, 6, tmp_path)
    maps = inverter.lift.backbone(torch.stack([ScenesDataset(3, size=32)[i]["image"] for i in range(3)]))
    assert (inverter.lift.mean.flatten() - maps.mean((0, 2, 3))).abs().max() < 1e-2


def test_a_share_of_rows_is_drawn_from_lifted_maps_and_compared_with_them_alone(tmp_path, lifted, backbone) -> None:
    lift = save_tiny(tmp_path / "run" / "inverter.safetensors", lifted, backbone).lift
    maps, inverter = LiftedMaps(tmp_path / "run", share=0.5), load_inverter(tmp_path / "lender")
    images, seeds, earlier = torch.rand(4, 3, 32, 32), [1, 2, 3, 4], backbone.at("layer3")
    features = earlier(images)
    drawn_maps = maps(features, seeds)
    assert (drawn_maps - lift(backbone(images[:2]), [1, 2])).abs().max() < 1e-3 and len(maps(features[:1], [1])) == 0

    term = SampleConsistency(rows=4, jitter=5, earlier={"layer1": 0.5}, lifted=maps)
    term._shift = lambda seed: {3: (1, 2)}.get(seed, (0, 3) if seed < 3 else (0, 0))
    with torch.no_grad():
        found = term(inverter, earlier, {"images": images}, features, seeds)
        given = torch.cat([drawn_maps, features[2:]])
        drawn = inverter.invert(given, seeds=seeds)
        judged, shown = (x.clone() for x in (drawn, images))
        for x in (judged, shown):
            x[2] = x[2].roll((1, 2), (1, 2))
        wanted = torch.cat([given[:2], earlier(shown[2:3]), given[3:]])
        expected = 1 - F.cosine_similarity(earlier(judged).flatten(1), wanted.flatten(1)).mean()
        first = [backbone.at("layer1")(x[2:]).flatten(1) for x in (judged, shown)]
        expected += 0.5 * (1 - F.cosine_similarity(*first).mean())
    assert float(found) == pytest.approx(float(expected), abs=1e-4)

    with pytest.raises(UserError, match="draws maps of 'layer3'"):
        maps(backbone(images), seeds)
    with pytest.raises(UserError, match="has no lift"):
        LiftedMaps(tmp_path / "lender")
    with pytest.raises(UserError, match="between 0 and 1"):
        LiftedMaps(tmp_path / "run", share=1.0)
    with pytest.raises(UserError, match="a step at least"):
        LiftedMaps(tmp_path / "run", num_inference_steps=0)


def test_maps_for_training_can_be_drawn_in_fewer_steps(tmp_path, lifted, backbone) -> None:
    lift = save_tiny(tmp_path / "run" / "inverter.safetensors", lifted, backbone).lift.eval()
    features, seeds = backbone.at("layer3")(torch.rand(4, 3, 32, 32)), [5, 6, 7, 8]
    drawn = LiftedMaps(tmp_path / "run", num_inference_steps=2)(features, seeds)
    lift.num_inference_steps = 2
    assert (drawn - lift(lift.last_map(features[:2]), [5, 6])).abs().max() < 1e-3


def test_rows_looked_at_again_are_told_what_was_missing_and_judged_by_what_was_wanted(
    tmp_path, lifted, backbone
) -> None:
    lift = save_tiny(tmp_path / "run" / "inverter.safetensors", lifted, backbone).lift
    maps, inverter, earlier = LiftedMaps(tmp_path / "run"), load_inverter(tmp_path / "lender"), backbone.at("layer3")
    images, seeds, looks = torch.rand(8, 3, 32, 32), list(range(8)), SecondLooks(gain=0.25, lift_gain=1.0)
    features, last = earlier(images), backbone(images)
    given = torch.cat([maps(features, seeds), features[4:]])
    told, wanted = looks(inverter, earlier, given, features, seeds, maps, first=4)

    looked, gains = {True: 0, False: 0}, []
    for row, seed in enumerate(seeds):  # one at a time, without knowing which were chosen
        if torch.equal(told[row], given[row]):
            assert torch.equal(wanted[row], given[row])
            continue
        seen = earlier(inverter.invert(given[row : row + 1], seeds=[seed]))[0]
        aim = lift.nearer(seen[None], last[row : row + 1])[0] if row < 4 else given[row]
        assert (wanted[row] - aim).abs().max() < 1e-3
        added, missing = (told[row] - given[row]).flatten(), (aim - seen).flatten()
        gain = float(added @ missing / missing.square().sum())
        assert (added - gain * missing).norm() < 1e-2 * added.norm() and 0 < gain < (2.0 if row < 4 else 0.5)
        looked[row < 4], gains = looked[row < 4] + 1, [*gains, gain]
    assert looked[True] and looked[False] and sum(looked.values()) < 8 and len(set(gains)) == len(gains)

    found = SampleConsistency(rows=8, lifted=maps, second_looks=looks)(inverter, earlier, {}, features, seeds)
    drawn = earlier(inverter.invert(told, seeds=seeds)).flatten(1)
    assert float(found) == pytest.approx(1 - float(F.cosine_similarity(drawn, wanted.flatten(1)).mean()), abs=1e-4)

    few = SecondLooks(share=1e-9)
    assert all(x is given for x in few(inverter, earlier, given, features, seeds, maps, first=4))
    with pytest.raises(UserError, match="between 0 and 1"):
        SecondLooks(share=1.0)
