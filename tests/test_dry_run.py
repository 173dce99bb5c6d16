"""The dry run: real sizes on the meta device, counted costs, mismatches found before anything is read."""

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from featinv.backbones import Backbone, without_weights
from featinv.config import load_config, load_group
from featinv.diffusion.architectures import outline_prior, random_prior
from featinv.diffusion.prior import load_prior
from featinv.errors import UserError
from featinv.training import plan as planning
from featinv.training.costs import matmul_peak, step_cost
from featinv.training.plan import plan


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch) -> None:
    monkeypatch.setattr(planning, "matmul_peak", lambda device, dtype: 1e12)


def test_the_published_networks_have_their_published_sizes(capsys) -> None:
    """859.5 M frozen, 368.7 M trained (branch and hint encoder), without hub, ImageNet or 4 GB of memory."""
    lines = list(plan(load_config("reference")))
    found = {line.split()[0]: line.split()[1] for line in lines if " M  " in line}
    assert found["UNet"] == "859.5" and found["trained"] == "368.7"
    text = "\n".join(lines)
    assert "1024 x 9 x 9" in text and "4 x 32 x 32" in text and "miniSD" in text and "1281167 images" in text
    gradients = next(line for line in lines if line.startswith("trained gradients"))
    assert float(gradients.split()[2]) == pytest.approx(4 * 0.3687, abs=0.01)
    assert "trained average" not in text  # the published recipe keeps none


def test_a_lift_is_planned_by_the_maps_that_it_is_trained_on(monkeypatch) -> None:
    monkeypatch.setenv("PHOTOS_ROOT", "nowhere")
    text = "\n".join(plan(load_config("photos64")))
    found = {line.split()[0]: line.split()[2:] for line in text.splitlines() if " M  " in line}
    assert found["lift"][-1] == "trained" and {found[part][-1] for part in ("encoder", "branch")} == {"frozen"}
    assert "1280 x 4 x 4 of 'final'" in text and "operations" in text


class _OneConvolution(nn.Module):
    """Loss = mean of the squares of one convolution of the pictures."""

    def __init__(self):
        super().__init__()
        self.size, self.convolution = 8, nn.Conv2d(3, 5, 3, padding=1, bias=False)

    def training_losses(self, images, features, *, seeds, latents=None):
        return {"loss": self.convolution(images).square().mean()}


def test_costs_of_one_convolution_are_those_of_the_formula() -> None:
    cost = step_cost(_OneConvolution().to("meta"), images=4, features=(1, 1, 1))
    products = 4 * 5 * 8 * 8 * 3 * 9
    assert cost.flops == 2 * products * 2  # forward and the weight's gradient; pictures need none
    assert cost.activations == 4 * (4 * 3 * 64 + 4 * 5 * 64)  # the convolution keeps its input, the square its own


def test_costs_do_not_depend_on_how_many_images_a_step_has(inverter) -> None:
    inverter.to("meta")
    one, four = (step_cost(inverter, n, (512, 2, 2)) for n in (1, 4))
    assert four.flops == pytest.approx(4 * one.flops, rel=1e-3)
    assert four.activations == pytest.approx(4 * one.activations, rel=0.05)
    assert step_cost(inverter, 4, (512, 2, 2), cached=True).flops < four.flops


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.params.train.params.size=128", "pictures of 128 px"),
        ("training.devices=3", "shared by 3"),
        ("prior=random:mini", "did you mean minisd"),
        ("backbone.params.layer=stages.9", "stages"),
        ("training.precision=half", "precision"),
    ],
)
def test_mismatches_are_found(override, message) -> None:
    config = load_config("scenes64", ["prior=random:small", "backbone=mobilenetv2", override])
    with pytest.raises(UserError, match=message):
        list(plan(config))


def test_a_random_prior_is_the_same_twice_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    first, drawn = load_prior("random:small"), torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)
    again = random_prior("small")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in first.state_dict().items())
    images = first.first_stage.decode(torch.randn(1, *first.latent_shape))
    assert images.shape == (1, 3, 64, 64)
    outline = outline_prior("random:small")
    assert all(v.is_meta and v.shape == first.state_dict()[k].shape for k, v in outline.state_dict().items())


def test_backbones_lose_their_weights_by_their_own_switch() -> None:
    assert without_weights(load_group("backbone", "convnext_base"))["params"]["pretrained"] is False
    assert without_weights(load_group("backbone", "openclip_vit_b32"))["params"]["pretrained"] is None
    assert without_weights(load_group("backbone", "efficientnet_lite0"))["params"]["pretrained"] is False


class _OwnBackbone(Backbone):
    """As docs/add-a-backbone.md says to write one: no word of weights."""

    def __init__(self, channels: int = 8):
        super().__init__("final", 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        self.network = nn.Conv2d(3, channels, 8, stride=8)
        self.freeze()

    def forward(self, images):
        return self.network(self.preprocess(images))


def test_a_backbone_of_ones_own_needs_no_switch_for_its_weights(tmp_path, monkeypatch) -> None:
    from tools import list_layers

    node = {"target": f"{__name__}._OwnBackbone", "params": {"channels": 6}}
    assert without_weights(node) == node
    config = load_config("scenes64", ["prior=random:small", "backbone=mobilenetv2"])
    config.backbone = node
    assert any("6 x 4 x 4" in line for line in plan(config))
    monkeypatch.setattr(list_layers, "CONFIG_ROOT", tmp_path)
    monkeypatch.setattr(list_layers, "load_group", lambda group, name: OmegaConf.create(node))
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "own.yaml").touch()
    assert list_layers.without_weights("own").spec.channels == 6


def test_the_peak_is_measured() -> None:
    assert matmul_peak(torch.device("cpu"), torch.float32, seconds=0.01) > 1e8
