"""The figure tool: every row is what the inverter draws, in the order of the figure."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from featinv.applications.matching import RefinedInverter
from featinv.config import CONFIG_ROOT
from featinv.data.scenes import render_scenes
from featinv.errors import UserError
from featinv.image import save_png
from featinv.inverters.reconstruct import sample_seed
from tools import figure as tool


@pytest.fixture
def config(inverter, backbone, monkeypatch):
    """The default figure, of two inverters with random weights."""
    for parameter in inverter.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    trained = SimpleNamespace(
        inverter=inverter.eval(), spec=backbone.spec, config=OmegaConf.create({}), load_backbone=lambda: backbone
    )
    monkeypatch.setattr(tool, "load_trained", lambda name: trained)
    words = {"inverters": ["runs/a", "runs/b"], "baselines": ["optimisation"], "n": 2, "samples": 2}
    words["params"] = {"optimisation": {"steps": 2}}
    return OmegaConf.merge(OmegaConf.load(CONFIG_ROOT / "figure.yaml"), words)


def test_rows_are_originals_samples_posterior_mean_and_baseline(config, inverter, backbone) -> None:
    rows = tool.rows_of(config)
    drawn = ["sample 1", "sample 2", "posterior mean"]
    assert list(rows) == ["original", *(f"a\n{x}" for x in [*drawn, "optimisation"]), *(f"b\n{x}" for x in drawn)]
    assert all(pictures.shape == (2, 3, 32, 32) for pictures in rows.values())
    assert torch.equal(rows["original"], render_scenes(1, [0, 1], 32)[0])
    features = backbone(rows["original"])
    for k in (0, 1):
        seeds = [sample_seed(0, f"scene-{i}", k) for i in (0, 1)]
        assert torch.equal(rows[f"a\nsample {k + 1}"], inverter.invert(features, seeds=seeds))
    assert torch.equal(rows["b\nposterior mean"], inverter.posterior_mean(features))
    assert not torch.equal(rows["a\nsample 1"], rows["a\nsample 2"])


def test_matched_rows_say_so_and_share_the_posterior_mean(config, inverter, backbone) -> None:
    changed = {"inverters": ["runs/a", "runs/a+refined"], "samples": 1, "baselines": ["optimisation+refined"]}
    rows = tool.rows_of(OmegaConf.merge(config, changed, {"params": {"refined": {"steps": 2}}}))
    layer = backbone.spec.layer
    expected = ["sample 1", "posterior mean", "optimisation+refined"]
    assert list(rows) == ["original", *(f"{layer}\n{x}" for x in expected), f"{layer}\n+refined\nsample 1"]
    features = backbone(rows["original"])
    found = RefinedInverter(inverter, backbone, steps=2).invert(
        features, seeds=[sample_seed(0, f"scene-{i}", 0) for i in (0, 1)]
    )
    assert torch.equal(rows[f"{layer}\n+refined\nsample 1"], found)


def test_no_row_takes_the_place_of_another(config) -> None:
    changed = {"inverters": ["scenes64/a", "photos64/a+refined", "photos64/a+corrected"], "samples": 1}
    changed["baselines"] = ["optimisation", "runs/x/b", "runs/y/b"]
    rows = tool.rows_of(OmegaConf.merge(config, changed, {"params": {"refined": {"steps": 1}}}))
    assert list(rows) == [
        "original",
        *("scenes64-a\nsample 1", "scenes64-a\nposterior mean", "scenes64-a\noptimisation"),
        *("photos64-a\n+refined\nsample 1", "photos64-a\nposterior mean", "photos64-a\nx-b"),
        *("photos64-a\n+corrected\nsample 1", "photos64-a\ny-b"),
    ]
    changed = {"inverters": ["runs/a", "/runs/a"], "samples": 1}
    with pytest.raises(UserError, match="would both be the row 'runs-a'"):
        tool.rows_of(OmegaConf.merge(config, changed))


def test_pictures_by_name_and_by_path(tmp_path) -> None:
    import skimage.data

    names, found = tool.chosen_images(["astronaut", "cat", "rocket"], 2, 32)
    assert names == ["astronaut", "cat"] and found.shape == (2, 3, 32, 32)
    cat = Image.fromarray(skimage.data.chelsea())  # 451 x 300
    expected = np.asarray(cat.crop((75, 0, 375, 300)).resize((32, 32), Image.Resampling.BICUBIC)) / 255
    assert np.abs(found[1].permute(1, 2, 0).numpy() - expected).mean() < 0.01
    save_png(tmp_path / "my.png", torch.rand(3, 40, 50))
    assert tool.chosen_images(str(tmp_path / "my.png"), 6, 16)[0] == ["my"]
    with pytest.raises(UserError, match="did you mean rocket"):
        tool.chosen_images(["rockett"], 1, 16)
    with pytest.raises(UserError, match="no picture or folder"):
        tool.chosen_images(str(tmp_path / "none.png"), 1, 16)


def test_as_many_baselines_as_inverters(config) -> None:
    config.inverters = ["a", "b", "c"]
    config.baselines = ["optimisation", "optimisation"]
    with pytest.raises(UserError, match="one baseline for each"):
        tool.rows_of(config)
