"""Each metric against an independent computation, its optimum, a degradation ladder, and failures."""

from __future__ import annotations

import itertools
import json
import logging
import math
import tempfile
from typing import NamedTuple

import numpy as np
import pytest
import scipy.linalg
import skimage.data
import skimage.metrics
import skimage.transform
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torchmetrics.functional.regression import cosine_similarity
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from featinv.backbones import load_backbone
from featinv.errors import UserError
from featinv.metrics import distribution, intervals
from featinv.metrics.collection import METRICS, derangement, same_class_partner
from featinv.metrics.distribution import (
    distribution_meta,
    frechet_distance,
    identification,
    kernel_distance,
    precision_recall,
)
from featinv.metrics.factors import FactorProbe
from featinv.metrics.features import (
    feature_cosine,
    label_accuracy,
    normalised_l2,
    position_cosine,
    share_of_span,
    topk_agreement,
)
from featinv.metrics.images import PSNR_CAP, embedding_diversity, pixel_diversity, psnr, ssim
from featinv.metrics.intervals import bootstrap_mean, bootstrap_r2, resampled_interval
from featinv.metrics.names import short_names
from featinv.metrics.networks import check_referee, inception_embedder, lpips_network
from featinv.metrics.rows import Judges, Row, evaluate_rows
from featinv.metrics.summary import DISTRIBUTION_METRICS, metric_name, summarise


class TinyNetwork(nn.Module):
    """A random two-layer network with the backbone contract; counts the images that it sees."""

    def __init__(self, seed: int, classes: int = 10, head_from_features: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(3, 16, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, padding=1)
            )
            self.head = nn.Linear(24, classes)
        self.head_from_features = head_from_features
        self.images_seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.images_seen += len(images)
        return self.body(images - 0.5)

    def logits_from(self, features: Tensor) -> Tensor:
        if not self.head_from_features:
            raise UserError("no head from this layer")
        return self.head(features.mean((2, 3)))

    def logits(self, images: Tensor) -> Tensor:
        return self.head(self.body(images - 0.5).mean((2, 3)))


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """Twelve 48-pixel crops of scikit-image's own photographs, (12, 3, 48, 48)."""
    crops = []
    for name in ("astronaut", "coffee", "chelsea"):
        photo = getattr(skimage.data, name)()[:296, :296]
        half = photo.shape[0] // 2
        for y, x in itertools.product((0, half), (0, half)):
            crops.append(skimage.transform.resize(photo[y : y + half, x : x + half], (48, 48), anti_aliasing=True))
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float()


@pytest.fixture
def backbone() -> TinyNetwork:
    return TinyNetwork(0)


@pytest.fixture
def referee() -> TinyNetwork:
    return TinyNetwork(1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- features ----------------------------------------------------------------------------------


def naive_cosine(a: list[float], b: list[float]) -> float:
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


def test_feature_metrics_equal_naive_loops() -> None:
    a, b = random(3, 4, 2, 3), random(3, 4, 2, 3, seed=1)
    flat = [naive_cosine(x.flatten().tolist(), y.flatten().tolist()) for x, y in zip(a, b, strict=True)]
    assert feature_cosine(a, b).tolist() == pytest.approx(flat, abs=1e-12)
    assert feature_cosine(a, b).tolist() == pytest.approx(
        cosine_similarity(a.flatten(1), b.flatten(1), "none").tolist(), abs=1e-6
    )
    for i in range(3):
        at = [naive_cosine(a[i, :, y, x].tolist(), b[i, :, y, x].tolist()) for y in range(2) for x in range(3)]
        for q in (0.5, 0.05):
            assert float(position_cosine(a, b, q)[i]) == pytest.approx(np.quantile(at, q), abs=1e-12)
        gap = math.sqrt(
            sum((y - x) ** 2 for x, y in zip(a[i].flatten().tolist(), b[i].flatten().tolist(), strict=True))
        )
        size = math.sqrt(sum(x**2 for x in a[i].flatten().tolist()))
        assert float(normalised_l2(a, b)[i]) == pytest.approx(gap / size, abs=1e-12)


def test_cosines_are_symmetric_and_scale_free_and_l2_is_neither() -> None:
    a, b = random(5, 4, 3, 3), random(5, 4, 3, 3, seed=1) * 2
    assert torch.equal(feature_cosine(a, b), feature_cosine(b, a))
    assert torch.allclose(position_cosine(a, 7 * b), position_cosine(b, a))
    assert not torch.allclose(normalised_l2(a, b), normalised_l2(b, a))
    assert torch.allclose(normalised_l2(a, 3 * a), torch.full((5,), 2.0, dtype=torch.float64))


def test_zero_maps_are_equal_to_each_other_and_unrelated_to_others() -> None:
    a, zero = random(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    for cosine in (feature_cosine, position_cosine):
        assert (cosine(zero, zero).item(), cosine(a, zero).item(), cosine(zero, a).item()) == (1, 0, 0)
    assert normalised_l2(zero, zero).item() == 0
    assert normalised_l2(zero, a).item() == math.inf
    assert normalised_l2(a, zero).item() == pytest.approx(1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_feature_reaches_every_feature_metric(bad: float) -> None:
    a, b = random(2, 4, 2, 2), random(2, 4, 2, 2, seed=1)
    b[1, 2, 0, 0] = bad
    for metric in (feature_cosine, normalised_l2, lambda x, y: position_cosine(x, y, 0.05)):
        assert metric(a, b).isfinite().tolist() == [True, False]
        assert feature_cosine(torch.zeros_like(a), b).isfinite().tolist() == [True, False]


def test_topk_agreement_equals_sorting_by_hand() -> None:
    a, b = random(50, 12), random(50, 12, seed=1)
    for k in (1, 5, 12):
        ranked = [sorted(range(12), key=lambda c, row=row: -row[c])[:k] for row in b.tolist()]
        naive = [
            float(max(range(12), key=row.__getitem__) in best) for row, best in zip(a.tolist(), ranked, strict=True)
        ]
        assert topk_agreement(a, b, k).tolist() == naive
        assert topk_agreement(a, a, k).min() == 1
    labels = torch.arange(50) % 12
    naive = [float(labels[i] in b[i].topk(5).indices) for i in range(50)]
    assert label_accuracy(b, labels, k=5).tolist() == naive


def test_constant_scores_do_not_agree_with_everything() -> None:
    original = torch.eye(6)
    assert topk_agreement(original, torch.zeros(6, 6), k=2).tolist() == [1, 1, 0, 0, 0, 0]


def test_agreement_is_nan_where_scores_or_labels_are_missing() -> None:
    scores = random(3, 6)
    broken = scores.clone()
    broken[1, 3] = math.nan
    for pair in ((scores, broken), (broken, scores)):
        assert topk_agreement(*pair, k=5).isnan().tolist() == [False, True, False]
    assert label_accuracy(broken, torch.tensor([0, 0, -1])).isnan().tolist() == [False, True, True]
    with pytest.raises(UserError, match="k=7"):
        topk_agreement(scores, scores, k=7)
    with pytest.raises(UserError, match="Label 6"):
        label_accuracy(scores, torch.tensor([0, 6, 1]))


def test_share_of_span_puts_floor_at_zero_and_ceiling_at_one() -> None:
    assert share_of_span(0.43, 0.43, 0.86) == 0
    assert share_of_span(0.86, 0.43, 0.86) == 1
    assert torch.allclose(share_of_span(torch.tensor([0.3, 0.5]), 0.4, 0.6), torch.tensor([-0.5, 0.5]))
    with pytest.raises(UserError, match="ceiling"):
        share_of_span(0.5, 0.5, 0.5)


# --- images ------------------------------------------------------------------------------------


def test_psnr_and_ssim_equal_scikit_image(photos: Tensor) -> None:
    noisy = (photos + 0.1 * random(*photos.shape).float()).clamp(0, 1)
    for i in range(3):
        a, b = photos[i].double().numpy(), noisy[i].double().numpy()
        decibels = skimage.metrics.peak_signal_noise_ratio(a, b, data_range=1)
        _, ssim_map = skimage.metrics.structural_similarity(
            *(a, b),
            data_range=1,
            channel_axis=0,
            gaussian_weights=True,
            use_sample_covariance=False,
            full=True,
        )
        assert float(psnr(photos, noisy)[i]) == pytest.approx(decibels, abs=1e-6)

        assert float(ssim(photos, noisy)[i]) == pytest.approx(ssim_map.mean(), abs=0.01)


def test_identical_images_reach_a_finite_optimum(photos: Tensor) -> None:
    assert psnr(photos, photos).eq(PSNR_CAP).all()
    assert torch.allclose(ssim(photos, photos), torch.ones(12, dtype=torch.float64))
    assert torch.equal(psnr(photos, 1 - photos), psnr(1 - photos, photos))
    assert torch.allclose(ssim(photos, 1 - photos), ssim(1 - photos, photos))


def test_image_metrics_reject_sizes_that_differ_and_keep_nan_in_its_row(photos: Tensor) -> None:
    with pytest.raises(UserError, match="resize"):
        psnr(photos, photos[..., :-1])
    with pytest.raises(UserError, match="11 x 11"):
        ssim(photos[..., :8, :8], photos[..., :8, :8])
    broken = photos.clone()
    broken[2, 0, 5, 5] = math.nan
    for metric in (psnr, ssim):
        assert metric(photos, broken).isnan().nonzero().flatten().tolist() == [2]


def test_diversity_equals_a_loop_over_pairs() -> None:
    samples, embeddings = random(2, 4, 3, 5, 5).sigmoid(), random(2, 4, 7)
    for n in range(2):
        pairs = list(itertools.combinations(range(4), 2))
        rmse = [float((samples[n, i] - samples[n, j]).square().mean().sqrt()) for i, j in pairs]
        far = [1 - naive_cosine(embeddings[n, i].tolist(), embeddings[n, j].tolist()) for i, j in pairs]
        assert float(pixel_diversity(samples)[n]) == pytest.approx(np.mean(rmse), abs=1e-12)
        assert float(embedding_diversity(embeddings)[n]) == pytest.approx(np.mean(far), abs=1e-12)
    assert pixel_diversity(samples[:, :1].repeat(1, 3, 1, 1, 1)).eq(0).all()
    with pytest.raises(UserError, match="K >= 2"):
        pixel_diversity(samples[:, :1])


# --- distributions -----------------------------------------------------------------------------


class PassThrough(nn.Module):
    num_features = 6

    def forward(self, embeddings: Tensor) -> Tensor:
        return embeddings


def with_moments(n: int, mean: Tensor, std: Tensor, seed: int) -> Tensor:
    """A sample whose mean is exactly `mean` and whose covariance is exactly diag(std^2)."""
    sample = random(n, len(mean), seed=seed)
    orthonormal = torch.linalg.qr(sample - sample.mean(0)).Q
    return orthonormal * math.sqrt(n - 1) * std + mean


def test_frechet_distance_of_diagonal_gaussians_has_its_closed_form() -> None:
    mean_a, mean_b = torch.tensor([0.0, 1, 2, 3]).double(), torch.tensor([1.0, 1, 0, 3]).double()
    std_a, std_b = torch.tensor([1.0, 2, 0.5, 0]).double(), torch.tensor([3.0, 2, 1, 0.25]).double()
    expected = float((mean_a - mean_b).square().sum() + (std_a - std_b).square().sum())
    a, b = with_moments(40, mean_a, std_a, 0), with_moments(60, mean_b, std_b, 1)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("n", [5, 50])  # 5 < D = 6: both covariances are singular
def test_frechet_distance_equals_sqrtm_and_torchmetrics(n: int) -> None:
    a, b = random(n, 6), random(n, 6, seed=1) @ random(6, 6, seed=2) + 0.5
    x, y = a.numpy(), b.numpy()
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # sqrt(S) T sqrt(S) is symmetric, so its root comes from eigenvalues even when S is singular.
    values, vectors = np.linalg.eigh(s)
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ t @ root).clip(0)).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    if n > 6:
        assert np.trace(scipy.linalg.sqrtm(s @ t)).real == pytest.approx(cross, rel=1e-9)
    theirs = FrechetInceptionDistance(feature=PassThrough())
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    assert frechet_distance(a, b) == pytest.approx(float(theirs.compute()), rel=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def kernel(x: Tensor, y: Tensor) -> float:
    return (float(x @ y) / len(x) + 1) ** 3


def naive_kid(a: Tensor, b: Tensor) -> float:
    xx = [kernel(x, y) for x, y in itertools.permutations(a, 2)]
    yy = [kernel(x, y) for x, y in itertools.permutations(b, 2)]
    return float(np.mean(xx) + np.mean(yy) - 2 * np.mean([kernel(x, y) for x in a for y in b]))


def test_kernel_distance_equals_naive_loops_and_torchmetrics() -> None:
    a, b = random(9, 6), random(9, 6, seed=1) + 0.3
    assert kernel_distance(a, b) == pytest.approx(naive_kid(a, b), rel=1e-12)
    theirs = KernelInceptionDistance(feature=PassThrough(), subsets=1, subset_size=9)
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    assert kernel_distance(a, b) == pytest.approx(float(theirs.compute()[0]), rel=1e-9)
    everything = torch.arange(9)[None]
    assert float(distribution.kernel_resampled(a, b, everything, everything)) == pytest.approx(
        naive_kid(a, b), rel=1e-9
    )


def test_kernel_distance_is_unbiased_and_frechet_is_not() -> None:
    draws = [(random(40, 6, seed=2 * s), random(40, 6, seed=2 * s + 1)) for s in range(150)]
    kid = torch.tensor([kernel_distance(a, b) for a, b in draws])
    assert abs(kid.mean()) < 3 * kid.std() / math.sqrt(len(kid))
    assert kid.min() < 0 < kid.max()
    assert min(frechet_distance(a, b) for a, b in draws[:20]) > 0.1
    shifted = [kernel_distance(a, b + 0.5) for a, b in draws[:20]]
    assert min(shifted) > float(kid.mean() + kid.std())


def naive_paired_kid(a: Tensor, b: Tensor) -> float:
    others = list(itertools.permutations(range(len(a)), 2))
    parts = [np.mean([kernel(x[i], y[j]) for i, j in others]) for x, y in ((a, a), (b, b), (a, b))]
    return float(parts[0] + parts[1] - 2 * parts[2])


def test_kernel_distance_of_pairs_leaves_out_own_partners_and_so_what_they_have_in_common() -> None:
    a, b = random(9, 6), random(9, 6, seed=1) + 0.3
    assert kernel_distance(a, b, paired=True) == pytest.approx(naive_paired_kid(a, b), rel=1e-9)
    with pytest.raises(UserError, match="no pairs"):
        kernel_distance(a, b[:8], paired=True)
    # Nine tenths in common, one distribution: 0 is right, and what counts own partners says less.
    kids = []
    for s in range(60):
        real, other = random(40, 6, seed=2 * s), random(40, 6, seed=2 * s + 1)
        near = 0.9 * real + (1 - 0.9**2) ** 0.5 * other
        kids.append([kernel_distance(real, near, paired=paired) for paired in (True, False)])
        figures = summarise({}, {"net": real}, {"net": near}, distribution_resamples=2)
        assert figures["kid_net"]["value"] == pytest.approx(kids[-1][0])
    right, low = torch.tensor(kids).T
    assert abs(right.mean()) < 3 * right.std() / math.sqrt(len(kids))
    assert low.mean() < -3 * low.std() / math.sqrt(len(kids))


def test_kernel_distance_subsets_are_seeded_and_agree_with_the_whole() -> None:
    a, b = random(200, 6), random(150, 6, seed=1) + 0.5
    first, again = (kernel_distance(a, b, subset_size=50, seed=3) for _ in range(2))
    assert first == again != kernel_distance(a, b, subset_size=50, seed=4)
    every = torch.arange(200)[None], torch.arange(150)[None]
    whole = float(distribution.kernel_resampled(a, b, *every))
    assert first == pytest.approx(whole, rel=0.2)


def test_blocks_do_not_change_pairwise_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = random(20, 4), random(20, 4, seed=1)
    picks = intervals.resample_indices(20, 20, paired=False, resamples=5)
    whole = distribution.kernel_resampled(a, b, *picks), *precision_recall(a, b)
    monkeypatch.setattr(distribution, "_BLOCK", 7)
    for x, y in zip(whole, (distribution.kernel_resampled(a, b, *picks), *precision_recall(a, b)), strict=True):
        assert torch.allclose(x, y, rtol=1e-12)


def test_kernel_resamples_never_pair_an_image_with_its_copy() -> None:
    a, b = random(8, 4), random(8, 4, seed=1)
    rows, columns = torch.tensor([[0, 0, 0, 1, 2, 2, 5, 7]]), torch.tensor([[3, 3, 1, 1, 0, 6, 6, 6]])

    def within(x: Tensor, picks: list[int]) -> float:
        pairs = [(i, j) for i, j in itertools.product(picks, repeat=2) if i != j]
        return float(np.mean([(float(x[i] @ x[j]) / 4 + 1) ** 3 for i, j in pairs]))

    cross = np.mean([(float(a[i] @ b[j]) / 4 + 1) ** 3 for i in rows[0].tolist() for j in columns[0].tolist()])
    expected = within(a, rows[0].tolist()) + within(b, columns[0].tolist()) - 2 * cross
    assert float(distribution.kernel_resampled(a, b, rows, columns)) == pytest.approx(float(expected), rel=1e-10)


def test_precision_recall_equals_naive_loops_and_tells_them_apart() -> None:
    a, b = random(25, 3), random(20, 3, seed=1) * 0.6

    def inside(points: Tensor, support: Tensor) -> list[float]:
        radii = [sorted(float((s - t).norm()) for t in support)[3] for s in support]  # [0] is the point itself
        return [float(any((p - s).norm() <= r for s, r in zip(support, radii, strict=True))) for p in points]

    precision, recall = precision_recall(a, b)
    assert precision.tolist() == inside(b, a)
    assert recall.tolist() == inside(a, b)
    narrow_precision, narrow_recall = precision_recall(random(200, 2), random(200, 2, seed=1) * 0.1)
    assert narrow_precision.mean() > 0.95 > 0.2 > narrow_recall.mean()
    assert precision_recall(a, a)[0].min() == 1


def test_distribution_metrics_reject_what_would_mislead(caplog: pytest.LogCaptureFixture) -> None:
    a = random(30, 6)
    broken = a.clone()
    broken[3, 2] = math.nan
    for metric in (frechet_distance, kernel_distance, precision_recall):
        with pytest.raises(UserError, match="1 of 30 reconstruction embeddings are not finite"):
            metric(a, broken)
        with pytest.raises(UserError, match="one network"):
            metric(a, a[:, :5])
        with pytest.raises(UserError, match="at least"):
            metric(a, a[:1])
    with caplog.at_level(logging.WARNING, logger="featinv.metrics.distribution"):
        frechet_distance(a, a)
    assert "30 images (< 2048)" in caplog.text
    caplog.clear()
    frechet_distance(random(2048, 2), random(2048, 2, seed=1))
    assert not caplog.records


def test_identification_equals_a_search_by_hand() -> None:
    real = random(30, 6)
    fake = real + 0.7 * random(30, 6, seed=1)
    expected = []
    for i in range(30):
        cosines = [naive_cosine(fake[i].tolist(), other.tolist()) for other in real]
        expected.append(float(max(range(30), key=cosines.__getitem__) == i))
    found = identification(real, fake)
    assert found.tolist() == expected and 0 < found.mean() < 1
    assert identification(real, real).tolist() == [1.0] * 30
    assert identification(real, real.roll(1, 0)).tolist() == [0.0] * 30
    twice = torch.cat([real[:3], real[:3]])
    assert identification(twice, twice).tolist() == [0.5] * 6  # an equally near other original
    assert identification(real, fake[:5]).tolist() == expected[:5]  # the other 25 are candidates only
    fewer = identification(real, fake, candidates=4)
    assert bool((fewer >= found).all()) and fewer.mean() > found.mean()
    with pytest.raises(UserError, match="at least as many"):
        identification(real[:5], fake)
    with pytest.raises(UserError, match="between 2 and"):
        identification(real, fake, candidates=31)


def test_lpips_equals_its_formula_and_climbs_with_damage(photos: Tensor) -> None:
    lpips = lpips_network(pretrained=False)
    worse = [(photos + level * random(*photos.shape).float()).clamp(0, 1) for level in (0.0, 0.05, 0.2, 0.5)]
    rungs = torch.stack([lpips(photos, w) for w in worse])
    assert rungs[0].abs().max() == 0 and (rungs[1:] > rungs[:-1]).all()
    network = lpips.network
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    pair = [((2 * x - 1) - shift[:, None, None]) / scale[:, None, None] for x in (photos[:2], worse[2][:2])]
    expected = torch.zeros(2)
    for number in range(5):
        pair = [getattr(network.net, f"slice{number + 1}")(x) for x in pair]
        unit = [x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt() for x in pair]
        weight = network.lins[number].model[-1].weight[0]
        expected += ((unit[0] - unit[1]).square() * weight).sum(1).mean((1, 2))
    assert torch.allclose(rungs[2, :2], expected.double(), atol=1e-5)


def test_lpips_without_its_weights_is_a_clear_error(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match="AlexNet"):
        lpips_network()


def test_names_and_meta_say_which_network() -> None:
    assert [metric_name(kind, "mobilenetv2") for kind in ("fd", "kid")] == [
        "fd_mobilenetv2",
        "kid_mobilenetv2",
    ]
    assert [metric_name(kind, "inception") for kind in ("fd", "kid")] == ["fid", "kid"]
    meta = distribution_meta("mobilenetv2", 10, 12, antialias=True)
    assert (meta["n_real"], meta["n_fake"], meta["antialias"], meta["network"]) == (
        10,
        12,
        True,
        "mobilenetv2",
    )
    assert json.loads(json.dumps(meta)) == meta


def test_missing_inception_weights_are_a_clear_error(tmp_path) -> None:
    with pytest.raises(UserError, match="no Inception weights"):
        inception_embedder(tmp_path / "none.pth")


# --- intervals ---------------------------------------------------------------------------------


def test_bootstrap_interval_is_close_to_normal_theory_and_seeded() -> None:
    values = random(400) * 2 + 5
    interval = bootstrap_mean(values, resamples=4000)
    half = 1.96 * float(values.std()) / math.sqrt(400)
    assert interval["value"] == pytest.approx(float(values.mean()), abs=1e-12)
    assert interval["low"] == pytest.approx(float(values.mean()) - half, abs=0.1 * half)
    assert interval["high"] == pytest.approx(float(values.mean()) + half, abs=0.1 * half)
    assert interval["n"] == 400 and "n_nonfinite" not in interval
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says() -> None:
    draws = [bootstrap_mean(random(60, seed=s).exp(), resamples=400, seed=s) for s in range(200)]
    covered = sum(d["low"] <= math.exp(0.5) <= d["high"] for d in draws) / 200  # skewed values on purpose
    assert 0.85 <= covered <= 0.99


def test_chunks_bound_the_memory_and_keep_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    values = random(50)
    monkeypatch.setattr(intervals, "_CHUNK", 50 * 7)
    chunked = bootstrap_mean(values, resamples=4000)
    half = 1.96 * float(values.std()) / math.sqrt(50)
    assert chunked["high"] - chunked["low"] == pytest.approx(2 * half, rel=0.1)


def test_values_that_are_not_finite_are_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    values = torch.tensor([1.0, 2.0, math.nan, 3.0, math.inf])
    with caplog.at_level(logging.WARNING, logger="featinv.metrics.intervals"):
        interval = bootstrap_mean(values)
    assert (interval["value"], interval["n"], interval["n_nonfinite"]) == (2.0, 3, 2)
    assert "2 of 5" in caplog.text
    nothing = bootstrap_mean(torch.full((3,), math.nan))
    assert nothing == {"value": None, "low": None, "high": None, "n": 0, "n_nonfinite": 3}
    with pytest.raises(UserError, match="no images"):
        bootstrap_mean(torch.zeros(0))


def test_bootstrap_r2_equals_its_formula() -> None:
    truth, noise = random(300), random(300, seed=1)
    predicted = truth + 0.5 * noise
    interval = bootstrap_r2(truth, predicted)
    expected = 1 - (predicted - truth).square().sum() / (truth - truth.mean()).square().sum()
    assert interval["value"] == pytest.approx(float(expected), abs=1e-12)
    assert interval["low"] < interval["value"] < interval["high"]
    assert bootstrap_r2(truth, truth)["low"] == 1
    assert bootstrap_r2(torch.ones(5), torch.ones(5))["value"] is None


def test_interval_of_a_distance_has_the_spread_of_fresh_samples() -> None:
    fresh = [kernel_distance(random(80, 4, seed=2 * s), random(80, 4, seed=2 * s + 1) + 0.6) for s in range(100)]
    spread = float(np.std(fresh))
    widths = []
    for s in range(10):
        real, fake = random(80, 4, seed=900 + 2 * s), random(80, 4, seed=901 + 2 * s) + 0.6
        kid = summarise({}, {"net": real}, {"net": fake}, distribution_resamples=200)["kid_net"]
        assert kid["low"] < kid["value"] < kid["high"]
        widths.append(kid["high"] - kid["low"])
    assert np.mean(widths) == pytest.approx(2 * 1.96 * spread, rel=0.35)


@pytest.mark.parametrize("resamples", [2, 5, 50])
def test_few_resamples_give_an_interval_that_covers_as_often_as_it_says(resamples: int) -> None:
    generator = torch.Generator().manual_seed(resamples)
    truth, covered = 3.0, 0
    for _ in range(2000):  # of an ideal bootstrap, whose resamples lie about the value as that lies about the truth
        value = truth + float(torch.randn((), generator=generator))
        interval = resampled_interval(value, value + 0.7 + torch.randn(resamples, generator=generator), 9)
        covered += interval["low"] <= truth <= interval["high"]
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


def test_resamples_that_are_not_finite_are_left_out_and_too_few_give_no_bounds() -> None:
    samples = torch.tensor([1.0, math.nan, 2.0, math.inf])
    assert resampled_interval(1.5, samples, 4) == resampled_interval(1.5, samples[[0, 2]], 4)
    assert resampled_interval(1.5, samples[:2], 4) == {"value": 1.5, "low": None, "high": None, "n": 4}
    real, fake = random(4, 6), random(4, 6, seed=1)  # of four images one is drawn four times now and then
    kid = summarise({}, {"net": real}, {"net": fake}, distribution_resamples=5)["kid_net"]
    assert all(math.isfinite(kid[bound]) for bound in ("low", "value", "high"))


# --- factors -----------------------------------------------------------------------------------

SCHEMA = [("shape", "categorical", 3), ("size", "continuous", 0)]


def factor_data(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Embeddings (n, 8) that hold a class and a number linearly, and their (n, 2) values."""
    generator = torch.Generator().manual_seed(seed)
    shape = torch.randint(3, (n,), generator=generator)
    size = torch.rand(n, generator=generator, dtype=torch.float64)
    clean = torch.cat([nn.functional.one_hot(shape, 3).double(), size[:, None]], dim=1)
    return clean @ random(4, 8, seed=99) + 3, torch.stack([shape.double(), size], dim=1)


def test_factor_probe_recovers_what_is_there_and_not_what_is_shuffled() -> None:
    probe = FactorProbe(SCHEMA, ridge=1e-6).fit(*factor_data(200, 0))
    embeddings, values = factor_data(100, 1)
    good = probe.score(embeddings, values)
    assert good["shape"]["value"] == 1
    assert good["size"]["value"] > 0.999
    shuffled = probe.score(embeddings[derangement(100)], values)
    assert shuffled["shape"]["value"] < 0.6
    assert shuffled["size"]["value"] < 0.2


@pytest.mark.parametrize("n", [6, 40])  # fewer and more rows than the 8 dimensions
def test_factor_probe_is_the_minimum_of_its_penalised_loss(n: int) -> None:
    embeddings, values = factor_data(n, 0)
    embeddings = embeddings + random(n, 8, seed=5)
    probe = FactorProbe(SCHEMA[1:], ridge=0.3).fit(embeddings, values[:, 1:])
    x = (embeddings - embeddings.mean(0)) / embeddings.std(0, correction=0)
    # Least squares with the penalty as extra rows; the free bias is an unpenalised column of ones.
    rows = torch.cat([torch.cat([x, torch.ones(n, 1).double()], 1), torch.eye(9).double()[:8] * math.sqrt(0.3 * n)])
    targets = torch.cat([values[:, 1], torch.zeros(8).double()])
    solution = np.linalg.lstsq(rows.numpy(), targets.numpy(), rcond=None)[0]
    expected = rows[:n].numpy() @ solution
    assert probe.predict(embeddings)[:, 0].tolist() == pytest.approx(expected.tolist(), abs=1e-9)


def test_masked_factors_are_left_out() -> None:
    embeddings, values = factor_data(120, 0)
    masked = values.clone()
    masked[::2, 0] = math.nan
    masked[:, 1] = math.nan
    probe = FactorProbe(SCHEMA).fit(embeddings, masked)
    only = FactorProbe(SCHEMA[:1]).fit(embeddings, masked[:, :1])
    assert torch.equal(probe.predict(embeddings)[:, 0], only.predict(embeddings)[:, 0])
    assert probe.predict(embeddings)[:, 1].isnan().all()
    scores = probe.score(embeddings, masked)
    assert set(scores) == {"shape"}
    assert scores["shape"]["n"] == 60


def test_an_embedding_that_is_not_finite_has_no_factors() -> None:
    embeddings, values = factor_data(30, 0)
    probe = FactorProbe(SCHEMA).fit(embeddings, values)
    broken = embeddings.clone()
    broken[3, 0], broken[5, 2] = math.nan, math.inf
    found, whole = probe.predict(broken), probe.predict(embeddings)
    assert found[[3, 5]].isnan().all()
    kept = [i for i in range(30) if i not in (3, 5)]
    assert torch.equal(found[kept], whole[kept])
    wrong = values.clone()
    wrong[3, 0] = 0  # the class that the largest of no scores would be
    assert probe.class_accuracy(found, wrong)[3] == 0


def test_factor_probe_rejects_bad_input() -> None:
    embeddings, values = factor_data(20, 0)
    with pytest.raises(UserError, match="not fitted"):
        FactorProbe(SCHEMA).predict(embeddings)
    with pytest.raises(UserError, match="kind 'colour'"):
        FactorProbe([("a", "colour", 2)])
    with pytest.raises(UserError, match="outside its classes"):
        FactorProbe(SCHEMA).fit(embeddings, values + 1)
    with pytest.raises(UserError, match="schema of 2"):
        FactorProbe(SCHEMA).fit(embeddings, values[:, :1])
    with pytest.raises(UserError, match="not finite"):
        FactorProbe(SCHEMA).fit(embeddings / 0, values)


# --- the whole pass ----------------------------------------------------------------------------

OPTIMUM = {"l2": 0.0, "psnr": PSNR_CAP}
# What needs no labels, no LPIPS and no network of the inverter's own.
POSSIBLE = {n for n in METRICS if "label" not in n and not n.startswith(("own_", "lpips"))}
RISING = ("cosine", "cosine_median", "cosine_q05", "referee_cosine", "psnr", "ssim")


class WholePass(NamedTuple):
    """Values (N,) by metric, and both sides' embeddings (N, D) by network."""

    per_image: dict[str, Tensor]
    embeddings_real: dict[str, Tensor]
    embeddings_fake: dict[str, Tensor]


def whole_pass(
    originals: Tensor, pictures: Tensor, backbone: nn.Module, referee: nn.Module | None = None, batch_size=32, **judges
) -> WholePass:
    """One row through the pass over all rows."""
    with tempfile.TemporaryDirectory() as folder:
        numbers = evaluate_rows(
            lambda indices: originals[indices],
            len(originals),
            {"row": Row(lambda indices: pictures[indices], range(len(pictures)))},
            Judges(backbone, referee, **judges),
            f"{folder}/numbers",
            batch_size,
        )
        return WholePass(numbers.values("row"), numbers.embeddings(), numbers.embeddings("row"))


def test_identical_images_give_every_metric_its_optimum(photos: Tensor, backbone, referee) -> None:
    result = whole_pass(photos, photos, backbone, referee)
    assert set(result.per_image) == POSSIBLE
    for name, values in result.per_image.items():
        assert values.shape == (12,)
        assert values.tolist() == pytest.approx([OPTIMUM.get(name, 1.0)] * 12, abs=1e-6), name
    figures = summarise(*result)
    assert figures["fd_mobilenetv2"]["value"] == pytest.approx(0, abs=1e-6)
    assert figures["precision_mobilenetv2"]["value"] == 1


@pytest.mark.parametrize("kind", ["blur", "noise"])
def test_metrics_fall_down_a_degradation_ladder(photos: Tensor, backbone, referee, kind: str) -> None:
    noise = random(*photos.shape).float()
    rungs = []
    for level in (0.5, 1.0, 2.0, 4.0):
        if kind == "blur":
            worse = torch.from_numpy(gaussian_filter(photos.numpy(), sigma=(0, 0, level, level)))
        else:
            worse = (photos + 0.05 * level * noise).clamp(0, 1)
        rungs.append(summarise(*whole_pass(photos, worse, backbone, referee), distribution_resamples=0))
    for name in (*RISING, "l2", "fd_mobilenetv2", "kid_mobilenetv2"):
        ladder = [rung[name]["value"] for rung in rungs]
        assert ladder == sorted(ladder, reverse=name in RISING), (name, ladder)
        assert len(set(ladder)) == 4, (name, ladder)


def test_batches_and_order_change_nothing(photos: Tensor, backbone, referee) -> None:
    worse = (photos + 0.1 * random(*photos.shape).float()).clamp(0, 1)
    whole = whole_pass(photos, worse, backbone, referee, batch_size=12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    pieces = whole_pass(photos, worse, backbone, referee, batch_size=5)
    shuffled = whole_pass(photos[order], worse[order], backbone, referee, batch_size=7)
    for name, values in whole.per_image.items():
        assert torch.allclose(values, pieces.per_image[name], atol=1e-5), name
        assert torch.allclose(values[order], shuffled.per_image[name], atol=1e-5), name
    fd = [
        frechet_distance(r.embeddings_real["mobilenetv2"], r.embeddings_fake["mobilenetv2"]) for r in (whole, shuffled)
    ]
    assert fd[0] == pytest.approx(fd[1], rel=1e-4)


def test_each_network_sees_each_image_once(photos: Tensor, backbone, referee) -> None:
    whole_pass(photos, photos, backbone, referee, batch_size=5)
    assert (backbone.images_seen, referee.images_seen) == (24, 24)


def test_only_values_and_vectors_are_kept(photos: Tensor, backbone, referee) -> None:
    result = whole_pass(photos, photos, backbone, referee, embedders={"rgb": lambda x: x.mean((2, 3))})
    assert {tuple(v.shape) for v in result.per_image.values()} == {(12,)}
    assert {k: tuple(v.shape) for k, v in result.embeddings_fake.items()} == {
        "rgb": (12, 3),
        "mobilenetv2": (12, 24),
    }


def test_logits_come_from_the_image_where_the_layer_has_no_head(photos: Tensor) -> None:
    worse = photos.flip(3)
    direct = whole_pass(photos, worse, TinyNetwork(0))
    around = whole_pass(photos, worse, TinyNetwork(0, head_from_features=False))
    for name in ("top1_agreement", "top5_agreement"):
        assert torch.equal(direct.per_image[name], around.per_image[name])


def test_floor_pairs_every_image_with_another_one() -> None:
    for n in (2, 3, 50):
        partner = derangement(n, seed=n)
        assert sorted(partner.tolist()) == list(range(n))
        assert not (partner == torch.arange(n)).any()
    assert torch.equal(derangement(50, 1), derangement(50, 1))
    assert not torch.equal(derangement(50, 1), derangement(50, 2))
    with pytest.raises(UserError, match="two images"):
        derangement(1)


def test_partners_of_the_same_class_are_others_of_that_class() -> None:
    labels = torch.tensor([0, 1, 0, 2, 1, 0, -1, -1])
    partner = same_class_partner(labels, seed=1)
    assert partner[3] == partner[6] == partner[7] == -1  # alone in its class, or unknown
    paired = (partner >= 0).nonzero().flatten()
    assert (labels[partner[paired]] == labels[paired]).all() and (partner[paired] != paired).all()
    assert sorted(partner[paired].tolist()) == paired.tolist()
    assert torch.equal(partner, same_class_partner(labels, seed=1))


def test_labels_are_read_in_order_across_batches(photos: Tensor, backbone) -> None:
    labels = torch.arange(12) % 10
    labels[4] = -1
    values = whole_pass(photos, photos, backbone, labels=labels, batch_size=5).per_image["label_accuracy"]
    best = backbone.logits(photos).argmax(1)
    expected = [math.nan if t == -1 else float(t == p) for t, p in zip(labels.tolist(), best.tolist(), strict=True)]
    assert values.tolist() == pytest.approx(expected, nan_ok=True)


def test_a_broken_reconstruction_is_counted_and_never_averaged(photos: Tensor, backbone, referee) -> None:
    broken = photos.clone()
    broken[7] = math.nan
    figures = summarise(*whole_pass(photos, broken, backbone, referee, batch_size=5))
    for name in METRICS:
        if name in POSSIBLE:
            assert (figures[name]["n"], figures[name]["n_nonfinite"]) == (11, 1), name
    for kind in DISTRIBUTION_METRICS:
        assert figures[f"{kind}_mobilenetv2"]["value"] is None
        assert figures[f"{kind}_mobilenetv2"]["n_nonfinite"] == 1


def test_evaluation_rejects_what_does_not_fit(photos: Tensor, backbone) -> None:
    with pytest.raises(UserError, match="no images"):
        whole_pass(photos[:0], photos[:0], backbone)
    with pytest.raises(UserError, match="different networks"):
        summarise({}, {"a": random(5, 2)}, {"b": random(5, 2)})


def test_a_network_is_no_referee_of_itself_at_whatever_layer() -> None:
    inverted, same, other = (
        load_backbone(n, x)
        for n, x in (("mobilenetv2", "blocks.4"), ("mobilenetv2", None), ("efficientnet_lite0", None))
    )
    check_referee(other, inverted)
    check_referee(None, inverted)
    with pytest.raises(UserError, match="the very network that is inverted"):
        check_referee(same, inverted)


def test_summary_has_the_schema_of_metrics_json(photos: Tensor, backbone, referee) -> None:
    result = whole_pass(photos, photos.flip(3), backbone, referee, referee_name="other")
    figures = summarise(*result, seed=1, distribution_resamples=10)
    assert {"fd_other", "kid_other", "precision_other", "recall_other"} <= set(figures)
    for name, interval in figures.items():
        assert set(interval) == {"value", "low", "high", "n"}, name
        assert interval["n"] == 12
        assert interval["low"] <= interval["value"] <= interval["high"], name
    assert (
        json.loads(json.dumps(figures, allow_nan=False)) == figures == summarise(*result, 1, distribution_resamples=10)
    )
    assert summarise(*result, distribution_resamples=0)["fd_other"]["low"] is None


def test_rows_have_short_names_that_are_never_one() -> None:
    assert short_names(["runs/a", "scenes64/b", "optimisation"]) == {
        "runs/a": "a",
        "scenes64/b": "b",
        "optimisation": "optimisation",
    }
    assert short_names(["scenes64/a", "photos64/a", "a"]) == {
        "scenes64/a": "scenes64-a",
        "photos64/a": "photos64-a",
        "a": "a",
    }
    assert short_names(["x/y/a+refined", "x/z/a+refined", "x/z/a"]) == {
        "x/y/a+refined": "y-a+refined",
        "x/z/a+refined": "z-a+refined",
        "x/z/a": "a",
    }
    assert short_names([]) == {}
    for names in (["runs/a", "/runs/a"], ["x/b-a", "b/a", "c/a"]):
        with pytest.raises(UserError, match="would both be the row"):
            short_names(names)
