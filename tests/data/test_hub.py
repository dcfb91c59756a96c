"""Hugging Face datasets, opened by the library itself from local files; no network."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from fewstep.data import hub, open_data
from fewstep.data.folder import holds_rows
from fewstep.data.hub import ScannedRows, scan_hub
from fewstep.data.pictures import FORMATS, PictureError
from fewstep.data.report import Drops
from fewstep.errors import DataError, InputError

from .makers import Base, Settings, encoded, noise, number_of, numbered, picture, write
from .test_open_data import contents


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def parquet(folder: Path, images: list[bytes | None], split: str = "train", **columns: list[Any]) -> str:
    """A folder of one parquet file with an image column; other columns by name."""
    cells = [None if raw is None else {"bytes": raw, "path": None} for raw in images]
    rows = datasets.Dataset.from_dict({"picture": cells, **columns}).cast_column("picture", datasets.Image())
    folder.mkdir(exist_ok=True)
    rows.to_parquet(folder / f"{split}.parquet")
    return str(folder)


def scan(name: str, **options: Any) -> tuple[ScannedRows, Counter[str]]:
    drops = Drops()
    rows = scan_hub(name, 16, drops, **options)
    counts: Counter[str] = Counter()
    for reason in drops.report("", 0, 0).dropped:
        counts[reason.reason] += reason.count
    return rows, counts


def test_rows_become_pictures_and_captions(tmp_path: Path) -> None:
    name = parquet(tmp_path / "set", [numbered(i) for i in range(5)], text=[f" number {i}\n" for i in range(5)])
    rows, dropped = scan(name)
    assert not dropped
    assert (len(rows.data), rows.captions) == (5, 5)
    assert "split train" in rows.source
    for index in range(5):
        pixels, captions = rows.data.item(index)
        assert number_of(pixels) == index
        assert captions == (f"number {index}",)
    # As worker processes get it where they are not forked.
    again = pickle.loads(pickle.dumps(rows.data))  # noqa: S301
    assert np.array_equal(again.item(3)[0], rows.data.item(3)[0])


def test_bad_rows_are_counted_and_the_others_keep_their_captions(tmp_path: Path) -> None:
    images = [numbered(0), None, b"no picture", numbered(3), numbered(4), encoded(picture(size=(1, 1))), numbered(6)]
    captions = [["zero", "nil", "zero"], ["x"], ["x"], [], ["four", ""], ["x"], ["six"]]
    rows, dropped = scan(parquet(tmp_path / "set", images, captions=captions))
    assert dropped == {
        "no picture in the row": 1,
        f"not a picture ({', '.join(FORMATS)})": 1,
        "smaller than 8 pixels": 1,
        "caption is empty": 2,  # one row without any, one caption of several
    }
    assert [(number_of(rows.data.item(i)[0]), rows.data.item(i)[1]) for i in range(len(rows.data))] == [
        (0, ("zero", "nil")),
        (4, ("four",)),
        (6, ("six",)),
    ]
    assert [rows.data.captions(i) for i in range(3)] == [("zero", "nil"), ("four",), ("six",)]
    assert [rows.data.name(i) for i in range(3)] == ["row 0", "row 4", "row 6"]
    assert rows.captions == 4


def test_damage_inside_a_picture_is_found_when_it_is_decoded(tmp_path: Path) -> None:
    raw = bytearray(encoded(noise()))
    raw[len(raw) // 2 : len(raw) // 2 + 40] = b"\0" * 40
    rows, _ = scan(parquet(tmp_path / "set", [numbered(0), bytes(raw)], text=["a", "b"]))
    with pytest.raises(PictureError, match="damaged"):
        rows.data.item(1)


def test_the_fingerprint_is_the_contents(tmp_path: Path) -> None:
    images = [numbered(i) for i in range(3)]
    first, _ = scan(parquet(tmp_path / "a", images, text=["x", "y", "z"]))
    same, _ = scan(parquet(tmp_path / "b", images, text=["x", "y", "z"]))
    other, _ = scan(parquet(tmp_path / "c", images, text=["x", "y", "Z"]))
    assert first.fingerprint == same.fingerprint != other.fingerprint


def test_columns_are_guessed_or_asked_for(tmp_path: Path) -> None:
    name = parquet(tmp_path / "set", [numbered(1)], text=["wrong"], prompt=["right"], id=[7])
    with pytest.raises(InputError, match=r"several columns .*--caption_column"):
        scan(name)
    rows, _ = scan(name, caption_column="prompt")
    assert rows.data.item(0)[1] == ("right",)
    with pytest.raises(InputError, match=r"no caption_column 'nope'; allowed: picture, text, prompt, id"):
        scan(name, caption_column="nope")
    with pytest.raises(InputError, match=r"no image_column 'text' of pictures .*: picture; say which"):
        scan(name, image_column="text", caption_column="prompt")


def test_a_dataset_without_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    datasets.Dataset.from_dict({"url": ["x"], "text": ["y"]}).to_parquet(folder / "train.parquet")
    with pytest.raises(InputError, match=r"0 columns of pictures \(columns: url, text\)"):
        scan(str(folder))


def test_parquet_that_others_wrote(tmp_path: Path) -> None:
    """Bytes, or structs of bytes, without a word that they are pictures."""
    import pyarrow
    from pyarrow import parquet as files

    raw = [numbered(i) for i in range(3)]
    texts = {"text": list("abc"), "id": [1, 2, 3]}
    for kind, cells in {"bytes": raw, "structs": [{"bytes": one, "name": "x"} for one in raw]}.items():
        (tmp_path / kind).mkdir()
        files.write_table(pyarrow.table({"jpg": cells, **texts}), tmp_path / kind / "part.parquet")
        for place in (tmp_path / kind / "part.parquet", tmp_path / kind):
            opened = open_data(Settings(data_dir=place), Base())
            assert contents(opened) == [(0, ("a",)), (1, ("b",)), (2, ("c",))]
            assert f"{place}, split train: 3 pictures, 3 captions" in next(opened.report.lines())
    files.write_table(pyarrow.table({"a": raw, "b": raw, **texts}), tmp_path / "two.parquet")
    with pytest.raises(InputError, match=r"2 columns of pictures .*: a, b; say which with --image_column"):
        open_data(Settings(data_dir=tmp_path / "two.parquet"), Base())
    named = open_data(Settings(data_dir=tmp_path / "two.parquet", image_column="b"), Base())
    assert len(named.data) == 3


def test_a_folder_of_parquet_is_one_with_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, {"00000.parquet": b"", "README.md": "x", ".cache/x": b""})
    assert holds_rows(tmp_path) and holds_rows(tmp_path / "00000.parquet")
    for name in ("00000.tar", "1.PNG", "metadata.jsonl", "images/x"):
        place = write(tmp_path / name.replace("/", "-"), {"00000.parquet": b"", name: b""})
        assert not holds_rows(place)
    assert not holds_rows(tmp_path / "missing")


def test_broken_parquet_that_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"x.parquet": b"PAR1 junk"})
    with pytest.raises(DataError, match=r"x\.parquet cannot be opened"):
        open_data(Settings(data_dir=tmp_path / "x.parquet"), Base())
    with pytest.raises(DataError, match=r"data_dir .*gone\.parquet does not exist"):
        open_data(Settings(data_dir=tmp_path / "gone.parquet"), Base())


def test_splits(tmp_path: Path) -> None:
    name = parquet(tmp_path / "set", [numbered(1)], "test", text=["test"])
    assert scan(name)[0].data.item(0)[1] == ("test",)
    parquet(tmp_path / "set", [numbered(1), numbered(2)], "train", text=["train", "train"])
    assert scan(name)[0].data.item(0)[1] == ("train",)


def test_a_part_of_a_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "set", [numbered(i) for i in range(4)], text=list("abcd"))
    monkeypatch.chdir(tmp_path)
    rows, _ = scan("./set:default:train[:2]")
    assert len(rows.data) == 2
    with pytest.raises(DataError, match=r"no split 'val'; allowed: train; pass --dataset_name \./set::train"):
        scan("./set::val")
    with pytest.raises(DataError, match=r"cannot be opened \(BuilderConfig 'nope' not found"):
        scan("./set:nope")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/nothing", r"not in the cache .* cannot be reached .*hf download nobody/nothing --repo-type dataset"),
        ("not an id", "dataset not an id"),
        ("/no/such/folder", "was not found"),
    ],
)
def test_datasets_that_cannot_be_had(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        scan(name)
    assert "\n" not in str(caught.value)


def test_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.parquet").write_bytes(b"junk")
    with pytest.raises(DataError, match="cannot be opened") as caught:
        scan(str(tmp_path / "set"))
    assert "\n" not in str(caught.value)


def test_a_dataset_behind_a_link_is_its_own(tmp_path: Path) -> None:
    """`datasets` names its files by where they really are."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("real", "link"):
        assert hub._place(str(tmp_path / "real" / "0.png"), hub._roots(str(tmp_path / name))).name == "0.png"
    with pytest.raises(PictureError, match="leads out of the dataset"):
        hub._place(str(tmp_path / "secret.png"), hub._roots(str(tmp_path / "link")))
