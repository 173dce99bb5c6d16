"""Curves over sampling steps and training images, in miniature."""

import json
import sys
from pathlib import Path

import pytest
import torch
from cells import Mosaic
from conftest import save_tiny, tiny_config, tiny_prior

from eval import curves as tool
from featinv.applications.matching import CorrectedInverter, FeatureGuidedInverter
from featinv.errors import UserError
from featinv.image import load_png, to_uint8
from featinv.inverters.build import load_trained
from featinv.inverters.reconstruct import Reconstructions, sample_seed
from featinv.metrics.benchmark import Contestant
from featinv.metrics.images import psnr
from featinv.report.curves import read_log, write_curves

LOG = [{"step": k, "images": 16 * k, "minutes": k, "cosine": 0.1 * k, "share": 0.05 * k} for k in (1, 3, 4)]
IMAGES = 5


def scenes(seed: int) -> dict:
    return {"target": "featinv.data.scenes.ScenesDataset", "params": {"length": IMAGES, "size": 32, "seed": seed}}


@pytest.fixture
def run(tmp_path, backbone) -> Path:
    """An inverter with random weights and a probe log."""
    tiny_prior().save_pretrained(tmp_path / "prior")
    data = {
        "target": "featinv.data.datamodule.ImageDataModule",
        "params": {"train": scenes(0), "val": scenes(1)},
    }
    save_tiny(tmp_path / "run" / "inverter.safetensors", tiny_config(tmp_path / "prior", data=data), backbone)
    (tmp_path / "run" / "probe.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
    return tmp_path / "run"


def call(*words: object) -> None:
    old, sys.argv = sys.argv, ["curves", *map(str, words)]
    try:
        tool.main()
    finally:
        sys.argv = old


def test_each_row_is_the_inverter_with_so_many_steps_and_more_are_added_later(run, tmp_path, backbone) -> None:
    words = [f"inverter={run}", f"n={IMAGES}", "referee=null", "distribution_resamples=0", f"out={tmp_path / 'out'}"]
    call(*words, "steps=[4,1]")
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "steps").rglob("samples/*.png")}
    assert len(kept) == 2 * IMAGES
    call(*words, "steps=[4,1,2]")
    assert all(p.stat().st_mtime_ns == time for p, time in kept.items())
    found = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert [point["num_inference_steps"] for point in found["steps"]["points"]] == [1, 2, 4]
    inverter = load_trained(run).inverter
    for point in found["steps"]["points"]:
        steps = point["num_inference_steps"]
        made = Reconstructions(tmp_path / "out" / "steps" / f"steps-{steps}")
        originals, drawn = made.originals(), made.samples()
        inverter.num_inference_steps = steps
        direct = inverter.invert(backbone(originals), seeds=[sample_seed(0, name, 0) for name in made.ids])
        assert (to_uint8(direct).int() - to_uint8(drawn).int()).abs().max() <= 1
        figure = point["figures"]["psnr"]
        assert figure["value"] == pytest.approx(psnr(originals, drawn).mean().item(), abs=1e-4)
        assert figure["n"] == IMAGES
    assert found["training"] == {str(run).strip("/"): LOG}
    picture, page = load_png(tmp_path / "out" / "curves.png"), (tmp_path / "out" / "report.html").read_text()
    assert picture.shape[2] > 2 * picture.shape[1] and picture.std() > 0.05
    assert "4 steps" in page and "ceiling" in page and 'src="http' not in page


@pytest.mark.parametrize(("kind", "wrapper"), [("corrected", CorrectedInverter), ("guided", FeatureGuidedInverter)])
def test_a_matched_row_is_matched_at_each_number_of_steps(run, tmp_path, backbone, kind, wrapper) -> None:
    out = tmp_path / "out"
    words = ["n=2", "referee=null", "distribution_resamples=0", "steps=[2]", "runs=[]"]
    call(f"inverter={run}+{kind}", *words, f"out={out}")
    made, inverter = Reconstructions(out / "steps" / "steps-2"), load_trained(run).inverter
    inverter.num_inference_steps = 2
    seeds = [sample_seed(0, name, 0) for name in made.ids]
    direct = wrapper(inverter, backbone).invert(backbone(made.originals()), seeds=seeds).detach()
    assert (to_uint8(direct).int() - to_uint8(made.samples()).int()).abs().max() <= 1


def test_a_row_keeps_the_lift_that_correcting_goes_through(inverter, backbone) -> None:
    inverter.lift = torch.nn.Identity()
    row = tool.step_rows("d", Contestant(inverter), [2])["steps-2"].inverter
    assert CorrectedInverter(row, backbone).lift is inverter.lift
    assert (row.num_inference_steps, inverter.num_inference_steps) == (2, 3)
    assert row.encoder is inverter.encoder  # no weight is copied


def test_training_alone_needs_no_inverter(run, tmp_path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"images": 5, "share": 0.5, "cosine": 0.6}) + "\n")
    call("inverter=null", f"runs=[{run},{other}]", f"out={tmp_path / 'out'}")
    found = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert found["steps"] is None and [len(lines) for lines in found["training"].values()] == [3, 1]
    assert "0.200" in (tmp_path / "out" / "report.html").read_text()  # the last share


def test_mistakes_are_named(inverter, tmp_path, capsys) -> None:
    with pytest.raises(UserError, match="Mosaic, which has no sampling steps"):
        tool.step_rows("m", Contestant(Mosaic()), [1])
    for steps in ([], [1, 1], [0], [2.5], [1001]):
        with pytest.raises(UserError, match="from 1 to 1000"):
            tool.step_rows("d", Contestant(inverter), steps)
    with pytest.raises(SystemExit):
        call("inverter=null", "runs=[runs/a,/runs/a]", f"out={tmp_path}")
    assert "would both be the row" in capsys.readouterr().err
    with pytest.raises(UserError, match="nothing to draw"):
        write_curves(tmp_path, None, {}, "title")
    with pytest.raises(UserError, match="no log"):
        read_log(tool.log_of(str(tmp_path)))
    for content in ("", "{", '{"step": 1}'):
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(UserError, match="leave it out"):
            read_log(tmp_path / "a.jsonl")
    figure = {"value": 0.5, "low": None, "high": None, "n": 2}
    content = {"meta": {}, "floor": {}, "ceiling": {}, "inverters": {"steps-1": {"psnr": figure}}}
    with pytest.raises(UserError, match="no 'share'; there are psnr"):
        write_curves(tmp_path, content, {}, "title", ["share"])
