import dataclasses
import statistics
import sys

import pytest
import torch
from conftest import save_tiny, tiny_config, tiny_prior
from omegaconf import OmegaConf

from eval import classic
from eval.classic_studies import (
    Claim,
    study_activity,
    study_attacks,
    study_grad_cam,
    study_layers,
    study_maximisation,
)
from featinv.attribution.localisation import localisation, single_object_scenes
from featinv.attribution.transfer import attacks, predict
from featinv.backbones import load_backbone
from featinv.errors import UserError
from featinv.image import save_png
from featinv.inverters.build import check_backbone, load_trained
from featinv.report.classic import activity_figure, layer_figure, read_classic, write_classic
from tools import visual_methods, visualize
from tools.visualize import arguments


@pytest.fixture(scope="module")
def net():
    return load_backbone("resnet10t", pretrained=False, input_size=32)


def test_mass_inside_a_mask_is_what_a_loop_counts() -> None:
    maps, masks = torch.rand(3, 1, 6, 5), torch.rand(3, 1, 6, 5).round()
    maps[2] = 0.0
    found = localisation(maps, masks)
    for i in range(2):
        inside = sum(float(m) for m, k in zip(maps[i].flatten(), masks[i].flatten(), strict=True) if k)
        assert float(found.inside[i]) == pytest.approx(inside / float(maps[i].sum()), rel=1e-5)
    assert found.inside[2] == 0 and not found.found[2]
    uniform, exact = localisation(torch.ones_like(masks), masks), localisation(masks, masks)
    assert torch.allclose(uniform.inside, uniform.area) and torch.allclose(exact.inside, torch.ones(3).double())
    with pytest.raises(UserError, match="one shape"):
        localisation(maps, masks[:, :, :4])


def test_single_object_scenes_hold_one_object_where_the_mask_says() -> None:
    from featinv.data.scenes import render_scenes

    images, masks = single_object_scenes(3, 24)
    assert images.shape == (3, 3, 24, 24) and masks.shape == (3, 1, 24, 24)
    found, factors, objects = render_scenes(1, range(30), 24)
    alone = (factors[:, 0] == 0).nonzero()[:3, 0]  # column 0 counts the objects, class 0 being one
    assert torch.equal(images, found[alone]) and torch.equal(masks[:, 0], objects[alone, 0])


def test_attacks_stay_in_their_balls_and_go_where_they_should(net) -> None:
    images = torch.rand(2, 3, 32, 32)
    labels = predict(net, images)
    targets = (labels + 7) % 1000
    made = attacks(net, images, labels, eps=0.03, l2_eps=0.8, steps=4, targets=targets, seeds=[1, 2])
    assert set(made) == {f"{kind}{suffix}" for kind in ("fgsm", "pgd", "pgd_l2") for suffix in ("", "_targeted")}
    before = net.logits(images).log_softmax(1)
    for name, found in made.items():
        change = (found - images).flatten(1)
        size = change.norm(dim=1).max() / 0.8 if "l2" in name else change.abs().max() / 0.03
        assert size <= 1 + 1e-4
        classes = targets if name.endswith("targeted") else labels
        gain = (net.logits(found).log_softmax(1) - before).gather(1, classes[:, None])
        assert (gain > 0).all() if name.endswith("targeted") else (gain < 0).all()


def test_studies_make_figures_claims_and_a_page(net, tmp_path) -> None:
    images = torch.rand(4, 3, 32, 32)
    layers = study_layers(net, net, images[:2], images[2:], ["layer1", "final"], steps=2)
    assert list(layers.figures) == ["layer1", "final"] and layers.figures["final"]["leak_chance"] == 0.25
    assert set(layers.rows) == {"original", "layer1", "final"} and len(layers.claims) == 4
    labels = predict(net, images)
    labels[3] = (labels[3] + 1) % 1000  # wrong before any attack: never attacked
    hit = study_attacks({"net": net}, images, labels, n=9, eps=0.05, l2_eps=2.0, steps=3, inverted=1, invert_steps=2)
    assert hit.figures["clean_accuracy"]["net"] == 0.75 and hit.figures["attacked"] == 3
    assert len(hit.figures["inverted"]["psnr_between_reconstructions"]) == 1
    with pytest.raises(UserError, match="none of the 4"):
        study_attacks(
            {"net": net}, images, (labels + 1) % 1000 * 0 - 1, n=9, eps=0, l2_eps=0, steps=1, inverted=0, invert_steps=1
        )
    active, found = study_activity(net, images, ["layer1", "final"])
    assert active.figures["final"]["channels"] == net.spec.channels == len(found[1].dead)
    activity_figure(tmp_path / "activity.png", found)
    layer_figure(tmp_path / "layer_curve.png", layers.figures)
    content = {
        name: {
            "figures": s.figures,
            "settings": {},
            "claims": [{"claim": "<b>", "value": 1, "target": 2, "met": False}],
        }
        for name, s in (("layers", layers), ("attacks", hit), ("activity", active))
    }
    write_classic(tmp_path, content)
    page = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;" in page and "missed" in page and page.count("data:image/png") == 2
    assert Claim("a", 2.0, 1.0).met and not Claim("a", 0.9, 1.0).met and read_classic(tmp_path) == {}


def test_maximisation_study_compares_with_the_prior_alone(net) -> None:
    found = study_maximisation(net, tiny_prior(), torch.rand(3, 3, 32, 32), channels=1, steps=2)
    (scores,) = found.figures.values()
    assert set(scores) == {"strongest image", "pixel", "fourier", "prior alone", "prior, guided"}
    assert {pictures.shape for pictures in found.rows.values()} == {(1, 3, 32, 32)}


def test_the_script_runs_on_a_folder_and_names_mistakes(tmp_path, monkeypatch, capsys) -> None:
    for i in range(2):
        save_png(tmp_path / "in" / f"{i}.png", torch.rand(3, 40, 50))
    words = [f"images={tmp_path / 'in'}", f"out={tmp_path / 'out'}", "activity.size=32"]
    monkeypatch.setattr(sys, "argv", ["eval.classic", "parts=[activity]", *words])
    classic.main()
    content = read_classic(tmp_path / "out")
    assert content["activity"]["figures"]["final"]["images"] == 2
    assert (tmp_path / "out" / "activity.png").is_file() and (tmp_path / "out" / "report.html").is_file()
    for part, message in (("activities", "activity"), ("table", "trained inverters")):
        monkeypatch.setattr(sys, "argv", ["eval.classic", f"parts=[{part}]", *words])
        with pytest.raises(SystemExit) as caught:
            classic.main()
        assert caught.value.code == 2 and message in capsys.readouterr().err


def test_one_picture_has_every_part_but_the_leak(tmp_path, monkeypatch, capsys) -> None:
    save_png(tmp_path / "my.png", torch.rand(3, 40, 50))
    words = [f"images={tmp_path / 'my.png'}", f"out={tmp_path / 'out'}", "activity.size=32", "layers.size=32"]
    monkeypatch.setattr(sys, "argv", ["eval.classic", "parts=[layers,activity,table]", *words])
    classic.main()
    said, content = capsys.readouterr().out, read_classic(tmp_path / "out")
    assert "layers is left out: one picture" in said and "table is left out: no trained inverters" in said
    assert list(content) == ["activity"] and content["activity"]["figures"]["final"]["images"] == 1


def test_one_picture_is_found_whatever_its_folders_are_called(tmp_path, monkeypatch) -> None:
    (tmp_path / "shots.target").mkdir()
    save_png(tmp_path / "shots.target" / "cat.png", torch.rand(3, 16, 16))
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (f"{tmp_path}/shots.target/cat.png", "~/shots.target/cat.png"):
        assert len(classic.user_items(path, 16)) == 1


def test_a_kept_part_says_what_it_was_made_of(tmp_path, monkeypatch) -> None:
    for i in range(2):
        save_png(tmp_path / "in" / f"{i}.png", torch.rand(3, 40, 50))
    words = [f"images={tmp_path / 'in'}", f"out={tmp_path / 'out'}"]
    calls = [
        ["parts=[activity]", "activity.size=32"],
        [
            "parts=[layers]",
            "layers={size: 32, n: 2, names: [blocks.1, final], steps: 2}",
            "backbone=mobilenetv2",
            "referee=efficientnet_lite0",
        ],
    ]
    for call in calls:
        monkeypatch.setattr(sys, "argv", ["eval.classic", *call, *words])
        classic.main()
    content = read_classic(tmp_path / "out")
    settings = {part: found["settings"] for part, found in content.items()}
    assert {part: s["backbone"] for part, s in settings.items()} == {
        "activity": "efficientnet_lite0",
        "layers": "mobilenetv2",
    }
    assert settings["layers"]["referee"] == "efficientnet_lite0" and settings["layers"]["size"] == 32
    assert all(s["images"] == str(tmp_path / "in") for s in settings.values())
    page = (tmp_path / "out" / "report.html").read_text()
    assert "efficientnet_lite0" in page and "mobilenetv2" in page


def _call(name: str, net, image: torch.Tensor, tmp_path, *words: str):
    options = arguments([name, "--image", "x.png", "--out", str(tmp_path), "--steps", "3", "--judges", *words])
    return visual_methods.METHODS[name](net, image, options)


def test_visual_methods_beyond_the_page(net, tmp_path, monkeypatch) -> None:
    image = torch.rand(1, 3, 32, 32)
    found, numbers = _call("attacked_inversion", net, image, tmp_path)
    assert set(found) == {"attacked", "from_clean_features", "from_attacked_features"}
    assert (tmp_path / "attacked_inversion_progress.png").is_file() and 0 < numbers["feature_cosine"] < 1
    found, _ = _call("optimisation", net, image, tmp_path, "--start", "image", "--optimizer", "lbfgs")
    assert found["optimisation_progress"].shape == (1, 3, 32, 96)  # steps 1, 2 and the last
    made, numbers = _call("transfer", net, image, tmp_path, "--target", "5")
    assert len(numbers["class_changed"]) == len(made) == 6
    alone = [name for method in ("fgsm", "pgd") for name in _call(method, net, image, tmp_path)[0]]
    assert not set(made) & set(alone), "on one page each has files of its own"
    monkeypatch.setattr(visual_methods, "load_prior", lambda name: tiny_prior())
    found, numbers = _call("prior_maximisation", net, image, tmp_path, "--objective", "direction")
    assert set(found) == {"prior_alone", "prior_maximisation"} and numbers["gradients_skipped"] == 0
    with pytest.raises(UserError, match="--data"):
        _call("activity", net, image, tmp_path)
    save_png(tmp_path / "set" / "a.png", image[0])
    _, numbers = _call("activity", net, image, tmp_path, "--data", str(tmp_path / "set"))
    assert numbers["images"] == 1 and numbers["channels"] == net.spec.channels


def test_deconvnet_projects_what_is_selected(net, tmp_path) -> None:
    image = torch.rand(1, 3, 32, 32)
    strongest = net(image)[0].square().sum((1, 2)).argmax()
    one = _call("deconvnet", net, image, tmp_path, "--channel", str(int(strongest)))
    top = _call("deconvnet", net, image, tmp_path, "--top", "1")
    whole = _call("deconvnet", net, image, tmp_path)
    region = _call("deconvnet", net, image, tmp_path, "--region", "0", "0", "1", "1")
    assert torch.equal(one[0]["deconvnet"], top[0]["deconvnet"])
    assert torch.equal(whole[0]["deconvnet"], region[0]["deconvnet"])
    assert not torch.equal(one[0]["deconvnet"], whole[0]["deconvnet"])


def test_the_table_has_every_inverter_with_its_seconds(tmp_path, monkeypatch) -> None:
    tiny_prior().save_pretrained(tmp_path / "prior")
    scenes = {"target": "featinv.data.scenes.ScenesDataset", "params": {"length": 4, "size": 32}}
    data = {
        "target": "featinv.data.datamodule.ImageDataModule",
        "params": {"train": scenes, "val": scenes, "batch_size": 2},
    }
    config = tiny_config(tmp_path / "prior", data=data)
    backbone = load_backbone("resnet10t", pretrained=False, input_size=64)
    save_tiny(tmp_path / "diffusion" / "upconv" / "inverter.safetensors", config, backbone)
    config.inverter = {
        "target": "featinv.inverters.upconv.UpconvInverter",
        "params": {"size": 32, "width": 32, "components": 16},
    }
    save_tiny(tmp_path / "upconv" / "inverter.safetensors", config, backbone)
    words = [
        "parts=[table]",
        f"table.inverters=[{tmp_path}/diffusion/upconv,{tmp_path}/upconv]",
        "referee=efficientnet_lite0",
        "table.n=4",
        "table.steps=2",
        "table.timed=1",
    ]
    monkeypatch.setattr(sys, "argv", ["eval.classic", *words, f"out={tmp_path / 'out'}"])
    classic.main()
    figures = read_classic(tmp_path / "out")["table"]["figures"]
    names = {"diffusion-upconv", f"{tmp_path.name}-upconv", "optimisation"}
    assert set(figures["inverters"]) == names == set(figures["seconds_per_image"])
    for name, row in figures["inverters"].items():
        assert {"cosine", "referee_cosine", "psnr", "ssim", "fd_efficientnet_lite0"} <= set(row)
        assert figures["seconds_per_image"][name] > 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "upconv" in page and "seconds an image" in page
    assert "fd_efficientnet_lite0" in page and "mobilenetv2" not in page


def test_visualize_takes_an_open_clip_tower(tmp_path, monkeypatch) -> None:
    save_png(tmp_path / "my.png", torch.rand(3, 40, 50))
    words = ["--backbone", "open_clip:ViT-B-32", "--untrained", "--layer", "blocks.0", "--steps", "1"]
    words += ["--image", str(tmp_path / "my.png"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["tools.visualize", "optimisation", *words])
    visualize.main()
    assert (tmp_path / "out" / "optimisation.png").is_file()
    monkeypatch.setattr(sys, "argv", ["tools.visualize", "grad_cam", *words])
    with pytest.raises(SystemExit):
        visualize.main()


def test_inverters_of_equal_maps_and_other_weights_are_refused(tmp_path, net) -> None:
    config = tiny_config(tmp_path / "no_prior")
    settings = {"size": 32, "width": 32, "components": 16}
    config.inverter = {"target": "featinv.inverters.upconv.UpconvInverter", "params": settings}
    backbone = load_backbone("resnet10t", pretrained=False, input_size=64)
    save_tiny(tmp_path / "one" / "inverter.safetensors", config, backbone)
    save_tiny(tmp_path / "same" / "inverter.safetensors", config, backbone)
    config.backbone.params.seed = 1
    save_tiny(tmp_path / "control" / "inverter.safetensors", config, backbone)
    one, same, control = (load_trained(tmp_path / name) for name in ("one", "same", "control"))
    assert one.spec == control.spec
    check_backbone("same", same, one)
    with pytest.raises(UserError, match="control was trained on another backbone .*'seed': 1.* inverters of one back"):
        check_backbone("control", control, one)
    table = {"inverters": [f"{tmp_path}/one", f"{tmp_path}/control+guided"], "n": 2, "steps": 1, "timed": 1}
    with pytest.raises(UserError, match=r"control\+guided was trained on another backbone"):
        classic.table(OmegaConf.create({"table": table, "referee": "mobilenetv2"}), tmp_path / "out")
    other_layer = dataclasses.replace(one, spec=dataclasses.replace(one.spec, layer="layer2"))
    with pytest.raises(UserError, match="the inverter was built for .*layer2"):
        check_backbone("early", other_layer, one)


def test_a_judge_of_the_same_name_leaves_the_attacked_network_its_column(net, tmp_path, monkeypatch) -> None:
    class Unmoved(torch.nn.Module):
        mean = torch.zeros(3)

        def logits(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[1.0, 0.0]]).expand(len(images), -1)

    monkeypatch.setattr(visual_methods, "load_backbone", lambda name, **_: Unmoved())
    image = torch.rand(1, 3, 32, 32)
    words = ("resnet10t", "--backbone", "resnet10t", "--untrained", "--eps", "16")
    made, numbers = _call("transfer", net, image, tmp_path, *words)
    for attack, row in numbers["class_changed"].items():
        moved = bool(predict(net, made[f"transfer_{attack}"]) != predict(net, image))
        assert row == {"resnet10t (attacked)": moved, "resnet10t": False}
    assert numbers["class_changed"]["pgd"]["resnet10t (attacked)"]


def test_the_median_lift_of_an_even_number_of_scenes_is_between_the_two_in_the_middle(net) -> None:
    figures = study_grad_cam(net, net, 4, "layer1").figures["trained"]
    lifts = [inside / area for inside, area in zip(figures["inside"], figures["area"], strict=True)]
    assert figures["median_lift"] == pytest.approx(statistics.median(lifts)) and len(set(lifts)) == 4
