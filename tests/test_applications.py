import pytest
import torch
from cells import SIZE, Cells, Mosaic, Noisy, Pooled

from featinv.applications import measure
from featinv.applications.batches import decode, encode
from featinv.applications.composites import (
    covered,
    mix,
    paste,
    permute_positions,
    placement,
    replace,
    shift,
    swap_channels,
)
from featinv.applications.layers import layer_curve, leak_report, linear_information
from featinv.applications.matching import FeatureGuidedInverter
from featinv.applications.posterior import (
    calibrate,
    draw_samples,
    perceptual_map,
    pixel_map,
    risk_factor,
    sample_cosines,
)
from featinv.applications.refine import refine
from featinv.applications.scene_reader import scene_set
from featinv.applications.subset import SubsetInverter, concepts_only, concepts_without, invert_subset
from featinv.conditioning.masking import masked, mean_feature
from featinv.data.scene_factors import FACTOR_INDEX
from featinv.data.scenes import render_scenes
from featinv.errors import UserError
from featinv.metrics.factors import FactorSpec
from featinv.metrics.features import feature_cosine


def test_pasting_features_is_pasting_pictures_where_the_backbone_is_local() -> None:
    images, other = torch.rand(2, 2, 3, SIZE, SIZE)
    backbone, step = Cells(), SIZE // 8
    pixels = images.clone()
    pixels[..., 2 * step : 5 * step, step : 4 * step] = other[..., 2 * step : 5 * step, step : 4 * step]
    box = (1 / 8, 2 / 8, 4 / 8, 5 / 8)
    assert torch.equal(paste(backbone(images), backbone(other), box), backbone(pixels))
    moved = images.clone()
    moved[..., 4 * step : 7 * step, 5 * step :] = other[..., 2 * step : 5 * step, step : 4 * step]
    assert torch.allclose(paste(backbone(images), backbone(other), box, to=(5 / 8, 4 / 8)), backbone(moved))
    with pytest.raises(UserError, match="nothing of the region"):
        paste(backbone(images), backbone(other), box, to=(2.0, 0.0))
    with pytest.raises(UserError, match="cannot be combined"):
        paste(backbone(images), backbone.at("4")(other), box)


def test_composites_do_what_a_loop_would() -> None:
    a, b = torch.rand(2, 3, 4, 5, 6)
    assert torch.allclose(mix(a, b, 0.25), 0.75 * a + 0.25 * b)
    swapped = swap_channels(a, b, [0, 3])
    for c in range(4):
        assert torch.equal(swapped[:, c], (b if c in (0, 3) else a)[:, c])
    permuted = permute_positions(a, seed=3)
    assert torch.equal(permuted, permute_positions(a, seed=3)) and not torch.equal(permuted, a)
    assert torch.allclose(permuted.mean((2, 3)), a.mean((2, 3)), atol=1e-6)  # a pooled model cannot tell
    columns = {tuple(v.tolist()) for v in a[0].flatten(1).T}
    assert columns == {tuple(v.tolist()) for v in permuted[0].flatten(1).T}  # whole vectors travel
    moved = shift(a, 2, -1)
    for y in range(5):
        for x in range(6):
            inside = y + 1 < 5 and x - 2 >= 0
            assert torch.equal(moved[..., y, x], a[..., y + 1, x - 2] if inside else torch.zeros(3, 4))


def test_a_pasted_object_of_a_scene_appears_at_its_place_but_not_with_a_pooled_model() -> None:
    images, factors, masks = render_scenes(5, range(24), SIZE)
    target, source, mask = images[:12], images[12:], masks[12:, :1]
    backbone = Cells()
    where = covered(mask, (8, 8))
    pasted = replace(backbone(target), backbone(source), where)
    found = {}
    for name, inverter in (("spatial", Mosaic()), ("pooled", Pooled())):
        decoded, unpasted = inverter.invert(pasted, seeds=range(12)), inverter.invert(backbone(target), seeds=range(12))
        found[name] = placement(decoded, unpasted, target, source, mask)
    assert found["spatial"].placed.all() and not found["pooled"].placed.any()
    # A pooled model changes everywhere alike: by chance, as much of its change is inside as the mask is large.
    assert torch.allclose(found["pooled"].inside, found["pooled"].area, atol=1e-6)
    assert torch.equal(placement(target, target, target, source, mask).kept, torch.ones(12).double())


def test_a_posterior_map_is_the_deviation_that_was_planted() -> None:
    features = torch.full((2, 3, 8, 8), 0.5)
    backbone = Cells()
    samples = draw_samples(Noisy(), features, 200, seed=1)
    assert torch.allclose(pixel_map(samples), Noisy.spread.expand(2, 1, -1, -1), atol=0.015)
    assert torch.equal(samples[1:], draw_samples(Noisy(), features, 200, seed=1, batch_size=7)[1:])
    again = draw_samples(Noisy(), features[1:], 3, ids=["1"], seed=1)
    assert torch.equal(again[0], samples[1, :3])  # whatever was drawn beside it
    felt = perceptual_map(samples[:, :20], backbone)
    assert felt.shape == (2, 1, SIZE, SIZE) and (felt[..., -1] > 3 * felt[..., 0]).all()
    exact = draw_samples(Mosaic(), features, 2)
    assert not pixel_map(exact).any() and not perceptual_map(exact, backbone).any()
    assert torch.allclose(sample_cosines(exact, features, backbone), torch.ones(2, 2).double())
    with pytest.raises(UserError, match="at least two samples"):
        draw_samples(Mosaic(), features, 1)


def test_conformal_coverage_is_exact_on_exchangeable_residuals() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(4000, 20, generator=generator, dtype=torch.float64)
    inside = [float(row[19] <= risk_factor(row[:19, None], 0.9)) for row in rows]
    assert sum(inside) / len(inside) == pytest.approx(0.9, abs=0.015)  # 18 / 20, whatever the distribution
    # Many values an image, all of an image alike: still at least the level, and not much more.
    shared = torch.rand(300, 60, 1, generator=generator) * (1 + torch.rand(300, 60, 8, generator=generator))
    covered_ = [float((row[59] <= risk_factor(row[:59], 0.9)).double().mean()) for row in shared]
    assert 0.88 <= sum(covered_) / len(covered_) <= 0.94
    residuals = torch.rand(30, 4, generator=generator)
    factor = risk_factor(residuals, 0.9)

    def risk(value: float) -> float:
        return 30 / 31 * float((residuals > value).double().mean()) + 1 / 31

    assert risk(factor) <= 0.1 + 1e-9
    assert risk(float(residuals[residuals < factor].max())) > 0.1  # no smaller value would do
    with pytest.raises(UserError, match="take at least 9"):
        risk_factor(residuals[:8], 0.9)


def test_intervals_calibrated_on_scenes_cover_new_scenes() -> None:
    truth = render_scenes(7, range(120), SIZE)[0]
    features = Cells("16")(truth)
    samples = draw_samples(Noisy(), features, 8)
    intervals = calibrate(truth[:60], samples[:60])
    coverage = intervals.coverage(truth[60:], samples[60:])
    assert 0.87 <= coverage["value"] <= 0.93 and coverage["n"] == 60
    low, high = intervals.bounds(samples[60:])
    naive = ((truth[60:] >= low.float() - 1e-6) & (truth[60:] <= high.float() + 1e-6)).float().mean()
    assert float(naive) == pytest.approx(coverage["value"], abs=0.01)
    assert (intervals.width(samples) > 0).all() and (low >= 0).all() and (high <= 1).all()


def test_refining_reaches_the_tolerance_or_says_that_it_did_not() -> None:
    backbone = Cells()
    features = torch.rand(3, 3, 8, 8)
    features[2] = -features[2]  # no picture has these
    start = torch.rand(3, 3, SIZE, SIZE)
    found = refine(backbone, features, start, tolerance=0.995, steps=60)
    assert found.reached.tolist() == [True, True, False]
    assert torch.allclose(found.after, feature_cosine(features, backbone(found.images)))
    assert (found.after >= found.before).all() and found.images.min() >= 0 and found.images.max() <= 1
    assert 0 < found.steps[0] < 60
    assert found.verdict(0).startswith("reached") and found.verdict(2).startswith("not reached")
    alone = refine(backbone, features[1:2], start[1:2], tolerance=0.995, steps=60)
    assert torch.equal(alone.images[0], found.images[1])  # whatever was refined beside it
    done = refine(backbone, features[:1], found.images[:1], tolerance=0.9, steps=5)
    assert torch.equal(done.images, found.images[:1]) and int(done.steps) == 0


class _Faulty(Cells):
    """Row 1 has no finite gradient in the first two calls that ask for one."""

    calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = super().forward(images)
        if features.requires_grad:
            self.calls += 1
            if self.calls <= 2:
                spoilt = torch.ones(len(images), 1, 1, 1)
                spoilt[1] = torch.nan
                features.register_hook(lambda gradient: gradient * spoilt)
        return features


def test_gradients_that_are_not_finite_are_skipped_counted_and_harm_no_other_row() -> None:
    features, start = torch.rand(2, 3, 8, 8), torch.rand(2, 3, SIZE, SIZE)
    found = refine(_Faulty(), features, start, tolerance=0.999, steps=12)
    clean = refine(Cells(), features, start, tolerance=0.999, steps=12)
    assert found.skipped.tolist() == [0, 2] and "2 gradients not finite" in found.verdict(1)
    assert torch.equal(found.images[0], clean.images[0]) and found.after[1] > found.before[1]


def test_the_referee_shows_a_match_that_the_original_does_not_share() -> None:
    original = torch.rand(1, 3, SIZE, SIZE)
    wrong = torch.rand(1, 3, 8, 8)
    found = refine(Cells(), wrong, original, steps=20, tolerance=1.0, referee=Cells("16"), originals=original)
    assert found.referee_before == pytest.approx(1) and found.adversarial.tolist() == [True]
    assert "adversarial" in found.verdict(0)


def test_feature_guidance_raises_the_cosine_and_leaves_the_inverter_alone(inverter, backbone) -> None:
    features = torch.rand(2, *backbone(torch.zeros(1, 3, 64, 64)).shape[1:])
    kept = inverter.guidance, inverter.sampler
    inverter.sampler = "ddim"
    plain = inverter.invert(features, seeds=[1, 2])
    idle = FeatureGuidedInverter(inverter, backbone, strength=0.0).invert(features, seeds=[1, 2])
    assert torch.equal(plain, idle)
    guided = FeatureGuidedInverter(inverter, backbone, strength=0.3, iterations=3, interval=(0.0, 1.0))
    images = guided.invert(features, seeds=[1, 2])
    assert (feature_cosine(features, backbone(images)) > feature_cosine(features, backbone(plain))).all()
    assert guided.skipped == 0 and inverter.guidance is kept[0]
    assert torch.allclose(images[1:], guided.invert(features[1:], seeds=[2]), atol=1e-4)


class _Masking(Mosaic):
    def invert(self, features, *, seeds, mask=None):
        self.mask = mask
        return super().invert(features, seeds=seeds)


def test_a_subset_is_what_training_with_masks_would_give(inverter, backbone) -> None:
    features = torch.rand(2, 512, 2, 2)
    inverter.encoder.whitening.fit(features + 1)
    keep = torch.zeros(1, 512, 1, 1)
    keep[:, :7] = 1
    given = masked(features, keep, mean_feature(inverter, 512))
    assert torch.equal(given[:, 7:].flatten(2).mean(2)[0], inverter.encoder.whitening.mean[7:])
    expected = inverter.invert(given, seeds=[3, 4])
    assert torch.equal(invert_subset(inverter, features, keep, seeds=[3, 4]), expected)
    again = SubsetInverter(inverter, keep).invert(features[1:], seeds=[4])
    assert torch.allclose(again[0], expected[1], atol=1e-4)
    free = _Masking()
    invert_subset(free, features[:, :3], keep[:, :3], seeds=[1, 2])
    assert torch.equal(free.mask, keep[:, :3])


def test_concepts_alone_are_a_projection_about_the_mean() -> None:
    from featinv.applications.concepts import Subspace

    features, mean = torch.randn(4, 6, 3, 3), torch.randn(6)
    basis = torch.linalg.qr(torch.randn(6, 3)).Q.T
    one, two = Subspace("one", basis[:2], 1.0), Subspace("two", basis[2:], 1.0)
    only = concepts_only(features, [one, two], mean)
    projector = basis.T @ basis
    naive = mean[:, None, None] + torch.einsum("dc,nchw->ndhw", projector, features - mean[:, None, None])
    assert torch.allclose(only, naive, atol=1e-5)
    assert torch.allclose(concepts_only(only, [one, two], mean), only, atol=1e-5)
    assert torch.allclose(concepts_only(features, [one, one], mean), concepts_only(features, [one], mean), atol=1e-5)
    rest = concepts_without(features, [one], mean)
    assert one.score(rest - mean[:, None, None]).abs().max() < 1e-5
    everything = Subspace("all", torch.eye(6), 1.0)
    assert torch.allclose(concepts_only(features, [everything], mean), features, atol=1e-5)
    with pytest.raises(UserError, match="at least one concept"):
        concepts_only(features, [], mean)


def test_information_falls_with_depth_and_the_leak_with_it() -> None:
    images, factors, _ = render_scenes(9, range(90), SIZE)
    backbone, told = Cells("16"), []
    points = layer_curve(
        backbone,
        backbone.layers,
        images[:16],
        lambda cut: Pooled() if cut.layer == "1" else Mosaic(),
        Cells("4"),
        progress=lambda done, total: told.append((done, total)),
    )
    assert [p.layer for p in points] == backbone.layers and told[-1] == (5, 5)
    quality = [p.figures["psnr"]["value"] for p in points]
    assert quality == sorted(quality, reverse=True)
    assert points[0].figures["leak"]["value"] == 1 and points[0].chance == pytest.approx(1 / 16)
    assert "identifies originals" in leak_report(points)[0]
    names = ["sky", "object0_image_x"]
    values = factors[:, [FACTOR_INDEX[name] for name in names]]
    schema = [FactorSpec("sky", "categorical", 4), FactorSpec("object0_image_x", "continuous")]
    known = linear_information(
        backbone, ["4", "1"], (images[:60], values[:60]), (images[60:], values[60:]), schema, grid=4
    )
    assert known["4"]["sky"]["value"] > 0.6
    # The mean colour of the picture cannot say where its object is.
    assert known["1"]["object0_image_x"]["value"] < 0.2
    with pytest.raises(UserError, match="two images"):
        layer_curve(backbone, ["4"], images[:1], lambda cut: Mosaic(), Cells())


def test_batches_can_be_watched_and_cancelled() -> None:
    class Cancelled(Exception):
        pass

    def progress(done: int, total: int) -> None:
        assert total == 5
        if done >= 4:
            raise Cancelled

    with pytest.raises(Cancelled):
        decode(Mosaic(), torch.rand(5, 3, 8, 8), range(5), batch_size=2, progress=progress)
    with pytest.raises(UserError, match="as many seeds"):
        decode(Mosaic(), torch.rand(5, 3, 8, 8), [1])
    assert encode(Cells(), torch.rand(5, 3, SIZE, SIZE), batch_size=2).shape == (5, 3, 8, 8)


@pytest.mark.parametrize("part", ["composites", "posterior"])
def test_one_scene_is_too_few_to_measure_on(part) -> None:
    scenes = scene_set(5, 1, SIZE)
    measured = {
        "composites": lambda: measure.measure_composites({"spatial": Mosaic()}, Cells(), scenes),
        "posterior": lambda: measure.measure_posterior(Noisy(), Cells(), scenes),
    }
    with pytest.raises(UserError, match="at least 2 scenes, not 1"):
        measured[part]()


def test_no_image_calibrates_nothing() -> None:
    with pytest.raises(UserError, match="0 images cannot calibrate 90% intervals; take at least 9"):
        risk_factor(torch.zeros(0, 5), 0.9)
