"""Bundles: what is written loads and draws the same, names no place of this machine, and tells where it came from."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import save_tiny, tiny_config, tiny_prior
from omegaconf import OmegaConf

from featinv.checkpoint import load_checkpoint, read_header, save_checkpoint
from featinv.diffusion.prior import WEIGHTS_ROOT
from featinv.files import load_safetensors
from featinv.inverters.build import load_trained
from tools import bundle as tool
from tools.model_card import (
    IMAGENET,
    RENDERED,
    UNKNOWN,
    bundle_licence,
    licence,
    logged_hours,
    probed_hours,
    this_machine,
)

ROOT = Path(__file__).parents[1]
LOG = [
    {"step": k, "images": 16 * k, "minutes": m, "cosine": 0.5, "share": 0.4, "floor": 0.1, "ceiling": 0.9}
    for k, m in ((100, 10.0), (200, 30.0), (300, 5.0), (400, 20.0))  # two sessions
]


def call(*words: object) -> None:
    old, sys.argv = sys.argv, ["bundle", *map(str, words)]
    try:
        tool.main()
    finally:
        sys.argv = old


@pytest.fixture
def run(tmp_path, backbone, monkeypatch) -> Path:
    """A finished prior and a finished inverter, whose configuration names paths below `tmp_path`."""
    monkeypatch.setenv("PHOTOS_ROOT", str(tmp_path / "photos"))
    run = tmp_path / "runs"
    tiny_prior().save_pretrained(run / "prior")
    (run / "first_stage.json").write_text(json.dumps({"psnr": 31.25, "cosine": 0.9, "floor": 0.2, "images": 64}))
    save_checkpoint(run / "unet" / "last.safetensors", {"global_step": 77})
    training = {"seed": 5, "batch_size": 16, "cache_root": str(tmp_path / "cache")}
    data = OmegaConf.create({"data": OmegaConf.load(ROOT / "configs/data/photos64.yaml")})
    config = tiny_config(run / "prior", training=training, **OmegaConf.to_container(data, resolve=True))
    save_tiny(run / "inverter.safetensors", config, backbone, note=LOG[-1])
    (run / "probe.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
    return run


def prior_yaml(folder: Path) -> Path:
    config = yaml.safe_load((ROOT / "configs/prior/photos64.yaml").read_text())
    path = folder / "p.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_bundle_draws_as_the_run_and_says_where_it_came_from(run, tmp_path, backbone, monkeypatch, capsys) -> None:
    weights, family = tmp_path / "weights", tmp_path / "weights" / "fam"
    call("prior", run, "fam", "--into", weights, "--config", prior_yaml(tmp_path), "--machine", "an abacus")
    call("inverter", run, "fam/one", "--into", weights, "--machine", "an abacus", "--set", "training.batch_size=8")
    printed = capsys.readouterr().out
    assert "inverters/one.safetensors  (new)" in printed and "in all, of 60" in printed
    for path in family.rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes(), path
    assert [p.name for p in weights.iterdir()] == ["fam"]
    tensors = load_safetensors(family / "inverters" / "one.safetensors")[0]
    assert {v.dtype for v in tensors.values() if v.is_floating_point()} == {torch.float16}
    config = read_header(family / "inverters" / "one.safetensors")["featinv"]["config"]
    assert config["data"]["params"]["val"]["params"]["urls"] == "${oc.env:PHOTOS_ROOT,data/photos64}/val-*.tar*"
    assert config["prior"] == "fam"
    assert config["training"]["batch_size"] == 8  # a number, as in the run
    for module in ("featinv.inverters.build", "featinv.diffusion.prior"):
        monkeypatch.setattr(f"{module}.WEIGHTS_ROOT", weights)
    features = backbone(torch.rand(2, 3, 32, 32))
    pictures = [load_trained(name).inverter.invert(features, seeds=[1, 2]) for name in ("fam/one", run)]
    assert (pictures[0] - pictures[1]).abs().mean() < 0.02
    card = (family / "MODEL_CARD.md").read_text()
    for words in ("6,400", "| seed | 5 |", "| hours | 0.83 |", "an abacus", "512 x 2 x 2", "1,232", "31.2 dB", "0.400"):
        assert words in card, words  # 77 steps of 16; 30 + 20 minutes
    assert IMAGENET in card and "PHOTOS_ROOT" in card and "inverters/one.safetensors" in card
    assert sum(p.stat().st_size for p in family.rglob("*") if p.is_file()) < 60e6


def test_what_does_not_fit_is_refused_and_changes_nothing(run, tmp_path, capsys, monkeypatch) -> None:
    weights = tmp_path / "weights"

    def refused(*words: object) -> str:
        before = {p: p.read_bytes() for p in weights.rglob("*") if p.is_file()} if weights.is_dir() else {}
        with pytest.raises(SystemExit) as ended:
            call(*words, "--into", weights)
        assert ended.value.code == 2
        after = {p: p.read_bytes() for p in weights.rglob("*") if p.is_file()} if weights.is_dir() else {}
        assert before == after
        return capsys.readouterr().err

    assert "bundle it first" in refused("inverter", run, "fam/one")
    assert "FAMILY/NAME" in refused("inverter", run, "fam")
    assert "no prior; train one" in refused("prior", run / "unet", "fam")
    assert "more than --limit 0.01" in refused("prior", run, "fam", "--limit", "0.01")
    call("prior", run, "fam", "--into", weights)
    size = sum(p.stat().st_size for p in (weights / "fam").rglob("*") if p.is_file()) / 1e6
    assert "nothing was changed" in refused("inverter", run, "fam/one", "--limit", f"{size + 0.01:.3f}")
    with monkeypatch.context() as patch:
        patch.setenv("PHOTOS_ROOT", "elsewhere")
        assert "data.params.train.params.urls is" in refused("inverter", run, "fam/one")
    call("inverter", run, "fam/one", "--into", weights)
    borrower = weights / "fam" / "inverters" / "two.safetensors"
    described = {"config": {"branch_of": "fam/one"}, "branch": "as it was", "prior": None}
    save_checkpoint(borrower, {"featinv": described, "state_dict": {}})
    assert "borrows the branch of fam/one as it was" in refused("inverter", run, "fam/one")
    whole = load_checkpoint(weights / "fam" / "inverters" / "one.safetensors")
    whole["featinv"] |= {"branch": None, "config": whole["featinv"]["config"] | {"branch_of": "fam/one"}}
    save_checkpoint(borrower, whole)  # as a lift does, which goes on with any branch
    call("inverter", run, "fam/one", "--into", weights)
    borrower.unlink()
    torch.manual_seed(9)
    tiny_prior().save_pretrained(run / "prior")
    assert "trained with another prior" in refused("prior", run, "fam")


def test_figures_of_a_benchmark_come_into_the_card(run, tmp_path, capsys) -> None:
    weights = tmp_path / "weights"
    figure = {"value": 0.7, "low": 0.65, "high": 0.75, "n": 9}
    metrics = {
        "meta": {"images": 9, "seed": 0, "features": {"network": "resnet10t", "layer": "final"}},
        "floor": {"cosine": {**figure, "value": 0.2}},
        "ceiling": {"cosine": {**figure, "value": 0.9}},
        "inverters": {"branch": {"cosine": figure, "share": figure}},
    }
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    call("prior", run, "fam", "--into", weights)
    with pytest.raises(SystemExit):
        call("inverter", run, "fam/one", "--into", weights, "--metrics", tmp_path / "metrics.json")
    assert "has no row" in capsys.readouterr().err
    call("card", "fam/one", "--into", weights, "--metrics", tmp_path / "metrics.json", "--row", "branch")
    card = (weights / "fam" / "MODEL_CARD.md").read_text()
    assert "| cosine | 0.700 [0.650, 0.750] | 0.200 | 0.900 |" in card and "9 images, judged in `final`" in card


def test_hours_are_those_of_all_sessions(tmp_path) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    (tmp_path / "tensorboard").mkdir()
    for start, length in ((1000, 1800), (9000, 5400)):
        with open(tmp_path / "tensorboard" / f"events.out.tfevents.{start}", "wb") as file:
            for time in (start, start + length / 2, start + length):
                RecordWriter(file).write(Event(wall_time=time).SerializeToString())
    assert logged_hours(tmp_path) == 2.0 and logged_hours(tmp_path / "none") is None
    assert probed_hours(LOG) == pytest.approx(50 / 60, abs=0.01) and probed_hours([]) is None
    assert this_machine()[0].isdigit()


def test_the_licence_note_is_that_of_the_data() -> None:
    paths = {name: ROOT / f"configs/data/{name}.yaml" for name in ("imagenet", "photos64", "scenes")}
    data = {name: {"data": yaml.safe_load(path.read_text())} for name, path in paths.items()}
    assert licence([data["imagenet"]]) == licence([data["photos64"]]) == licence([data["scenes"], data["photos64"]])
    assert licence([data["imagenet"]]) == IMAGENET and licence([data["scenes"], data["scenes"]]) == RENDERED


def test_a_licence_is_that_of_rendered_scenes_only_if_all_pictures_are() -> None:
    scenes = yaml.safe_load((ROOT / "configs/prior/scenes64.yaml").read_text())
    folder = {"target": "featinv.data.folders.FlatFolder", "params": {"folder": "holidays"}}
    params = {"train": folder, "val": scenes["validation"]}
    own = {"data": {"target": "featinv.data.datamodule.ImageDataModule", "params": params}}
    assert licence([scenes]) == RENDERED
    for other in (own, {"data": folder}, {"data": None}, None, {**scenes, "start": "runs/holidays/prior"}):
        assert licence([scenes, other]) == licence([other, scenes]) == UNKNOWN, other


def test_the_cards_that_come_with_the_package_have_the_licence_of_their_data() -> None:
    for family, note in (("scenes64", RENDERED), ("photos64", IMAGENET)):
        assert note in (WEIGHTS_ROOT / family / "MODEL_CARD.md").read_text()
        assert bundle_licence(WEIGHTS_ROOT / family) == note


def test_bundles_are_package_data(tmp_path) -> None:
    import glob
    import tomllib

    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["featinv"]
    for name in ("MODEL_CARD.md", "training.json", "inverters/one.safetensors", "unet/config.json"):
        path = tmp_path / "weights" / "fam" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert any(f"weights/fam/{name}" in glob.glob(p, root_dir=tmp_path, recursive=True) for p in patterns)
