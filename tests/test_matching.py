"""Inverters matched to the features, by the suffixes of their names."""

import json

import pytest
import torch
from cells import SIZE, Cells, Mosaic
from conftest import wake

from featinv.applications.matching import (
    MATCHING,
    BestInverter,
    CorrectedInverter,
    FeatureGuidedInverter,
    RefinedInverter,
    matched,
    settings_of,
    split_name,
)
from featinv.applications.refine import _Search, refine
from featinv.diffusion import objective_guidance
from featinv.errors import UserError
from featinv.metrics.features import feature_cosine


class Noise:
    """Pictures that know nothing of the features."""

    size = SIZE

    def invert(self, features, *, seeds):
        rows = [torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows)


def test_suffixes_are_split_off_and_a_path_that_is_there_is_a_name(tmp_path, monkeypatch) -> None:
    assert split_name("runs/a+guided+refined") == ("runs/a", ("guided", "refined"))
    assert split_name("retrieval@blocks.2+refined") == ("retrieval@blocks.2", ("refined",))
    assert split_name("a+b/c") == ("a+b/c", ())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr+wd").mkdir()
    assert split_name("lr+wd") == ("lr+wd", ()) and split_name("lr+wd+refined") == ("lr+wd", ("refined",))
    with pytest.raises(UserError, match="did you mean refined"):
        split_name("runs/a+refine")


def test_the_best_of_some_is_the_nearest_of_them_row_by_row() -> None:
    class Recorded(Noise):
        def __init__(self):
            self.drawn = []

        def invert(self, features, *, seeds):
            self.drawn.append(super().invert(features, seeds=seeds))
            return self.drawn[-1]

    backbone, features, recorded = Cells(), torch.rand(5, 3, 8, 8), Recorded()
    images = BestInverter(recorded, backbone, count=6).invert(features, seeds=[1, 2, 3, 4, 5])
    drawn = torch.stack(recorded.drawn)
    assert len(drawn) == 6 and len({float(picture.sum()) for picture in drawn.flatten(0, 1)}) == 30  # no draw twice
    cosines = torch.stack([feature_cosine(features, backbone(each)) for each in drawn])
    chosen = [drawn[int(cosines[:, row].argmax()), row] for row in range(5)]
    assert torch.equal(images, torch.stack(chosen)) and len(set(cosines.argmax(0).tolist())) > 1
    assert torch.equal(drawn[0], Noise().invert(features, seeds=[1, 2, 3, 4, 5]))
    assert torch.equal(BestInverter(Noise(), backbone, 6).invert(features[3:4], seeds=[4])[0], images[3])
    assert torch.equal(BestInverter(Noise(), backbone, 1).invert(features, seeds=[1, 2, 3, 4, 5]), drawn[0])
    with pytest.raises(UserError, match="draw one at least"):
        BestInverter(Noise(), backbone, 0)


def test_a_picture_that_is_not_finite_is_not_the_best() -> None:
    class Broken(Noise):
        def invert(self, features, *, seeds):
            images = super().invert(features, seeds=seeds)
            return torch.full_like(images, torch.nan) if seeds == [7] else images

    images = BestInverter(Broken(), Cells(), 3).invert(torch.rand(1, 3, 8, 8), seeds=[7])
    assert images.isfinite().all()


def test_refined_pictures_come_nearer_each_on_its_own_until_the_tolerance() -> None:
    backbone, features = Cells(), torch.rand(3, 3, 8, 8)
    plain = Noise().invert(features, seeds=[1, 2, 3])
    refined = RefinedInverter(Noise(), backbone, steps=60, tolerance=0.99)
    images = refined.invert(features, seeds=[1, 2, 3])
    before, after = (feature_cosine(features, backbone(x)) for x in (plain, images))
    assert (before < 0.99).all() and (after >= 0.99).all() and refined.skipped == 0
    assert torch.equal(refined.invert(features[1:2], seeds=[2])[0], images[1])
    few = RefinedInverter(Noise(), backbone, steps=2, tolerance=0.99).invert(features, seeds=[1, 2, 3])
    assert (feature_cosine(features, backbone(few)) < after).all()
    exact = Mosaic().invert(features, seeds=[0] * 3)
    assert torch.equal(RefinedInverter(Mosaic(), backbone).invert(features, seeds=[0] * 3), exact)


def test_a_picture_that_has_passed_is_not_looked_at_again() -> None:
    class Counting(Cells):
        rows = 0

        def __call__(self, images):
            type(self).rows += len(images)
            return super().__call__(images)

    features = torch.rand(4, 3, 8, 8)
    start = Noise().invert(features, seeds=[0] * 4)
    alone = [refine(Cells(), features[i : i + 1], start[i : i + 1], steps=200, tolerance=0.99) for i in range(4)]
    found = refine(Counting(), features, start, steps=200, tolerance=0.99)
    assert found.steps.tolist() == [int(one.steps) for one in alone] and found.reached.all()
    assert torch.equal(found.images, torch.cat([one.images for one in alone]))
    # Every picture: at the start of the search, for `before`, before its first step and after each.
    assert Counting.rows == 4 * 3 + int(found.steps.sum())


def test_a_picture_that_is_not_finite_is_left_as_it_is() -> None:
    features, start = torch.rand(2, 3, 8, 8), Noise().invert(torch.rand(2, 3, 8, 8), seeds=[1, 2])
    start[1] = torch.nan
    found = refine(Cells(), features, start, steps=200, tolerance=0.9)
    assert found.reached.tolist() == [True, False] and found.images[1].isnan().all() and int(found.steps[1]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Search, "step", lambda *_: pytest.fail("there is nothing to move"))
        assert refine(Cells(), features[1:], start[1:], steps=5).images.isnan().all()


@pytest.mark.parametrize("latent", [False, True])
def test_a_gradient_is_taken_of_so_many_pictures_and_every_row_moves_as_alone(monkeypatch, latent) -> None:
    class Counting(Cells):
        def forward(self, images):
            asked["backbone"].append(len(images) if images.requires_grad else 0)
            return super().forward(images)

    class Quarters:
        """A first stage whose arithmetic is the same for one picture and for several."""

        def encode(self, images):
            return torch.nn.functional.avg_pool2d(images, 2)

        def decode(self, latents):
            asked["decoder"].append(len(latents) if latents.requires_grad else 0)
            return torch.nn.functional.interpolate(latents, scale_factor=2).sigmoid()

    asked = {"backbone": [], "decoder": []}
    features, start = torch.rand(5, 3, 8, 8), torch.rand(5, 3, SIZE, SIZE)
    monkeypatch.setattr(objective_guidance, "GRADIENT_PIXELS", 2 * SIZE**2 + 1)
    codec = Quarters() if latent else None
    found = refine(Counting(), features, start, first_stage=codec, tolerance=1.0, steps=3, learning_rate=0.05)
    assert [n for n in asked["backbone"] if n] == [2, 2, 1] * 3
    assert [n for n in asked["decoder"] if n] == ([2, 2, 1] * 3 if latent else [])
    for row in range(5):
        wanted, original = features[row : row + 1], start[row : row + 1]
        best, cosine = _by_hand(wanted, original, codec)
        torch.testing.assert_close(found.images[row : row + 1], best, atol=1e-6, rtol=1e-6)
        assert float(found.after[row]) == pytest.approx(cosine, abs=1e-6)


def _by_hand(wanted, original, codec):
    """The best of a picture and of where three of Adam's steps lead from it."""
    free = (codec.encode(original) if codec else original.clone()).requires_grad_(True)
    optimizer = torch.optim.Adam([free], lr=0.05)
    best, highest = original, float(feature_cosine(wanted, Cells()(original)))
    for step in range(4):
        images = codec.decode(free) if codec else free
        match = torch.cosine_similarity(Cells()(images).flatten(1), wanted.flatten(1))
        if step and match.item() > highest:
            best, highest = images.detach().clone(), match.item()
        optimizer.zero_grad()
        (1 - match).sum().backward()
        optimizer.step()
        if not codec:
            free.data.clamp_(0, 1)
    return best, highest


def test_latents_are_moved_where_there_is_a_first_stage(inverter, backbone) -> None:
    features = torch.rand(2, 512, 2, 2)
    assert RefinedInverter(inverter, backbone).first_stage is inverter.prior.first_stage
    given = inverter.prior.first_stage
    images = matched(Noise32(), backbone, ["refined"], {"refined": {"steps": 3}}, given).invert(features, seeds=[1, 2])
    start = Noise32().invert(features, seeds=[1, 2])
    latents = given.encode(start)
    # Every picture that has moved is one that the first stage can draw; Adam's first three steps are of equal length.
    moved = (given.encode(images) - latents).abs().amax((1, 2, 3))
    assert images.shape == (2, 3, 32, 32) and (moved > 0).all()


class Faint(Mosaic):
    """Its contrast is half of what it should be."""

    def invert(self, features, *, seeds):
        return super().invert(features / 2, seeds=seeds)


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_corrections_go_on_from_what_the_last_picture_lacked(rounds) -> None:
    features = 0.4 * torch.rand(2, 3, 8, 8)
    images = CorrectedInverter(Faint(), Cells(), rounds=rounds, gain=0.3).invert(features, seeds=[0, 0])
    # told - 2 features shrinks by 1 - 0.3 / 2 in each round, from -features on.
    assert torch.allclose(Cells()(images), features * (1 - 0.5 * 0.85**rounds), atol=1e-6)


def test_a_corrected_row_depends_on_its_own_features_and_seed_alone(inverter, backbone) -> None:
    features = torch.rand(3, 512, 2, 2)
    corrected = CorrectedInverter(wake(inverter), backbone)
    together, alone = corrected.invert(features, seeds=[5, 6, 7]), corrected.invert(features[1:2], seeds=[6])
    assert torch.allclose(together[1:2], alone, atol=1e-4)
    assert not torch.allclose(together, inverter.invert(features, seeds=[5, 6, 7]), atol=1e-4)


def test_what_is_corrected_can_be_refined_and_not_the_other_way_round(inverter, backbone) -> None:
    outer = matched(inverter, backbone, ["corrected", "refined"], {"corrected": {"gain": 0.1}})
    assert isinstance(outer.inverter, CorrectedInverter) and outer.inverter.gain == 0.1
    assert outer.first_stage is inverter.prior.first_stage
    for kind in MATCHING:
        with pytest.raises(UserError, match="comes first"):
            matched(inverter, backbone, [kind, "corrected"])
    with pytest.raises(UserError, match="no sampling steps to guide"):
        matched(inverter, backbone, ["corrected", "guided"])
    with pytest.raises(UserError, match="takes a round"):
        CorrectedInverter(inverter, backbone, rounds=0)


class Noise32(Noise):
    size = 32

    def invert(self, features, *, seeds):
        return super().invert(features, seeds=seeds)[..., :32, :32]


def test_wrappers_lie_in_the_order_of_the_name_and_take_their_own_parameters(inverter, backbone) -> None:
    params = {"guided": {"strength": 0.3}, "refined": {"steps": 7}, "retrieval": {"count": 3}}
    outer = matched(inverter, backbone, ["guided", "refined"], params)
    assert isinstance(outer, RefinedInverter) and outer.steps == 7 and outer.size == inverter.size
    assert isinstance(outer.inverter, FeatureGuidedInverter) and outer.inverter.strength == 0.3
    assert outer.inverter.inverter is inverter and outer.first_stage is inverter.prior.first_stage
    assert matched(inverter, backbone, []) is inverter
    with pytest.raises(UserError, match="no sampling steps to guide"):
        matched(Noise(), backbone, ["guided"])
    with pytest.raises(UserError, match=r"params\.refined"):
        matched(inverter, backbone, ["refined"], {"refined": {"stepss": 7}})


def test_settings_are_those_that_a_wrapper_really_has(inverter, backbone) -> None:
    for kind, wrapper in ((kind, MATCHING[kind](inverter, backbone)) for kind in MATCHING):
        found = settings_of(kind)
        assert found == json.loads(json.dumps(found)) and found
        assert all(getattr(wrapper, k) == (tuple(v) if isinstance(v, list) else v) for k, v in found.items())
    assert settings_of("refined", {"steps": 3}) == settings_of("refined") | {"steps": 3}
