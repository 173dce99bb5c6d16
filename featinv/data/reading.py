"""One picture, whatever its mode, from a file or bytes to a float tensor; or a sentence that says why not."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from featinv.errors import UserError

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Pillow opens more (PostScript starts another program); a data set needs only pictures.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_TAIL_BYTES = 64

ImageSource = str | os.PathLike[str] | bytes
Thoroughness = Literal["header", "full"]


class UnreadableImage(UserError):
    """A picture that cannot be read.

    Attributes:
        reason: Why, without the name.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(f"cannot read the image {name}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[type[UnreadableImage], tuple[str, str]]:
        # DataLoader workers send exceptions to the main process by pickling them.
        return type(self), (self.name, self.reason)


def read_image(source: ImageSource, *, name: str | None = None, min_side: int | None = None) -> Tensor:
    """Read one picture as float32 (3, H, W) in [0, 1].

    EXIF rotation is applied (a damaged EXIF block is passed over). Grey, palette and CMYK become RGB, a CMYK JPEG being
    taken as inverted, the way Adobe writes it. Grey of 16 bits keeps them all, colour of 16 bits its upper eight.
    Grey of 32 bits is read if its integers fit into 16 bits, or its floats into [0, 1].
    Transparency is composited on white; an animation gives its first frame. Colour profiles are ignored.

    Args:
        source: Path, or the encoded bytes.
        name: How to call it in messages; default is the path.
        min_side: The shorter side that the caller needs, in pixels. Pictures at least four times larger are
            shrunk by a whole factor while decoding, and stay at least twice as large; None keeps every pixel.

    Raises:
        UnreadableImage: If it is missing, empty, truncated, not a picture, of grey beyond these ranges, or too large
            to be one (Pillow's limit against decompression bombs).
    """
    name = _name(source, name)
    try:
        with _open(source, name) as image:
            if min_side is not None:
                image.draft("", (2 * min_side, 2 * min_side))
            image.load()
            _turn_upright(image)
            return _to_tensor(image, min_side)
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on broken files.
        raise UnreadableImage(name, _reason(error)) from error


def check_image(source: ImageSource, *, name: str | None = None, how: Thoroughness = "header") -> str | None:
    """Say why a picture cannot be read, or None.

    `"header"` reads a JPEG's or PNG's header and end marker, which finds zero-byte, foreign and cut files,
    and decodes the others; `"full"` decodes all, which also finds damage in the middle.
    """
    name = _name(source, name)
    try:
        if how == "header" and _is_whole(source, name):
            return None
        read_image(source, name=name, min_side=1)  # decoding finds all damage; the pixels are not needed
    except UnreadableImage as error:
        return error.reason
    return None


def _name(source: ImageSource, name: str | None) -> str:
    return name or ("<bytes>" if isinstance(source, bytes) else os.fspath(source))


def _open(source: ImageSource, name: str) -> Image.Image:
    if isinstance(source, bytes):
        size = len(source)
    elif not (path := Path(source)).is_file():
        raise UnreadableImage(name, "it is a folder" if path.is_dir() else "there is no such file")
    else:
        size = path.stat().st_size
    if size == 0:
        raise UnreadableImage(name, "the file is empty (zero bytes)")
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS)


def _is_whole(source: ImageSource, name: str) -> bool:
    try:
        with _open(source, name) as image:
            marker = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}.get(image.format or "")
    except UnreadableImage:
        raise
    except Exception as error:  # as in read_image
        raise UnreadableImage(name, _reason(error)) from error
    return marker is not None and marker in _tail(source)


def _tail(source: ImageSource) -> bytes:
    if isinstance(source, bytes):
        return source[-_TAIL_BYTES:]
    with open(source, "rb") as file:
        file.seek(max(0, os.path.getsize(source) - _TAIL_BYTES))
        return file.read()


def _turn_upright(image: Image.Image) -> None:
    """Apply the rotation that EXIF asks for, in place: a copy of a huge picture may not fit into memory."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception as error:  # the parser raises almost anything; browsers show such pictures as they are stored
        log.debug("EXIF of %s passed over: %s", image, error)


def _to_tensor(image: Image.Image, min_side: int | None) -> Tensor:
    transparent = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    if image.mode in ("L", "LA", "RGB", "RGBA") and "transparency" not in image.info:
        image = _shrunk(image, min_side)  # before converting, which copies every pixel; other modes cannot be averaged
    if image.mode.startswith("I") or image.mode == "F":
        grey = torch.from_numpy(_deep_grey(image))[None]
        factor = _factor(image.size, min_side)
        return (F.avg_pool2d(grey, factor, ceil_mode=True) if factor > 1 else grey).expand(3, -1, -1).clone()
    if transparent:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    pixels = np.array(_shrunk(image.convert("RGB"), min_side))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255


def _factor(size: tuple[int, int], min_side: int | None) -> int:
    """Pixels along a side of the blocks that are averaged, so that the shorter side stays at least 2 * min_side."""
    return max(1, min(size) // (2 * min_side)) if min_side else 1


def _shrunk(image: Image.Image, min_side: int | None) -> Image.Image:
    factor = _factor(image.size, min_side)
    return image.reduce(factor) if factor > 1 else image


def _deep_grey(image: Image.Image) -> np.ndarray:
    """Grey of more than 8 bits as float32 (H, W) in [0, 1]."""
    pixels = np.asarray(image).astype(np.float32)
    if image.mode != "F":
        (bits,) = getattr(image, "tag_v2", {}).get(TiffImagePlugin.BITSPERSAMPLE, (16,))  # cameras' TIFFs have 12
        white = 2 ** min(bits, 16) - 1  # Pillow may widen 16 to 32
        if pixels.min() < 0 or pixels.max() > white:
            raise ValueError(f"its integer pixels are not in 0 to {white}, the range of {min(bits, 16)} bits")
        pixels /= white
        return pixels
    if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError("its floating-point pixels are not in [0, 1]")
    return pixels


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"it is not a picture in a known format ({', '.join(_FORMATS)})"
    if isinstance(error, Image.DecompressionBombError):
        return (
            f"it is too large: more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels are not decoded; shrink it first"
        )
    if isinstance(error, MemoryError):
        return "it is too large for this machine's memory; shrink it first"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, OSError | SyntaxError):
        return f"it is damaged or cut off ({error})"
    return str(error) or type(error).__name__
