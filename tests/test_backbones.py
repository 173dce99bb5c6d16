from pathlib import Path

import pytest
import skimage.data
import timm
import torch
import torch.nn.functional as F

from featinv.backbones import load_backbone
from featinv.errors import UserError
from featinv.metrics.views import View, classifies


def test_final_layer_equals_timm_by_hand() -> None:
    backbone = load_backbone("resnet10t", pretrained=False, input_size=64)
    images = torch.rand(2, 3, 64, 64)
    config = timm.data.resolve_model_data_config(backbone.model)
    mean, std = (torch.tensor(config[k]).view(3, 1, 1) for k in ("mean", "std"))
    by_hand = backbone.model.forward_features((images - mean) / std)
    assert torch.allclose(backbone(images), by_hand, atol=1e-5)
    assert torch.allclose(backbone.logits_from(backbone(images)), backbone.logits(images), atol=1e-4)
    spec = backbone.spec
    assert tuple(by_hand.shape[1:]) == (spec.channels, spec.height, spec.width) and spec.layer == "final"


def test_tokens_lose_their_prefix() -> None:
    backbone = load_backbone("vit_tiny_patch16_224", pretrained=False, input_size=64)
    images = torch.rand(1, 3, 64, 64)
    tokens = backbone.model.forward_features(backbone.preprocess(images))
    grid = backbone(images)
    assert grid.shape == (1, 192, 4, 4)
    assert torch.allclose(grid[0, :, 1, 2], tokens[0, 1 + 4 * 1 + 2], atol=1e-5)
    with pytest.raises(UserError, match="class token"):
        backbone.logits_from(grid)


def test_a_model_without_a_classifier_has_no_class_scores() -> None:
    backbone = load_backbone("vit_small_patch14_dinov2", pretrained=False, input_size=28)
    images = torch.rand(1, 3, 28, 28)
    assert backbone.model(backbone.preprocess(images)).shape == (1, 384)  # what timm gives: pooled features
    features = backbone(images)
    for ask in (lambda: backbone.logits(images), lambda: backbone.logits_from(features)):
        with pytest.raises(UserError, match="vit_small_patch14_dinov2 has no classifier"):
            ask()
    assert not View(backbone, images).classifies and not classifies(backbone.at("blocks.3"))
    assert classifies(load_backbone("resnet10t", "layer2", pretrained=False, input_size=32))


@pytest.mark.parametrize("layer", ["blocks.3", "blocks.5.mlp.fc2"])
def test_earlier_vit_layers_are_maps(layer: str) -> None:
    backbone = load_backbone("vit_tiny_patch16_224", layer, pretrained=False, input_size=64)
    assert backbone.spec.height == backbone.spec.width == 4
    with pytest.raises(UserError, match="layer"):
        backbone.logits_from(backbone(torch.rand(1, 3, 64, 64)))


def test_swin_comes_out_channels_first() -> None:
    backbone = load_backbone("swin_tiny_patch4_window7_224", pretrained=False)
    images = torch.rand(1, 3, 40, 56)
    features = backbone(images)
    assert features.shape == (1, 768, 7, 7)
    assert torch.allclose(backbone.logits_from(features), backbone.logits(images), atol=1e-4)


def test_listed_layer_equals_a_hook_on_the_same_module() -> None:
    listed = load_backbone("resnet10t", "layer2", pretrained=False, input_size=64)
    images, kept = torch.rand(2, 3, 64, 64), []
    handle = listed.model.layer2.register_forward_hook(lambda _m, _i, o: kept.append(o))
    listed.logits(images)
    handle.remove()
    assert torch.allclose(listed(images), kept[0], atol=1e-6)


@pytest.mark.parametrize("name", ["hrnet_w18_small", "mvitv2_tiny"])  # whose listed layers are not all modules
def test_every_listed_layer_can_be_chosen(name: str) -> None:
    backbone = load_backbone(name, pretrained=False)
    assert [backbone.at(layer).layer for layer in backbone.layers] == backbone.layers


def test_gradient_reaches_the_image_and_no_weight() -> None:
    backbone = load_backbone("resnet10t", pretrained=False, input_size=64).train()
    images = torch.rand(1, 3, 50, 70, requires_grad=True)
    backbone(images).square().sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not any(m.training for m in backbone.modules())


def test_features_do_not_depend_on_the_batch() -> None:
    backbone = load_backbone("resnet10t", pretrained=False, input_size=64)
    images = torch.rand(3, 3, 64, 64)
    assert torch.allclose(backbone(images)[1:2], backbone(images[1:2]), atol=1e-5)


def test_random_weights_leave_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one = load_backbone("resnet10t", pretrained=False, input_size=64, seed=1)
    assert torch.equal(torch.rand(3), expected)
    other = load_backbone("resnet10t", pretrained=False, input_size=64, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_mistakes_name_the_nearest() -> None:
    with pytest.raises(UserError, match="resnet10t"):
        load_backbone("resnet10tt", pretrained=False)
    with pytest.raises(UserError, match="layer2"):
        load_backbone("resnet10t", "layr2", pretrained=False)
    with pytest.raises(UserError, match="float images"):
        load_backbone("resnet10t", pretrained=False)(torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("name", ["efficientnet_lite0", "mobilenetv2"])
def test_bundled_backbones_see_a_cat_and_a_cup_of_coffee(name: str) -> None:
    backbone = load_backbone(name, input_size=224)
    pictures = [
        torch.from_numpy(p.copy()).permute(2, 0, 1).float() / 255
        for p in (skimage.data.chelsea(), skimage.data.coffee())
    ]
    square = [F.interpolate(p[None, :, :300, -400:], (224, 224), mode="bicubic", antialias=True) for p in pictures]
    cat, coffee = (backbone.logits(p.clamp(0, 1)).topk(5).indices[0].tolist() for p in square)
    assert any(281 <= k <= 287 for k in cat)  # the ImageNet cats
    assert {967, 968, 504} & set(coffee)  # espresso, cup, coffee mug


def test_bundled_backbone_classifies_photographs() -> None:
    shards = sorted((Path(__file__).parents[2] / "shared/data/imagenet-sample").glob("*.tar"))
    if not shards:
        pytest.skip("the ImageNet sample is not here")
    from featinv.data import load_dataset

    data = load_dataset(str(shards[0]), size=224)
    items = [data[i] for i in range(0, 500, 5)]
    logits = load_backbone("efficientnet_lite0", input_size=224).logits(torch.stack([i["image"] for i in items]))
    right = sum(int(row.argmax() == i["label"]) for row, i in zip(logits, items, strict=True))
    assert right >= 60  # its published accuracy is 75 %


def test_open_clip_tower_equals_its_own_tokens() -> None:
    backbone = load_backbone("openclip_vit_b32", pretrained=None)
    images = torch.rand(1, 3, 50, 60, requires_grad=True)
    features = backbone(images)
    visual = backbone.model
    kept = []
    handle = visual.transformer.resblocks[-1].register_forward_hook(lambda _m, _i, out: kept.append(out))
    visual(backbone.preprocess(images))
    handle.remove()
    assert features.shape == (1, 768, 7, 7)
    assert torch.allclose(features[0, :, 2, 3], kept[0][0, 1 + 2 * 7 + 3], atol=1e-4)
    features.sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in backbone.parameters())
    assert backbone.embed(images).shape == (1, 512)
    assert not torch.allclose(backbone.at("blocks.3")(images), features, atol=1e-2)


def test_open_clip_takes_its_own_input_size_and_random_weights_by_either_word() -> None:
    named = load_backbone("openclip_vit_b32", pretrained=None, input_size=224)
    direct = load_backbone("open_clip:ViT-B-32", pretrained=False, input_size=224)
    assert named.input_size == direct.input_size == 224
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(named(images), direct(images))


def test_open_clip_mistakes_name_the_nearest() -> None:
    for words, message in (
        ({"name": "open_clip:ViT-B-23"}, "ViT-B-32"),
        ({"name": "openclip_vit_b32", "pretrained": "laion2b"}, "laion2b_s34b_b79k"),
        ({"name": "openclip_vit_b32", "pretrained": None, "layer": "block.3"}, "blocks.3"),
        ({"name": "openclip_vit_b32", "pretrained": None, "input_size": 64}, "sees 224 pixels, not 64"),
    ):
        with pytest.raises(UserError, match=message):
            load_backbone(**words)


def test_the_same_network_cut_elsewhere_shares_its_weights() -> None:
    backbone = load_backbone("resnet10t", pretrained=False, input_size=64)
    early, images = backbone.at("layer2"), torch.rand(1, 3, 64, 64)
    assert early.model is backbone.model and (early.layer, backbone.layer) == ("layer2", "final")
    again = load_backbone("resnet10t", "layer2", pretrained=False, input_size=64)
    assert torch.allclose(early(images), again(images), atol=1e-5) and early.spec == again.spec
    assert backbone.spec.layer == "final"


def test_layer_table_agrees_with_the_maps() -> None:
    from tools.list_layers import rows

    backbone = load_backbone("resnet10t", pretrained=False, input_size=64)
    table = rows(backbone, backbone.layers)
    assert table[-1] == ("final", 512, "2 x 2", "32")
    for layer, channels, grid, _ in table:
        shape = backbone.at(layer)(torch.rand(1, 3, 64, 64)).shape
        assert (channels, grid) == (shape[1], f"{shape[2]} x {shape[3]}")


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "configs" / "backbone").glob("*.yaml")), ids=str)
def test_every_shipped_backbone_gives_a_map(path: Path) -> None:
    from tools.list_layers import without_weights

    spec = without_weights(path.stem).spec
    assert spec.height == spec.width > 1 and spec.channels > 1


@pytest.mark.parametrize(("name", "layer"), [("resnet18", "layer2"), ("tf_efficientnet_lite0", "blocks.2")])
def test_the_rest_of_the_network_makes_the_last_map_of_an_earlier_one(name: str, layer: str) -> None:
    early = load_backbone(name, layer, pretrained=False, input_size=64)
    images = torch.rand(3, 3, 64, 64, requires_grad=True)
    last = early.final_from(early(images))
    assert torch.allclose(last, early.at("final")(images), rtol=1e-4, atol=1e-5)
    last.sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert torch.equal(early(images), early(images)), "no hook stays behind"
    features = torch.rand(2, 8, 2, 2)
    assert early.at("final").final_from(features) is features


def test_a_map_that_lacks_tokens_cannot_go_on() -> None:
    vit = load_backbone("vit_tiny_patch16_224", "blocks.2", pretrained=False, input_size=32)
    with pytest.raises(UserError, match="not all that the next layer reads"):
        vit.final_from(vit(torch.rand(1, 3, 32, 32)))


def _hooked(backbone, name, images):
    kept = []
    handle = backbone.model.get_submodule(name).register_forward_hook(lambda _m, _i, out: kept.append(out))
    backbone.model.forward_features(backbone.preprocess(images))
    handle.remove()
    return kept[0]


@pytest.mark.parametrize(
    ("name", "size", "layer", "channels_last"),
    [
        ("test_convnext", 64, "stages.2.blocks.0.norm", True),
        ("test_convnext", 64, "stages.2.blocks.0.mlp.fc1", True),
        ("test_convnext", 64, "stages.2.blocks.0", False),
        ("test_convnext", 96, "stages.0.blocks.0.norm", True),  # a cube: 24 x 24 x 24
        ("test_convnext", 96, "stages.0.blocks.0", False),
        ("swin_tiny_patch4_window7_224", None, "patch_embed.proj", False),  # of an NHWC model
        ("swin_tiny_patch4_window7_224", None, "layers.1.blocks.0", True),
    ],
)
def test_a_modules_layout_is_its_own_and_not_the_models(name, size, layer, channels_last) -> None:
    backbone = load_backbone(name, layer, pretrained=False, input_size=size)
    images = torch.rand(1, 3, backbone.input_size, backbone.input_size)
    by_hand = _hooked(backbone, layer, images)
    assert torch.equal(backbone(images), by_hand.permute(0, 3, 1, 2) if channels_last else by_hand)
    assert backbone.spec.height == backbone.spec.width


def test_a_module_whose_layout_cannot_be_told_is_refused() -> None:
    vit = load_backbone("test_vit", pretrained=False)
    heads = torch.nn.Identity()  # heads x tokens x channels, as within an attention
    vit.model.norm = torch.nn.Sequential(torch.nn.Unflatten(2, (2, -1)), heads, torch.nn.Flatten(2))
    with pytest.raises(UserError, match="sides of a square map cannot be told"):
        vit.at("norm.1")(torch.rand(1, 3, 32, 32))
    swin = load_backbone("swin_tiny_patch4_window7_224", pretrained=False)
    swin.model.patch_embed.proj = torch.nn.Sequential(torch.nn.Conv2d(3, 56, 4, stride=4), torch.nn.Conv2d(56, 96, 1))
    with pytest.raises(UserError, match="gives 56 x 56 x 56 numbers"):  # a cube of a network of one input size
        swin.at("patch_embed.proj.0")(torch.rand(1, 3, 32, 32))


def test_a_channels_last_layer_goes_on_to_the_last_map() -> None:
    early = load_backbone("swin_tiny_patch4_window7_224", "layers.2", pretrained=False)
    images = torch.rand(1, 3, 224, 224)
    assert torch.allclose(early.final_from(early(images)), early.at("final")(images), rtol=1e-4, atol=1e-5)


def test_the_layer_table_lists_every_module_or_what_the_backbone_lists(monkeypatch, capsys) -> None:
    from tools import list_layers

    monkeypatch.setattr("sys.argv", ["list_layers", "open_clip:ViT-B-32", "--all"])
    list_layers.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == [*(f"blocks.{i}" for i in range(12)), "final"]
    convnext = load_backbone("test_convnext", pretrained=False, input_size=64)
    table = {row[0]: row[1:3] for row in list_layers.rows(convnext, list_layers.modules_with_maps(convnext))}
    assert table["stages.2.blocks.0.norm"] == (48, "4 x 4")
