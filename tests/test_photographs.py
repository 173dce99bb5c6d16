"""Photographs of any size in shards, as eval.benchmark and the photos64 experiments read them."""

import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from eval.benchmark import Setting, chosen_data, has_class_labels
from featinv.config import CONFIG_ROOT, instantiate, load_config
from featinv.data.folders import ilsvrc_synsets
from featinv.diffusion.prior import load_prior
from featinv.inverters.build import find_inverter

SHARED = Path(__file__).parents[2] / "shared" / "data"
EXPERIMENTS = (
    "photos64",
    "photos64_direct",
    "photos64_early",
    "photos64_early_lifted",
    "photos64_mobilenetv2",
    "photos64_mobilenetv2_early",
    "photos64_pooled",
    "photos64_upconv",
)
absent = pytest.mark.skipif(not SHARED.is_dir(), reason="the sample photographs are not here")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_on_photographs_is_that_on_scenes_with_other_data_and_prior(name: str, monkeypatch) -> None:
    monkeypatch.setenv("PHOTOS_ROOT", "photos")
    config = load_config(name)
    on_scenes = re.sub("_(mobilenetv2|direct|lifted)", "", name.replace("photos64", "scenes64"))
    expected = OmegaConf.merge(load_config(on_scenes), {"prior": "photos64"})
    expected.data = config.data
    if "mobilenetv2" in name:
        expected.backbone.params.name = "mobilenetv2"
    if lender := config.training.start or config.branch_of:  # other schedules, a narrower new encoder
        assert find_inverter(lender).is_file()
        expected.training, expected.conditioning.params = config.training, config.conditioning.params
        expected.branch_of, expected.lift = config.branch_of, config.lift
    else:  # an epoch of images as they come
        expected.training.max_steps, expected.training.cache = 2500, False
    assert OmegaConf.to_container(config, resolve=True) == OmegaConf.to_container(expected, resolve=True)
    assert config.data.params.val.params.urls == "photos/val-*.tar*"
    assert load_prior(config.prior).size == config.data.params.val.params.size == 64


def centre(image: Image.Image, size: int) -> np.ndarray:
    """By Pillow alone: every pixel decoded, the shorter side resized (bicubic, antialiased), the centre kept."""
    scale = size / min(image.size)
    image = image.convert("RGB").resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size))) / 255


@absent
def test_larger_photographs_are_reduced_with_antialiasing_and_keep_their_labels() -> None:
    path = SHARED / "imagenet-sample" / "val-000.tar"
    config = OmegaConf.load(CONFIG_ROOT / "benchmark.yaml")
    config.data, config.n, config.class_labels = str(path), 500, True
    data = chosen_data(config, Setting(OmegaConf.create({}), None, 64, None))
    assert len(data) == 500 and has_class_labels(config.class_labels, data.dataset)
    assert not has_class_labels(None, data.dataset)  # shards do not say what their labels are
    synsets = ilsvrc_synsets()
    with tarfile.open(path) as tar:
        for number in (0, 123, 499):
            item = data[number]
            key = item["id"].partition("__")[2]
            assert synsets[item["label"]] == key.split("_")[0]
            image = Image.open(tar.extractfile(f"{key}.jpg")).convert("RGB")
            expected = torch.from_numpy(centre(image, 64)).permute(2, 0, 1).float()
            assert item["image"].shape == (3, 64, 64)
            error = (item["image"] - expected).abs().mean()
            nearest = np.asarray(image.resize((64, 64), Image.Resampling.NEAREST)) / 255
            aliased = np.abs(nearest.transpose(2, 0, 1) - expected.numpy()).mean()
            assert error < 0.01 and error < aliased / 3  # the JPEG is decoded at half its side


@absent
def test_labels_of_the_64_pixel_shards_become_classes_of_imagenet(monkeypatch) -> None:
    root = SHARED / "tiny-imagenet"
    monkeypatch.setenv("PHOTOS_ROOT", str(root))
    data = instantiate(load_config("photos64").data.params.val)
    wnids, synsets = json.loads((root / "wnids.json").read_text()), ilsvrc_synsets()
    with tarfile.open(root / "val-000.tar.gz") as tar:
        stated = {m.name[:-4]: int(tar.extractfile(m).read()) for m in tar if m.name.endswith(".cls")}
    assert len(data) == len(stated) == 3000 and not data.skipped
    for entry in data.entries:
        assert synsets[entry.label] == wnids[stated[entry.id.partition("__")[2]]]
    assert data[0]["image"].shape == (3, 64, 64)
