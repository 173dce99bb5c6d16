"""The benchmark as a whole: reference rows, damaged pictures, other backbones, two processes, memory."""

import json
import os
from pathlib import Path

import pytest
import torch
from cells import Cells
from conftest import tiny_first_stage
from forks import in_two_processes
from omegaconf import OmegaConf
from torch import Tensor

from eval.benchmark import Setting, contestants
from featinv.backbones import Backbone, load_backbone
from featinv.errors import UserError
from featinv.image import load_png, save_png, to_uint8
from featinv.inverters import retrieval
from featinv.inverters.build import build_inverter
from featinv.inverters.reconstruct import Reconstructions, is_whole, reconstruct
from featinv.inverters.retrieval import RetrievalInverter
from featinv.metrics.benchmark import Benchmark, Contestant
from featinv.metrics.collection import METRICS, derangement, possible_metrics, same_class_partner
from featinv.metrics.distribution import frechet_distance, pooled
from featinv.metrics.features import feature_cosine
from featinv.metrics.images import pixel_diversity, psnr
from featinv.metrics.rows import Judges, Row, evaluate_rows
from featinv.metrics.summary import DISTRIBUTION_METRICS
from featinv.metrics.tables import PAIRED, UNPAIRED
from featinv.metrics.views import ImagePairs, View
from featinv.processes import first_does, own_share, process_rank
from featinv.report.benchmark import COLUMNS, benchmark_sections, write_benchmark


def images(count: int, seed: int = 0, size: int = 32) -> Tensor:
    """Smooth random pictures."""
    small = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(small, size, mode="bilinear")


def items(count: int, seed: int = 0) -> list[dict]:
    return [{"image": x, "label": i % 3, "id": f"image-{i}"} for i, x in enumerate(images(count, seed))]


class Painter:
    """Colours by the features, noise by the seed; counts what it is asked for."""

    size = 32

    def __init__(self, noise: float = 0.1) -> None:
        self.noise, self.asked = noise, 0

    def invert(self, features: Tensor, *, seeds) -> Tensor:
        self.asked += len(features)
        colour = torch.sigmoid(features.flatten(2).mean(2)[:, :3] * 3)[:, :, None, None].expand(-1, 3, 32, 32)
        rows = [torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return (colour + self.noise * torch.stack(rows)).clamp(0, 1)


class Headless(Cells):
    """Mean colours, and no classifier."""

    def logits(self, images: Tensor) -> Tensor:
        return Backbone.logits(self, images)


@pytest.fixture(scope="module")
def other() -> torch.nn.Module:
    return load_backbone("resnet18", layer="layer2", pretrained=False, input_size=32)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, backbone, other):
    out = tmp_path_factory.mktemp("benchmark")
    benchmark = Benchmark(
        backbone, items(14), out, referee=other, first_stage=tiny_first_stage(), size=32, distribution_resamples=2
    )
    rows = {
        "a": Contestant(Painter()),
        "b": Contestant(Painter(0.4), limit=9),
        "c": Contestant(Painter(), backbone=other),
    }
    return out, benchmark, benchmark.run(rows, samples=2)


def directly(originals: Tensor, pictures: Tensor, backbone, referee) -> dict[str, Tensor]:
    """Every metric of all images at once: no batches, no rows, no files."""
    seen, judged = (View(network, originals).against(pictures) for network in (backbone, referee))
    pairs = ImagePairs(originals, pictures, seen, judged)
    return {name: METRICS[name](pairs) for name in possible_metrics(referee=True, labels=False)}


def test_every_row_is_what_a_direct_evaluation_gives(finished, backbone, other) -> None:
    out, _, content = finished
    originals = to_uint8(images(14)).float() / 255
    assert torch.allclose(Reconstructions(out / "a").originals(), originals, atol=1e-6)
    for name, n in (("a", 14), ("b", 9), ("c", 14)):
        pictures = Reconstructions(out / name).samples(0)
        for metric, values in directly(originals[:n], pictures, backbone, other).items():
            figure = content["inverters"][name][metric]
            assert figure["value"] == pytest.approx(values.mean().item(), abs=1e-5) and figure["n"] == n
        pair = pooled(other(originals[:n])), pooled(other(pictures))
        assert content["inverters"][name]["fd_mobilenetv2"]["value"] == pytest.approx(frechet_distance(*pair), rel=1e-3)
    partner = derangement(14, 0)
    cosine = feature_cosine(backbone(originals), backbone(originals[partner])).mean().item()
    assert content["floor"]["cosine"]["value"] == pytest.approx(cosine, abs=1e-5)
    same = same_class_partner(torch.arange(14) % 3, 0)
    floor = psnr(originals, originals[same]).mean().item()
    assert content["floor_same_class"]["psnr"]["value"] == pytest.approx(floor, abs=1e-5)
    assert content["ceiling"]["psnr"]["n"] == 14 and "label_accuracy" not in content["inverters"]["a"]


def test_an_inverter_of_other_features_is_judged_in_both_networks(finished, other) -> None:
    out, _, content = finished
    originals, pictures = (Reconstructions(out / "c").originals(), Reconstructions(out / "c").samples(0))
    own = feature_cosine(other(originals), other(pictures)).mean().item()
    assert content["inverters"]["c"]["own_cosine"]["value"] == pytest.approx(own, abs=1e-5)
    assert "own_cosine" not in content["inverters"]["a"] and "own_share" not in content["inverters"]["a"]
    partner, first_stage = derangement(14, 0), finished[1].first_stage
    floor = feature_cosine(other(originals), other(originals[partner])).mean().item()
    with torch.no_grad():
        again = to_uint8(first_stage.decode(first_stage.encode(originals))).float() / 255
        ceiling = feature_cosine(other(originals), other(again)).mean().item()
    share = content["inverters"]["c"]["own_share"]["value"]
    assert share == pytest.approx((own - floor) / (ceiling - floor), abs=1e-3)
    assert content["meta"]["rows"]["c"]["layer"] == "layer2" and content["meta"]["rows"]["a"]["depth"] == 1.0


def test_diversity_subset_differences_and_cases(finished, backbone, other) -> None:
    out, _, content = finished
    made = Reconstructions(out / "a")
    samples = torch.stack([made.samples(0), made.samples(1)], 1)
    assert content["inverters"]["a"]["pixel_diversity"]["value"] == pytest.approx(
        pixel_diversity(samples).mean().item()
    )
    assert content["inverters"]["b"]["pixel_diversity"]["value"] > content["inverters"]["a"]["pixel_diversity"]["value"]
    assert content["subset"]["n"] == 9 and content["subset"]["inverters"]["a"]["cosine"]["n"] == 9
    decibels = [psnr(m.originals(), m.samples(0)) for m in (made, Reconstructions(out / "b"))]
    difference = content["differences"]["rows"]["b"]["psnr"]
    assert (
        difference["value"] == pytest.approx((decibels[1] - decibels[0][:9]).mean().item(), abs=1e-4)
        and difference["high"] < 0
    )
    referee = feature_cosine(other(made.originals()), other(made.samples(0)))
    cases = content["cases"]["a"]
    assert cases["worst"][0] == f"image-{referee.argmin()}" and cases["best"][-1] == f"image-{referee.argmax()}"
    lines = (out / "per_image.csv").read_text().splitlines()
    assert len(lines) == 1 + 14 + 9 + 14 and lines[0].startswith("row,id,cosine")


def test_the_page_says_what_must_stand_beside_the_figures(finished) -> None:
    out, _, content = finished
    content["meta"]["skipped"] = {"lpips": "no weights"}
    write_benchmark(out, content, "title")
    table, page = (out / "table.md").read_text(), (out / "report.html").read_text()
    for words in ("antialias = True", "N = 14", "torchmetrics", "read the KID", "Skipped lpips: no weights"):
        assert words in table and words in page
    for words in ("floor (another of the class)", "worst: original", "n.s.", "identified_mobilenetv2"):
        assert words in page
    assert 'src="http' not in page and not (out / ".evaluation").exists()


@pytest.mark.parametrize("damage", ["missing", "cut", "one bit", "other size"])
def test_a_damaged_reconstruction_is_found_and_remade(tmp_path, backbone, damage) -> None:
    inverter, data = Painter(), items(5)
    reconstruct(inverter, backbone, data, tmp_path, size=32, batch_size=2)
    path = tmp_path / "samples" / "image-2_0.png"
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "other size":
        path.write_bytes(_png_of(tmp_path, 16))
    else:
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] if damage == "cut" else _flipped(whole, middle))
    assert not is_whole(path, 32)
    inverter.asked = 0
    reconstruct(inverter, backbone, data, tmp_path, size=32, batch_size=2)
    assert inverter.asked == 2 and path.read_bytes() == whole, "its own batch of two is drawn again, no other"
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        reconstruct(inverter, backbone, data, tmp_path, size=32)


def _flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def _png_of(folder: Path, size: int) -> bytes:
    from featinv.image import save_png

    save_png(folder / "other.png", torch.rand(3, size, size))
    return (folder / "other.png").read_bytes()


def test_a_diverged_inverter_is_named_and_nothing_is_stored(tmp_path, backbone) -> None:
    class Broken(Painter):
        def invert(self, features, *, seeds):
            return super().invert(features, seeds=seeds) * float("nan")

    with pytest.raises(UserError, match="not finite"):
        reconstruct(Broken(), backbone, items(2), tmp_path, size=32)
    assert not list(tmp_path.glob("samples/*.png"))


def test_retrieval_is_the_search_by_hand_and_finds_itself(backbone) -> None:
    train, asked = items(40), images(6, seed=9)
    inverter = RetrievalInverter(backbone, train, size=32, batch_size=7)
    features = backbone(asked)
    everything = backbone(images(40)).flatten(1)
    expected = torch.nn.functional.cosine_similarity(features.flatten(1)[:, None], everything[None], dim=2)
    positions, cosines = inverter.nearest(features)
    assert torch.equal(positions, expected.argmax(1)) and torch.allclose(cosines, expected.amax(1), atol=1e-3)
    assert torch.equal(inverter.invert(features, seeds=range(6)), images(40)[positions])
    assert torch.equal(inverter.nearest(backbone(images(40)[:5]))[0], torch.arange(5))
    few = RetrievalInverter(backbone, train, size=16, count=3)
    assert few.index.shape[0] == 3 and few.invert(features, seeds=range(6)).shape == (6, 3, 16, 16)
    with pytest.raises(UserError, match="at least one"):
        RetrievalInverter(backbone, [])


def test_an_index_that_memory_cannot_hold_is_refused_before_a_picture_is_read(monkeypatch, backbone) -> None:
    class Unread(list):
        def __getitem__(self, index):
            pytest.fail("a picture was read")

    row = 2 * backbone.spec.channels * backbone.spec.height * backbone.spec.width
    monkeypatch.setattr(retrieval, "free_memory", lambda: 20 * row)
    with pytest.raises(UserError, match=r"40 training images .* params\.retrieval=\{count: 16\}"):
        RetrievalInverter(backbone, Unread(items(40)), size=32).nearest(backbone(images(1)))
    assert len(RetrievalInverter(backbone, items(40), size=32, count=16).index) == 16


def test_free_memory_is_what_the_system_says_and_no_more_than_a_process_s_share(monkeypatch) -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < retrieval.free_memory() <= total
    monkeypatch.setattr(Path, "read_text", lambda _: "MemTotal: 9 kB\nMemAvailable:     7 kB\n")
    assert retrieval.free_memory() == 7 * 1024
    monkeypatch.setattr(Path, "read_text", lambda _: "")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # each process keeps an index of its own
    assert retrieval.free_memory() == total // 4


def test_retrieval_searches_the_pictures_without_the_crops_and_flips_of_training(tmp_path, backbone) -> None:
    for i, image in enumerate(images(3)):
        save_png(tmp_path / f"{i}.png", image)
    settings = {"root": str(tmp_path), "size": 32, "augment": {"scale": [0.5, 0.6]}}
    folder = {"target": "featinv.data.folders.FlatFolder", "params": settings}
    data = {"target": "featinv.data.datamodule.ImageDataModule", "params": {"train": folder}}
    inverter = {"target": "featinv.inverters.retrieval.RetrievalInverter", "params": {"size": 32}}
    config = OmegaConf.create({"data": data, "inverter": inverter})
    found = build_inverter(config, backbone.spec, backbone)
    for i, image in enumerate(images(3)):
        torch.testing.assert_close(found.dataset[i]["image"], image, atol=1 / 254, rtol=0)
    assert config.data.params.train.params.augment.scale == [0.5, 0.6]


def test_originals_are_seen_once_whatever_the_number_of_rows(tmp_path, backbone) -> None:
    seen = 0

    class Counting(torch.nn.Module):
        def forward(self, x):
            nonlocal seen
            seen += len(x)
            return backbone(x)

        def logits_from(self, features):
            return backbone.logits_from(features)

    pictures, held = images(10), []

    def originals(indices):
        held.append(len(indices))
        return pictures[indices]

    rows = {str(k): Row(lambda indices: pictures[indices].flip(3), range(10 - k)) for k in range(3)}
    numbers = evaluate_rows(originals, 10, rows, Judges(Counting()), tmp_path / "scratch", batch_size=4)
    assert seen == 10 + 10 + 9 + 8 and held == [4, 4, 2]  # never more than a batch
    assert numbers.indices("2").tolist() == list(range(8)) and len(numbers.values("1")["psnr"]) == 9


@pytest.mark.parametrize("which", ["backbone", "referee"])
def test_a_judge_without_a_classifier_gives_no_agreement_and_the_table_says_so(tmp_path, other, which) -> None:
    backbone, referee = (Headless(), other) if which == "backbone" else (other, Headless())
    benchmark = Benchmark(
        backbone, items(6), tmp_path, referee=referee, size=32, distribution_resamples=0, class_labels=True
    )
    content = benchmark.run({"a": Contestant(Painter())})
    every = {"top1_agreement", "top5_agreement", "label_accuracy"}
    every |= {f"referee_{name}" for name in every}
    missing = {name for name in every if name.startswith("referee") == (which == "referee")}
    figures = content["inverters"]["a"]
    assert every & set(figures) == every - missing and {"cosine", "referee_cosine", "psnr"} <= set(figures)
    assert content["meta"]["skipped"] == dict.fromkeys(missing, f"the {which} has no classifier")
    write_benchmark(tmp_path, content, "title")
    assert all(f"Skipped {name}: the {which} has no" in (tmp_path / "table.md").read_text() for name in missing)


@pytest.mark.parametrize("limit", [0, -1, "all"])
def test_a_limit_that_leaves_no_image_is_refused_before_the_first_picture(tmp_path, backbone, limit) -> None:
    painter = Painter()
    benchmark = Benchmark(backbone, items(3), tmp_path, size=32)
    with pytest.raises(UserError, match="limit of b must be a number of images from 1"):
        benchmark.run({"a": Contestant(painter), "b": Contestant(painter, limit=limit)})
    assert painter.asked == 0


def _rows(backbone, names: list[str], **config) -> dict[str, Contestant]:
    setting = Setting(OmegaConf.create({"backbone": {}}), backbone, 32, None)
    return contestants(dict.fromkeys(names), setting, OmegaConf.create(config))


def test_the_limit_of_a_row_goes_before_that_of_its_kind(backbone) -> None:
    limits = {"optimisation": 7, "optimisation@layer2": 0, "optimisation@layer3": None}
    rows = _rows(backbone, ["optimisation", "optimisation@layer2", "optimisation@layer3"], limits=limits)
    assert [row.limit for row in rows.values()] == [7, 0, None]  # and 0 is refused by the benchmark


def test_two_inverters_are_never_one_row(backbone) -> None:
    assert list(_rows(backbone, ["optimisation", "optimisation@layer2"])) == ["optimisation", "optimisation@layer2"]
    for names in (["runs/a/b", "runs/a-b"], ["runs/a/b", "/runs/a/b"], ["a", "runs/a"]):
        with pytest.raises(UserError, match="would both be the row"):
            _rows(backbone, names)


def _run(out: Path) -> None:
    backbone = load_backbone("resnet10t", pretrained=False, input_size=64)
    benchmark = Benchmark(backbone, items(11), out, referee=Headless(), size=32, batch_size=3, distribution_resamples=2)
    benchmark.run({"a": Contestant(Painter()), "b": Contestant(Painter(0.3), limit=7)}, samples=2)


def test_two_processes_make_the_pictures_and_figures_of_one(tmp_path) -> None:
    _run(tmp_path / "one")
    in_two_processes(lambda: _run(tmp_path / "two"))
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert one == two
    for path in (tmp_path / "one").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    assert load_png(tmp_path / "two" / "a" / "samples" / "image-10_1.png").shape == (3, 32, 32)


def test_processes_share_the_parts_and_an_error_of_the_first_reaches_all(tmp_path) -> None:
    def work() -> None:
        rank = process_rank()[0]
        (tmp_path / f"share-{rank}").write_text(str(own_share(list(range(5)))))
        with pytest.raises(UserError, match="disk"):
            first_does(_full)
        assert first_does(lambda: rank) == 0

    in_two_processes(work)
    assert [(tmp_path / f"share-{rank}").read_text() for rank in (0, 1)] == ["[0, 2, 4]", "[1, 3]"]


def _full() -> None:
    raise UserError("the disk is full.")


@pytest.mark.parametrize("which", ["backbone", "referee"])
def test_a_judge_of_few_classes_gives_no_top5_and_the_table_says_so(tmp_path, other, which) -> None:
    backbone, referee = (Cells(), other) if which == "backbone" else (other, Cells())
    benchmark = Benchmark(backbone, items(4), tmp_path, referee=referee, size=32, distribution_resamples=0)
    content = benchmark.run({"a": Contestant(Painter())})
    every = {f"{judge}top{k}_agreement" for judge in ("", "referee_") for k in (1, 5)}
    missing = "top5_agreement" if which == "backbone" else "referee_top5_agreement"
    assert every & set(content["inverters"]["a"]) == every - {missing}
    assert content["meta"]["skipped"] == {missing: f"the {which} has too few classes (3)"}
    write_benchmark(tmp_path, content, "title")
    assert f"Skipped {missing}: the {which} has too few classes (3)" in (tmp_path / "table.md").read_text()


def test_a_metric_that_only_its_dict_lists_is_in_every_table(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(METRICS, "mae", lambda p: (p.reconstructions - p.originals).abs().mean((1, 2, 3)))
    monkeypatch.setitem(METRICS, "own_mae", METRICS["mae"])  # of one row only
    monkeypatch.setitem(DISTRIBUTION_METRICS, "mmd", DISTRIBUTION_METRICS["precision"])
    benchmark = Benchmark(Cells(), items(4), tmp_path, referee=Cells(), size=32, distribution_resamples=0)
    rows = {"a": Contestant(Painter()), "b": Contestant(Painter(0.4), backbone=Cells("4"))}
    content = benchmark.run(rows)
    originals, a, b = Reconstructions(tmp_path / "a").originals(), *_first_samples(tmp_path)
    further = float((b - originals).abs().mean() - (a - originals).abs().mean())
    differences = content["differences"]["rows"]["b"]
    assert differences["mae"]["value"] == pytest.approx(further, abs=1e-5) and "own_mae" not in differences
    assert list(differences)[:2] == ["cosine", "referee_cosine"] and not set(differences) & set(UNPAIRED)
    write_benchmark(tmp_path, content, "title")
    columns = (tmp_path / "table.md").read_text().splitlines()[0].strip("| ").split(" | ")
    assert columns.index("mae") == columns.index("ssim") + 1 and columns[-2:] == ["mmd_mobilenetv2", "n"]
    assert not [name for name in columns if name.startswith("factor_")]
    sections = dict(benchmark_sections(tmp_path, content))
    single, sets = sections["Figures"], sections["Sets of images"]
    assert "<th>mae</th>" in single and "<th>mae</th>" in sections["Differences"] and "<th>mae</th>" not in sets
    assert "mmd_mobilenetv2" in sets and "mmd_mobilenetv2" not in single


def _first_samples(folder: Path) -> list[Tensor]:
    return [Reconstructions(folder / name).samples(0) for name in ("a", "b")]


def test_every_metric_of_the_package_has_its_place_in_the_tables() -> None:
    assert set(METRICS) <= set(COLUMNS) and set(METRICS) == set(PAIRED) | set(UNPAIRED)
    assert not set(PAIRED) & set(UNPAIRED)
