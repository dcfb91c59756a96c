"""Everything awkward at once, in every form of data: what is kept has its own caption, what is not has its reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from fewstep.config import CacheSettings, TrainSettings
from fewstep.data import OpenedData, open_data
from fewstep.data.pictures import FORMATS
from fewstep.errors import DataError
from fewstep.train import distill, rehearse
from fewstep.train.fill import fill

from . import makers
from .makers import Base, Settings, encoded, picture, write
from .test_pictures import near, png_claiming
from .test_shards import shard

Samples = dict[str, tuple[bytes, str | bytes]]
"""File name to (picture, caption)."""


def turned() -> bytes:
    """Half red, half blue, stored on its side: upright, red is above."""
    image = picture((250, 0, 0), (20, 20))
    image.paste((0, 0, 250), (0, 10, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)


GOOD: Samples = {
    "animated.gif": (encoded(picture((0, 200, 0)), "GIF", save_all=True, append_images=[picture((9, 9, 9))]), "green"),
    "cmyk.jpg": (encoded(picture((200, 30, 60)).convert("CMYK"), "JPEG"), "crimson"),
    "long.png": (encoded(picture((7, 7, 7))), "word " * 2_000),
    "palette.png": (encoded(picture((10, 20, 200)).convert("P", palette=Image.Palette.ADAPTIVE)), "blue"),
    "turned.png": (turned(), "red above blue"),
}
WHOLE = encoded(makers.noise(), "JPEG")
BAD: Samples = {
    "bomb.png": (png_claiming(10_000, 10_000), "100 megapixels"),
    "cut.jpg": (WHOLE[: len(WHOLE) // 2], "cut short"),
    "mute.png": (makers.numbered(1), " \n"),
    "page.png": (b"<html>404</html>", "no picture"),
    "pixel.png": (encoded(picture(size=(1, 1))), "one pixel"),
}
REASONS = {
    "more than 89 megapixels": 1,
    "truncated or damaged": 1,
    "caption is empty": 1,
    f"not a picture ({', '.join(FORMATS)})": 1,
    "smaller than 8 pixels": 1,
}
NOT_UTF8: Samples = {"latin.png": (makers.numbered(2), "Größe".encode("latin-1"))}


def as_folder(root: Path, samples: Samples) -> Path:
    for name, (raw, caption) in samples.items():
        write(root, {name: raw, f"{Path(name).stem}.txt": caption})
    return root


def as_metadata(root: Path, samples: Samples) -> Path:
    lines = [b'{"file_name": "%s", "text": "%s"}' % (name.encode(), caption if isinstance(caption, bytes) else
             json.dumps(caption)[1:-1].encode()) for name, (_, caption) in samples.items()]  # fmt: skip
    write(root, {name: raw for name, (raw, _) in samples.items()})
    return write(root, {"metadata.jsonl": b"\n".join(lines)})


def as_shards(root: Path, samples: Samples) -> Path:
    names = sorted(samples)
    for number, part in enumerate((names[::2], names[1::2])):
        pictures = [(name, samples[name][0]) for name in part]
        texts = [(f"{Path(name).stem}.txt", samples[name][1]) for name in part]
        shard(root / f"{number:05d}.tar", [*texts, *pictures])
    return root


def as_coco(root: Path, samples: Samples) -> Path:
    images = [{"id": number, "file_name": name} for number, name in enumerate(samples)]
    texts = [{"image_id": number, "caption": caption} for number, (_, caption) in enumerate(samples.values())]
    write(root / "val2017", {name: raw for name, (raw, _) in samples.items()})
    return write(root, {"annotations/captions_val2017.json": makers.coco(images, texts[::-1])})


def as_parquet(root: Path, samples: Samples) -> Path:
    root.mkdir()
    cells = [{"bytes": raw, "path": name} for name, (raw, _) in samples.items()]
    table = pyarrow.table({"image": cells, "text": [caption for _, caption in samples.values()]})
    parquet.write_table(table, root / "part.parquet")
    return root


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def assert_right(opened: OpenedData) -> None:
    """All that is good is there, each picture with its own caption."""
    seen = {captions: pixels for pixels, captions in (opened.data.item(i) for i in range(len(opened.data)))}
    assert set(seen) == {(caption.strip(),) for _, caption in GOOD.values() if isinstance(caption, str)}
    assert near(seen["green",], (0, 200, 0), by=4)
    assert near(seen["crimson",], (200, 30, 60), by=6)
    assert near(seen["blue",], (10, 20, 200))
    assert near(seen[("word " * 2_000).strip(),], (7, 7, 7))
    upright = seen["red above blue",]
    assert near(upright[:6], (250, 0, 0), by=6) and near(upright[-6:], (0, 0, 250), by=6)


@pytest.mark.parametrize(
    ("form", "more"),
    [
        (as_folder, NOT_UTF8), (as_shards, NOT_UTF8), (as_metadata, NOT_UTF8), (as_coco, {}), (as_parquet, {}),
    ],
)  # fmt: skip
def test_every_form_keeps_what_is_good_and_says_what_is_not(
    tmp_path: Path, form: Callable[[Path, Samples], Path], more: Samples
) -> None:
    samples = dict(sorted((GOOD | BAD | more).items()))
    place = form(tmp_path / "set", samples)
    with pytest.raises(DataError, match=r"of the data cannot be used .*--max_dropped") as caught:
        open_data(Settings(data_dir=place), Base())
    assert "\n" not in str(caught.value)
    opened = open_data(Settings(data_dir=place, max_dropped=0.6), Base())
    assert_right(opened)
    found = Counter({reason.reason: reason.count for reason in opened.report.dropped if reason.kind == "pictures"})
    utf8 = {"line is not UTF-8" if form is as_metadata else "caption is not UTF-8": 1} if more else {}
    coco = {"no caption": 1} if form is as_coco else {}  # there an empty caption is one of several that a picture has
    assert found == {reason: n for reason, n in REASONS.items() if not (coco and "caption" in reason)} | utf8 | coco


@pytest.mark.parametrize("procedure", [distill, rehearse, fill])
def test_data_that_is_not_there_is_missed_before_the_base_is_opened(procedure: Any, tmp_path: Path) -> None:
    asked = {"base_model": str(tmp_path / "no-base"), "data_dir": tmp_path / "no-data", "output_dir": tmp_path}
    settings = CacheSettings(**asked, cache_dir=tmp_path) if procedure is fill else TrainSettings(**asked)
    with pytest.raises(DataError, match="no-data does not exist"):
        procedure(settings)
