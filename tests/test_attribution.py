import argparse

import pytest
import torch
import torch.nn.functional as F
from captum.attr import GuidedBackprop, InputXGradient, IntegratedGradients, LayerGradCam, NoiseTunnel, Saliency
from torch import Tensor, nn

from featinv.attribution.adversarial import fgsm, pgd
from featinv.attribution.diagnostics import blank_reconstructions, dead_channels, leak_check
from featinv.attribution.saliency import SALIENCY, grad_cam, gradient, guided_backprop, overlay, smooth_grad, to_map
from featinv.attribution.transfer import accuracy, predict, transfer_table
from featinv.backbones import Backbone, load_backbone
from featinv.errors import UserError
from tools.visual_methods import METHODS


class _Plain(Backbone):
    """Pixels in, pixels out: a base for hand-written networks of 3 x 8 x 8 images."""

    def __init__(self):
        super().__init__("final", 8, (0.0,) * 3, (1.0,) * 3)

    def logits(self, images: Tensor) -> Tensor:
        return self.logits_from(self(images))


class _Linear(_Plain):
    def __init__(self, classes: int = 2):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, 3 * 8 * 8))
        self.freeze()

    def forward(self, images: Tensor) -> Tensor:
        return self.preprocess(images)

    def logits_from(self, features: Tensor) -> Tensor:
        return features.flatten(1) @ self.weight.T


class _PreActivation(_Plain):
    """The first ReLU's input feeds a shortcut too, a ReLU6 in place follows, and the last ReLU has two names."""

    def __init__(self, functional: bool = False):
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.first, self.six, self.last = nn.ReLU(), nn.ReLU6(inplace=True), nn.ReLU()
        self.head, self.same_as_last, self.functional = nn.Linear(6, 4), self.last, functional
        self.freeze()

    def run(self, images: Tensor, first, six, last) -> Tensor:
        x = self.stem(self.preprocess(images))
        x = x + self.branch(first(x))
        return last(self.branch(six(6 * x)) - 0.1)

    def forward(self, images: Tensor) -> Tensor:
        # Looked up at every call: within guided backpropagation the modules are others.
        return self.run(images, self.first, self.six, F.relu if self.functional else self.same_as_last)

    def logits_from(self, features: Tensor) -> Tensor:
        return self.head(features.mean((2, 3)))


class _Guided(torch.autograd.Function):
    """The rule of the paper, written out."""

    @staticmethod
    def forward(ctx, x: Tensor, top: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.top = top
        return x.clamp(0, top)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (x,) = ctx.saved_tensors
        return grads[0] * (x > 0) * (x < ctx.top) * (grads[0] > 0), None


def _snapshot(backbone: Backbone) -> tuple:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = list(backbone.named_modules(remove_duplicate=False))
    return (
        [(name, id(module)) for name, module in modules],
        [[len(getattr(module, kind)) for kind in hooks] for _, module in modules],
        [(module.training, getattr(module, "inplace", None), sorted(vars(module))) for _, module in modules],
        [(name, value.clone()) for name, value in backbone.state_dict().items()],
    )


def _assert_unchanged(backbone: Backbone, before: tuple) -> None:
    after = _snapshot(backbone)
    assert after[:3] == before[:3] and not any(sum(row) for row in after[1])
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(after[3], before[3], strict=True))
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())


@pytest.fixture(scope="module")
def cnn() -> Backbone:
    return load_backbone("resnet10t", pretrained=False, input_size=32)


@pytest.fixture(scope="module")
def double() -> Backbone:
    # In float64 a gradient's sign does not flip with the order of a sum, so results can be compared between batches.
    return load_backbone("resnet10t", pretrained=False, input_size=32).double()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 32, 32)


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
def test_attributions_equal_captum_bit_for_bit(cnn: Backbone, images: Tensor) -> None:
    target, grad = torch.tensor([3, 5]), images.clone().requires_grad_()
    expected = {
        "gradient": Saliency(cnn.logits).attribute(grad, target, abs=False),
        "input_x_gradient": InputXGradient(cnn.logits).attribute(grad, target),
        "guided_backprop": GuidedBackprop(_AsModule(cnn)).attribute(grad, target),
        "grad_cam": LayerGradCam(cnn.logits, cnn.model.layer4).attribute(grad, target, relu_attributions=True),
    }
    for name, values in expected.items():
        found = SALIENCY[name](cnn, images, target)
        values = F.interpolate(values, (32, 32), mode="bilinear", antialias=True) if name == "grad_cam" else values
        assert torch.equal(found, values) and not found.requires_grad, name
    found = SALIENCY["integrated_gradients"](cnn, images, target, baseline=0.5, steps=6)
    path = IntegratedGradients(cnn.logits)
    grey = torch.full_like(images, 0.5)
    assert torch.equal(found, path.attribute(images, grey, target, n_steps=6, internal_batch_size=64))
    found = smooth_grad(cnn, images, target, seeds=[8, 9], samples=3, noise=0.1)
    for i, seed in enumerate((8, 9)):
        torch.manual_seed(seed)
        tunnel = NoiseTunnel(Saliency(cnn.logits))
        alone = tunnel.attribute(images[i : i + 1], nt_samples=3, stdevs=0.1, target=target[i : i + 1], abs=False)
        assert torch.equal(found[i : i + 1], alone)


class _AsModule(nn.Module):
    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone.logits(images)


def test_guided_backprop_equals_its_definition() -> None:
    net, images, target = _PreActivation(), torch.rand(3, 3, 8, 8), torch.tensor([0, 1, 3])
    by_hand = images.clone().requires_grad_()
    rules = [lambda x, top=top: _Guided.apply(x, top) for top in (torch.inf, 6.0, torch.inf)]
    features = net.run(by_hand, *rules)
    scores = net.logits_from(features)
    assert torch.allclose(scores, net.logits(images), atol=1e-6)
    scores.gather(1, target[:, None]).sum().backward()
    before = _snapshot(net)
    found = guided_backprop(net, images, target)
    assert by_hand.grad is not None and by_hand.grad.abs().sum() > 0
    assert torch.allclose(found, by_hand.grad, atol=1e-7)
    assert not torch.allclose(found, gradient(net, images, target), atol=1e-4)
    _assert_unchanged(net, before)


def test_guided_backprop_reaches_relu6_and_refuses_what_it_cannot_reach(images: Tensor) -> None:
    mobile = load_backbone("mobilenetv2_100", pretrained=False, input_size=32)
    before = _snapshot(mobile)
    assert not torch.allclose(guided_backprop(mobile, images), gradient(mobile, images))
    _assert_unchanged(mobile, before)
    with pytest.raises(UserError, match="vit_tiny_patch16_224 has none"):
        guided_backprop(load_backbone("vit_tiny_patch16_224", pretrained=False, input_size=32), images)
    functional = _PreActivation(functional=True)
    before = _snapshot(functional)
    with pytest.raises(UserError, match="as a function"):
        guided_backprop(functional, torch.rand(1, 3, 8, 8))
    _assert_unchanged(functional, before)


def _cam_by_hand(backbone: Backbone, module: nn.Module, images: Tensor, target: Tensor, to_grid) -> Tensor:
    kept: list[Tensor] = []
    handle = module.register_forward_hook(lambda _m, _i, output: kept.append(output) or output.clone())
    scores = backbone.logits(images.clone().requires_grad_()).gather(1, target[:, None]).sum()
    handle.remove()
    (grads,) = torch.autograd.grad(scores, kept[0])
    weights = to_grid(grads).mean((2, 3), keepdim=True)
    cam = (weights * to_grid(kept[0])).sum(1, keepdim=True).relu().detach()
    return F.interpolate(cam, images.shape[-2:], mode="bilinear", align_corners=False)


@pytest.mark.parametrize("layer", ["layer2", "layer1.0.bn2", "layer3.0.act1", "bn1"])
def test_grad_cam_equals_a_hand_computation_on_a_cnn(cnn: Backbone, layer: str) -> None:
    # bn2's output is added to in place, bn1's is rectified in place: the map is the one before.
    images, target = torch.rand(2, 3, 40, 56), torch.tensor([1, 2])
    by_hand = _cam_by_hand(cnn, dict(cnn.model.named_modules())[layer], images, target, lambda x: x)
    found = grad_cam(cnn, images, target, layer)
    assert found.shape == (2, 1, 40, 56) and torch.allclose(found, by_hand, atol=1e-6)
    assert torch.equal(grad_cam(cnn.at("layer2"), images, target), grad_cam(cnn, images, target, "layer2"))


def test_grad_cam_lays_out_tokens_and_nhwc_maps() -> None:
    images, target = torch.rand(2, 3, 64, 64), torch.tensor([1, 2])
    vit = load_backbone("vit_tiny_patch16_224", pretrained=False, input_size=64)
    before = _snapshot(vit)

    def grid(x: Tensor) -> Tensor:
        return x[:, 1:].transpose(1, 2).unflatten(2, (4, 4))

    for layer, module in (("blocks.3", vit.model.blocks[3]), (None, vit.model.blocks[-1].norm1)):
        by_hand = _cam_by_hand(vit, module, images, target, grid)
        found = grad_cam(vit, images, target, layer)
        assert found.abs().sum() > 0 and torch.allclose(found, by_hand, atol=1e-6)
    with pytest.raises(UserError, match="class token"):
        grad_cam(vit, images, target, "blocks.11")
    with pytest.raises(UserError, match="class token"):
        grad_cam(vit, images, target, "final")
    _assert_unchanged(vit, before)
    swin = load_backbone("swin_tiny_patch4_window7_224", pretrained=False, input_size=64)
    for layer, module in (("layers.1", swin.model.layers[1]), (None, swin.model.norm)):
        by_hand = _cam_by_hand(swin, module, images, target, lambda x: x.permute(0, 3, 1, 2))
        assert torch.allclose(grad_cam(swin, images, target, layer), by_hand, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "layer", "order"),
    [
        ("convnext_atto", "stages.1.blocks.0.mlp", (0, 3, 1, 2)),  # NHWC within blocks of an NCHW network
        ("swin_tiny_patch4_window7_224", "patch_embed.proj", (0, 1, 2, 3)),  # and the other way round
    ],
)
def test_grad_cam_reads_a_module_in_its_own_layout(name: str, layer: str, order: tuple[int, ...]) -> None:
    images, target = torch.rand(2, 3, 64, 64), torch.tensor([1, 2])
    backbone = load_backbone(name, pretrained=False, input_size=64)
    module = backbone.model.get_submodule(layer)
    by_hand = _cam_by_hand(backbone, module, images, target, lambda x: x.permute(order))
    found = grad_cam(backbone, images, target, layer)
    assert by_hand.std() > 0 and torch.allclose(found, by_hand, atol=1e-6 * float(by_hand.max().clamp(min=1)))


@pytest.mark.parametrize("name", SALIENCY)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_failure_leaves_model_and_generator_as_they_were(name: str, where: str, images: Tensor) -> None:
    backbone = load_backbone("resnet10t", "layer3", pretrained=False, input_size=32)
    before, state, real, calls = _snapshot(backbone), torch.get_rng_state(), backbone.logits, []
    first = 3 if name == "guided_backprop" else 2  # the forward of the method itself, after those of the checks

    def break_down(*_: object) -> None:
        raise KeyboardInterrupt

    def logits(pixels: Tensor) -> Tensor:
        calls.append(1)
        scores = real(pixels)
        if len(calls) == first:
            break_down() if where == "forward" else scores.register_hook(break_down)
        return scores

    backbone.logits = logits  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        SALIENCY[name](backbone, images)
    del backbone.logits
    _assert_unchanged(backbone, before)
    assert torch.equal(torch.get_rng_state(), state) and not images.requires_grad
    found = SALIENCY[name](backbone, images)
    _assert_unchanged(backbone, before)
    assert found.shape == (2, 1 if name == "grad_cam" else 3, 32, 32)
    assert torch.equal(torch.get_rng_state(), state)


def test_saliency_is_at_the_images_own_size_and_explains_the_predicted_class(cnn: Backbone) -> None:
    images = torch.rand(1, 3, 20, 48)
    with torch.no_grad():
        found = gradient(cnn, images)
    assert found.shape == images.shape
    assert torch.equal(found, gradient(cnn, images, cnn.logits(images).argmax(1)))
    one = smooth_grad(cnn, images.repeat(2, 1, 1, 1), [4, 4], seeds=[1, 2], samples=2)
    assert torch.equal(one[1:], smooth_grad(cnn, images, [4], seeds=[2], samples=2)) and not torch.equal(one[0], one[1])


def test_a_network_of_three_classes_has_its_saliency_shown_too(cnn: Backbone, monkeypatch) -> None:
    every = cnn.logits
    monkeypatch.setattr(cnn, "logits", lambda images: every(images)[:, :3])
    pictures, numbers = METHODS["gradient"](cnn, torch.rand(1, 3, 20, 48), argparse.Namespace(target=None))
    assert list(pictures) == ["gradient"] and sorted(numbers["class"]) == [0, 1, 2]
    assert sum(numbers["probability"]) == pytest.approx(1)


def test_saliency_mistakes_say_what_to_do(cnn: Backbone, images: Tensor) -> None:
    for target, message in (([1], "2 images need 2"), ([0.5, 1.0], "integer"), ([0, 1000], "no class 1000")):
        with pytest.raises(UserError, match=message):
            gradient(cnn, images, target)
    with pytest.raises(UserError, match="at least one image"):
        gradient(cnn, images[:0])
    with pytest.raises(UserError, match="layer2"):
        grad_cam(cnn, images, layer="layr2")
    with pytest.raises(UserError, match="not run"):
        grad_cam(cnn, images, layer="fc")
    swin = load_backbone("swin_tiny_patch4_window7_224", pretrained=False, input_size=64)
    with pytest.raises(UserError, match="each whole image"):  # windows, not images
        grad_cam(swin, images, layer="layers.0.blocks.0.attn")
    with pytest.raises(UserError, match="inferno"):
        overlay(images, images[:, :1], colormap="infern")
    with pytest.raises(UserError, match="broadcast"):
        SALIENCY["integrated_gradients"](cnn, images, baseline=torch.zeros(5))


def test_maps_and_overlays_are_pictures(images: Tensor) -> None:
    attribution = torch.randn(3, 3, 32, 32) * torch.tensor([1e-8, 1e5, 0.0]).view(3, 1, 1, 1)
    maps = to_map(attribution)
    assert maps.shape == (3, 1, 32, 32) and (maps.amax((1, 2, 3)) == torch.tensor([1.0, 1.0, 0.0])).all()
    assert maps.min() >= 0 and maps[0].mean() == pytest.approx(float(maps[1].mean()), abs=0.1)
    single = torch.zeros(1, 1, 32, 32)
    single[0, 0, 3, 4] = -2.0
    assert torch.equal(to_map(single), single / -2)
    pictures = overlay(images, F.interpolate(maps[:2], (8, 8)))
    assert pictures.shape == images.shape and pictures.min() >= 0 and pictures.max() <= 1
    assert torch.allclose(overlay(images, maps[:2], alpha=0.0), images)


def _losses(backbone: Backbone, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(backbone.logits(images), labels, reduction="none")


def test_attacks_on_a_linear_model_find_the_optimum() -> None:
    net, labels = _Linear(), torch.tensor([0, 1])
    images = torch.rand(2, 3, 8, 8) * 0.5 + 0.25
    away = torch.stack([net.weight[1] - net.weight[0], net.weight[0] - net.weight[1]]).view(2, 3, 8, 8)
    assert torch.allclose(fgsm(net, images, labels, 0.05), images + 0.05 * away.sign(), atol=1e-6)
    assert torch.allclose(fgsm(net, images, labels, 0.05, targeted=True), images - 0.05 * away.sign(), atol=1e-6)
    assert torch.allclose(pgd(net, images, labels, 0.05, seeds=[1, 2]), images + 0.05 * away.sign(), atol=1e-6)
    best = images + 0.2 * away / away.flatten(1).norm(dim=1).view(2, 1, 1, 1)
    assert torch.allclose(pgd(net, images, labels, 0.2, norm="l2"), best, atol=1e-5)


@pytest.mark.parametrize("norm,eps", [("linf", 0.03), ("l2", 0.8)])
def test_pgd_stays_in_the_ball_and_changes_the_loss_for_each_image_alone(
    double: Backbone, norm: str, eps: float
) -> None:
    images, labels, seeds = torch.rand(3, 3, 32, 32).double(), torch.tensor([1, 2, 3]), [5, 6, 7]
    images[0, :, :8], images[1, :, :8] = 0.0, 1.0
    start = _losses(double, images, labels)
    for targeted in (False, True):
        found = pgd(double, images, labels, eps, 4, norm=norm, targeted=targeted, seeds=seeds)  # type: ignore[arg-type]
        delta = (found - images).flatten(1)
        size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
        assert (size <= eps * (1 + 1e-9)).all() and (size > eps / 3).all()
        assert found.min() >= 0 and found.max() <= 1 and not found.requires_grad
        assert ((_losses(double, found, labels) < start) == targeted).all()
    order = [2, 0]
    again = pgd(double, images[order], labels[order], eps, 4, norm=norm, targeted=True, seeds=[7, 5])  # type: ignore[arg-type]
    assert torch.allclose(again, found[order], atol=1e-9)
    other = pgd(double, images[order], labels[order], eps, 4, norm=norm, targeted=True, seeds=[7, 8])  # type: ignore[arg-type]
    assert torch.allclose(other[0], found[2], atol=1e-9) and not torch.allclose(other[1], found[0], atol=1e-4)


def test_fgsm_stays_in_the_ball_and_raises_the_loss(double: Backbone) -> None:
    images, labels = torch.rand(3, 3, 32, 32).double(), torch.tensor([1, 2, 3])
    start, found = _losses(double, images, labels), fgsm(double, images, labels, 0.01)
    assert (found - images).abs().max() <= 0.01 + 1e-12 and found.min() >= 0 and found.max() <= 1
    assert (_losses(double, found, labels) > start).all()
    assert (_losses(double, fgsm(double, images, labels, 0.01, targeted=True), labels) < start).all()
    assert torch.allclose(fgsm(double, images[1:2], labels[1:2], 0.01), found[1:2], atol=1e-9)
    assert torch.equal(pgd(double, images, labels, eps=0.0, seeds=[1, 2, 3]), images)


def test_attack_mistakes_say_what_to_do(double: Backbone) -> None:
    images, labels = torch.rand(2, 3, 32, 32).double(), torch.tensor([1, 2])
    for words, message in (
        ({"images": images * 2}, "clamp"),
        ({"eps": -1.0}, "radius"),
        ({"labels": labels[:1]}, "2 images need 2"),
        ({"norm": "l1"}, "linf or l2"),
        ({"seeds": [1]}, "as many seeds"),
    ):
        with pytest.raises(UserError, match=message):
            pgd(**({"backbone": double, "images": images, "labels": labels} | words))  # type: ignore[arg-type]


def test_transfer_table_counts_by_hand() -> None:
    one, two, images = _Linear(3), _Linear(3), torch.rand(10, 3, 8, 8)
    labels = predict(one, images)
    attacked = {"one": pgd(one, images, labels, 0.2), "none": images}
    table = transfer_table(attacked, labels, {"one": one, "two": two}, originals=images, batch_size=3)
    unchanged = {"n": 10.0, "right": 1.0, "changed": 0.0, "n_right": 10.0, "flipped": 0.0}
    assert table["none"]["one"] == unchanged and accuracy(one, images, labels) == 1.0
    assert table["one"]["one"]["right"] == 0.0 and table["one"]["one"]["changed"] == 1.0
    changed = (two.logits(attacked["one"]).argmax(1) != two.logits(images).argmax(1)).double().mean()
    assert table["one"]["two"]["changed"] == pytest.approx(float(changed))
    was_right = two.logits(images).argmax(1) == labels
    flipped = two.logits(attacked["one"]).argmax(1)[was_right] != labels[was_right]
    share = pytest.approx(float(flipped.double().mean())) if was_right.any() else None
    assert table["one"]["two"]["flipped"] == share
    never = transfer_table(attacked, (labels + 1) % 3, {"one": one}, originals=images)["one"]["one"]
    assert never["n_right"] == 0 and never["flipped"] is None
    assert table["one"]["two"]["n_right"] == int(was_right.sum())
    assert table["one"]["two"]["right"] == pytest.approx(accuracy(two, attacked["one"], labels))
    assert "changed" not in transfer_table(attacked, labels, {"one": one})["one"]["one"]
    with pytest.raises(UserError, match="one: 10 images with 9 labels"):
        transfer_table(attacked, labels[:9], {"one": one})


class _Channels(_Plain):
    def __init__(self, rectify: bool):
        super().__init__()
        self.conv, self.rectify = nn.Conv2d(3, 5, 1), rectify
        with torch.no_grad():
            self.conv.weight[2], self.conv.bias[2] = 0.0, -0.3
            self.conv.weight[4], self.conv.bias[4] = -1.0, 0.3
        self.freeze()

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(self.preprocess(images))
        return x.relu() if self.rectify else x


@pytest.mark.parametrize("rectify", [True, False])
def test_dead_channels_are_found_and_counted(rectify: bool) -> None:
    net, images = _Channels(rectify), torch.rand(7, 3, 8, 8)
    images[0] = 1.0
    found, features = dead_channels(net, images.split(3)), net(images)
    active = features > 0
    assert torch.equal(found.active_images, active.any(3).any(2).sum(0))
    assert torch.equal(found.active_positions, active.sum((0, 2, 3)))
    assert torch.allclose(found.mean, features.double().mean((0, 2, 3)), atol=1e-9)
    assert torch.allclose(found.std, features.double().std((0, 2, 3), correction=0), atol=1e-9)
    assert (found.images, found.positions, found.rectified) == (7, 7 * 64, rectify)
    assert found.dead[2] and not found.dead[4] and 0 < found.image_share[4] < 1 and found.position_share[4] < 0.2
    assert found.dead_count == int(found.dead.sum())
    assert torch.equal(found.inactive_units, active.sum(0) == 0)
    if not rectify:
        assert found.dead_count == 1
    with pytest.raises(UserError, match="at least one image"):
        dead_channels(net, [])


def test_blank_pictures_are_found() -> None:
    images = torch.rand(5, 3, 16, 16)
    images[1] = torch.tensor([0.9, 0.1, 0.4]).view(3, 1, 1)
    images[2] = 0.5 + 0.01 * torch.randn(3, 16, 16)
    images[3], images[3, 2] = 0.0, torch.linspace(0, 1, 16)
    images[4, 0, 0, 0] = torch.nan
    assert blank_reconstructions(images).tolist() == [False, True, True, False, True]


def test_leak_check_is_one_on_copies_and_about_chance_on_strangers(cnn: Backbone) -> None:
    originals = F.interpolate(torch.rand(60, 3, 4, 4), 32, mode="bilinear")
    strangers = F.interpolate(torch.rand(60, 3, 4, 4), 32, mode="bilinear")
    assert leak_check(originals, originals, cnn).top1 == 1.0
    copies = leak_check(originals, originals, cnn, candidates=4)
    assert copies.top1 == 1.0 and copies.chance == 0.25 and copies.hits.shape == (60,)
    shuffled = leak_check(originals, originals.roll(1, 0), cnn)
    assert shuffled.top1 == 0.0 and shuffled.chance == 1 / 60
    assert 0.1 < leak_check(originals, strangers, cnn, candidates=4).top1 < 0.45
    same = originals[:1].expand(6, -1, -1, -1)
    assert leak_check(same, same, cnn, candidates=3).top1 == pytest.approx(1 / 3)
    with pytest.raises(UserError, match="between 2 and"):
        leak_check(originals, originals, cnn, candidates=61)
    few = leak_check(originals, originals[:3], cnn)  # the other 57 are candidates only
    assert few.hits.tolist() == [1.0, 1.0, 1.0] and few.candidates == 60
    with pytest.raises(UserError, match="at least as many"):
        leak_check(originals[:3], originals, cnn)
