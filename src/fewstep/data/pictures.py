"""From a picture file to a square of uint8 RGB pixels, with Pillow alone, or the reason why not.

Only formats that Pillow decodes by itself are opened (EPS would start Ghostscript). Colour profiles are not applied.
"""

from __future__ import annotations

import errno
import hashlib
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from fewstep.errors import DataError

_AVIF = bool(features.check("avif"))  # a Pillow may be built without it

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] if _AVIF else []))
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", *([".avif"] if _AVIF else [])}
)
UNREAD = (
    frozenset(
        {
            ".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".jpx", ".psd", ".tga",
            ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf",
        }
    )
    - SUFFIXES
)  # fmt: skip
"""Endings of pictures that are known, so that they are missed, and not read."""

KNOWN = SUFFIXES | UNREAD

MIN_SIDE = 8  # pixels
MAX_PIXELS = 89_478_485  # Pillow's own line, a quarter of a gibibyte as RGB: what is above it may be a bomb

_SAMPLE = 1024  # bytes at a place: the disk reads more than that at a time anyway

_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV"})
_SIXTEEN_BIT = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})

_BROKEN = (  # what Pillow's decoders raise on bytes that they cannot make sense of
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError,
    RuntimeError, AssertionError, struct.error, zlib.error, Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)  # fmt: skip

_ORIENTATION = 0x0112  # EXIF tag; its values 2 to 8 say what to do so that the picture stands upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(DataError):
    """A picture that cannot be used.

    Attributes:
        reason: the kind of fault, worded alike for all pictures that share it.
        detail: what is particular to this one; may be empty.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[PictureError], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


def inspect(stream: BinaryIO) -> str:
    """Look a picture over without decoding it, as far as that tells anything.

    Reads the header (format, mode, size) and the last bytes; where those do not show that the picture is complete, it
    is decoded after all. Call it inside `quiet_pillow`.

    Args:
        stream: the whole file, seekable.

    Returns:
        A mark that tells it from others: its length, and a digest of its start, middle and end.

    Raises:
        PictureError: it cannot be used.
        OSError: the operating system could not read it (`errno` is set).
    """
    with _faults():
        length = stream.seek(0, 2)
        if length == 0:
            raise PictureError("empty file")
        image = _open(stream)
        if not _ends_as_it_should(image.format, stream, length):
            stream.seek(0)
            _open(stream).load()
    return _mark(stream, length)


def _mark(stream: BinaryIO, length: int) -> str:
    """Three samples of a picture: any other drawing of the same length differs in them, compressed or not."""
    digest = hashlib.blake2b(digest_size=8)
    for place in (0, (length - _SAMPLE) // 2, length - _SAMPLE):
        stream.seek(max(0, place))
        digest.update(stream.read(_SAMPLE))
    return f"{length} {digest.hexdigest()}"


def decode(stream: BinaryIO, resolution: int) -> np.ndarray:
    """Decode a picture into the square that a model of `resolution` is trained on.

    The first frame of an animation; upright by its EXIF orientation (an unreadable EXIF block says nothing about that
    and is passed over); transparency composited on white; shorter side resized to `resolution`, centre kept.

    Args:
        stream: the whole file, seekable.
        resolution: side in pixels.

    Returns:
        uint8 array [resolution, resolution, 3], RGB.

    Raises:
        PictureError: it cannot be used.
        OSError: the operating system could not read it (`errno` is set).
    """
    with quiet_pillow(), _faults():
        stream.seek(0)
        image = _open(stream)
        # JPEG decodes to 1/2, 1/4 or 1/8 by itself. Twice the side is kept for the resampling below.
        image.draft(None, (2 * resolution, 2 * resolution))
        image.load()
        square = square_pixels(_on_white(image), resolution)
        turn = _UPRIGHT.get(_orientation(image))
        if turn is not None:  # a centred square may be turned after the crop: the crop turns into itself
            square = np.asarray(Image.fromarray(square).transpose(turn))
    return np.ascontiguousarray(square)


def square_pixels(image: Image.Image, resolution: int) -> np.ndarray:
    """Resize the shorter side of an RGB picture to `resolution` and keep the centre.

    One resampling of the centred square, anti-aliased (bicubic): the longer side is never blown up.

    Returns:
        uint8 array [resolution, resolution, 3].
    """
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    if image.size == (resolution, resolution):
        return np.array(image)
    box = (left, top, left + side, top + side)
    return np.array(image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box))


def inspect_file(path: Path) -> str:
    """`inspect` of the file at `path`, with system errors as `PictureError` too, since a scan counts them."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for, a device has no end
            raise PictureError("no file but a folder, a pipe or a device")
        with path.open("rb") as stream:
            return inspect(stream)
    except OSError as error:
        raise PictureError("cannot be read", error.strerror or type(error).__name__) from error


def decode_file(path: Path, resolution: int) -> np.ndarray:
    """`decode` of the file at `path`.

    Raises:
        PictureError: the file is there, its content is no good.
        DataError: the file is gone or the system does not let it be read, although the scan had seen it.
    """
    try:
        with path.open("rb") as stream:
            return decode(stream, resolution)
    except OSError as error:
        raise gone(path, error) from error


def gone(path: Path, error: OSError) -> DataError:
    """The error for a file that the scan had seen and that cannot be read any more."""
    return DataError(
        f"{path} was there when the data was scanned and cannot be read now: {error.strerror or error}; training "
        "data must stay in place during a run; put it back and resume from the last checkpoint"
    )


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silence Pillow's remarks on odd metadata, and make an error of what it suspects to be a decompression bomb.

    Python's warning filters belong to the whole process: threads share the context that was opened around all of them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


@contextmanager
def _faults() -> Iterator[None]:
    """Turn what Pillow says about bad bytes into `PictureError`; pass on what the system says (it sets errno)."""
    try:
        yield
    except PictureError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(f"more than {MAX_PIXELS / 1e6:.0f} megapixels") from error
    except UnidentifiedImageError as error:
        raise PictureError(f"not a picture ({', '.join(FORMATS)})") from error
    except _BROKEN as error:
        # EINVAL is a seek to where no file has anything: an offset in a broken header.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise PictureError("truncated or damaged", " ".join(str(error).split())[:100]) from error


def _open(stream: BinaryIO) -> Image.Image:
    """Read the header and refuse what is not worth decoding."""
    stream.seek(0)
    image = Image.open(stream, formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise PictureError(f"more than {MAX_PIXELS / 1e6:.0f} megapixels", f"{width}x{height}")
    if min(width, height) < MIN_SIDE:
        raise PictureError(f"smaller than {MIN_SIDE} pixels", f"{width}x{height}")
    if image.mode not in _MODES | _SIXTEEN_BIT:
        raise PictureError("pixel format without a fixed range", f"mode {image.mode}")
    return image


def _ends_as_it_should(kind: str | None, stream: BinaryIO, length: int) -> bool:
    """Whether a JPEG's or PNG's end mark stands at the end, or a WebP is as long as it says; others need decoding."""
    if kind == "WEBP":
        stream.seek(4)
        said = int.from_bytes(stream.read(4), "little")  # of what follows, filled up to an even number
        return length == 8 + said + said % 2
    mark = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}.get(kind or "")
    if mark is None:
        return False
    stream.seek(max(0, length - 32))
    return mark in stream.read(32)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except _BROKEN:
        return 1


def _on_white(image: Image.Image) -> Image.Image:
    """Any picture that was let in, as RGB."""
    if image.mode in _SIXTEEN_BIT:
        # Pillow's own conversion clips 16 bits at 255: nearly everything would be white.
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in {"LA", "La", "PA", "RGBA", "RGBa"} or "transparency" in image.info:
        colours = image.convert("RGBA")
        white = Image.new("RGB", colours.size, (255, 255, 255))
        white.paste(colours, mask=colours.getchannel("A"))
        return white
    return image.convert("RGB")
