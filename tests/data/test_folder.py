"""Local folders: every layout, and never a wrong pair."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.data.captions import clean_list
from fewstep.data.folder import Scanned, scan_folder
from fewstep.data.pairs import Pair, safe_name
from fewstep.data.report import Drops
from fewstep.errors import DataError, FewstepError, InputError

from .makers import numbered, write, write_numbered


def scan(place: Path, **options: str | None) -> tuple[Scanned, Counter[str]]:
    """What is paired, and how often each reason dropped something."""
    drops = Drops()
    scanned = scan_folder(place, drops, **options)  # type: ignore[arg-type]
    counts: Counter[str] = Counter()
    for reason in drops.report("", 0, 0).dropped:
        counts[reason.reason] += reason.count
    return scanned, counts


# -------------------------------------------------------------------------------------------------- pictures with .txt


def test_pictures_and_text_of_the_same_stem_at_any_depth(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "b.jpg": b"", "b.txt": "bee",
            "a.PNG": b"", "a.TXT": "ay",
            "deep/er/a.webp": b"", "deep/er/a.txt": "another\nay",
            "v1.2.jpeg": b"", "v1.2.txt": "dots",
            "README.md": "not data", "deep/.hidden.png": b"", "._b.jpg": b"", ".git/x.png": b"",
        },
    )  # fmt: skip
    scanned, dropped = scan(tmp_path)
    assert scanned.pairs == [
        Pair("a.PNG", ("ay",)),
        Pair("b.jpg", ("bee",)),
        Pair("deep/er/a.webp", ("another ay",)),
        Pair("v1.2.jpeg", ("dots",)),
    ]
    assert not dropped


def test_what_has_no_partner_or_two_is_dropped_and_named(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "good.png": b"", "good.txt": "good",
            "twice.png": b"", "twice.jpg": b"", "twice.txt": "which of them?",
            "double.png": b"", "double.txt": "this", "double.TXT": "or that",
            "mute.png": b"", "orphan.txt": "no picture",
            "empty.png": b"", "empty.txt": " \n", "latin.png": b"", "latin.txt": "Größe".encode("latin-1"),
            "elsewhere/mute.txt": "another folder's",
        },
    )  # fmt: skip
    scanned, dropped = scan(tmp_path)
    assert scanned.pairs == [Pair("good.png", ("good",))]
    assert dropped == {
        "another picture has the same stem": 2,
        "several caption files of the same stem": 1,
        "no caption file of the same stem": 1,
        "no picture of the same stem": 2,
        "caption is empty": 1,
        "caption is not UTF-8": 1,
    }


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    data = write_numbered(tmp_path / "data", 2)
    elsewhere = write_numbered(tmp_path / "elsewhere", 3)
    (data / "more").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(data)
    scanned, dropped = scan(data)
    assert [pair.name for pair in scanned.pairs] == ["0000.png", "0001.png", *(f"more/000{i}.png" for i in range(3))]
    assert not dropped


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not hold for this user")
def test_a_closed_folder_stops_the_scan(tmp_path: Path) -> None:
    write_numbered(tmp_path, 1)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    with pytest.raises(DataError, match="closed cannot be read: Permission denied"):
        scan(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_that_are_not_utf8_pair_all_the_same(tmp_path: Path) -> None:
    odd = os.fsdecode(b"gr\xfcn")
    try:
        write(tmp_path, {f"{odd}.png": numbered(3), f"{odd}.txt": "green"})
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    scanned, dropped = scan(tmp_path)
    assert scanned.pairs == [Pair(f"{odd}.png", ("green",))]
    assert not dropped


def test_files_of_endings_that_are_not_read_are_named_with_what_to_do(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "good.png": b"", "good.txt": "good", "good.caption": "the same", "good.heic": b"the same",
            "1.HEIC": b"", "1.txt": "one", "2.heif": b"", "sub/3.jxl": b"", "sub/3.caption": "three",
            "4.png": b"", "4.caption": "four", "orphan.caption": "no picture",
        },
    )  # fmt: skip
    scanned, dropped = scan(tmp_path)
    assert scanned.pairs == [Pair("good.png", ("good",))]
    assert dropped == {
        ".heic files are not read (convert them to .jpg or .png)": 1,
        ".heif files are not read (convert them to .jpg or .png)": 1,
        ".jxl files are not read (convert them to .jpg or .png)": 1,
        ".caption files are not read (rename them to .txt)": 1,
        "no picture of the same stem": 1,
    }


def test_notes_are_captions_below_the_top_or_where_a_picture_has_their_name(tmp_path: Path) -> None:
    write(tmp_path, {"notice.png": b"", "notice.txt": "a notice", "sub/README.txt": "whose?", "README.txt": "notes"})
    scanned, dropped = scan(tmp_path)
    assert scanned.pairs == [Pair("notice.png", ("a notice",))]
    assert dropped == {"no picture of the same stem": 1}


# ------------------------------------------------------------------------------------------------- images/ + captions/


def test_images_and_captions_are_paired_by_stem_and_not_by_order(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "images/a.png": b"", "images/b.png": b"", "images/sub/c.png": b"", "images/d.png": b"",
            "captions/b.txt": "bee", "captions/d.txt": "dee", "captions/sub/c.txt": "sea", "captions/c.txt": "whose?",
        },
    )  # fmt: skip
    scanned, dropped = scan(tmp_path)
    assert scanned.pairs == [
        Pair("images/b.png", ("bee",)),
        Pair("images/d.png", ("dee",)),
        Pair("images/sub/c.png", ("sea",)),
    ]
    assert dropped == {"no caption file of the same stem": 1, "no picture of the same stem": 1}


# ------------------------------------------------------------------------------------------------------ metadata.jsonl


def lines(*rows: object) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def test_metadata(tmp_path: Path) -> None:
    rows = [
        {"file_name": "b.png", "text": " bee\n", "url": "x"},
        {"file_name": "./sub/a.png", "text": ["one", "two", "one"]},
        {"text": "order of the keys does not matter", "file_name": "c.png"},
    ]
    write(tmp_path, {"metadata.jsonl": "\ufeff" + lines(*rows) + "\n\n", "unlisted.png": b""})
    scanned, dropped = scan(tmp_path)
    assert scanned.pairs == [
        Pair("b.png", ("bee",)),
        Pair("c.png", ("order of the keys does not matter",)),
        Pair("sub/a.png", ("one", "two")),
    ]
    assert not dropped
    assert scan(tmp_path / "metadata.jsonl")[0].pairs == scanned.pairs


def test_metadata_columns_can_be_named(tmp_path: Path) -> None:
    write(tmp_path, {"metadata.jsonl": lines({"picture": "a.png", "text": "wrong", "prompt": "right"})})
    scanned, _ = scan(tmp_path, image_column="picture", caption_column="prompt")
    assert scanned.pairs == [Pair("a.png", ("right",))]
    with pytest.raises(InputError, match=r"several columns .*--caption_column"):
        scan(tmp_path, image_column="picture")


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({}, "no image_column 'file_name'"), ({"image_column": "img"}, "no image_column 'img'"),
        ({"image_column": "image", "caption_column": "capt"}, "no caption_column 'capt'"),
    ],
)  # fmt: skip
def test_columns_that_are_not_there_are_answered_with_those_that_are(
    tmp_path: Path, options: dict[str, str], wrong: str
) -> None:
    write(tmp_path, {"metadata.jsonl": lines({"image": "a.png", "text": "a"}, {"image": "b.png", "url": "x"})})
    flag = wrong.split()[1]
    with pytest.raises(InputError, match=f"{wrong}; allowed: image, text, url; say which with --{flag} NAME"):
        scan(tmp_path, **options)


@pytest.mark.parametrize("below", ["", "data/"])
def test_the_part_to_pass_is_named_where_each_has_a_metadata_of_its_own(tmp_path: Path, below: str) -> None:
    for part in ("test", "train"):
        rows = lines({"file_name": "a.png", "text": part})
        write(tmp_path, {f"{below}{part}/metadata.jsonl": rows, f"{below}{part}/a.png": b""})
    for options in ({}, {"caption_column": "text"}):
        with pytest.raises(DataError, match=rf"{below}test/metadata\.jsonl, .*; pass --data_dir .*/{below}train$"):
            scan(tmp_path, **options)
    assert scan(tmp_path / f"{below}train")[0].pairs == [Pair("a.png", ("train",))]
    for part in ("test", "train"):
        write(tmp_path, {f"{below}{part}/a.txt": "beside"})
    assert [pair.captions for pair in scan(tmp_path)[0].pairs] == [("beside",), ("beside",)]


def test_bad_lines_are_counted_and_named(tmp_path: Path) -> None:
    good = lines({"file_name": "a.png", "text": "good"}).encode()
    bad = [
        b"{not json", b"[1, 2]", b"[" * 100_000, b'{"file_name": "g.png", "text": "gr\xfcn"}',
        *(lines(row).encode() for row in (
            {"text": "no name"}, {"file_name": 3, "text": "x"}, {"file_name": "../../etc/passwd", "text": "x"},
            {"file_name": "/etc/passwd", "text": "x"}, {"file_name": "sub\\w.png", "text": "x"},
            {"file_name": "nul\0.png", "text": "x"}, {"file_name": "half\ud800.png", "text": "x"},
            {"file_name": "empty.png", "text": " "}, {"file_name": "none.png"}, {"file_name": "list.png", "text": []},
            {"file_name": "some.png", "text": ["", "kept"]},
        )),
    ]  # fmt: skip
    write(tmp_path, {"metadata.jsonl": b"\r\n".join([good, *bad])})
    scanned, dropped = scan(tmp_path)
    assert scanned.pairs == [Pair("a.png", ("good",)), Pair("some.png", ("kept",))]
    assert dropped == {
        "line is not JSON": 2,
        "line is not a JSON object": 1,
        "line is not UTF-8": 1,
        "file_name is no path below the folder (with forward slashes)": 7,
        "caption is empty": 3,  # two pictures without any, one caption of several
        "caption is not text": 1,
    }


def test_a_picture_has_the_captions_of_all_its_lines(tmp_path: Path) -> None:
    rows = [
        {"file_name": "some.png", "text": "a cat"}, {"file_name": "same.png", "text": "a dog"},
        {"file_name": "same.png", "text": "a dog"}, {"file_name": "./some.png", "text": ["a pet", "a cat"]},
        {"file_name": "some.png", "text": " "}, {"file_name": "mute.png", "text": ""}, {"file_name": "mute.png"},
    ]  # fmt: skip
    write(tmp_path, {"metadata.jsonl": lines(*rows)})
    drops = Drops()
    assert scan_folder(tmp_path, drops).pairs == [Pair("same.png", ("a dog",)), Pair("some.png", ("a cat", "a pet"))]
    assert list(drops.report("", 2, 3).lines())[1:] == [
        "dropped 1 caption: caption is empty: some.png (line 5)",
        "dropped 1 picture: caption is empty: mute.png (line 6)",
    ]


@given(st.binary(max_size=400) | st.lists(st.text(max_size=30)).map(lambda rows: "\n".join(rows).encode()))
@settings(deadline=None, max_examples=50)
def test_any_metadata_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    place = tmp_path_factory.mktemp("any")
    write(place, {"metadata.jsonl": raw})
    try:
        scanned, _ = scan(place, caption_column="text")
    except FewstepError:
        return
    assert all(pair.captions and all(pair.captions) for pair in scanned.pairs)


cells = st.none() | st.integers() | st.text(max_size=6) | st.lists(st.text(max_size=4), max_size=3)
names = st.sampled_from(["a.png", "./a.png", "b.png", "c/d.png", "../a.png", "", "/x.png"]) | cells


@given(st.lists(st.fixed_dictionaries({}, optional={"file_name": names, "text": cells}), max_size=6))
@settings(deadline=None, max_examples=50)
def test_every_row_is_kept_or_counted(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]]) -> None:
    place = write(tmp_path_factory.mktemp("rows"), {"metadata.jsonl": lines(*rows)})
    drops = Drops()
    try:
        pairs = scan_folder(place, drops, caption_column="text").pairs
    except FewstepError:
        return
    assert len({pair.name for pair in pairs}) == len(pairs)
    for pair in pairs:
        cells = [row.get("text") for row in rows if safe_name(row.get("file_name")) == pair.name]
        texts = [text for cell in cells for text in (cell if isinstance(cell, list) else [cell])]
        assert set(pair.captions) == set(clean_list(texts)[0])
    named = {name for row in rows if (name := safe_name(row.get("file_name"))) is not None}
    nameless = sum(safe_name(row.get("file_name")) is None for row in rows)
    assert drops.report("", 0, 0).dropped_of("pictures") == len(named) - len(pairs) + nameless


# ------------------------------------------------------------------------------------------------------------- refused


def test_folders_that_are_no_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        scan(tmp_path / "missing")
    with pytest.raises(DataError, match=r"0 pictures and 0 caption files; allowed .* metadata\.jsonl"):
        scan(tmp_path)
    write(tmp_path, {"a.png": b"", "b.png": b""})
    with pytest.raises(DataError, match="2 pictures and 0 caption files"):
        scan(tmp_path)
    with pytest.raises(DataError, match="is a file"):
        scan(tmp_path / "a.png")
    write(tmp_path, {"README.txt": "notes", "a.caption": "a", "b.caption": "b"})
    named = r"2 pictures and 0 caption files, and 2 \.caption files are not read \(rename them to \.txt\); allowed"
    with pytest.raises(DataError, match=named):
        scan(tmp_path)
    write(tmp_path / "sub", {"a.HEIC": b"", "b.heic": b"", "a.txt": "a"})
    with pytest.raises(DataError, match=r"0 pictures and 1 caption files, and 2 \.heic files are not read \(convert"):
        scan(tmp_path / "sub")


def test_columns_where_there_are_none(tmp_path: Path) -> None:
    write_numbered(tmp_path, 1)
    with pytest.raises(InputError, match="caption_column 'text' came"):
        scan(tmp_path, caption_column="text")


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("a.png", "a.png"), ("./a/b.png", "a/b.png"), ("a//b.png", "a/b.png"), ("a/../b.png", None), ("/a.png", None),
        ("C:/a.png", None), ("", None), (".", None), (None, None), (7, None), ("a\\b.png", None), ("a\0", None),
    ],
)  # fmt: skip
def test_names_stay_below_the_folder(name: object, safe: str | None) -> None:
    assert safe_name(name) == safe
