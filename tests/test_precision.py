import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import save_tiny, tiny_config, tiny_first_stage, tiny_prior
from omegaconf import OmegaConf
from test_training import _module
from torch import nn

from featinv.backbones import load_backbone
from featinv.data.memory import InMemoryImages
from featinv.data.scenes import ScenesDataset
from featinv.diffusion.half import saved_bytes, store_half
from featinv.errors import UserError
from featinv.inverters.build import load_trained
from featinv.inverters.upconv import UpconvInverter
from featinv.training.adversary import Adversary
from featinv.training.consistency import EstimateConsistency, SampleConsistency
from featinv.training.precision import draw_in, fast_bfloat16, hasten
from featinv.training.prior_modules import FirstStageModule
from featinv.training.probe import FeatureProbe
from featinv.training.runner import fit
from featinv.training.teacher import EmbeddingTeacher


def _trained(folder, backbone):
    tiny_prior().save_pretrained(folder / "prior")
    save_tiny(folder / "run" / "inverter.safetensors", tiny_config(folder / "prior"), backbone)
    return load_trained(folder / "run").inverter


def _bytes(network: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters())


def test_stored_half_a_frozen_network_computes_what_autocast_does() -> None:
    unet, inputs = tiny_prior().unet.requires_grad_(False), torch.randn(2, 4, 4, 4)
    call = {"timestep": torch.tensor([3, 700]), "encoder_hidden_states": torch.randn(2, 3, 8), "return_dict": False}
    with torch.autocast("cpu", torch.bfloat16):
        expected = unet(inputs, **call)[0]
        size, saved = _bytes(unet), saved_bytes(unet)
        store_half(unet)
        assert size - _bytes(unet) == saved > 0.4 * size
        assert torch.equal(unet(inputs, **call)[0], expected)
    kinds = {type(layer): layer.weight.dtype for layer in unet.modules() if getattr(layer, "weight", None) is not None}
    assert kinds[nn.Conv2d] == kinds[nn.Linear] == torch.bfloat16 and kinds[nn.GroupNorm] == torch.float32


def test_what_is_trained_keeps_its_precision() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    store_half(network)
    assert [layer.weight.dtype for layer in network] == [torch.float32, torch.bfloat16]


def test_a_halved_inverter_draws_nearly_the_same_pictures(tmp_path, backbone) -> None:
    inverter, features = _trained(tmp_path, backbone), backbone(torch.rand(3, 3, 32, 32))
    exact, mean = inverter.invert(features, seeds=[1, 2, 3]), inverter.posterior_mean(features)
    size = _bytes(inverter.prior.unet)
    assert draw_in(inverter, "fp32") == "fp32" and torch.equal(inverter.invert(features, seeds=[1, 2, 3]), exact)
    assert draw_in(inverter, "bf16") == "bf16"
    drawn = inverter.invert(features, seeds=[1, 2, 3])
    assert drawn.dtype == torch.float32 and not torch.equal(drawn, exact)
    assert float((drawn - exact).abs().mean()) < 0.01
    torch.testing.assert_close(inverter.invert(features[1:2], seeds=[2]), drawn[1:2], atol=0.02, rtol=0)
    assert torch.equal(inverter.posterior_mean(features), mean)
    assert _bytes(inverter.prior.unet) < 0.55 * size


def test_auto_halves_where_the_hardware_gains_by_it(tmp_path, backbone) -> None:
    inverter = _trained(tmp_path, backbone)
    assert draw_in(inverter, "auto") == ("bf16" if fast_bfloat16() else "fp32")
    with pytest.raises(UserError, match="precision 'half'"):
        draw_in(inverter, "half")


def test_an_inverter_without_a_unet_draws_as_it_is(backbone) -> None:
    from featinv.inverters.retrieval import RetrievalInverter

    pictures = [{"image": torch.rand(3, 32, 32), "label": 0, "id": str(i)} for i in range(3)]
    small = load_backbone("resnet10t", pretrained=False, input_size=32)
    inverter = RetrievalInverter(small, pictures, size=32)
    assert draw_in(inverter, "bf16") == "fp32"


def test_compiled_networks_draw_the_same_pictures(inverter, backbone) -> None:
    features, names = backbone(torch.rand(2, 3, 32, 32)), list(inverter.trainable_state())
    expected = inverter.invert(features, seeds=[1, 2])
    inverter.compile_networks(backend="eager")  # traced as for inductor, without minutes of generating code
    torch.testing.assert_close(inverter.invert(features, seeds=[1, 2]), expected, atol=1e-5, rtol=0)
    assert list(inverter.trainable_state()) == names


@pytest.fixture(scope="module")
def images() -> InMemoryImages:
    return InMemoryImages(ScenesDataset(8, size=32))


SHORT = {"max_steps": 2, "batch_size": 4, "progress": False, "precision": "bf16"}


def test_a_branch_trains_in_half_precision_beside_a_stored_prior(tmp_path, backbone, images) -> None:
    term = SampleConsistency(rows=2, jitter=3, adversary=Adversary(layers=["pixels", "layer1"], width=4))
    module = _module(backbone, consistency=term)
    for block in module.inverter.branch.controlnet_down_blocks:
        nn.init.normal_(block.weight, std=0.1)
    before = {name: p.detach().clone() for name, p in module.inverter.named_parameters() if p.requires_grad}
    store_half(module.inverter.prior.unet)
    probe = FeatureProbe(images[range(4)]["image"], backbone, tmp_path, every=0, batch_images=4)
    fit(module, images, tmp_path, callbacks=[probe], **SHORT)
    assert term.adversary.steps == 2
    (line,) = (json.loads(text) for text in (tmp_path / "probe.jsonl").read_text().splitlines())
    assert math.isfinite(line["cosine"])
    trained = {name: p for name, p in module.inverter.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert any(not torch.equal(p, before[name]) for name, p in trained.items() if name.startswith("branch."))


def test_a_first_stage_trains_in_half_precision(tmp_path, backbone, images) -> None:
    first_stage = tiny_first_stage(shortcut=True)
    first_stage.shortcut.fit(images[range(8)]["image"])
    before = first_stage.vae.decoder.conv_out.weight.detach().clone()
    fit(FirstStageModule(first_stage, backbone, max_steps=2, warmup_steps=1), images, tmp_path, **SHORT)
    assert not torch.equal(first_stage.vae.decoder.conv_out.weight, before)
    assert first_stage.decode(torch.randn(1, 4, 4, 4)).isfinite().all()


def test_a_run_is_hastened_as_its_settings_allow(inverter, backbone) -> None:
    kept = {"precision": "bf16", "strategy": "fsdp", "compile": False}
    unet = inverter.prior.unet
    hasten(inverter, OmegaConf.create(kept))
    assert unet.conv_in.weight.dtype == torch.float32  # fsdp splits weights of one format only
    hasten(inverter, OmegaConf.create(kept | {"strategy": "auto"}))
    assert unet.conv_in.weight.dtype == torch.bfloat16 and inverter.branch.conv_in.weight.dtype == torch.float32
    with pytest.raises(UserError, match="no UNet to compile"):
        hasten(UpconvInverter(backbone.spec, size=32), OmegaConf.create(kept | {"compile": True}))


@pytest.mark.parametrize("size", [32, 48])
def test_the_decoder_learns_under_autocast_on_a_cpu(backbone, size) -> None:
    # Its resize to the picture's size has no gradient in bfloat16 there.
    images = torch.rand(2, 3, size, size)
    decoder = UpconvInverter(backbone.spec, size=size, width=16)
    features = torch.randn(2, backbone.spec.channels, backbone.spec.height, backbone.spec.width)
    decoder.prepare(features, None)
    expected = decoder.training_losses(images, features, seeds=[0, 1])["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = decoder.training_losses(images, features, seeds=[0, 1])["loss"]
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert all(torch.isfinite(p.grad).all() for p in decoder.parameters() if p.requires_grad)


def test_images_are_encoded_into_latents_of_full_precision_under_autocast(prior, inverter, backbone) -> None:
    images = torch.rand(2, 3, 32, 32)
    features = backbone(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert prior.first_stage.encode(images).dtype == torch.bfloat16
        found = inverter.training_losses(images, features, seeds=[0, 1])
    # The noise schedule is computed in the latents' format, and in bfloat16 adds nothing at its first steps.
    assert found["latents"].dtype == torch.float32


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(1 - F.cosine_similarity(found.flatten(1), wanted.flatten(1)).mean())


def test_features_are_those_of_float32_under_autocast(backbone) -> None:
    module, images, seeds = _module(backbone), torch.rand(3, 3, 32, 32), [1, 2, 3]
    exact = backbone(images)
    decoder = UpconvInverter(backbone.spec, 32, backbone, components=16, width=16, feature_weight=1.0)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert not torch.equal(backbone(images).float(), exact)
        features = module.features_of({"image": images})
        losses = module.inverter.training_losses(images, features, seeds=seeds)
        estimated = module.inverter.prior.first_stage.decode(losses["estimate"])
        judged = EstimateConsistency(rows=3, max_timestep=1.0)(module.inverter, backbone, losses, features, seeds)
        drawn = decoder(features).clamp(0, 1)
        feature_term = decoder.training_losses(images, features, seeds=seeds)["feature"]
    assert torch.equal(features, exact)
    assert float(judged) == pytest.approx(_distance(backbone(estimated), exact), abs=1e-6)
    assert float(feature_term) == pytest.approx(_distance(backbone(drawn), exact), abs=1e-6)


def test_what_teaches_and_draws_in_training_sees_features_of_float32_under_autocast(tmp_path, backbone) -> None:
    _trained(tmp_path, backbone)
    images, seen = torch.rand(2, 3, 32, 32), []
    teacher = EmbeddingTeacher(tmp_path / "run")
    stage = load_trained(tmp_path / "run").inverter.prior.first_stage
    drawer = FirstStageModule(stage, backbone, drawn_by=str(tmp_path / "run"))._drawer[0]
    encoder, draw = teacher.encoder.forward, drawer.inverter.draw
    teacher.encoder.forward = lambda features: seen.append(features) or encoder(features)
    drawer.inverter.draw = lambda features, seeds: seen.append(features) or draw(features, seeds)
    with torch.autocast("cpu", torch.bfloat16):
        teacher(images)
        drawer(images, [1, 2])
    assert torch.equal(seen[0], teacher.backbone(images)) and torch.equal(seen[1], drawer.backbone(images))
