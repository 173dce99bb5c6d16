"""A user's picture of any kind: its pixels as computed by hand from the format's definition, or one clear sentence."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageOps
from torch import Tensor

from featinv.config import CONFIG_ROOT
from featinv.data.folders import pictures
from featinv.data.reading import check_image, read_image
from featinv.errors import UserError, exit_on_user_error

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types of the PNG standard, section 11.2.2
TOLERANCE = 1.01 / 255


def encode(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png(pixels: np.ndarray, kind: int, **chunks: bytes) -> bytes:
    """A PNG written by hand: pixels (H, W, C) of 8 or 16 bits, and further chunks by name."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(pixels.dtype.newbyteorder(">")).tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.dtype.itemsize, kind, 0, 0, 0)
    parts = [(b"IHDR", header), *((k.encode(), v) for k, v in chunks.items()), (b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts) + chunk(b"IEND", b"")


def random(channels: int, dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    top = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, top, (7, 5, channels), dtype=dtype, endpoint=True)


def share(pixels: np.ndarray) -> np.ndarray:
    """Integers as fractions of their largest value."""
    return pixels / np.iinfo(pixels.dtype).max


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return colour * alpha + (1 - alpha)


def check(data: bytes, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    """`expected` is (H, W, 1 or 3) in [0, 1]."""
    image = read_image(data)
    assert image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
    wanted = torch.from_numpy(np.broadcast_to(expected, (*expected.shape[:2], 3)).astype(np.float32)).permute(2, 0, 1)
    torch.testing.assert_close(image, wanted, atol=tolerance, rtol=0)
    assert check_image(data) is None and check_image(data, how="full") is None


# Modes


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_and_colour_with_and_without_alpha(dtype: type) -> None:
    grey, colour, alpha = random(1, dtype), random(3, dtype, 1), random(1, dtype, 2)
    check(png(grey, GREY), share(grey), 1e-6)  # no bit is lost
    check(png(colour, RGB), share(colour), TOLERANCE if dtype is np.uint16 else 1e-6)
    check(png(np.concatenate([grey, alpha], 2), GREY_ALPHA), on_white(share(grey), share(alpha)), 2 * TOLERANCE)
    check(png(np.concatenate([colour, alpha], 2), RGBA), on_white(share(colour), share(alpha)), 2 * TOLERANCE)


def test_grey_of_16_bits_keeps_what_8_bits_cannot_hold() -> None:
    pixels = np.arange(35, dtype=np.uint16).reshape(7, 5, 1) + 1000  # two grey levels of 8 bits
    assert read_image(png(pixels, GREY))[0].unique().numel() == 35
    for order in "<>":
        tiff = encode(Image.fromarray(pixels[:, :, 0].astype(f"{order}u2")), "TIFF")
        check(tiff, share(pixels), 1e-6)


def test_grey_of_12_bits_as_cameras_write_it() -> None:
    pixels = np.linspace(0, 4095, 24).astype(int).reshape(4, 6)
    packed = b"".join((int(a) << 12 | int(b)).to_bytes(3, "big") for a, b in pixels.reshape(-1, 2))
    tags = {256: 6, 257: 4, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 4, 279: len(packed)}  # TIFF 6.0, section 3
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    data = struct.pack("<2sHI", b"II", 42, 8 + len(packed)) + packed + directory
    check(data, pixels[:, :, None] / 4095, 1e-6)


def test_palette_whose_entries_are_partly_transparent() -> None:
    index, palette, alpha = random(1) % 6, random(3, seed=3)[:6, 0], np.array([0, 51, 128, 255], np.uint8)
    data = png(index, PALETTE, PLTE=palette.tobytes(), tRNS=alpha.tobytes())
    opacity = np.append(share(alpha), [1, 1])  # entries that tRNS leaves out are opaque
    index = index[:, :, 0]
    check(data, on_white(share(palette)[index], opacity[index][:, :, None]))


def test_one_colour_can_stand_for_transparent() -> None:
    colour, grey = random(3) | 1, random(1) | 1
    colour[2, 3], grey[2, 3] = (10, 20, 30), 40
    for data, pixels in (
        (png(colour, RGB, tRNS=struct.pack(">3H", 10, 20, 30)), colour),
        (png(grey, GREY, tRNS=struct.pack(">H", 40)), grey),
    ):
        expected = share(pixels).copy()
        expected[2, 3] = 1
        check(data, expected)


def blocks(channels: int) -> np.ndarray:
    """Four flat 16 x 16 blocks, which JPEG keeps nearly exactly."""
    colours = np.array([[0, 255, 255, 0], [255, 0, 0, 0], [20, 60, 200, 0], [40, 80, 120, 128]], np.uint8)
    return np.repeat(np.repeat(colours.reshape(2, 2, 4), 16, 0), 16, 1)[:, :, :channels]


def ink(cmyk: np.ndarray) -> np.ndarray:
    """What inks (H, W, 4) leave of white."""
    return (1 - share(cmyk)[:, :, :3]) * (1 - share(cmyk)[:, :, 3:])


def test_cmyk_plain_inverted_and_as_ycck() -> None:
    cmyk = blocks(4)
    check(encode(Image.fromarray(cmyk, "CMYK"), "TIFF"), ink(cmyk))
    inverted = encode(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100, subsampling=0)
    check(inverted, ink(cmyk), 3 / 255)
    marker = inverted.index(b"Adobe")
    check(inverted[: marker - 4] + inverted[marker + 12 :], ink(cmyk), 3 / 255)  # without Adobe's marker all the same
    # Adobe's YCCK: the inks' complements, of which the first three went through YCbCr. Pillow stores 255 - value.
    red, green, blue = (cmyk[:, :, i].astype(float) for i in range(3))
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    ycc = [luma, 128 + (blue - luma) / 1.772, 128 + (red - luma) / 1.402]
    stored = np.stack([*(255 - part for part in ycc), cmyk[:, :, 3]], 2).clip(0, 255).round().astype(np.uint8)
    data = bytearray(encode(Image.fromarray(stored, "CMYK"), "JPEG", quality=100, subsampling=0))
    data[data.index(b"Adobe") + 11] = 2  # the marker's transform: YCCK
    check(bytes(data), ink(cmyk), 4 / 255)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(form: str) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("#ff8000", "#0000ff", "#00ff00")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encode(frames[0], form, save_all=True, append_images=frames[1:], duration=50, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    check(data, np.full((4, 6, 3), [1, 128 / 255, 0]))


# Rotation


def stored_as(upright: np.ndarray, orientation: int) -> np.ndarray:
    """How the pixels of an upright picture lie in a file of this orientation (EXIF 2.3, table 6)."""
    turned = upright.swapaxes(0, 1) if orientation >= 5 else upright
    across = orientation in (2, 3, 7, 8)
    down = orientation in (3, 4, 6, 7)
    return np.ascontiguousarray(turned[:: -1 if down else 1, :: -1 if across else 1])


def with_orientation(pixels: np.ndarray, orientation: int, form: str, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(Image.fromarray(pixels), form, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_in_every_format(orientation: int) -> None:
    upright = np.repeat(np.repeat(random(3)[:2, :3], 16, 0), 16, 1)
    stored = stored_as(upright, orientation)
    for form, options in (
        ("JPEG", {"quality": 100, "subsampling": 0}),
        ("PNG", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
    ):
        check(with_orientation(stored, orientation, form, **options), share(upright), 3 / 255)
    large = with_orientation(np.repeat(np.repeat(stored, 8, 0), 8, 1), orientation, "JPEG", quality=95)
    small = read_image(large, min_side=16)  # shrunk while it is decoded, and turned
    assert small.shape == (3, 32, 48)
    expected = torch.from_numpy(share(upright)).permute(2, 0, 1).float()
    assert (small - expected).abs().mean() < 0.03


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"junk", b"Exif\0\0garbage garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_spoils_no_picture(form: str, exif: bytes) -> None:
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    check(encode(Image.fromarray(blocks(3)), form, exif=exif, **options), share(blocks(3)), 3 / 255)


# Sizes


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (1, 9), (16, 2)])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_tiny_pictures_fill_the_square(tmp_path: Path, size: tuple[int, int], form: str) -> None:
    path = tmp_path / f"tiny.{form.lower()}"
    path.write_bytes(encode(Image.new("RGB", size, (200, 100, 50)), form))
    (item,) = pictures(path, 16)
    assert item["id"] == "tiny" and item["label"] == -1 and item["image"].shape == (3, 16, 16)
    colour = torch.tensor([200, 100, 50])[:, None, None] / 255
    torch.testing.assert_close(item["image"], colour.expand(3, 16, 16), atol=4 / 255, rtol=0)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_huge_jpeg_is_never_decoded_at_its_size(tmp_path: Path, monkeypatch, mode: str) -> None:
    path, decoded = tmp_path / "huge.jpg", []
    Image.linear_gradient("L").resize((3000, 2000)).convert(mode).save(path)
    turned = ImageOps.exif_transpose

    def watched(image, **options):
        decoded.append(image.size)
        return turned(image, **options)

    monkeypatch.setattr(ImageOps, "exif_transpose", watched)
    (image,) = (item["image"] for item in pictures(path, 64))
    assert decoded and all(max(size) <= 3000 / 8 for size in decoded)
    ramp = (torch.arange(64) + 0.5) / 64  # black at the top, white at the bottom
    torch.testing.assert_close(image, ramp[:, None].expand(3, 64, 64), atol=0.02, rtol=0)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1", "I;16", "F", "CMYK"])
def test_every_mode_is_shrunk_to_the_mean_of_its_blocks(mode: str) -> None:
    half = np.repeat(np.array([0, 255], np.uint8), 32)
    image = Image.fromarray(np.broadcast_to(half, (64, 64)).copy())
    if mode in ("I;16", "F"):
        scale, dtype = {"I;16": (257, np.uint16), "F": (1 / 255, np.float32)}[mode]
        image = Image.fromarray((np.asarray(image).astype(float) * scale).astype(dtype))
    elif mode in ("LA", "RGBA"):
        image = Image.merge(mode, [Image.new("L", (64, 64), 0)] * (len(mode) - 1) + [ImageOps.invert(image)])
    else:
        image = image.convert(mode)
    small = read_image(encode(image, "PNG" if mode not in ("F", "CMYK") else "TIFF"), min_side=4)
    assert small.shape == (3, 8, 8)
    assert torch.allclose(small[:, :, :4], torch.zeros(())) and torch.allclose(small[:, :, 4:], torch.ones(()))


def test_a_decompression_bomb_is_refused_unread(tmp_path: Path) -> None:
    small = png(np.zeros((1, 1, 1), np.uint8), GREY)
    header = struct.pack(">IIBBBBB", 50000, 50000, 8, GREY, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "bomb.png").write_bytes(small[:8] + chunk + small[33:])
    with pytest.raises(UserError, match="bomb.png: it is too large: more than [0-9,]+ pixels"):
        pictures(tmp_path / "bomb.png", 8)


# What is no picture


def _cut(form: str) -> bytes:
    data = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), form)
    return data[: len(data) // 2]


NO_PICTURES = {
    "empty.jpg": (b"", "zero bytes"),
    "page.jpg": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not a picture"),
    "text.png": (b"hello", "not a picture"),
    "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not a picture"),
    **{f"cut.{form.lower()}": (_cut(form), "damaged or cut off") for form in ("JPEG", "PNG", "GIF", "WEBP", "TIFF")},
    "folder": (None, "there are no images in"),
    "absent.jpg": (None, "there is no picture or folder"),
}


@pytest.mark.parametrize("name", NO_PICTURES)
def test_what_is_no_picture_gets_one_sentence_and_exit_code_2(name: str, tmp_path: Path, capsys) -> None:
    from sample import chosen_images

    content, reason = NO_PICTURES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    elif name == "folder":
        (tmp_path / name).mkdir()
    config = OmegaConf.load(CONFIG_ROOT / "sample.yaml")
    config.image = str(tmp_path / name)
    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(lambda: chosen_images(config, None, 8, tmp_path) and None)()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and line.startswith("error: ") and str(tmp_path / name) in line and reason in line


def test_a_folder_gives_its_readable_pictures(tmp_path: Path) -> None:
    for name, (content, _) in NO_PICTURES.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    Image.new("RGB", (9, 9), "red").save(tmp_path / "good.png")
    found = pictures(tmp_path, 8)
    assert [item["id"] for item in found] == ["good"] and len(found.skipped) == 8


def test_the_home_folder_is_known(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (9, 9), "red").save(tmp_path / "my.png")
    image: Tensor = pictures("~/my.png", 4)[0]["image"]
    assert torch.allclose(image[:, 0, 0], torch.tensor([1.0, 0, 0]), atol=1e-5)
