"""Corruptions, foreign pictures, the robustness run and the curves over layers."""

import json

import numpy as np
import pytest
import torch
from cells import Cells
from test_benchmark import Headless, Painter, items

from eval.robustness import attack, chosen_conditions, corruption, foreign, left_out
from featinv.attribution.transfer import predict
from featinv.config import CONFIG_ROOT, load_config
from featinv.data.corruptions import CORRUPTIONS, _plasma, corrupt
from featinv.data.outliers import OUTLIERS, outlier, sketch
from featinv.errors import UserError
from featinv.image import load_png
from featinv.inverters.reconstruct import Reconstructions
from featinv.metrics.features import feature_cosine
from featinv.metrics.robustness import Condition, Robustness
from featinv.report.layers import Point, layer_points, write_layers
from featinv.report.robustness import AGAINST, draw_curves, write_robustness


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    return outlier("photos", 1, 64)


@pytest.mark.parametrize("name", sorted(CORRUPTIONS))
def test_every_corruption_is_a_seeded_picture_that_gets_worse(photo, name) -> None:
    rungs = [corrupt(photo, name, severity, seed=3) for severity in (1, 3, 5)]
    for rung in rungs:
        assert rung.shape == photo.shape and rung.min() >= 0 and rung.max() <= 1 and rung.isfinite().all()
    assert torch.equal(rungs[1], corrupt(photo, name, 3, seed=3))
    far = [float((rung - photo).square().mean()) for rung in rungs]
    assert far[0] > 1e-5
    if name not in ("elastic_transform", "snow", "fog"):  # their parameters change in kind, not only in strength
        assert far == sorted(far)


def test_corruptions_are_their_formulas(photo) -> None:
    grey = torch.full((3, 64, 64), 0.5)
    assert float((corrupt(grey, "gaussian_noise", 1) - 0.5).std()) == pytest.approx(0.08, rel=0.03)
    assert float((corrupt(grey, "shot_noise", 1) - 0.5).std()) == pytest.approx((0.5 / 60) ** 0.5, rel=0.05)
    impulses = corrupt(grey, "impulse_noise", 5)
    assert float((impulses != 0.5).float().mean()) == pytest.approx(0.27, abs=0.02)
    assert set(impulses.unique().tolist()) == {0.0, 0.5, 1.0}
    mean = photo.mean((1, 2), keepdim=True)
    expected = ((photo - mean) * 0.4 + mean).clamp(0, 1)
    assert torch.allclose(corrupt(photo, "contrast", 1), expected, atol=1e-5)
    brighter = corrupt(photo, "brightness", 2)
    assert torch.allclose(brighter.amax(0), (photo.amax(0) + 0.2).clamp(max=1), atol=1e-5)  # HSV's value is the maximum
    for name in ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "pixelate"):
        assert torch.allclose(corrupt(grey, name, 5), grey, atol=0.003), name  # a blur of one grey is that grey
    fractal = _plasma(256, 1.7, np.random.default_rng(0))
    new = []
    for step in (4, 2):  # what each halving adds to the mean of the four corners
        corners, half = fractal[::step, ::step], step // 2
        mean = (corners + np.roll(corners, -1, 0) + np.roll(corners, -1, 1) + np.roll(corners, (-1, -1), (0, 1))) / 4
        new.append((fractal[half::step, half::step] - mean).std())
    assert new[0] / new[1] == pytest.approx(1.7**2, rel=0.03) and fractal.min() == 0 and fractal.max() == 1
    dot = torch.zeros(3, 65, 65)
    dot[:, 32, 32] = 1
    blurred = corrupt(dot, "defocus_blur", 5)[0]
    disk = blurred > 1e-3
    assert blurred.sum().item() == pytest.approx(1, abs=1e-4) and disk.any(0).sum() >= 2 * 10 * 65 / 224 - 1
    assert torch.equal(disk, disk.T) and torch.equal(disk, disk.flip(0))
    with pytest.raises(UserError, match="gaussian_noise"):
        corrupt(photo, "gausian_noise", 1)
    with pytest.raises(UserError, match="severity"):
        corrupt(photo, "fog", 6)


def test_foreign_pictures_are_pictures_and_sketches_are_lines(photo) -> None:
    for kind in OUTLIERS:
        first, second = outlier(kind, 0, 32), outlier(kind, 1, 32)
        assert first.shape == (3, 32, 32) and first.min() >= 0 and first.max() <= 1
        assert torch.equal(first, outlier(kind, 0, 32)) and not torch.equal(first, second)
    lines = sketch(photo)
    assert lines.shape == photo.shape and torch.equal(lines[0], lines[2]) and lines.mean() > 0.6
    assert sketch(torch.full((3, 32, 32), 0.4)).min() == 1  # nothing to draw
    with pytest.raises(UserError, match="noise"):
        outlier("nois", 0, 32)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, backbone):
    out = tmp_path_factory.mktemp("robustness")
    conditions = [
        Condition("clean", "clean", lambda _index, clean: clean),
        *(corruption("gaussian_noise", severity, 0) for severity in (1, 5)),
        attack("fgsm", 8, backbone),
        foreign("sketches", 32),
        foreign("noise", 32),
    ]
    robustness = Robustness(Painter(), backbone, items(5), out, batch_size=4)
    return out, robustness, conditions, robustness.run(conditions)


def test_each_condition_is_compared_with_what_was_given_and_with_the_clean(finished, backbone) -> None:
    out, _, _, content = finished
    clean = torch.stack([load_png(out / "clean" / f"image-{i}.png") for i in range(5)])
    for name, found in content["conditions"].items():
        given = torch.stack([load_png(out / "inputs" / name / f"image-{i}.png") for i in range(5)])
        drawn = Reconstructions(out / "reconstructions" / name).samples(0)
        cosine = feature_cosine(backbone(given), backbone(drawn)).mean().item()
        assert found["given"]["cosine"]["value"] == pytest.approx(cosine, abs=1e-5)
        if name == "noise":
            assert "clean" not in found
            continue
        cosine = feature_cosine(backbone(clean), backbone(drawn)).mean().item()
        assert found["clean"]["cosine"]["value"] == pytest.approx(cosine, abs=1e-5)
        moved = feature_cosine(backbone(clean), backbone(given)).mean().item()
        assert found["input"]["cosine"]["value"] == pytest.approx(moved, abs=1e-5)
    same = content["conditions"]["clean"]
    assert same["given"] == same["clean"] and same["input"]["cosine"]["value"] == pytest.approx(1)
    noise = [content["conditions"][f"gaussian_noise-{s}"]["input"]["psnr"]["value"] for s in (1, 5)]
    assert noise[0] > noise[1] and json.loads((out / "robustness.json").read_text())["conditions"].keys() == set(
        content["conditions"]
    )


def test_an_attack_stays_in_its_ball_and_changes_what_is_seen(finished, backbone) -> None:
    out = finished[0]
    clean, given = (
        torch.stack([load_png(out / folder / f"image-{i}.png") for i in range(5)])
        for folder in ("clean", "inputs/fgsm-8of255")
    )
    assert float((given - clean).abs().max()) <= 8.5 / 255
    before = backbone.logits(clean).softmax(1).gather(1, predict(backbone, clean)[:, None])
    after = backbone.logits(given).softmax(1).gather(1, predict(backbone, clean)[:, None])
    assert (after < before).all()


def test_a_robustness_run_goes_on_and_its_page_is_whole(finished) -> None:
    out, robustness, conditions, content = finished
    robustness.inverter.asked = 0
    (out / "reconstructions" / "noise" / "samples" / "image-3_0.png").write_bytes(b"")
    assert robustness.run(conditions) == content
    assert robustness.inverter.asked == 4, "its own batch is drawn again, nothing else"
    write_robustness(out, content, "title")
    page = (out / "report.html").read_text()
    assert "gaussian_noise-5: drawn" in page and 'src="http' not in page and (out / "curves.png").stat().st_size > 5000
    assert (out / "table.md").read_text().count("\n| ") == len(conditions)


def test_all_conditions_of_the_configuration_exist(backbone) -> None:
    config = load_config(CONFIG_ROOT / "robustness.yaml")
    names = [c.name for c in chosen_conditions(config, backbone, 32, scenes=True)]
    assert len(names) == len(set(names)) == 1 + 5 * len(CORRUPTIONS) + 4 + 4 and "photos" in names
    assert "scenes" in [c.name for c in chosen_conditions(config, backbone, 32, scenes=False)]
    with pytest.raises(UserError, match="did you mean pgd"):
        attack("pgdd", 2, backbone)


def test_a_backbone_without_a_classifier_is_not_attacked_and_the_table_says_so(tmp_path, backbone) -> None:
    config = load_config(CONFIG_ROOT / "robustness.yaml", ["corruptions=[fog]", "severities=[1]", "ood=[]"])
    conditions = chosen_conditions(config, Headless(), 32, scenes=True)
    assert [c.name for c in conditions] == ["clean", "fog-1"]
    skipped = left_out(config, Headless(), Headless())
    robustness = Robustness(Painter(), Headless(), items(3), tmp_path, referee=Headless())
    content = robustness.run(conditions, {"skipped": skipped})
    for found in content["conditions"].values():
        assert set(found["given"]) == {"cosine", "referee_cosine", "psnr", "ssim"}
    write_robustness(tmp_path, content, "title")
    table = (tmp_path / "table.md").read_text()
    assert "skipped: class agreement, fgsm, pgd (the backbone has no classifier)" in table
    assert "skipped: the referee's class agreement" in table
    assert left_out(config, backbone, backbone) == []


def _metrics(rows: dict[str, tuple[str, float, float]]) -> dict:
    meta = {name: {"network": "net", "layer": layer, "depth": depth} for name, (layer, depth, _) in rows.items()}
    figure = {name: {"psnr": {"value": v, "low": v - 1, "high": v + 1, "n": 9}} for name, (_, _, v) in rows.items()}
    return {"meta": {"rows": meta}, "inverters": figure}


def test_layers_of_one_inverter_make_one_curve_in_the_order_of_depth(tmp_path) -> None:
    first = _metrics({"retrieval@final": ("final", 1.0, 12.0), "retrieval@blocks.1": ("blocks.1", 0.2, 15.0)})
    second = _metrics({"branch-blocks-1": ("blocks.1", 0.2, 20.0), "branch": ("final", 1.0, 14.0)})
    points = layer_points(first) + layer_points(second)
    assert {p.curve for p in points} == {"retrieval, net", "branch, net"}
    write_layers(tmp_path, points, None, "title")
    lines = (tmp_path / "layers.csv").read_text().splitlines()
    assert lines[1].startswith('"retrieval, net",blocks.1,0.2,psnr,15.0') and len(lines) == 5
    assert (tmp_path / "layers.png").stat().st_size > 5000 and (tmp_path / "report.html").is_file()
    with pytest.raises(UserError, match="more than once"):
        write_layers(tmp_path, points + points, None, "title")
    more = layer_points(_metrics({"branch@final": ("final", 1.0, 14.0)}))
    with pytest.raises(UserError, match="branch, net has layer 'final' more than once"):
        write_layers(tmp_path, points + more, None, "title")
    with pytest.raises(UserError, match="nothing to draw"):
        write_layers(tmp_path, [], None, "title")
    other = Point("a", "final", 1.0, {"own": points[0].figures["psnr"]})
    with pytest.raises(UserError, match="choose metrics of own"):
        write_layers(tmp_path, [other], None, "title")
    with pytest.raises(UserError, match="no row has 'ssim'"):
        write_layers(tmp_path, points, ["ssim"], "title")
    with pytest.raises(UserError, match="evaluate again"):
        layer_points({"meta": {}, "inverters": {}})


def test_matched_rows_make_curves_of_their_own() -> None:
    rows = {
        "optimisation@final+refined": ("final", 1.0, 14.0),
        "optimisation@blocks.4+refined": ("blocks.4", 0.5, 16.0),
        "branch-blocks-4+corrected+refined": ("blocks.4", 0.5, 16.0),
        "my-final+words-final": ("final", 1.0, 14.0),
    }
    found = [point.curve for point in layer_points(_metrics(rows))]
    own = ["branch+corrected+refined, net", "my-final+words, net"]
    assert found == ["optimisation+refined, net"] * 2 + own


def test_drawing_leaves_a_notebooks_backend_and_figures_alone(tmp_path) -> None:
    import matplotlib
    from matplotlib import pyplot

    pyplot.switch_backend("svg")
    try:
        write_layers(tmp_path, layer_points(_metrics({"a": ("final", 1.0, 12.0)})), None, "title")
        figure = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 3}
        found = {"severity": 1, **{against: {"cosine": figure} for against in AGAINST}}
        assert draw_curves(tmp_path / "curves.png", {"conditions": {"fog-1": found}})
        assert matplotlib.get_backend() == "svg" and not pyplot.get_fignums()
        assert all(load_png(tmp_path / name).std() > 0.02 for name in ("layers.png", "curves.png"))
    finally:
        pyplot.switch_backend("agg")


def test_a_backbone_of_few_classes_has_no_top5_and_the_table_says_so(tmp_path) -> None:
    config = load_config(CONFIG_ROOT / "robustness.yaml", ["corruptions=[]", "attacks=[]", "ood=[]"])
    skipped = left_out(config, Cells(), None)
    assert skipped == ["top5_agreement (the backbone has too few classes, 3)"]
    robustness = Robustness(Painter(), Cells(), items(3), tmp_path, referee=Cells())
    content = robustness.run(chosen_conditions(config, Cells(), 32, scenes=True), {"skipped": skipped})
    figures = content["conditions"]["clean"]["given"]
    assert set(figures) == {"cosine", "top1_agreement", "referee_cosine", "referee_top1_agreement", "psnr", "ssim"}
    write_robustness(tmp_path, content, "title")
    assert f"skipped: {skipped[0]}" in (tmp_path / "table.md").read_text()
