"""`open_data`: from settings to data that training may start on."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from fewstep.config import TrainSettings
from fewstep.data import OpenedData, open_data
from fewstep.data.pairs import Strings
from fewstep.data.pictures import FORMATS
from fewstep.data.report import Drops, shown
from fewstep.errors import DataError, InputError

from . import makers
from .makers import Artist, Base, Settings, encoded, number_of, numbered, picture, write, write_numbered


def contents(opened: OpenedData) -> list[tuple[int, tuple[str, ...]]]:
    """(number that the picture carries, captions) of all items; the captions are had without the picture too."""
    items = [opened.data.item(index) for index in range(len(opened.data))]
    assert [captions for _, captions in items] == [opened.data.captions(index) for index in range(len(items))]
    return [(number_of(pixels), captions) for pixels, captions in items]


# -------------------------------------------------------------------------------------------------------- the forms


def test_a_folder(tmp_path: Path) -> None:
    opened = open_data(Settings(data_dir=write_numbered(tmp_path, 5)), Base())
    assert contents(opened) == [(i, (f"number {i}",)) for i in range(5)]
    assert opened.data.item(0)[0].shape == (16, 16, 3)
    assert opened.data.name(3) == "0003.png"
    assert list(opened.report.lines()) == [f"pictures with .txt in {tmp_path}: 5 pictures, 5 captions"]


@pytest.mark.parametrize("split", ["train2014", "train2017"])
def test_coco_pairs_the_right_picture_with_the_right_captions(tmp_path: Path, split: str) -> None:
    name = {"train2014": "COCO_train2014_{:012d}.jpg", "train2017": "{:012d}.jpg"}[split]
    ids = random.Random(1).sample(range(1, 250), 20)
    images = [{"id": i, "file_name": name.format(i)} for i in ids]
    texts = [{"image_id": i, "caption": f"{i} {k}"} for k in range(5) for i in reversed(ids)]
    write(tmp_path, {f"{split}/{name.format(i)}": encoded(picture((i, 0, 0)), "PNG") for i in ids})
    write(tmp_path, {f"annotations/captions_{split}.json": makers.coco(images, texts)})
    opened = open_data(Settings(data_dir=tmp_path), Base())
    assert contents(opened) == [(i, tuple(f"{i} {k}" for k in range(5))) for i in sorted(ids)]
    assert (opened.report.pictures, opened.report.captions) == (20, 100)


def test_a_base_that_draws_its_own() -> None:
    opened = open_data(Settings(seed=3), Base(name="artist", abilities=Artist()))
    assert len(opened.data) > 10**9
    pixels, captions = opened.data.item(300)
    assert pixels.shape == (16, 16, 3)
    assert (pixels == (300 % 256, 1, 3)).all()
    assert captions == opened.data.captions(300) == ("drawing 300 of 3",)
    assert opened.data.name(300) == "drawing 300"
    assert list(opened.report.lines()) == ["pictures drawn by the base model artist: as many as training asks for"]
    assert opened.fingerprint == open_data(Settings(seed=3), Base(abilities=Artist())).fingerprint
    assert opened.fingerprint != open_data(Settings(seed=4), Base(abilities=Artist())).fingerprint


def test_columns_of_drawings_are_refused() -> None:
    """As after a --data_dir that was forgotten."""
    with pytest.raises(InputError, match="caption_column 'text' came, but what artist draws itself has no columns"):
        open_data(Settings(caption_column="text"), Base(name="artist", abilities=Artist()))


def test_a_base_that_draws_without_saying_what() -> None:
    class Mute:
        def training_item(self, seed: int, index: int) -> tuple[np.ndarray, str]:
            return np.zeros((16, 16, 3), dtype=np.uint8), self.training_caption(seed, index)

        def training_caption(self, seed: int, index: int) -> str:
            return " "

    with pytest.raises(DataError, match="bad caption"):
        open_data(Settings(), Base(abilities=Mute()))


def test_data_goes_before_a_bases_own(tmp_path: Path) -> None:
    opened = open_data(Settings(data_dir=write_numbered(tmp_path, 2)), Base(abilities=Artist()))
    assert len(opened.data) == 2


@pytest.mark.parametrize("abilities", [None, object()])
def test_no_data_and_no_drawings_says_what_to_pass(abilities: object | None) -> None:
    with pytest.raises(InputError, match=r"some/base draws none .*--data_dir FOLDER .*--dataset_name ID"):
        open_data(Settings(), Base(abilities=abilities))


def test_the_training_settings_are_what_it_takes(tmp_path: Path) -> None:
    settings = TrainSettings(data_dir=write_numbered(tmp_path, 2), resolution=24)
    assert open_data(settings, Base()).data.item(0)[0].shape == (24, 24, 3)
    assert open_data(settings.replace(resolution=None), Base()).data.item(0)[0].shape == (32, 32, 3)


def test_two_sources_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="came together"):
        open_data(Settings(data_dir=tmp_path, dataset_name="x/y"), Base())


# ------------------------------------------------------------------------------------------------- dropped and counted


def test_unusable_pictures_are_dropped_counted_and_named(tmp_path: Path) -> None:
    write_numbered(tmp_path, 6)
    whole = encoded(makers.noise(), "JPEG")
    write(
        tmp_path,
        {
            "0001.png": b"GIF89a but not really", "0002.png": encoded(picture(size=(1, 1))), "0004.png": b"",
            "cut.jpg": whole[: len(whole) // 2], "cut.txt": "cut short", "orphan.txt": "no picture",
        },
    )  # fmt: skip
    with pytest.raises(DataError, match=r"57\.14% .* allowed is 1\.00%; .*--max_dropped 0\.58") as caught:
        open_data(Settings(data_dir=tmp_path), Base())
    assert "\n" not in str(caught.value)
    opened = open_data(Settings(data_dir=tmp_path, max_dropped=0.58), Base())
    assert contents(opened) == [(i, (f"number {i}",)) for i in (0, 3, 5)]
    told = list(opened.report.lines())[1:]
    assert told[:-1] == [
        "dropped 1 caption: no picture of the same stem: orphan.txt",
        "dropped 1 picture: empty file: 0004.png",
        f"dropped 1 picture: not a picture ({', '.join(FORMATS)}): 0001.png",
        "dropped 1 picture: smaller than 8 pixels: 0002.png (1x1)",
    ]
    assert told[-1].startswith("dropped 1 picture: truncated or damaged: cut.jpg (image file is truncated")


def test_one_in_a_hundred_is_let_pass_and_two_are_not(tmp_path: Path) -> None:
    write_numbered(tmp_path, 100)
    write(tmp_path, {"0017.png": b""})
    opened = open_data(Settings(data_dir=tmp_path), Base())
    assert (len(opened.data), opened.report.dropped_share, opened.allowance) == (99, 0.01, 0)
    write(tmp_path, {"0018.txt": ""})
    with pytest.raises(DataError, match=r"2\.00%"):
        open_data(Settings(data_dir=tmp_path), Base())


@pytest.mark.parametrize("name", ["README.txt", "readme.TXT", "License.txt", "captions/NOTICE.txt"])
def test_notes_beside_the_data_are_no_lost_captions(tmp_path: Path, name: str) -> None:
    write_numbered(tmp_path / "plain", 40)
    for number in range(40):
        files = {f"images/{number}.png": numbered(number), f"captions/{number}.txt": f"number {number}"}
        write(tmp_path / "two", files)
    place = tmp_path / ("two" if "/" in name else "plain")
    write(place, {name: "not data"})
    report = open_data(Settings(data_dir=place), Base()).report
    assert (report.pictures, report.dropped) == (40, ())


def test_endings_that_are_not_read_count_as_dropped(tmp_path: Path) -> None:
    write_numbered(tmp_path, 8)
    write(tmp_path, {"1.HEIC": b"", "1.txt": "one", "2.heic": b"", "2.txt": "two"})
    with pytest.raises(DataError, match=r"20\.00% .*2 pictures: \.heic files are not read \(convert them to"):
        open_data(Settings(data_dir=tmp_path), Base())
    opened = open_data(Settings(data_dir=tmp_path, max_dropped=0.2), Base())
    assert list(opened.report.lines())[1:] == [
        "dropped 2 pictures: .heic files are not read (convert them to .jpg or .png): 1.HEIC, 2.heic"
    ]


def test_nothing_left_is_an_error_whatever_is_allowed(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": b"", "a.txt": "a"})
    with pytest.raises(DataError, match=r"no picture with a caption is left .*empty file: a\.png"):
        open_data(Settings(data_dir=tmp_path, max_dropped=1.0), Base())


def test_missing_pictures_are_counted(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(4)]
    texts = [{"image_id": i, "caption": str(i)} for i in range(4)]
    write(tmp_path, {"annotations/captions_val2017.json": makers.coco(images, texts)})
    write(tmp_path, {f"val2017/{i}.png": numbered(i) for i in (0, 2)})
    opened = open_data(Settings(data_dir=tmp_path, max_dropped=0.5), Base())
    assert contents(opened) == [(0, ("0",)), (2, ("2",))]
    assert "dropped 2 pictures: cannot be read: 1.png (No such file or directory)" in " ".join(opened.report.lines())


# --------------------------------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_tells_other_data(tmp_path: Path) -> None:
    def fingerprint(place: str, **files: bytes | str) -> str:
        folder = write_numbered(tmp_path / place, 3)
        write(folder, {name.replace("_", "."): content for name, content in files.items()})
        return open_data(Settings(data_dir=folder, max_dropped=0.5), Base()).fingerprint

    first = fingerprint("a")
    assert fingerprint("moved/elsewhere") == first
    others = [
        fingerprint("b", **{"0001_txt": "another caption"}),
        fingerprint("c", **{"0001_png": encoded(makers.noise())}),
        fingerprint("d", more_png=numbered(9), more_txt="more"),
        fingerprint("e", **{"0001_png": b""}),
    ]
    assert len({first, *others}) == 5


# -------------------------------------------------------------------------------------------------------- small parts


def test_strings_come_back_as_they_went_in() -> None:
    texts = ["", "a", "Größe 🏠", "", "odd \udcfc byte"]
    strings = Strings(texts)
    assert list(strings) == texts
    assert len(strings) == 5
    for outside in (-1, 5):
        with pytest.raises(IndexError):
            strings[outside]
    assert len(Strings([])) == 0


def test_examples_are_few_and_fit_one_line() -> None:
    drops = Drops()
    for number in range(7):
        drops.add("pictures", "reason", f"bad\n{number}")
    (reason,) = drops.report("x", 1, 1).dropped
    assert str(reason) == r"7 pictures: reason: bad\n0, bad\n1, bad\n2, ..."
    assert len(shown("x" * 5000)) < 130
    assert shown("grün 🏠") == "grün 🏠"
    assert shown("odd \udcfc").isprintable()
