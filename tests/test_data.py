"""The data room: reading, transforms, folders, CIFAR-10, shards, batches."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from featinv.data import load_dataset, load_part, shards
from featinv.data.cifar import CIFAR10
from featinv.data.datamodule import ImageDataModule, collate
from featinv.data.folders import FlatFolder, ImageNetFolder, ilsvrc_synsets, list_images, read_class_index
from featinv.data.image_list import stable_ids, write_skipped
from featinv.data.reading import UnreadableImage, check_image, read_image
from featinv.data.shards import IndexedShards, WebDatasetShards
from featinv.data.transforms import EvalTransform, TrainTransform
from featinv.errors import UserError

SHARED = Path(__file__).parents[2] / "shared" / "data"
RED = (255, 0, 0)


def encode(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def noise(seed: int, size: tuple[int, int] = (16, 12)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def write_images(folder: Path, names: list[str]) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(seed).save(folder / name)


def write_shard(path: Path, samples: list[tuple[str, bytes, bytes | None]]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for key, picture, label in samples:
            for suffix, data in (("jpg", picture), ("cls", label)):
                if data is not None:
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return path


# Reading


def test_rgb_is_exact(tmp_path: Path) -> None:
    image = noise(0)
    image.save(tmp_path / "a.png")
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    assert torch.equal(read_image(tmp_path / "a.png"), expected)
    assert torch.equal(read_image((tmp_path / "a.png").read_bytes()), expected)


def palette_with_transparency() -> bytes:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, *RED])
    image.putpixel((0, 0), 0)
    return encode(image, transparency=0)


MODES = {
    "L": (encode(Image.new("L", (4, 4), 51)), (0.2, 0.2, 0.2)),
    "1": (encode(Image.new("1", (4, 4), 1)), (1, 1, 1)),
    "LA": (encode(Image.new("LA", (4, 4), (0, 51))), (0.8, 0.8, 0.8)),
    "RGBA": (encode(Image.new("RGBA", (4, 4), (*RED, 51))), (1, 0.8, 0.8)),
    "P": (encode(Image.new("RGB", (4, 4), RED).convert("P")), (1, 0, 0)),
    "I;16": (encode(Image.fromarray(np.full((4, 4), 13107, np.uint16))), (0.2, 0.2, 0.2)),
    "I": (encode(Image.fromarray(np.full((4, 4), 13107, np.int32)), "TIFF"), (0.2, 0.2, 0.2)),
    "F": (encode(Image.fromarray(np.full((4, 4), 0.25, np.float32)), "TIFF"), (0.25, 0.25, 0.25)),
    "CMYK jpeg": (encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100), (1, 0, 0)),
    "CMYK tiff": (encode(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), (1, 0, 0)),
    "animated gif": (
        encode(
            Image.new("RGB", (4, 4), RED),
            "GIF",
            save_all=True,
            append_images=[Image.new("RGB", (4, 4), "blue")],
        ),
        (1, 0, 0),
    ),
    "webp": (encode(Image.new("RGB", (4, 4), RED), "WEBP", lossless=True), (1, 0, 0)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode: str) -> None:
    data, colour = MODES[mode]
    image = read_image(data)
    assert image.shape[0] == 3 and image.dtype == torch.float32 and image.is_contiguous()
    expected = torch.tensor(colour, dtype=torch.float32)[:, None, None].expand_as(image)
    torch.testing.assert_close(image, expected, atol=2.5 / 255 if "jpeg" in mode else 1e-6, rtol=0)
    assert check_image(data) is None


def test_transparent_palette_entry_is_white() -> None:
    image = read_image(palette_with_transparency())
    assert image[:, 0, 0].tolist() == [1, 1, 1] and image[:, 1, 1].tolist() == [1, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation: int) -> None:
    upright = torch.from_numpy(np.array(noise(1))).permute(2, 0, 1) / 255
    # How each orientation's pixels are stored, by the EXIF standard (rows, columns of the upright picture).
    stored = {
        1: upright,
        2: upright.flip(2),
        3: upright.flip(1, 2),
        4: upright.flip(1),
        5: upright.transpose(1, 2),
        6: upright.transpose(1, 2).flip(1),
        7: upright.transpose(1, 2).flip(1, 2),
        8: upright.transpose(1, 2).flip(2),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = (stored * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    assert torch.equal(read_image(encode(Image.fromarray(pixels), exif=exif)), upright)


JPEG = encode(noise(2, (64, 64)), "JPEG")
PNG = encode(noise(2, (64, 64)))
BROKEN = {
    "empty": (b"", "zero bytes"),
    "text": (b"hello, I am not a picture at all", "not a picture"),
    "cut jpeg": (JPEG[: len(JPEG) // 2], "truncated"),
    "cut png": (PNG[: len(PNG) // 2], "truncated"),
    "header only": (PNG[:20], ""),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n", "not a picture"),
    "integers too large": (encode(Image.fromarray(np.full((4, 4), 2**30, np.int32)), "TIFF"), "not in 0 to 65535"),
    "integers below zero": (encode(Image.fromarray(np.full((4, 4), -5, np.int32)), "TIFF"), "not in 0 to 65535"),
    "integers of 33 bits": (
        encode(Image.fromarray(np.full((4, 4), 2**32 - 5, np.uint32)), "TIFF"),
        "not in 0 to 65535",
    ),
    "float range": (encode(Image.fromarray(np.full((4, 4), 7.0, np.float32)), "TIFF"), "not in [0, 1]"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_named_with_a_reason(kind: str, tmp_path: Path) -> None:
    data, reason = BROKEN[kind]
    path = tmp_path / "broken.jpg"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_image(path)
    assert str(path) in str(caught.value) and reason in str(caught.value)
    for how in ("header", "full"):
        assert reason in (check_image(path, how=how) or "MISSED")


def test_missing_file_folder_and_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(UserError, match="is a folder"):
        read_image(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UserError, match="too large"):
        read_image(PNG)


def test_unreadable_image_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(UnreadableImage("a.jpg", "cut")))
    assert (error.name, error.reason, str(error)) == ("a.jpg", "cut", "cannot read the image a.jpg: cut")


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_large_pictures_are_shrunk_while_reading(form: str) -> None:
    ramp = np.linspace(0, 255, 800, dtype=np.uint8)
    image = Image.fromarray(np.broadcast_to(ramp, (400, 800)).copy())
    data = encode(image, form)
    assert read_image(data).shape == (3, 400, 800)
    small = read_image(data, min_side=32)
    assert 64 <= small.shape[1] < 128 and small.shape[2] == 2 * small.shape[1]
    whole = EvalTransform(32)(read_image(data))
    torch.testing.assert_close(EvalTransform(32)(small), whole, atol=0.02, rtol=0)


# Transforms


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (7, 5), (33, 20), (16, 16)])
def test_transforms_take_any_shape(shape: tuple[int, int]) -> None:
    image = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    for transform in (EvalTransform(16), TrainTransform(16, scale=(0.08, 1), vflip=True)):
        out = transform(image, item_id="a", epoch=0)
        assert out.shape == (3, 16, 16) and out.min() >= 0 and out.max() <= 1


def test_eval_transform_is_resize_then_centre_crop() -> None:
    image = torch.rand(3, 30, 47, generator=torch.Generator().manual_seed(0))
    resized = F.resize(image, [20], InterpolationMode.BICUBIC, antialias=True)
    left = round((resized.shape[2] - 20) / 2)
    assert torch.equal(EvalTransform(20)(image), resized[:, :, left : left + 20].clamp(0, 1))
    assert EvalTransform(30)(image[:, :, :30]).equal(image[:, :, :30])


def test_random_crops_depend_on_seed_epoch_and_id_only() -> None:
    image = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0))
    first = TrainTransform(16)(image, item_id="a", epoch=0)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert torch.equal(first, TrainTransform(16)(image, item_id="a", epoch=0))
    assert torch.equal(before, torch.get_rng_state())
    for other in (
        TrainTransform(16)(image, item_id="b", epoch=0),
        TrainTransform(16)(image, item_id="a", epoch=1),
        TrainTransform(16, seed=1)(image, item_id="a", epoch=0),
    ):
        assert not torch.equal(first, other)


def test_flips_happen_half_of_the_time_and_only_if_asked() -> None:
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    for axis, options in (
        (2, {"hflip": True}),
        (1, {"hflip": False, "vflip": True}),
        (None, {"hflip": False}),
    ):
        whole = TrainTransform(8, scale=(1, 1), ratio=(1, 1), **options)
        outs = [whole(image, item_id=str(i)) for i in range(200)]
        same = sum(torch.allclose(out, image, atol=1e-6) for out in outs)
        if axis is None:
            assert same == 200
        else:
            mirrored = sum(torch.allclose(out, image.flip(axis), atol=1e-6) for out in outs)
            assert same + mirrored == 200 and 70 < same < 130


@pytest.mark.parametrize("bad", [{"scale": (0, 1)}, {"scale": (0.9, 0.1)}, {"size": 0}, {"size": 3.5}])
def test_senseless_transform_is_a_user_error(bad: dict) -> None:
    with pytest.raises(UserError):
        TrainTransform(**{"size": 8, **bad})


# Folders


def test_flat_folder_order_ids_and_recursion(tmp_path: Path) -> None:
    names = ["b.png", "a.jpg", "a.png", "sub/a.jpg", "we ird.png", ".hidden.png"]
    write_images(tmp_path, names)
    (tmp_path / "notes.txt").write_text("no image")
    data = FlatFolder(tmp_path, size=8)
    ids = [item["id"] for item in data]
    assert len(set(ids)) == len(data) == 5
    assert {"b", "sub__a"} <= set(ids) and all(set(i) <= set("_-") | set(map(chr, range(48, 123))) for i in ids)
    assert all(item["label"] == -1 and item["image"].shape == (3, 8, 8) for item in data)
    assert len(FlatFolder(tmp_path, size=8, recursive=False)) == 4
    expected = EvalTransform(8)(torch.from_numpy(np.array(noise(0))).permute(2, 0, 1) / 255)
    assert torch.equal(data[ids.index("b")]["image"], expected)


def test_ids_are_unique_and_do_not_depend_on_order() -> None:
    names = ["a/b.jpg", "a__b.jpg", "a.jpg", "A.JPG", "x" * 300 + ".jpg", "é.jpg", "è.jpg", "v.1.jpg"]
    ids = stable_ids(names)
    assert len({i.lower() for i in ids}) == len(names) and max(map(len, ids)) < 200
    assert all("." not in i and "/" not in i for i in ids)
    assert stable_ids(names[::-1]) == ids[::-1]


def test_unreadable_images_are_skipped_counted_and_reported(tmp_path: Path, caplog) -> None:
    write_images(tmp_path, ["a.png", "b.png"])
    (tmp_path / "cut.jpg").write_bytes(BROKEN["cut jpeg"][0])
    (tmp_path / "empty.jpg").write_bytes(b"")
    data = FlatFolder(tmp_path, size=8)
    assert len(data) == 2 and [i for i, _ in data.skipped] == ["cut", "empty"]
    assert "skipped 2 of 4" in caplog.text and "empty" in caplog.text
    data.write_report(tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["used"] == 2 and report["n_skipped"] == 2
    assert report["skipped"][1] == {"id": "empty", "reason": "the file is empty (zero bytes)"}


def test_damage_in_the_middle_needs_full_verification(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png"])
    damaged = bytearray(PNG)
    damaged[len(PNG) // 2 : len(PNG) // 2 + 40] = bytes(40)
    (tmp_path / "b.png").write_bytes(damaged)
    data = FlatFolder(tmp_path, size=8)
    assert len(data) == 2
    with pytest.raises(UserError, match=r"b\.png.*verify=full"):
        data[1]
    assert [i for i, _ in FlatFolder(tmp_path, size=8, verify="full").skipped] == ["b"]


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        FlatFolder(tmp_path / "none")
    with pytest.raises(UserError, match="no images"):
        FlatFolder(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 images.*zero bytes"):
        FlatFolder(tmp_path)


def test_imagenet_layout_labels_and_per_class(tmp_path: Path) -> None:
    synsets = ilsvrc_synsets()
    assert len(synsets) == 1000 and synsets == sorted(synsets)
    for number in (999, 7):
        write_images(tmp_path / "val" / synsets[number], [f"{k}.png" for k in "dcba"])
    data = ImageNetFolder(tmp_path, "val", size=8)
    assert [item["label"] for item in data] == [7] * 4 + [999] * 4  # a part of ImageNet keeps its labels
    assert data[0]["id"] == f"{synsets[7]}__a" and data.classes[7] == synsets[7]
    (tmp_path / "val" / synsets[7] / "a.png").write_bytes(b"")
    few = ImageNetFolder(tmp_path, "val", size=8, per_class=2)
    assert [i["id"][-1] for i in few] == ["b", "c", "a", "b"] and len(few.skipped) == 1
    with pytest.raises(UserError, match="no folder"):
        ImageNetFolder(tmp_path, "train")


def test_class_index_file_orders_the_classes(tmp_path: Path) -> None:
    write_images(tmp_path, ["cat/1.png", "dog/images/1.png"])
    assert [item["label"] for item in ImageNetFolder(tmp_path, size=8)] == [0, 1]
    (tmp_path / "LOC_synset_mapping.txt").write_text("dog a dog\nbird a bird\ncat a cat\n")
    data = ImageNetFolder(tmp_path, size=8)
    assert {item["id"]: item["label"] for item in data} == {"dog__images__1": 0, "cat__1": 2}
    index = tmp_path / "index.json"
    for content in (["cat", "dog"], {"0": ["cat", "x"], "1": ["dog", "y"]}, {"1": "dog", "0": "cat"}):
        index.write_text(json.dumps(content), encoding="utf-8-sig")
        assert read_class_index(index) == ["cat", "dog"]
    index.write_text('["cat"]')
    with pytest.raises(UserError, match="dog.*not in the class index"):
        ImageNetFolder(tmp_path, size=8, class_index=index)
    for bad in ('["cat", "cat"]', "{", "[]", '{"5": ["cat"]}'):
        index.write_text(bad)
        with pytest.raises(UserError, match="class index"):
            read_class_index(index)


def test_splits_are_no_classes(tmp_path: Path) -> None:
    write_images(tmp_path, ["train/n01440764/a.png", "val/n01440764/b.png"])
    with pytest.raises(UserError, match="set split to one of train, val"):
        load_dataset(tmp_path, size=8)
    assert load_dataset(tmp_path, size=8, split="val")[0]["label"] == 0


def test_linked_folders_are_read_once_and_circles_end(tmp_path: Path) -> None:
    write_images(tmp_path, ["all/a.png", "elsewhere/b.png"])
    (tmp_path / "all" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "all" / "round").symlink_to(tmp_path / "all")
    (tmp_path / "all" / "up").symlink_to(tmp_path)
    (tmp_path / "all" / "sub").mkdir()
    write_images(tmp_path, ["all/sub/c.png"])
    (tmp_path / "all" / "an_alias").symlink_to(tmp_path / "all" / "sub")  # the folder's own name is kept
    (tmp_path / "all" / "second").symlink_to(tmp_path / "elsewhere")
    assert [item["id"] for item in FlatFolder(tmp_path / "all", size=8)] == ["a", "linked__b", "sub__c"]


@pytest.mark.parametrize("inner,outer", ["ab", "ba"])
def test_a_linked_folder_within_another_is_read_once_and_hides_nothing(tmp_path: Path, inner: str, outer: str) -> None:
    write_images(tmp_path, ["X/one.png", "X/sub/two.png", "root/own.png"])
    root = tmp_path / "root"
    (root / inner).symlink_to(tmp_path / "X" / "sub")
    (root / outer).symlink_to(tmp_path / "X")
    nested = f"{inner}/two.png" if inner < outer else f"{outer}/sub/two.png"  # the first that leads to it names it
    assert list_images(root) == sorted([f"{outer}/one.png", nested, "own.png"])
    assert list_images(root, recursive=False) == ["own.png"]
    write_images(tmp_path, ["above.png"])
    for place, target in [("X/sub/up", "X"), ("X/back", "root"), ("X/top", "."), ("X/sub/away", "Y"), ("Y/round", "X")]:
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).symlink_to(tmp_path / target)
    write_images(tmp_path, ["Y/three.png"])
    found = list_images(root)
    assert sorted(name.rsplit("/", 1)[-1] for name in found) == ["one.png", "own.png", "three.png", "two.png"]
    assert len({os.path.realpath(root / name) for name in found}) == 4


def test_a_name_in_another_encoding_gets_an_id(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "b.png", "c.png"])
    for old, new in ((b"b.png", b"caf\xe9.png"), (b"c.png", b"caf\xe8.png")):
        os.rename(os.path.join(os.fsencode(tmp_path), old), os.path.join(os.fsencode(tmp_path), new))
    ids = [item["id"] for item in FlatFolder(tmp_path, size=8)]
    assert len(set(ids)) == 3 and all(name.isascii() for name in ids)


def test_flat_images_are_no_imagenet(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png"])
    with pytest.raises(UserError, match="no class folders"):
        ImageNetFolder(tmp_path)


# CIFAR-10


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="download=true"):
        CIFAR10(tmp_path)
    with pytest.raises(UserError, match="splits"):
        CIFAR10(tmp_path, "dev")
    from torchvision import datasets

    rows = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "test_batch").write_bytes(pickle.dumps({"data": rows, "labels": [3, 0, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    data = CIFAR10(tmp_path, "val")
    assert [data[i]["label"] for i in range(3)] == [3, 0, 9] and data[1]["id"] == "cifar10-test-00001"
    assert torch.equal(data[2]["image"], torch.from_numpy(rows[2].reshape(3, 32, 32)) / 255)
    assert CIFAR10(tmp_path, "test", size=8)[0]["image"].shape == (3, 8, 8)
    with pytest.raises(IndexError):
        data[3]


# Shards


@pytest.fixture
def three_shards(tmp_path: Path) -> list[str]:
    """Three shards (one compressed) of 5, 4 and 3 samples; keys repeat between them."""
    paths = []
    for number, (count, suffix) in enumerate([(5, "tar"), (4, "tar.gz"), (3, "tar")]):
        samples = [(f"img_{k}", encode(noise(10 * number + k), "JPEG"), b"%d" % k) for k in range(count)]
        paths.append(str(write_shard(tmp_path / f"train-{number:03d}.{suffix}", samples)))
    return paths


def test_indexed_and_streamed_shards_agree(three_shards: list[str]) -> None:
    indexed = {item["id"]: item for item in IndexedShards(three_shards, size=8)}
    streamed = {item["id"]: item for item in WebDatasetShards(three_shards, size=8)}
    assert len(indexed) == 12 and indexed.keys() == streamed.keys()
    for key, item in indexed.items():
        assert torch.equal(item["image"], streamed[key]["image"])
        assert item["label"] == streamed[key]["label"] == int(key[-1])
    assert "train-001__img_3" in indexed
    pattern = three_shards[0].replace("000.tar", "*")
    assert len(IndexedShards(pattern, size=8)) == 12
    assert len(IndexedShards(three_shards[0].replace("000", "{000,002}"), size=8)) == 8
    assert [e.label for e in IndexedShards(three_shards, size=8, per_class=1).entries] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("world,workers", [(1, 1), (1, 3), (3, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("shuffle", [0, 4])
def test_each_sample_goes_to_one_worker_of_one_rank(
    three_shards: list[str], monkeypatch: pytest.MonkeyPatch, world: int, workers: int, shuffle: int
) -> None:
    class Worker:
        def __init__(self, number: int):
            self.id, self.num_workers = number, workers

    data = WebDatasetShards(three_shards, size=8, shuffle=shuffle)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    seen = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        for number in range(workers):
            monkeypatch.setattr(shards, "get_worker_info", lambda number=number: Worker(number))
            share = [item["id"] for item in data]
            assert share
            seen += share
    assert len(seen) == len(set(seen)) == 12


def test_stream_shuffling_is_a_function_of_seed_and_epoch(three_shards: list[str]) -> None:
    def order(seed: int, epoch: int) -> list[str]:
        data = WebDatasetShards(three_shards, size=8, shuffle=6, seed=seed)
        data.set_epoch(epoch)
        return [item["id"] for item in data]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(1, 1)
    assert sorted(order(0, 0)) == sorted(order(0, 1))


def test_broken_samples_in_shards_are_reported_from_workers_too(tmp_path: Path) -> None:
    good = encode(noise(0), "JPEG")
    path = write_shard(
        tmp_path / "s.tar",
        [("a", good, b"1"), ("b", b"", b"2"), ("c", good, b"cat"), ("d", good, None), ("a", good, b"1")],
    )
    expected = ["s__a#0", "s__b", "s__c"]
    data = WebDatasetShards(str(path), size=8)
    for workers in (0, 2):
        batches = list(DataLoader(data, batch_size=8, num_workers=workers, collate_fn=collate))
        assert sorted(i for batch in batches for i in batch["id"]) == ["s__a", "s__d"]
        assert [i for i, _ in data.skipped] == expected
    data.write_report(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["n_skipped"] == 3
    indexed = IndexedShards(str(path), size=8)
    assert sorted(i for i, _ in indexed.skipped) == expected and [i["label"] for i in indexed] == [1, -1]


def test_cut_missing_and_foreign_shards(three_shards: list[str], tmp_path: Path) -> None:
    for source in three_shards[:2]:
        whole = Path(source).read_bytes()
        cut = tmp_path / f"cut{Path(source).suffix}"
        lengths = [len(whole) // 3, len(whole) // 2]
        if source.endswith(".tar"):
            lengths += [4 * 512 + 100, 4 * 512, 5 * 512 + 7]  # within and between blocks
        for length in lengths:
            cut.write_bytes(whole[:length])
            data = IndexedShards([str(cut), three_shards[2]], size=8)
            assert 3 <= len(data) < 3 + (5 if source.endswith(".tar") else 4)
            assert any("rest of the shard" in reason for _, reason in data.skipped), length
    damaged = bytearray(Path(three_shards[0]).read_bytes())
    header = damaged.index(b"img_3.jpg")
    damaged[header : header + 9] = b"XXXXXXXXX"
    (tmp_path / "damaged.tar").write_bytes(damaged)
    data = IndexedShards(str(tmp_path / "damaged.tar"), size=8)
    assert len(data) == 3 and "damaged" in data.skipped[0][1]
    (tmp_path / "text.tar").write_text("not a tar")
    for build in (IndexedShards, WebDatasetShards):
        with pytest.raises(UserError, match="no shard"):
            build(str(tmp_path / "none.tar"))
        with pytest.raises(UserError, match="read"):
            build(str(tmp_path / "text.tar"))
        with pytest.raises(UserError, match="twice"):
            build([three_shards[0], three_shards[0]])


@pytest.mark.parametrize("names", [["000.mask.png", "000.png"], ["000.rgb.png"]])
def test_a_sample_of_a_shard_is_its_plain_picture(tmp_path: Path, names: list[str]) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names:
            data = encode(Image.new("RGB", (8, 8), "white" if "mask" in name else "red"))
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    image = IndexedShards(tmp_path / "a.tar", size=8)[0]["image"]
    assert image[0].min() > 0.9 and image[1].max() < 0.1


def test_pictures_that_share_a_name_before_the_first_dot_are_reported(tmp_path: Path) -> None:
    """WebDataset cuts frame.0000.jpg at the first dot, so that all frames are one sample."""
    samples = [(f"frame.{k:04d}", encode(noise(k), "JPEG"), b"%d" % k) for k in range(4)]
    good = [("a.0007", encode(noise(7), "JPEG"), b"7"), ("b", encode(noise(8), "JPEG"), b"8")]
    path = str(write_shard(tmp_path / "s.tar", [*samples, *good]))
    for build in (IndexedShards, WebDatasetShards):
        data = build(path, size=8)
        assert [(item["id"], item["label"]) for item in data] == [("s__a", 7), ("s__b", 8)]
        ((item_id, reason),) = data.skipped
        assert item_id == "s__frame" and "several pictures share the name before the first dot" in reason
        assert "0000.jpg" in reason and "4 in all" in reason
        with pytest.raises(UserError, match="before the first dot"):
            build(str(write_shard(tmp_path / "frames.tar", samples)), size=8)


def test_a_picture_of_two_suffixes_has_the_label_of_its_own_name(tmp_path: Path) -> None:
    picture = encode(noise(0), "JPEG")
    members = [("a.rgb", picture, b"3"), ("a", None, b"4"), ("b.rgb", picture, None), ("b", None, b"5")]
    assert [i["label"] for i in IndexedShards(write_shard(tmp_path / "s.tar", members), size=8)] == [3, 5]


def test_wnids_turn_labels_into_class_indices(three_shards: list[str], tmp_path: Path) -> None:
    chosen = [ilsvrc_synsets()[n] for n in (3, 30, 300, 500, 999)]
    (tmp_path / "wnids.json").write_text(json.dumps(chosen))
    data = IndexedShards(three_shards[0], size=8, wnids=tmp_path / "wnids.json")
    assert [item["label"] for item in data] == [3, 30, 300, 500, 999]
    (tmp_path / "wnids.json").write_text('["cat"]')
    with pytest.raises(UserError, match="cat"):
        IndexedShards(three_shards[0], wnids=tmp_path / "wnids.json")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the sample shards are not here")
def test_real_shards() -> None:
    data = IndexedShards(str(SHARED / "imagenet-sample" / "val-000.tar"), size=32)
    assert len(data) == 500 and not data.skipped
    synsets = ilsvrc_synsets()
    assert all(synsets[e.label] == e.id.split("__")[1].split("_")[0] for e in data.entries)
    tiny = WebDatasetShards(str(SHARED / "tiny-imagenet" / "val-000.tar.gz"), size=64)
    first = next(iter(tiny))
    assert first["image"].shape == (3, 64, 64) and 0 <= first["label"] < 200


# Batches


class Fake(Dataset):
    """Items that tell their index; batched as the scenes are."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        return [
            {
                "image": torch.full((3, 2, 2), i / 11),
                "label": i,
                "id": str(i),
                "factors": torch.tensor([i, 1.0]),
            }
            for i in indices
        ]


def epochs(module: ImageDataModule, count: int = 2) -> list[list[dict]]:
    loader = module.train_dataloader()
    result = []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)  # as Lightning does
        result.append(list(loader))
    return result


def test_batches_do_not_depend_on_workers(tmp_path: Path) -> None:
    write_images(tmp_path, [f"{k}.png" for k in range(7)])
    runs = [
        epochs(ImageDataModule(FlatFolder(tmp_path, size=8, augment=True), batch_size=3, num_workers=workers))
        for workers in (0, 2)
    ]
    for one, two in zip(*runs, strict=True):
        for a, b in zip(one, two, strict=True):
            assert a["id"] == b["id"] and torch.equal(a["image"], b["image"])
    pixels = [
        {i: image for batch in epoch for i, image in zip(batch["id"], batch["image"], strict=True)} for epoch in runs[1]
    ]
    common = pixels[0].keys() & pixels[1].keys()
    assert common and not any(torch.equal(pixels[0][i], pixels[1][i]) for i in common)


def test_order_is_the_seeds_and_not_the_batch_sizes() -> None:
    def order(seed: int, batch_size: int) -> list[str]:
        module = ImageDataModule(Fake(), batch_size=batch_size, seed=seed)
        return [i for batch in epochs(module, 1)[0] for i in batch["id"]]

    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert order(0, 2)[:9] == order(0, 3)[:9] and order(0, 2) != order(1, 2)
    assert torch.equal(state, torch.get_rng_state())
    assert sorted(map(int, order(0, 1))) == list(range(11))
    assert order(0, 50) == order(0, 1)  # a set smaller than a batch is not dropped


def test_ranks_share_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen = set()
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        ids = {i for batch in epochs(ImageDataModule(Fake(), batch_size=1), 1)[0] for i in batch["id"]}
        assert len(ids) == 6
        seen |= ids
    assert seen == set(map(str, range(11)))


def test_validation_is_complete_and_in_order() -> None:
    batches = list(ImageDataModule(Fake(), Fake(), batch_size=4).val_dataloader())
    assert [i for batch in batches for i in batch["id"]] == list(map(str, range(11)))
    assert batches[0]["label"].dtype == torch.long and batches[2]["factors"].shape == (3, 2)
    assert ImageDataModule(Fake()).val_dataloader() == []


def test_streams_learn_the_epoch(three_shards: list[str]) -> None:
    module = ImageDataModule(WebDatasetShards(three_shards, size=8, shuffle=6), batch_size=2, num_workers=2)
    first, second = ([i for batch in epoch for i in batch["id"]] for epoch in epochs(module))
    assert first != second and len(set(first)) == len(first) >= 10


def test_lightning_runs_and_announces_epochs() -> None:
    import pytorch_lightning as pl

    class Recorder(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.orders: dict[int, list[str]] = {}

        def training_step(self, batch: dict, index: int) -> torch.Tensor:
            self.orders.setdefault(self.current_epoch, []).extend(batch["id"])
            return self.weight * batch["image"].mean()

        def validation_step(self, batch: dict, index: int) -> None:
            assert batch["factors"].shape[1] == 2

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    model = Recorder()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(model, datamodule=ImageDataModule(Fake(), Fake(), batch_size=5))
    expected = [[i for batch in epoch for i in batch["id"]] for epoch in epochs(ImageDataModule(Fake(), batch_size=5))]
    assert [model.orders[0], model.orders[1]] == expected and expected[0] != expected[1]


def test_collate_refuses_mixed_items() -> None:
    a, b = Fake()[0], Fake()[1]
    with pytest.raises(UserError, match="one size"):
        collate([a, {**b, "image": torch.zeros(3, 4, 4)}])
    del b["factors"]
    with pytest.raises(UserError, match="factors"):
        collate([a, b])


# By name


def test_load_dataset_by_name_path_and_node(three_shards: list[str], tmp_path: Path) -> None:
    write_images(tmp_path / "flat", ["a.png"])
    write_images(tmp_path / "classes", ["x/a.png", "y/a.png"])
    assert isinstance(load_dataset("folder", root=str(tmp_path / "flat"), size=8), FlatFolder)
    assert isinstance(load_dataset(tmp_path / "flat", size=8), FlatFolder)
    assert isinstance(load_dataset(str(tmp_path / "classes"), size=8), ImageNetFolder)
    assert isinstance(load_dataset(three_shards[1], size=8), IndexedShards)
    assert isinstance(load_dataset("webdataset", urls=three_shards), WebDatasetShards)
    node = {
        "target": "featinv.data.folders.FlatFolder",
        "params": {"root": str(tmp_path / "flat"), "size": 4},
    }
    assert load_dataset(node)[0]["image"].shape == (3, 4, 4)
    assert load_dataset(node, size=6)[0]["image"].shape == (3, 6, 6)
    module = ImageDataModule(node, node, batch_size=1)
    assert next(iter(module.train_dataloader()))["image"].shape == (1, 3, 4, 4)
    scenes = load_dataset("scenes", length=2, size=16)
    assert collate([scenes[0], scenes[1]])["factors"].shape[0] == 2


def test_unknown_data_set_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'imagenet'"):
        load_dataset("imagenett")
    with pytest.raises(UserError, match="names are"):
        load_dataset("/no/such/place")


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "configs/data").glob("*.yaml")), ids=lambda p: p.stem
)
def test_configs_name_real_parameters(path: Path) -> None:
    import importlib
    import inspect

    from omegaconf import OmegaConf

    config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    for node in (config, config["params"]["train"], config["params"]["val"]):
        module, name = node["target"].rsplit(".", 1)
        known = inspect.signature(getattr(importlib.import_module(module), name)).parameters
        assert set(node["params"]) <= set(known)


def test_validation_images_need_no_training_images(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "val" / "a.png")
    folder = {"target": "featinv.data.folders.FlatFolder", "params": {"size": 8}}
    parts = {part: {**folder, "params": {"size": 8, "root": str(tmp_path / part)}} for part in ("train", "val")}
    node = {"target": "featinv.data.datamodule.ImageDataModule", "params": parts}
    assert len(load_part(node, "val")) == 1
    with pytest.raises(UserError, match="no folder"):
        load_part(node, "train")
    with pytest.raises(UserError, match="data.params.batch is unknown"):
        load_part({**node, "params": {**parts, "batch": 3}}, "val")
    assert load_part({**node, "params": {"train": parts["train"]}}, "val") is None
    assert len(load_part({**node, "params": {"train": str(tmp_path / "val")}}, "train")) == 1
    own = load_part({"target": "test_data.OwnModule"}, "val")
    assert own == ["val images"]


class OwnModule:
    """A data module of another class."""

    def setup(self) -> None:
        self.val = ["val images"]


def test_a_list_of_skipped_pictures_is_written_whoever_keeps_it(tmp_path: Path) -> None:
    class Own(list):
        skipped = [("a", "torn")]

    write_skipped(Own([1, 2]), tmp_path / "skipped.json")
    report = json.loads((tmp_path / "skipped.json").read_text())
    assert report["used"] == 2 and report["skipped"] == [{"id": "a", "reason": "torn"}]
    write_skipped([1, 2], tmp_path / "nothing.json")
    assert not (tmp_path / "nothing.json").exists()
