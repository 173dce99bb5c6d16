import json

import pytest
import torch
from conftest import save_tiny, tiny_config, tiny_prior
from omegaconf import OmegaConf

from featinv.checkpoint import load_checkpoint, save_checkpoint
from featinv.config import load_config
from featinv.diffusion.prior import load_prior
from featinv.errors import UserError
from featinv.inverters.base import TrainableInverter
from featinv.inverters.build import about, build_inverter, find_inverter, load_inverter, load_trained, take_over
from featinv.training.module import InversionModule


@pytest.fixture
def config(tmp_path):
    tiny_prior().save_pretrained(tmp_path / "prior")
    return tiny_config(tmp_path / "prior")


def test_a_saved_inverter_draws_the_same_images(tmp_path, config, backbone) -> None:
    inverter = save_tiny(tmp_path / "run" / "inverter.safetensors", config, backbone, note={"steps": 5})
    again = load_trained(tmp_path / "run")
    features = backbone(torch.rand(2, 3, 32, 32))
    difference = again.inverter.invert(features, seeds=[1, 2]) - inverter.invert(features, seeds=[1, 2])
    assert difference.abs().max() < 1e-5  # memory layout alone rounds differently
    assert again.note == {"steps": 5} and again.load_backbone().spec == backbone.spec
    assert not any(p.requires_grad for p in again.inverter.parameters())


class Documented(torch.nn.Module):
    """What docs/add-an-inverter.md asks for, and no more."""

    size = 8

    def invert(self, features, *, seeds): ...

    def training_losses(self, images, features, *, seeds, latents=None): ...

    def trainable_parameters(self): ...

    def trainable_state(self): ...

    def prepare(self, features, latents): ...


def test_weights_find_their_inverter_or_are_refused(tmp_path, config, backbone) -> None:
    assert isinstance(Documented(), TrainableInverter)
    path = tmp_path / "inverter.safetensors"
    save_tiny(path, config, backbone)
    tree = load_checkpoint(path)
    tree["featinv"]["config"]["inverter"] = {
        "target": "featinv.inverters.optimisation.OptimizationInverter",
        "params": {"size": 32, "steps": 1},
    }
    tree["featinv"]["config"]["backbone"]["params"]["pretrained"] = False
    save_checkpoint(path, tree)
    with pytest.raises(UserError, match="OptimizationInverter has no place for them"):
        load_trained(path)


def test_half_precision_changes_little(tmp_path, config, backbone) -> None:
    inverter = save_tiny(tmp_path / "half.safetensors", config, backbone, dtype=torch.float16)
    features = backbone(torch.rand(2, 3, 32, 32))
    again = load_inverter(tmp_path / "half.safetensors")
    assert (again.invert(features, seeds=[1, 2]) - inverter.invert(features, seeds=[1, 2])).abs().mean() < 0.02


def test_an_inverter_starts_from_another_one_part_by_part(tmp_path, config, backbone) -> None:
    save_tiny(tmp_path / "run" / "inverter.safetensors", config, backbone, note={})
    old = {k: v.clone() for k, v in load_trained(tmp_path / "run").inverter.trainable_state().items()}
    same = build_inverter(config, backbone.spec)
    taken, fresh = take_over(same, tmp_path / "run")
    assert fresh == [] and all(torch.equal(v, old[k]) for k, v in same.trainable_state().items())

    config.conditioning.params.hidden = 32  # another encoder: the branch fits, the encoder stays as it was built
    other = build_inverter(config, backbone.spec)
    before = {k: v.clone() for k, v in other.trainable_state().items()}
    taken, fresh = take_over(other, tmp_path / "run")
    assert "branch" in taken and fresh == ["encoder"]
    for key, value in other.trainable_state().items():
        assert torch.equal(value, (before if key.startswith("encoder.") else old)[key])


def test_a_start_of_which_nothing_fits_is_refused(tmp_path, config, backbone) -> None:
    save_checkpoint(tmp_path / "other.safetensors", {"featinv": {}, "state_dict": {"x": torch.zeros(1)}})
    with pytest.raises(UserError, match="nothing in"):
        take_over(build_inverter(config, backbone.spec), tmp_path / "other.safetensors")


@pytest.fixture
def borrowing(tmp_path, config, backbone):
    """Configuration of an inverter with another encoder and the branch of the one in tmp_path/lender."""
    save_tiny(tmp_path / "lender" / "inverter.safetensors", config, backbone)
    other = OmegaConf.merge(config, {"branch_of": str(tmp_path / "lender")})
    other.conditioning.params.hidden = 32
    return other


def test_a_borrowed_branch_is_neither_trained_nor_saved(tmp_path, borrowing, backbone) -> None:
    inverter = save_tiny(tmp_path / "run" / "inverter.safetensors", borrowing, backbone)
    assert all(
        key.startswith("encoder.") for key in load_checkpoint(tmp_path / "run/inverter.safetensors")["state_dict"]
    )
    lender = load_inverter(tmp_path / "lender")
    for key, value in lender.trainable_state().items():
        assert key.startswith("encoder.") or torch.equal(inverter.state_dict()[key], value)

    features = backbone(torch.rand(2, 3, 32, 32))
    again = load_inverter(tmp_path / "run")
    assert (again.invert(features, seeds=[1, 2]) - inverter.invert(features, seeds=[1, 2])).abs().max() < 1e-5
    lender.encoder = inverter.encoder  # the rest is the lender's
    assert (lender.invert(features, seeds=[1, 2]) - inverter.invert(features, seeds=[1, 2])).abs().max() < 1e-5

    fresh = build_inverter(borrowing, backbone.spec)
    fresh.training_losses(None, features, seeds=[1, 2], latents=torch.randn(2, 4, 4, 4))["loss"].backward()
    trained = {name for name, p in fresh.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained and all(name.startswith("encoder.") for name in trained)
    assert {id(p) for p in fresh.trainable_parameters()} == {id(p) for p in fresh.encoder.parameters()}


def test_a_branch_that_has_changed_or_does_not_fit_is_refused(tmp_path, config, borrowing, backbone) -> None:
    save_tiny(tmp_path / "run" / "inverter.safetensors", borrowing, backbone)
    light = OmegaConf.merge(borrowing, {"inverter": {"params": {"branch": "light"}}})
    with pytest.raises(UserError, match="another kind"):
        build_inverter(light, backbone.spec)
    decoder = OmegaConf.merge(borrowing, {})
    decoder.inverter = {"target": "featinv.inverters.upconv.UpconvInverter", "params": {"size": 32}}
    with pytest.raises(UserError, match="has no branch"):
        build_inverter(decoder, backbone.spec)
    torch.manual_seed(9)
    save_tiny(tmp_path / "lender" / "inverter.safetensors", config, backbone)  # trained again
    with pytest.raises(UserError, match="trained with another branch"):
        load_inverter(tmp_path / "run")
    now = build_inverter(borrowing, backbone.spec)
    module = InversionModule(now, backbone, described=about(borrowing, now, backbone.spec))
    with pytest.raises(UserError, match="begun with another branch"):
        module.on_load_checkpoint(load_checkpoint(tmp_path / "run" / "inverter.safetensors"))
    tiny_prior().save_pretrained(config.prior)
    with pytest.raises(UserError, match="another prior"):
        build_inverter(borrowing, backbone.spec)


def test_a_branch_can_be_borrowed_from_one_that_borrowed_it(tmp_path, config, borrowing, backbone) -> None:
    save_tiny(tmp_path / "run" / "inverter.safetensors", borrowing, backbone)
    twice = OmegaConf.merge(config, {"branch_of": str(tmp_path / "run")})  # with an encoder of a third size
    twice.conditioning.params.hidden = 16
    inverter, lender = save_tiny(tmp_path / "twice.safetensors", twice, backbone), load_inverter(tmp_path / "lender")
    assert all(torch.equal(v, dict(inverter.branch.named_parameters())[k]) for k, v in lender.branch.named_parameters())
    features = backbone(torch.rand(2, 3, 32, 32))
    again = load_inverter(tmp_path / "twice.safetensors")
    assert (again.invert(features, seeds=[1, 2]) - inverter.invert(features, seeds=[1, 2])).abs().max() < 1e-5

    torch.manual_seed(9)
    save_tiny(tmp_path / "lender" / "inverter.safetensors", config, backbone)  # trained again, tmp_path/run is not
    with pytest.raises(UserError, match="another branch than it now borrows"):
        build_inverter(twice, backbone.spec)


def test_another_prior_is_refused(tmp_path, config, backbone) -> None:
    save_tiny(tmp_path / "a.safetensors", config, backbone)
    torch.manual_seed(9)
    other = tiny_prior()
    other.save_pretrained(config.prior)
    with pytest.raises(UserError, match="trained with another prior"):
        load_inverter(tmp_path / "a.safetensors")


def test_a_prior_whose_decoder_was_trained_on_is_no_other(tmp_path, config, backbone) -> None:
    save_tiny(tmp_path / "a.safetensors", config, backbone)
    prior = load_prior(config.prior)
    with torch.no_grad():
        for parameter in prior.first_stage.vae.decoder.parameters():
            parameter.mul_(1.5)
    prior.save_pretrained(config.prior)
    assert load_inverter(tmp_path / "a.safetensors").size == prior.size
    with torch.no_grad():
        prior.first_stage.vae.encoder.conv_out.weight.mul_(1.5)
    prior.save_pretrained(config.prior)
    with pytest.raises(UserError, match="trained with another prior"):
        load_inverter(tmp_path / "a.safetensors")


def test_another_backbone_is_refused(tmp_path, config, backbone) -> None:
    save_tiny(tmp_path / "a.safetensors", config, backbone)
    tree = load_checkpoint(tmp_path / "a.safetensors")
    tree["featinv"]["config"]["backbone"]["params"]["layer"] = "layer1"
    save_checkpoint(tmp_path / "b.safetensors", tree)
    with pytest.raises(UserError, match="built for"):
        load_trained(tmp_path / "b.safetensors").load_backbone()


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "key", "shape", "kind"])
def test_a_damaged_file_is_named(tmp_path, config, backbone, damage) -> None:
    path = tmp_path / "a.safetensors"
    save_tiny(path, config, backbone)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("weights")
    else:
        tree = load_checkpoint(path)
        name = "null_embedding"
        if damage == "key":
            del tree["state_dict"][name]
        elif damage == "shape":
            tree["state_dict"][name] = torch.zeros(1, 3, 1, 1)
        else:
            del tree["featinv"]
        save_checkpoint(path, tree)
    with pytest.raises(UserError, match="a.safetensors"):
        load_inverter(path)


def test_unknown_names_are_answered_with_the_nearest(tmp_path) -> None:
    with pytest.raises(UserError, match="neither a file"):
        find_inverter("scenes64/eficientnet")
    with pytest.raises(UserError, match="holds no trained inverter"):
        find_inverter(tmp_path)


def test_an_untrained_inverter_equals_the_prior(config, backbone) -> None:
    from featinv.diffusion.controlled_unet import unconditional
    from featinv.diffusion.samplers import sample
    from featinv.image import seeded_noise

    inverter = build_inverter(config, backbone.spec)
    prior = inverter.prior
    latents = sample(
        lambda x, t: unconditional(prior.unet, prior.text["prompt"], x, t),
        seeded_noise([4, 5], prior.latent_shape),
        prior.scheduler,
        num_inference_steps=3,
    )
    images = inverter.invert(backbone(torch.rand(2, 3, 32, 32)), seeds=[4, 5])
    assert torch.equal(images, prior.first_stage.decode(latents))  # bit for bit


def test_experiments_inherit_and_groups_replace() -> None:
    base, pooled = load_config("scenes64"), load_config("scenes64_pooled")
    assert pooled.training == base.training and pooled.conditioning.target.endswith("PooledEncoder")
    published = load_config("scenes64_reference")
    assert (
        published.inverter.params.guidance.params.drop == ["text"] and published.training.module.params.ema_decay == 0
    )
    swapped = load_config("convnext_base", ["backbone=resnet50"])
    assert "input_size" not in swapped.backbone.params
    assert json.loads(json.dumps(OmegaConf.to_container(swapped)))["prior"] == base.prior.replace(
        "scenes64", "lambdalabs/miniSD-diffusers"
    )
