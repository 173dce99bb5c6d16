import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_prior
from diffusers import DDPMScheduler
from torch.utils.data import Subset

from eval.classic_studies import WithBar
from featinv.applications.matching import MATCHING, matched
from featinv.backbones import load_backbone
from featinv.conditioning.encoders import SpatialEncoder
from featinv.data.scenes import ScenesDataset
from featinv.diffusion.guidance import ClassifierFreeGuidance
from featinv.errors import UserError
from featinv.inverters.described import describe
from featinv.inverters.diffusion import DiffusionInverter
from featinv.inverters.optimisation import OptimizationInverter
from featinv.inverters.reconstruct import reconstruct, sample_seed
from featinv.inverters.regularisers import Regulariser, total_variation
from featinv.inverters.retrieval import RetrievalInverter
from featinv.inverters.upconv import UpconvInverter
from featinv.training.batches import StepBatches
from featinv.training.cache import build_cache
from featinv.training.ema import EMA


def test_total_variation_equals_a_loop() -> None:
    image = torch.rand(1, 1, 4, 5)
    total = 0.0
    for y in range(4):
        for x in range(5):
            dx = image[0, 0, y, x + 1] - image[0, 0, y, x] if x < 4 else 0.0
            dy = image[0, 0, y + 1, x] - image[0, 0, y, x] if y < 3 else 0.0
            total += float((dx**2 + dy**2 + 1e-8) ** 0.75)
    assert float(total_variation(image, beta=1.5)) == pytest.approx(total / 20, rel=1e-5)


def test_optimisation_approaches_the_features_one_image_at_a_time() -> None:
    backbone = load_backbone("resnet10t", "layer1", pretrained=False, input_size=32)
    images = torch.rand(2, 3, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    features = backbone(images)
    inverter = OptimizationInverter(backbone, size=32, steps=60, tv_weight=0.0, l2_weight=0.0)
    start = OptimizationInverter(backbone, size=32, steps=1, learning_rate=0.0).invert(features, seeds=[1, 2])
    found = inverter.invert(features, seeds=[1, 2])

    def cosine(x: torch.Tensor) -> torch.Tensor:
        return F.cosine_similarity(backbone(x).flatten(1), features.flatten(1))

    assert (cosine(found) > cosine(start) + 0.1).all() and (cosine(found) > 0.95).all()
    assert torch.allclose(inverter.invert(features[1:], seeds=[2]), found[1:], atol=5e-2)


class _Recorder:
    """Paints each image in a colour that tells its seed; counts calls; can die."""

    def __init__(self, die_after: int = 10**9):
        self.painted, self._last = 0, die_after

    def invert(self, features, *, seeds):
        if self.painted >= self._last:
            raise KeyboardInterrupt
        self.painted += len(seeds)
        return torch.stack([torch.full((3, 16, 16), (s % 256) / 255) for s in seeds])


def test_interrupted_reconstruction_finishes_without_repeating(tmp_path) -> None:
    backbone = load_backbone("resnet10t", pretrained=False, input_size=32)
    data = ScenesDataset(length=5, seed=0, size=16)
    items = [data[i] for i in range(5)]
    settings = {"samples": 2, "seed": 3, "size": 16, "batch_size": 3}
    with pytest.raises(KeyboardInterrupt):
        reconstruct(_Recorder(die_after=6), backbone, items, tmp_path, **settings)
    assert len(list((tmp_path / "samples").iterdir())) == 6
    damaged = sorted((tmp_path / "samples").iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:30])
    second = _Recorder()
    result = reconstruct(second, backbone, items, tmp_path, **settings)
    assert second.painted == 4 + 3  # four missing; with the damaged one its whole batch, so that rounding is the same
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [e["id"] for e in manifest["images"]] == [i["id"] for i in items]
    for k in range(2):
        for image, item in zip(result.samples(k), items, strict=True):
            assert float(image[0, 0, 0]) == pytest.approx((sample_seed(3, item["id"], k) % 256) / 255, abs=1e-3)
    assert torch.allclose(result.originals()[2], items[2]["image"], atol=2e-3)
    with pytest.raises(UserError, match=r"other settings \(seed: 3 -> 4\)"):
        reconstruct(second, backbone, items, tmp_path, **(settings | {"seed": 4}))
    with pytest.raises(UserError, match="other pictures"):
        reconstruct(second, backbone, [items[0] | {"image": items[1]["image"]}, *items[1:]], tmp_path, **settings)
    with pytest.raises(UserError, match=r"features_of.layer: final -> layer1"):
        reconstruct(second, backbone.at("layer1"), items, tmp_path, **settings)
    del manifest["about"]["inverter"], manifest["about"]["features_of"]  # as folders of old have it
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    third = _Recorder()
    reconstruct(third, backbone, items, tmp_path, **settings)
    assert third.painted == 0


def test_a_description_changes_with_whatever_changes_the_pictures(prior, backbone) -> None:
    def drawn_by() -> DiffusionInverter:
        torch.manual_seed(0)
        encoder = SpatialEncoder(backbone.spec, prior.latent_shape, prior.unet.config.block_out_channels[0], 8, 8)
        return DiffusionInverter(prior, encoder, num_inference_steps=3)

    inverter = drawn_by()
    assert describe(inverter) == describe(drawn_by()) == json.loads(json.dumps(describe(inverter)))
    seen = [describe(inverter)]
    with torch.no_grad():
        next(iter(inverter.branch.parameters())).add_(0.1)
    seen.append(describe(inverter))
    inverter.num_inference_steps = 4
    seen.append(describe(inverter))
    inverter.guidance = ClassifierFreeGuidance(2.0)
    seen.append(describe(inverter))
    seen += [describe(matched(inverter, backbone, kinds)) for kinds in (("corrected",), ("refined",), ("guided",))]
    seen.append(describe(matched(inverter, backbone, ("refined",), {"refined": {"steps": 3}})))
    bars = [WithBar(OptimizationInverter(backbone, size=32, steps=steps), "x") for steps in (2, 3)]
    seen += [describe(Subset(range(300), range(n))) for n in (100, 101)] + [describe(bar) for bar in bars]
    for changed in ({}, {"prediction_type": "epsilon"}, {"beta_end": 0.02}):
        seen.append(describe(DDPMScheduler.from_config(prior.scheduler.config, **changed)))
    latent = [OptimizationInverter(backbone, 32, parametrisation="latent", prior=tiny_prior()) for _ in range(2)]
    with torch.no_grad():
        next(latent[1]._prior.first_stage.parameters()).mul_(1.1)
    seen += [describe(x) for x in latent]
    seen += [describe([thing]) for thing in (Path("a"), Path("b"), torch.float16, np.float32(2), np.arange(2), len)]
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize(
    "kind",
    [DiffusionInverter, OptimizationInverter, RetrievalInverter, UpconvInverter, Regulariser, *MATCHING.values()],
    ids=lambda kind: kind.__name__,
)
def test_what_draws_keeps_its_arguments_under_their_names(kind: type) -> None:
    """Else `describe` would not see them; what is held in another object or in the weights is left out."""
    source = inspect.getsource(kind.__init__)
    elsewhere = {"snr_gamma", "gated", "components", "width"}
    elsewhere |= {"tv_weight", "tv_beta", "l2_weight"} if kind is OptimizationInverter else set()
    for name in set(inspect.signature(kind).parameters) - elsewhere:
        assert re.search(rf"self\._?{name}\b", source), name


def test_step_batches_resume_where_they_stopped_and_cover_every_row() -> None:
    whole = list(StepBatches(10, 4, stop=10, seed=1))
    assert list(StepBatches(10, 4, stop=10, start=6, seed=1)) == whole[6:]
    flat = [row for batch in whole for row in batch]
    for epoch in range(4):
        assert sorted(row - 10 * epoch for row in flat[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    halves = [list(StepBatches(10, 4, stop=10, seed=1, rank=r, world_size=2)) for r in range(2)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(b) for b in whole]


def test_cache_holds_what_the_networks_compute_and_resumes(tmp_path, prior, backbone) -> None:
    data = ScenesDataset(length=7, seed=0, size=32)
    calls = []

    def interrupt(done: int, total: int) -> None:
        calls.append(done)
        if done == 4:
            raise KeyboardInterrupt

    first_stage = prior.first_stage
    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path, {"a": 1}, data, first_stage, backbone, batch_size=2, progress=interrupt)
    cache = build_cache(tmp_path, {"a": 1}, data, first_stage, backbone, batch_size=2)
    batch = cache[[6, 0]]
    images = torch.stack([data[6]["image"], data[0]["image"]])
    mean, std = first_stage.posterior(images)
    assert torch.allclose(batch["features"], backbone(images), atol=1e-2)
    assert ((batch["latents"] - mean).abs() <= 6 * std + 1e-2).all()
    assert len(cache) == 7 and build_cache(tmp_path, {"a": 1}, data, first_stage, backbone).folder == cache.folder


def test_ema_of_every_third_step_takes_three_steps_at_once() -> None:
    layer, step = torch.nn.Linear(3, 2), torch.randn(2, 3)
    parameters = dict(layer.named_parameters())
    often, seldom = EMA(parameters, decay=0.95), EMA(parameters, decay=0.95, every=3)
    for update in range(1, 400):
        with torch.no_grad():
            layer.weight.add_(0.01 * step)
        before = seldom.averages["weight"].clone()
        often.update()
        seldom.update()
        assert torch.equal(seldom.averages["weight"], before) == (update % 3 != 0)
    # Of weights that move evenly, an average is d / (1 - d) steps behind; in threes, whole threes behind.
    behind = [float(((layer.weight - x.averages["weight"]) / (0.01 * step)).mean()) for x in (often, seldom)]
    assert behind == pytest.approx([0.95 / 0.05, 3 * 0.95**3 / (1 - 0.95**3)], rel=1e-2)


def test_ema_equals_the_recursion_and_gives_the_weights_back() -> None:
    layer = torch.nn.Linear(3, 2)
    ema, average = EMA(dict(layer.named_parameters()), decay=0.9), layer.weight.detach().clone()
    for update in range(1, 30):
        with torch.no_grad():
            layer.weight.add_(torch.randn(2, 3))
        ema.update()
        decay = min(0.9, (1 + update) / (10 + update))
        average = decay * average + (1 - decay) * layer.weight.detach()
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError), ema.applied():
        assert torch.allclose(layer.weight, average, atol=1e-5)
        raise RuntimeError
    assert torch.equal(layer.weight, before)
