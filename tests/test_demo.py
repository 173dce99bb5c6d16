"""What the demo hands on to training and evaluation."""

from types import SimpleNamespace

import pytest
from cells import Cells
from omegaconf import OmegaConf

from featinv.errors import UserError
from featinv.training import rows
from tools import demo

SCENES = {"target": "featinv.data.scenes.ScenesDataset", "params": {"length": 3, "size": 32}}
DATA = {"target": "featinv.data.datamodule.ImageDataModule", "params": {"train": SCENES, "val": SCENES}}
CONFIG = OmegaConf.create(
    {"demo": {"images": 256, "factor_images": 0}, "data": DATA, "training": {"max_steps": 5, "seed": 0}}
)


class Evaluated(Exception):
    """Ends the demo where it would draw."""


@pytest.fixture
def evaluated(monkeypatch):
    """Runs the demo with a training that only keeps its configuration; returns how many images are evaluated."""
    prior = SimpleNamespace(first_stage=None)
    trained = SimpleNamespace(load_backbone=lambda: Cells("8"), inverter=SimpleNamespace(prior=prior))
    monkeypatch.setattr(demo, "JUDGE", "4")
    monkeypatch.setattr(demo, "train", lambda config, out, changed: rows.keep_config(config, out, changed))
    monkeypatch.setattr(demo, "load_trained", lambda path: trained)
    monkeypatch.setattr(demo, "load_backbone", lambda name: None)
    monkeypatch.setattr(demo, "scene_truth", lambda images: None)
    monkeypatch.setattr(rows, "last_checkpoint", lambda folder: folder)  # a run that has begun

    def benchmark(backbone, items, *_args, **_settings):
        raise Evaluated(len(items))

    monkeypatch.setattr(demo, "Benchmark", benchmark)

    def run(out, *words: str, **settings) -> int:
        with pytest.raises(Evaluated) as caught:
            demo.run(OmegaConf.merge(CONFIG, OmegaConf.from_dotlist(list(words))), out, **settings)
        return caught.value.args[0]

    return run


def test_no_more_images_are_evaluated_than_there_are(evaluated, tmp_path) -> None:
    assert evaluated(tmp_path) == 3
    assert evaluated(tmp_path, "demo.images=2") == 2, "and another number goes on with the same training"


def test_another_training_is_refused_until_the_flag_allows_it(evaluated, tmp_path, monkeypatch) -> None:
    evaluated(tmp_path)
    with pytest.raises(UserError, match="go on with --changed"):
        evaluated(tmp_path, "training.seed=1")
    assert evaluated(tmp_path, "training.seed=1", changed=True) == 3
    seen = []
    monkeypatch.setattr("sys.argv", ["tools.demo", "--changed", f"out={tmp_path}"])
    monkeypatch.setattr(demo, "run", lambda *args: seen.append(args) or {"meta": {"minutes": 1}})
    (tmp_path / "table.md").write_text("")
    demo.main()
    assert seen[0][2] is True
