"""Pictures: every kind that is taken, and every kind of bad bytes."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fewstep.data import captions
from fewstep.data.captions import CaptionError
from fewstep.data.pictures import (
    FORMATS,
    KNOWN,
    MAX_PIXELS,
    SUFFIXES,
    PictureError,
    decode,
    decode_file,
    inspect,
    inspect_file,
    quiet_pillow,
    square_pixels,
)
from fewstep.data.report import Drops
from fewstep.data.shards import scan_shards
from fewstep.errors import DataError

from .makers import encoded, noise, picture

AVIF = [kind for kind in FORMATS if kind == "AVIF"]  # a Pillow may be built without it


def decoded(raw: bytes, resolution: int = 16) -> np.ndarray:
    pixels = decode(io.BytesIO(raw), resolution)
    assert pixels.shape == (resolution, resolution, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags["C_CONTIGUOUS"]
    return pixels


def looked_over(raw: bytes) -> int:
    with quiet_pillow():
        return int(inspect(io.BytesIO(raw)).split()[0])


def near(pixels: np.ndarray, colour: tuple[int, int, int], by: int = 2) -> bool:
    return bool((np.abs(pixels.astype(int) - colour) <= by).all())


# ------------------------------------------------------------------------------------------------- resize and crop


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (40, 40), (16, 16), (9, 400), (400, 9), (17, 23)])
def test_the_square_is_the_resized_picture_cropped(size: tuple[int, int]) -> None:
    """Against resizing the whole picture first; the longer side's rounding moves that by part of a pixel."""
    width, height = size
    x = np.linspace(0, 255, width)[None, :, None] * np.array([1, 0, 0])
    y = np.linspace(0, 255, height)[:, None, None] * np.array([0, 1, 0])
    image = Image.fromarray((x + y).astype(np.uint8))
    square = square_pixels(image, 16)
    scale = 16 / min(size)
    whole = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (whole.width - 16) // 2, (whole.height - 16) // 2
    expected = np.asarray(whole.crop((left, top, left + 16, top + 16)))
    assert square.shape == (16, 16, 3)
    assert np.abs(square.astype(int) - expected).max() <= 1 + 255 / 16 / 2


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    image = noise((16, 16))
    assert np.array_equal(decoded(encoded(image)), np.asarray(image))


def test_shrinking_averages() -> None:
    fine = Image.fromarray(np.indices((256, 256)).sum(0).__mod__(2).astype(np.uint8) * 255).convert("RGB")
    assert near(decoded(encoded(fine)), (127, 127, 127), by=3)


def test_a_large_jpeg_decoded_small_is_the_same_picture() -> None:
    coarse = noise((12, 8)).resize((960, 640), Image.Resampling.BICUBIC)
    raw = encoded(coarse, "JPEG", quality=95)
    full = square_pixels(Image.open(io.BytesIO(raw)).convert("RGB"), 32)
    assert np.abs(decoded(raw, 32).astype(int) - full).mean() < 1


# ------------------------------------------------------------------------------------------------- kinds of pictures


@pytest.mark.parametrize("kind", FORMATS)
def test_formats(kind: str) -> None:
    raw = encoded(picture((200, 30, 60)), kind)
    assert looked_over(raw) == len(raw)
    assert near(decoded(raw), (200, 30, 60), by=6)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_modes(mode: str) -> None:
    image = picture((255, 255, 255)).convert(mode)
    raw = encoded(image, "PNG" if mode not in ("CMYK", "YCbCr") else "TIFF" if mode == "YCbCr" else "JPEG")
    assert looked_over(raw) == len(raw)
    assert near(decoded(raw), (255, 255, 255))


@pytest.mark.skipif(not AVIF, reason="this Pillow reads no AVIF")
def test_avif() -> None:
    assert ".avif" in SUFFIXES
    half = picture((200, 0, 0)).convert("RGBA")
    half.putalpha(128)
    assert near(decoded(encoded(half, "AVIF", quality=100)), (227, 127, 127), by=3)


def test_every_known_ending_is_read_or_not() -> None:
    assert {".jpg", ".jfif", ".png"} <= SUFFIXES
    assert {".heic", ".heif", ".jxl"} <= KNOWN - SUFFIXES
    assert ".avif" in KNOWN


def test_cmyk_keeps_its_colours() -> None:
    assert near(decoded(encoded(picture((200, 30, 60)).convert("CMYK"), "JPEG")), (200, 30, 60), by=6)


def test_a_palette_keeps_its_colours() -> None:
    assert near(decoded(encoded(picture((200, 30, 60)).convert("P", palette=Image.Palette.ADAPTIVE))), (200, 30, 60))


def test_transparency_is_white() -> None:
    half = picture((200, 0, 0)).convert("RGBA")
    half.putalpha(128)
    assert near(decoded(encoded(half)), (227, 127, 127))
    hidden = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    assert near(decoded(encoded(hidden)), (255, 255, 255))
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([10, 20, 30])
    assert near(decoded(encoded(palette, transparency=0)), (255, 255, 255))
    assert near(decoded(encoded(palette)), (10, 20, 30))
    keyed = encoded(picture((1, 2, 3)), transparency=(1, 2, 3))
    assert near(decoded(keyed), (255, 255, 255))


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    grey = Image.fromarray(np.full((20, 20), 128 * 257, dtype=np.uint16))
    assert near(decoded(encoded(grey)), (128, 128, 128), by=0)


@pytest.mark.parametrize("array", [np.zeros((20, 20), np.float32), np.zeros((20, 20), np.int32)])
def test_values_without_a_range_are_refused(array: np.ndarray) -> None:
    raw = encoded(Image.fromarray(array), "TIFF")
    with pytest.raises(PictureError, match="range"):
        looked_over(raw)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("side", [32, 33, 47])
def test_what_ends_as_it_should_is_not_decoded_to_be_looked_over(
    kind: str, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = list[bool]()
    raw = encoded(Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)), kind)
    for place in ("PIL.ImageFile.ImageFile.load", "PIL.WebPImagePlugin.WebPImageFile.load"):
        monkeypatch.setattr(place, lambda _: decoded.append(True))
    looked_over(raw)
    assert not decoded
    for changed in (raw[:-40], raw + b"\0" * 40):
        with suppress(PictureError):
            looked_over(changed)
    assert decoded


def test_the_first_frame_of_an_animation() -> None:
    frames = [picture((0, 200, 0)), picture((0, 0, 200))]
    for kind in ("GIF", "WEBP", "PNG", *AVIF):
        raw = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        looked_over(raw)
        assert near(decoded(raw), (0, 200, 0), by=4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_says_which_side_is_up(orientation: int) -> None:
    upright = np.zeros((32, 32, 3), dtype=np.uint8)
    upright[:16, :16], upright[:16, 16:], upright[16:, :16] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the turn that the orientation asks a viewer to undo
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    sharp: dict[str, dict[str, Any]] = {
        "PNG": {},
        "JPEG": {"quality": 100, "subsampling": 0},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    }
    for kind in ("PNG", "JPEG", *AVIF):
        pixels = decoded(encoded(stored, kind, exif=exif, **sharp[kind]), 32)
        assert np.abs(pixels.astype(int) - upright).mean() < 4, kind


def test_a_broken_exif_block_turns_nothing() -> None:
    raw = encoded(picture((10, 200, 10)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff")
    assert near(decoded(raw), (10, 200, 10), by=6)
    nonsense = encoded(picture((10, 200, 10)), "JPEG", exif=b"Exif\0\0this is no TIFF")
    assert near(decoded(nonsense), (10, 200, 10), by=6)


# ------------------------------------------------------------------------------------------------------- bad pictures


def png_claiming(width: int, height: int) -> bytes:
    """A PNG header of any size with almost nothing behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty file"),
        (b"this is no picture", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n", "not a picture"),
        (encoded(picture(size=(1, 1))), "smaller than"),
        (encoded(picture(size=(1, 500))), "smaller than"),
        (png_claiming(10_000, 10_000), "megapixels"),
        (png_claiming(60_000, 60_000), "megapixels"),
    ],
)
def test_seen_without_decoding(raw: bytes, reason: str) -> None:
    with pytest.raises(PictureError, match=reason):
        looked_over(raw)
    with pytest.raises(PictureError):
        decode(io.BytesIO(raw), 16)


def test_the_limit_does_not_depend_on_pillows_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(PictureError, match="megapixels"):
        looked_over(png_claiming(MAX_PIXELS // 1000 + 1, 1000))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_pictures_are_found_in_the_scan(kind: str, share: float) -> None:
    raw = encoded(noise(), kind)
    with pytest.raises(PictureError):
        looked_over(raw[: int(len(raw) * share)])


def test_a_jpeg_with_something_behind_it_is_fine() -> None:
    raw = encoded(noise(), "JPEG") + b"\0" * 1000
    assert looked_over(raw) == len(raw)


def test_damage_inside_is_found_when_decoded() -> None:
    raw = bytearray(encoded(noise()))
    raw[len(raw) // 2 : len(raw) // 2 + 40] = b"\0" * 40
    looked_over(bytes(raw))  # its header and its end are fine
    with pytest.raises(PictureError, match="damaged"):
        decode(io.BytesIO(raw), 16)


WHOLE = [encoded(noise((24, 16)), kind) for kind in FORMATS]


@given(st.sampled_from(WHOLE), st.data())
@settings(max_examples=150, deadline=None)
def test_any_damage_is_a_picture_or_a_reason(whole: bytes, data: st.DataObject) -> None:
    raw = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    for use in (looked_over, decoded):
        with suppress(PictureError):
            use(bytes(raw))


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_any_bytes_are_a_picture_or_a_reason(raw: bytes) -> None:
    for use in (looked_over, decoded):
        with pytest.raises(PictureError):
            use(raw)


# ---------------------------------------------------------------------------------------------------------- on a disk


def test_an_impossible_offset_in_a_file_on_disk_is_no_system_error(tmp_path: Path) -> None:
    """Seeking to where no file system has anything sets errno, though nothing is wrong with the disk."""
    path = tmp_path / "odd.tif"
    path.write_bytes(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 2**63 - 1) + bytes(100))  # BigTIFF: the directory's place
    with pytest.raises(PictureError, match="damaged"):
        decode_file(path, 16)
    with quiet_pillow(), pytest.raises(PictureError, match="damaged"):
        inspect_file(path)


def test_another_picture_of_the_same_length_has_another_mark() -> None:
    """Of a format without compression, all pictures of one size have one length."""
    red, blue = (encoded(picture(colour, (64, 64)), "BMP") for colour in ((200, 0, 0), (0, 0, 200)))
    changed = bytearray(red)
    changed[len(red) // 2] ^= 1
    assert len(red) == len(blue)
    with quiet_pillow():
        marks = {inspect(io.BytesIO(raw)) for raw in (red, blue, bytes(changed))}
        assert len(marks) == 3 and inspect(io.BytesIO(red)) in marks


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(PictureError, match="a pipe or a device"):
        inspect_file(tmp_path / "a.png")
    with pytest.raises(CaptionError, match="a pipe or a device"):
        captions.read(tmp_path / "a.png")
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"a\.tar cannot be read"):
        scan_shards([tmp_path / "a.tar"], Drops())


def test_a_missing_file_is_counted_in_the_scan_and_ends_a_run(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="cannot be read"):
        inspect_file(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"gone\.png was there .* cannot be read now: No such file") as caught:
        decode_file(tmp_path / "gone.png", 16)
    assert not isinstance(caught.value, PictureError)


def test_pillow_stays_quiet_and_the_filters_stay_as_they_were() -> None:
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        decoded(encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff"))
    assert not seen
    assert list(warnings.filters) == before
