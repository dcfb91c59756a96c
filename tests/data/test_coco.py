"""COCO 2014 and 2017: paired by id, whatever the order, and every kind of broken annotation counted."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.data import coco
from fewstep.data.folder import scan_folder
from fewstep.data.pairs import Pair
from fewstep.data.report import Drops
from fewstep.errors import DataError, FewstepError, InputError
from fewstep.reporting import SILENT, Wordless

from . import makers
from .makers import write

FILE_NAMES = {
    "train2014": "COCO_train2014_{:012d}.jpg",
    "val2014": "COCO_val2014_{:012d}.jpg",
    "train2017": "{:012d}.jpg",
    "val2017": "{:012d}.jpg",
}


def make(root: Path, split: str, ids: list[int], pictures: str = "") -> Path:
    """A COCO folder with five captions an image, images and annotations in unrelated orders."""
    mix = random.Random(0)
    images = [{"id": image, "file_name": FILE_NAMES[split].format(image), "height": 1, "width": 1} for image in ids]
    texts = [{"id": 10 * i + k, "image_id": i, "caption": f"caption {k} of {i}.\n"} for i in ids for k in range(5)]
    mix.shuffle(images)
    mix.shuffle(texts)
    write(root, {f"annotations/captions_{split}.json": makers.coco(images, texts)})
    return write(root, {f"{pictures}{split}/{FILE_NAMES[split].format(image)}": b"" for image in ids})


def read(place: Path) -> tuple[list[Pair], dict[str, int], Drops]:
    drops = Drops()
    pairs = scan_folder(place, drops).pairs
    return pairs, {reason.reason: reason.count for reason in drops.report("", 0, 0).dropped}, drops


@pytest.mark.parametrize("pictures", ["", "images/"])
@pytest.mark.parametrize("split", FILE_NAMES)
def test_layouts(tmp_path: Path, split: str, pictures: str) -> None:
    ids = [581_929, 9, 25]
    make(tmp_path, split, ids, pictures)
    drops = Drops()
    scanned = scan_folder(tmp_path, drops)
    assert scanned.files.root == tmp_path / pictures / split
    assert [pair.name for pair in scanned.pairs] == [FILE_NAMES[split].format(image) for image in sorted(ids)]
    for pair, image in zip(scanned.pairs, sorted(ids), strict=True):
        assert sorted(pair.captions) == [f"caption {k} of {image}." for k in range(5)]
        assert (scanned.files.root / pair.name).is_file()
    assert not drops.report("", 0, 0).dropped


def test_train_is_taken_before_val_and_years_are_asked_for(tmp_path: Path) -> None:
    make(tmp_path, "val2014", [1])
    make(tmp_path, "val2017", [2])
    make(tmp_path, "train2017", [3])
    assert [pair.name for pair in read(tmp_path)[0]] == ["000000000003.jpg"]
    make(tmp_path, "train2014", [4])
    with pytest.raises(InputError, match=r"2014 and of 2017; .*--data_dir .*captions_train2017\.json"):
        read(tmp_path)
    assert [pair.name for pair in read(tmp_path / "annotations/captions_val2014.json")[0]] == [
        "COCO_val2014_000000000001.jpg"
    ]


def test_annotations_without_their_pictures(tmp_path: Path) -> None:
    write(tmp_path, {"annotations/captions_train2017.json": makers.coco([], [])})
    with pytest.raises(DataError, match=r"captions_train2017\.json is there but its .*train2017\.zip"):
        read(tmp_path)
    write(tmp_path, {"annotations/captions_val2017.json": makers.coco([], [])})
    named = r"train2017\.json and .*val2017\.json are there but .* unpack train2017\.zip or val2017\.zip there"
    with pytest.raises(DataError, match=named) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("year", ["2014", "2017"])
@pytest.mark.parametrize("pictures", ["", "images/"])
def test_the_split_whose_pictures_are_there_is_taken(tmp_path: Path, year: str, pictures: str) -> None:
    make(tmp_path, f"val{year}", [1], pictures)
    others = [f"annotations/captions_train{each}.json" for each in ("2014", "2017")]
    write(tmp_path, {name: makers.coco([], []) for name in others})  # as in the archive
    assert [pair.name for pair in read(tmp_path)[0]] == [FILE_NAMES[f"val{year}"].format(1)]
    with pytest.raises(DataError, match=r"train2017 or .*; unpack"):
        read(tmp_path / others[1])


def test_where_both_splits_are_there_it_says_how_to_have_the_other(tmp_path: Path) -> None:
    class Listener(Wordless):
        said: ClassVar[list[str]] = []

        def say(self, text: str) -> None:
            self.said.append(text)

    make(tmp_path, "train2017", [1])
    make(tmp_path, "val2017", [2])
    listener = Listener(SILENT)
    scan_folder(tmp_path, Drops(), reporter=listener)
    other = tmp_path / "annotations/captions_val2017.json"
    assert listener.said == [f"data: captions_train2017.json is read; for {other.name} pass --data_dir {other}"]
    scan_folder(other, Drops(), reporter=listener)
    shutil.rmtree(tmp_path / "val2017")
    scan_folder(tmp_path, Drops(), reporter=listener)
    assert len(listener.said) == 1


def test_everything_that_can_be_wrong_is_counted(tmp_path: Path) -> None:
    images: list[Any] = [
        {"id": 1, "file_name": "one.jpg"},
        {"id": 1, "file_name": "one.jpg"},  # said twice: harmless
        {"id": 2, "file_name": "two.jpg"},
        {"id": 3, "file_name": "this.jpg"}, {"id": 3, "file_name": "that.jpg"},
        {"id": 4, "file_name": "shared.jpg"}, {"id": 5, "file_name": "shared.jpg"},
        {"id": 6, "file_name": "mute.jpg"},
        {"id": True, "file_name": "bool.jpg"}, {"id": 7.0, "file_name": "float.jpg"}, {"id": 8}, "no entry",
        {"id": 9, "file_name": "../../secret.jpg"},
    ]  # fmt: skip
    texts: list[Any] = [
        {"image_id": 2, "caption": "of two"},
        {"image_id": 1, "caption": "of one"}, {"image_id": 1, "caption": " of one "}, {"image_id": 1, "caption": ""},
        {"image_id": 3, "caption": "which?"}, {"image_id": 4, "caption": "whose?"}, {"image_id": 5, "caption": "?"},
        {"image_id": 6, "caption": None},
        {"image_id": 404, "caption": "of nothing"}, {"image_id": 405, "caption": "of nothing"},
        {"caption": "without id"}, {"image_id": True, "caption": "true is not one"}, ["no", "entry"],
    ]  # fmt: skip
    write(tmp_path, {"annotations/captions_train2017.json": makers.coco(images, texts), "train2017/x.jpg": b""})
    pairs, dropped, drops = read(tmp_path)
    assert pairs == [Pair("one.jpg", ("of one",)), Pair("two.jpg", ("of two",))]
    assert dropped == {
        "image ids and file names do not match one to one": 3,
        "no caption": 1,
        "image entry without a usable id and file_name": 5,
        "annotation whose image_id has no image entry": 2,
        "annotation without a usable image_id": 3,
        "caption is empty": 1,
        "caption is not text": 1,
    }
    assert "image_id 404, image_id 405" in " ".join(drops.report("x", 1, 1).lines())


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"images": {}, "annotations": []}', "[" * 100_000, b"\xff\xfe"]
)
def test_a_file_that_is_not_cocos(tmp_path: Path, content: str | bytes) -> None:
    write(tmp_path, {"annotations/captions_val2017.json": content, "val2017/x.jpg": b""})
    with pytest.raises(DataError, match="allowed is COCO's own file") as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_with_another_name_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"annotations/instances_train2017.json": "{}"})
    with pytest.raises(DataError, match="is a file"):
        read(tmp_path / "annotations/instances_train2017.json")
    with pytest.raises(DataError, match="named like"):
        coco.picture_folder(tmp_path / "annotations/instances_train2017.json")


@given(st.binary(max_size=300))
@settings(deadline=None, max_examples=50)
def test_any_bytes_are_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    file = tmp_path_factory.mktemp("any") / "captions_train2017.json"
    file.write_bytes(raw)
    with pytest.raises(FewstepError) as caught:
        coco.read_pairs(file, Drops())
    assert "\n" not in str(caught.value)


ids = st.integers(0, 4) | st.none() | st.booleans() | st.just("3") | st.floats() | st.lists(st.integers(), max_size=1)
images = st.lists(
    st.fixed_dictionaries({}, optional={"id": ids, "file_name": st.sampled_from(["a", "b", "c/d", "../e", "", None])})
    | st.integers(),
    max_size=8,
)
texts = st.lists(
    st.fixed_dictionaries({}, optional={"image_id": ids, "caption": st.sampled_from(["x", "y", " ", None, 3])})
    | st.text(max_size=2),
    max_size=10,
)


@given(images, texts)
@settings(deadline=None, max_examples=50)
def test_pairs_are_what_the_ids_say(
    tmp_path_factory: pytest.TempPathFactory, images: list[Any], texts: list[Any]
) -> None:
    file = tmp_path_factory.mktemp("ids") / "captions_train2017.json"
    file.write_text(json.dumps({"images": images, "annotations": texts}))
    drops = Drops()
    pairs = coco.read_pairs(file, drops)
    assert [pair.name for pair in pairs] == sorted({pair.name for pair in pairs})

    def entries(of: list[Any]) -> list[dict[str, Any]]:
        return [entry for entry in of if isinstance(entry, dict)]

    def same(a: object, b: object) -> bool:
        return type(a) is type(b) and a == b

    for pair in pairs:
        claims = [e.get("id") for e in entries(images) if e.get("file_name") == pair.name]
        (image,) = {claim for claim in claims if type(claim) in (int, str)}
        own = [e.get("caption") for e in entries(texts) if same(e.get("image_id"), image)]
        assert pair.captions == tuple(dict.fromkeys(text for text in own if text in ("x", "y")))
        assert pair.captions
        claimed = {e.get("file_name") for e in entries(images) if same(e.get("id"), image)} - {None, "", "../e"}
        assert claimed == {pair.name}
