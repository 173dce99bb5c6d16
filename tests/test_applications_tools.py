import json

import pytest
import torch
import torch.nn.functional as F
from cells import SIZE, Cells, Mosaic, Noisy, Pooled
from conftest import TINY_BACKBONE, save_tiny, tiny_config
from omegaconf import OmegaConf

from featinv.applications import measure
from featinv.applications.lookup import Examples, find_concept
from featinv.applications.scene_reader import SceneReader, SceneSet, object_crops, scene_set, with_reconstructions
from featinv.backbones import load_backbone
from featinv.data.scene_factors import FACTOR_INDEX
from featinv.data.scenes import render_scenes
from featinv.errors import UserError
from featinv.image import load_png, save_png
from tools import apply, task


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs tools.apply with the backbone and inverter whose truth is known; returns the folder and the numbers."""
    monkeypatch.setattr(task, "load_backbone", lambda *_, **__: Cells())
    monkeypatch.setattr(apply, "load_backbone", lambda *_, **__: Cells("16"))
    monkeypatch.setattr(task.Task, "untrained", lambda self, cut: Noisy())

    def run(*words: str) -> dict:
        apply.main([*words, "--inverter", "optimisation", "--backbone", "cells", "--out", str(tmp_path)])
        return json.loads((tmp_path / f"{words[0]}.json").read_text())

    run.folder = tmp_path
    return run


def test_a_named_backbone_of_other_weights_is_refused(tmp_path, monkeypatch, backbone) -> None:
    config = tiny_config(tmp_path / "no_prior")
    settings = {"size": 32, "width": 32, "components": 16}
    config.inverter = {"target": "featinv.inverters.upconv.UpconvInverter", "params": settings}
    save_tiny(tmp_path / "run" / "inverter.safetensors", config, backbone)
    options = apply.arguments(["posterior", "--inverter", str(tmp_path / "run"), "--backbone", "resnet10t"])
    monkeypatch.setattr(task, "load_backbone", lambda *_, **__: backbone)
    assert task.Task(options).backbone is backbone
    other = load_backbone(**{**TINY_BACKBONE, "seed": TINY_BACKBONE.get("seed", 0) + 1})
    monkeypatch.setattr(task, "load_backbone", lambda *_, **__: other)
    with pytest.raises(UserError, match="trained on other weights than --backbone has"):
        task.Task(options)
    monkeypatch.setattr(task, "load_backbone", lambda *_, **__: backbone.at("layer3"))
    with pytest.raises(UserError, match="built for .*layer4|built for .*final"):
        task.Task(options)


PAIR = "--scene 5:3 --other-scene 5:4"
CALLS = {
    "concepts": "--scene 5:3 --examples 2 --count 2",
    "steer": "--scene 5:3 --concept mean:sky=night --examples 60 --positions object0 --strengths -1 2",
    "paste": f"{PAIR} --region 0.2 0.2 0.7 0.7 --to 0.3 0.3",
    "mix": PAIR,
    "swap": PAIR,
    "permute": "--scene 5:3",
    "subset": "--scene 5:3 --region 0 0 0.5 1 --top 2 --concept nmf:0 --examples 20 --count 2",
    "posterior": "--scene 5:3 --n 2 --samples 3",
    "refine": "--scene 5:3 --tolerance 0.999 --steps 10",
    "layers": "--scene 5:3 --n 3 --layers 8,2",
}


@pytest.mark.parametrize("method", list(apply.METHODS))
def test_every_method_writes_its_pictures_numbers_and_page(command, method) -> None:
    numbers = command(method, *CALLS[method].split())
    assert numbers
    assert torch.isfinite(load_png(command.folder / f"{method}.png")).all()
    assert list((command.folder / method).glob("*.png"))
    assert method in (command.folder / "report.html").read_text()


def test_a_picture_of_ones_own_is_taken_and_mistakes_are_told(command, capsys) -> None:
    save_png(command.folder / "mine.png", torch.rand(3, 40, 50))
    assert command("posterior", "--image", str(command.folder / "mine.png"), "--samples", "2")["cosines"]
    for words, message in (
        (("steer", "--scene", "5:3"), "name a --concept"),
        (("steer", "--scene", "5:3", "--concept", "red"), "KIND:NAME"),
        (("paste", *PAIR.split()), "name a --region"),
        (("posterior",), "name a picture"),
        (("posterior", "--scene", "five"), "SEED:INDEX"),
        (("mix", "--scene", "5:3"), "--other"),
        (("ster", "--scene", "5:3"), "steer"),
        (("subset", "--scene", "5:3", "--positions", "object9"), "object0 to object3"),
        (("subset", "--scene", "5:0", "--n", "30", "--positions", "object3"), "covers no position"),
        (("posterior", "--scene", "5:3", "--n", "0"), "--n must be at least 1"),
    ):
        with pytest.raises(SystemExit) as error:
            command(*words)
        assert error.value.code == 2 and message in capsys.readouterr().err


def test_steering_by_a_subspace_ends_where_it_is_gone_and_its_numbers_are_json(command) -> None:
    words = "steer --scene 5:3 --n 2 --concept subspace:0 --count 2 --examples 20 --strengths -4 -2 -1 1"
    numbers = command(*words.split())
    assert {"-1", "+0", "+1"} <= set(numbers) and "-2" not in numbers and numbers["+0"]["moved"] == [None, None]
    assert max(numbers["-1"]["asked"]) < 1e-6 and len(numbers["+1"]["classes"]) == 2
    page = (command.folder / "report.html").read_text()
    assert "NaN" not in page and "nan %" not in page and "2 of 2 on the manifold" in page


def test_concepts_are_found_by_their_words() -> None:
    images, factors, masks = render_scenes(2, range(60), SIZE)
    examples, backbone = Examples(images, factors), Cells()
    night = find_concept("mean:sky=night", backbone, examples)
    assert night.direction.sum() < 0  # darker
    assert find_concept("probe:sky=night", backbone, examples).evidence["p_value"] < 0.05
    few = Examples(images[:3])
    assert find_concept("subspace:1", backbone, few, count=2).name == "subspace 1"
    assert find_concept("mean:class=2", backbone, examples).name == "class=2"
    red, colour = "mean:object0_colour=red", FACTOR_INDEX["object0_colour"]
    over_objects = find_concept(red, backbone, Examples(images, factors, masks))
    scenes = SceneSet(images, factors, masks[:, :1])
    (wanted,) = (c for c in measure.object_concepts(backbone, scenes, "colour") if c.name == "red")
    assert torch.allclose(over_objects.direction, wanted.direction) and over_objects.evidence == wanted.evidence
    whole = find_concept(red, backbone, examples).direction
    assert F.cosine_similarity(over_objects.direction, whole, dim=0) < 0.99 and (factors[:, colour] >= 0).all()
    for word, message in (
        ("mean:sky=nigt", "did you mean night"),
        ("mean:skye=night", "did you mean sky"),
        ("nmf:9", "0 to 2"),
        ("text:a dog", "OpenCLIP"),
    ):
        with pytest.raises(UserError, match=message):
            find_concept(word, backbone, examples, count=3)
    with pytest.raises(UserError, match="only scenes"):
        find_concept("mean:sky=night", backbone, Examples(images))


def test_the_figures_of_inverters_whose_truth_is_known() -> None:
    learn, scenes, backbone = scene_set(2, 150, SIZE), scene_set(5, 40, SIZE), Cells()
    crops = object_crops(scenes.images, scenes.masks, size=16)
    inside = object_crops(scenes.masks.expand(-1, 3, -1, -1), scenes.masks, size=16)
    assert crops.shape == (40, 3, 16, 16) and inside.mean() > 2 * scenes.masks.mean()  # closer than the whole picture
    reader = SceneReader(Cells(), with_reconstructions(learn, learn.images))
    assert reader.accuracy(scenes) == SceneReader(Cells(), learn).accuracy(scenes)  # nothing new in the same pictures
    steered = measure.measure_steering(Mosaic(), backbone, reader, learn, scenes, strengths=(0.0001, 1.0, 3.0))
    by_strength = [steered.figures["by_strength"][s]["own"] for s in ("0.0001", "1", "3")]
    assert by_strength[0] < 0.3 < by_strength[2] and by_strength[0] < by_strength[1]
    assert steered.figures["by_strength"]["0.0001"]["others"] < 0.02
    assert steered.figures["others_by_chance"] == 0  # a mosaic has no chance in it

    composite = measure.measure_composites({"spatial": Mosaic(), "pooled": Pooled()}, backbone, scenes).figures
    assert composite["spatial"]["placed"]["value"] == 1 and composite["pooled"]["placed"]["value"] == 0

    posterior = measure.measure_posterior(Noisy(), Cells("16"), scenes, samples=6).figures
    assert 0.85 <= posterior["coverage"]["value"] <= 0.95 and posterior["knows"]["n"] == 20

    subset = measure.measure_subset(Mosaic(), backbone, scenes).figures
    assert subset["left half"]["given"]["value"] == pytest.approx(1, abs=1e-4)
    assert subset["left half"]["rest"]["value"] < 0.5 < subset["left half"]["all"]["value"]

    refined = measure.measure_refinement(Noisy(), backbone, Cells("4"), scenes[slice(0, 6)], 0.9999, 30).figures
    assert refined["reached"] > 0.5 and refined["refined"]["cosine"]["value"] > refined["sample"]["cosine"]["value"]
    with pytest.raises(UserError, match="at least 4 scenes"):
        measure.measure_steering(Mosaic(), backbone, reader, learn, scenes[slice(0, 3)])


def test_the_evaluation_writes_figures_and_page(monkeypatch, tmp_path, capsys) -> None:
    from types import SimpleNamespace

    from eval import applications

    def load(name: str) -> SimpleNamespace:
        inverter = Mosaic() if name == "spatial" else Pooled()
        config = OmegaConf.create({"backbone": {"params": {"pretrained": name != "control"}}})
        return SimpleNamespace(load_backbone=Cells, inverter=inverter, spec=Cells().spec, config=config)

    monkeypatch.setattr(applications, "load_trained", load)
    words = [
        "inverter=spatial",
        "pooled=pooled",
        "parts=[composites,posterior]",
        "n=24",
        "samples=2",
        f"out={tmp_path}",
    ]
    monkeypatch.setattr("sys.argv", ["applications", *words])
    applications.main()
    content = json.loads((tmp_path / "applications.json").read_text())
    assert content["composites"]["spatial"]["placed"]["value"] > content["composites"]["pooled"]["placed"]["value"]
    assert "coverage" in content["posterior"] and "composites" in (tmp_path / "applications.html").read_text()
    for word, message in (("parts=[postrior]", "did you mean posterior"), ("pooled=control", "on another backbone")):
        monkeypatch.setattr("sys.argv", ["applications", *words, word])
        with pytest.raises(SystemExit):
            applications.main()
        assert message in capsys.readouterr().err
