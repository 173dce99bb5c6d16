import pytest
import torch
from cells import Cells, Mosaic

from featinv.applications.concepts import class_means, image_score, linear_probe, linear_probes, make_direction
from featinv.applications.discovery import completeness, encode_texts, nmf_concepts, subspace_concepts, text_directions
from featinv.applications.steering import SteeringTest, factor_changes, steer, steer_strip
from featinv.data.scene_factors import FACTOR_INDEX, SKY_COLOURS
from featinv.data.scenes import render_scenes
from featinv.errors import UserError
from featinv.metrics.factors import FactorProbe, FactorSpec


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def _planted(count: int = 80) -> tuple[torch.Tensor, torch.Tensor]:
    """Channel 0 holds the concept and a distractor, channel 1 the distractor alone."""
    present = torch.arange(count) % 2 == 0
    distractor = 2 * torch.randn(count)
    features = 0.1 * torch.randn(count, 6, 2, 2)
    features[:, 0] += (present.float() + distractor)[:, None, None]
    features[:, 1] += distractor[:, None, None]
    return features, present


def test_a_probe_reads_around_a_distractor_and_moves_along_the_concept() -> None:
    features, present = _planted(200)
    concept = linear_probe("planted", features, present, permutations=19)
    assert concept.reader[1] < -0.5 * concept.reader[0] < 0  # cancels the distractor
    truth = torch.zeros(6)
    truth[0] = 1
    assert concept.evidence["auc"] > 0.95 and concept.evidence["p_value"] == pytest.approx(1 / 20)
    (mean,) = class_means(features, present.long(), ["absent", "present"])[1:]
    assert _cosine(mean.direction, concept.direction) > 0.999  # both are the pattern, not the filter


def test_shuffled_labels_are_not_significant() -> None:
    features, present = _planted(40)
    values = []
    for seed in range(6):
        labels = present[torch.randperm(40, generator=torch.Generator().manual_seed(seed))]
        values.append(linear_probe("nothing", features, labels, permutations=19, folds=3).evidence["p_value"])
    assert min(values) < 1 and sum(values) / len(values) > 0.2
    found = linear_probes(features, present.long(), ["absent", "present", "never"], permutations=19, folds=3)
    assert [c.name for c in found] == ["absent", "present"]
    assert all(c.evidence["p_adjusted"] >= c.evidence["p_value"] for c in found)
    with pytest.raises(UserError, match="at least 5 images on each side"):
        linear_probe("rare", features, torch.arange(40) < 3)


def test_a_strength_is_a_deviation_of_the_score() -> None:
    features, present = _planted()
    (concept,) = class_means(features, present.long() - 1, ["present"]) or [None]
    scores = concept.score(features)
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert torch.allclose(concept.score(concept.move(features, 2.5)), scores + 2.5, atol=1e-4)
    with pytest.raises(UserError, match="cannot be told apart"):
        make_direction("flat", torch.ones(6), torch.ones(6), torch.ones(3, 6, 2, 2))


def test_factors_are_those_that_were_planted() -> None:
    parts = torch.zeros(3, 12)
    for k in range(3):
        parts[k, 4 * k : 4 * k + 4] = torch.rand(4) + 0.5
    weights = torch.rand(40, 3, 2, 2) * (torch.rand(40, 3, 2, 2) < 0.5)
    features = torch.einsum("nkhw,kc->nchw", weights, parts) + 1e-3 * torch.rand(40, 12, 2, 2)
    concepts = nmf_concepts(features, 3)
    best = [max(range(3), key=lambda k, c=c: _cosine(c.direction, parts[k])) for c in concepts]
    assert sorted(best) == [0, 1, 2]
    assert all(_cosine(c.direction, parts[k]) > 0.99 for c, k in zip(concepts, best, strict=True))
    moved = concepts[0].move(features, 3.0)
    assert torch.allclose(concepts[1].score(moved), concepts[1].score(features), atol=1e-3)  # blind to the others
    assert concepts[0].evidence["explained"] > 0.99
    with pytest.raises(UserError, match="negative values"):
        nmf_concepts(features - 1, 3)
    for few, count in ((features, 0), (features, 13), (features[:1, :, :1], 3)):
        with pytest.raises(UserError, match="number of concepts must be 1 to"):
            nmf_concepts(few, count)


def test_subspaces_are_those_that_were_planted() -> None:
    planes = torch.linalg.qr(torch.randn(10, 4)).Q.T.reshape(2, 2, 10)
    own = torch.arange(60) % 2
    columns = torch.einsum("nd,ndc->nc", torch.randn(60, 2), planes[own])
    features = columns.reshape(15, 2, 2, 10).permute(0, 3, 1, 2)
    concepts = subspace_concepts(features, 2, energy=0.999)
    assert [c.basis.shape for c in concepts] == [(2, 10), (2, 10)]
    overlap = torch.stack([torch.stack([(c.basis @ p.T).square().sum() / 2 for p in planes]) for c in concepts])
    assert torch.allclose(overlap.sort(dim=1).values, torch.tensor([[0.0, 1.0]] * 2), atol=1e-3)
    assert completeness(concepts, features) == pytest.approx(1, abs=1e-4)
    gone = concepts[0].move(features, -1)
    assert concepts[0].score(gone).max() < 1e-5 and torch.equal(concepts[0].move(features, -3), gone)
    with pytest.raises(UserError, match="number of subspaces"):
        subspace_concepts(features, 0)
    assert completeness(concepts[:1], features) < 0.8
    gone = concepts[0].move(features, -1.0)
    assert concepts[0].score(gone).abs().max() < 1e-4
    assert torch.allclose(concepts[1].score(gone), concepts[1].score(features), atol=1e-3)
    with pytest.raises(UserError, match="too few"):
        subspace_concepts(features[:1], 3)


class _Joint(Cells):
    """Its joint space is the mean colour, so that "red" is a known direction."""

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


def test_a_text_becomes_the_direction_that_it_names() -> None:
    images = torch.rand(60, 3, 1, 1).expand(-1, -1, 32, 32).contiguous()
    texts = torch.eye(3)
    found = text_directions(_Joint(), images, ["red", "green", "blue"], texts, torch.ones(3), permutations=5)
    for k, concept in enumerate(found):
        assert int(concept.direction.argmax()) == k and concept.evidence["correlation"] > 0.85
    with pytest.raises(UserError, match="OpenCLIP"):
        text_directions(Cells(), images, ["red"], texts[:1])


def test_texts_pass_through_the_models_own_tower() -> None:
    texts = encode_texts("ViT-S-32-alt", ["a red ball", "a picture", "a red ball"], None)
    assert texts.shape == (3, 256) and torch.allclose(texts[0], texts[2]) and not torch.allclose(texts[0], texts[1])
    with pytest.raises(UserError, match="cannot get the text tower of resnet18"):
        encode_texts("resnet18", ["a red ball"], None)


def _reddening() -> tuple[torch.Tensor, object]:
    features = torch.full((2, 3, 8, 8), 0.5)
    spread = torch.rand(4, 3, 8, 8)
    red = torch.tensor([1.0, 0.0, 0.0])
    return features, make_direction("red", red, red, spread)


def test_an_edit_that_can_be_drawn_stays_on_the_manifold_and_one_that_cannot_is_told() -> None:
    features, red = _reddening()
    step = float(red.direction[0])
    strip = steer_strip(Mosaic(), Cells(), features, red, [-0.2 / step, 0.4 / step, 4 / step], [1, 2], tolerance=0.02)
    assert strip.strengths[strip.origin] == 0 and len(strip.strengths) == 4
    assert torch.allclose(strip.moved[[0, 2]].double(), torch.ones(2, 2).double(), atol=1e-3)
    assert strip.on_manifold[:3].all() and not strip.on_manifold[3].any()
    # Clamped at 1: half a unit of the 4 asked for.
    assert torch.allclose(strip.moved[3].double(), torch.full((2,), 0.125).double(), atol=1e-3)
    assert "has left the manifold" in strip.verdict(3, 0) and "on the manifold" in strip.verdict(2, 0)
    expected = (10 * torch.tensor([0.9, 0.5, 0.5])).softmax(0)
    assert torch.allclose(strip.probabilities[2, 0], expected, atol=1e-4)


def test_only_the_chosen_positions_are_steered() -> None:
    features, red = _reddening()
    keep = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    keep[..., 2:4, 5] = True
    steered = steer(features, red, 0.5, keep)
    changed = (steered != features).any(1, keepdim=True)
    assert torch.equal(changed, keep.expand_as(changed))
    strip = steer_strip(Mosaic(), Cells(), features, red, [0.5], [1, 2], keep, batch_size=1)
    whole = steer_strip(Mosaic(), Cells(), features, red, [0.5], [1, 2], keep)
    assert torch.equal(strip.images, whole.images)
    start = image_score(red, features)
    assert torch.allclose(image_score(red, steered, keep), start + 0.5, atol=1e-5)
    assert torch.allclose(strip.asked, torch.stack([start, start + 0.5]), atol=1e-5)


def test_steering_the_sky_of_scenes_changes_the_sky_and_not_the_floor() -> None:
    images, factors, _ = render_scenes(3, range(160), 32)
    values = factors[:, [FACTOR_INDEX["sky"], FACTOR_INDEX["floor_colour"]]]
    schema = [FactorSpec("sky", "categorical", 4), FactorSpec("floor_colour", "categorical", 5)]
    backbone, night = Cells(), list(SKY_COLOURS).index("night")
    features = backbone(images)
    # Each factor is read where it is: a probe of the whole picture would take the sky for the floor.
    probes = [FactorProbe(schema[:1]).fit(features[:, :, 0].flatten(1), values[:, :1])]
    probes += [FactorProbe(schema[1:]).fit(features[:, :, 4:].flatten(1), values[:, 1:])]

    def read(pictures: torch.Tensor) -> torch.Tensor:
        found = backbone(pictures)
        return torch.cat(
            [probes[0].predict(found[:, :, 0].flatten(1)), probes[1].predict(found[:, :, 4:].flatten(1))], 1
        )

    others = (values[:, 0] != night).nonzero()[:40, 0]
    concept = class_means(features[:, :, :1], values[:, 0].long(), list(SKY_COLOURS))[night]
    top = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    top[..., 0, :] = True
    tests = {}
    for name, keep in (("top", top), ("everywhere", None)):
        strip = steer_strip(Mosaic(), backbone, features[others], concept, [2.0], list(range(40)), keep)
        before, after = read(strip.images[strip.origin]), read(strip.images[1])
        changed = factor_changes(before, after, schema, torch.ones(2))
        tests[name] = SteeringTest(after[:, 0] == night, changed, "sky")
    assert tests["top"].own >= 0.8 and tests["top"].others == 0
    assert tests["everywhere"].own >= 0.8 and tests["everywhere"].others > 0.2
    unreadable = torch.full_like(values, torch.nan)
    assert all(v.all() for v in factor_changes(values, unreadable, schema, torch.ones(2)).values())
    with pytest.raises(UserError, match="compared"):
        factor_changes(values, values[:, :1], schema, torch.ones(2))
