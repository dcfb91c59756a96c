"""What a dataset's files unpack to is bounded, and what they name lies in the dataset."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from fewstep.data import open_data, unpacking
from fewstep.data.unpacking import refuse_bomb
from fewstep.errors import DataError

from .makers import Base, Settings, numbered

ZEROS = bytes(2**22)


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", str(tmp_path / "cache" / "extracted"))
    monkeypatch.setattr(unpacking, "ALWAYS", 2**20)
    datasets.disable_progress_bars()


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", content)
    return file.getvalue()


def squeezed_tar(content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        member = tarfile.TarInfo("a.txt")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "zip": zipped,
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "tar.gz": squeezed_tar,
}


@pytest.mark.parametrize("kind", PACKERS)
def test_a_file_that_unpacks_to_far_more_than_it_is(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.{kind}"
    file.write_bytes(PACKERS[kind](ZEROS))
    with pytest.raises(DataError, match=r"unpacks to more than 1\.05 MB; allowed is what the disk has room for"):
        refuse_bomb(file)
    file.write_bytes(PACKERS[kind](b"a red house and a blue tree\n" * 100))
    refuse_bomb(file)
    file.write_bytes(PACKERS[kind](ZEROS)[:30])
    if kind != "zip":  # which is none without its end
        with pytest.raises(DataError, match="cut short or damaged"):
            refuse_bomb(file)


def test_what_cannot_be_counted_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
    with pytest.raises(DataError, match="packed in a way that is not read here"):
        refuse_bomb(tmp_path / "a")


def test_the_disk_is_a_bound_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(5_000)))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=4_000))
    with pytest.raises(DataError, match=r"unpacks to more than 4 kB"):
        refuse_bomb(tmp_path / "a.gz")


def dictionary_bomb(file: Path) -> Path:
    """A caption of 10 kB that a thousand rows share: a few kilobytes of file, ten megabytes of rows."""
    rows = 1_000
    text = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * rows, pyarrow.int32()), pyarrow.array(["x" * 10_000])
    )
    image = pyarrow.array([{"bytes": numbered(1), "path": None}] * rows)
    parquet.write_table(pyarrow.table({"image": image, "text": text}), file, compression="zstd")
    return file


def test_parquet_whose_rows_are_far_more_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    file = dictionary_bomb(tmp_path / "set" / "a.parquet")
    assert file.stat().st_size < 20_000
    with pytest.raises(DataError, match=r"a\.parquet of .* unpacks to more than"):
        open_data(Settings(data_dir=tmp_path / "set"), Base())
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_archives_of_a_dataset_are_not_unpacked_before_they_are_counted(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    (tmp_path / "set" / "b.jsonl").write_bytes(gzip.compress(ZEROS))
    with pytest.raises(DataError, match=r"b\.jsonl of .* unpacks to more than"):
        open_data(Settings(dataset_name=str(tmp_path / "set")), Base())
    assert not (tmp_path / "cache" / "extracted").exists()


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> None:
    file.parent.mkdir(exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_all_of_a_tar_that_is_no_bomb_is_there(tmp_path: Path) -> None:
    """`datasets` goes through a tar twice: for the kinds of its columns, and for its rows."""
    numbers = range(8)
    pairs = [((f"{i}.png", numbered(i)), (f"{i}.txt", f"number {i}".encode())) for i in numbers]
    write_tar(tmp_path / "set" / "a.tar", [member for pair in pairs for member in pair])
    opened = open_data(Settings(dataset_name=str(tmp_path / "set"), caption_column="txt"), Base())
    assert [opened.data.item(i)[1] for i in range(len(opened.data))] == [(f"number {i}",) for i in numbers]


def test_a_member_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "set" / "a.tar", [("0.png", numbered(0)), ("0.txt", b"x" * (2**20 + 1))])
    with pytest.raises(DataError, match=r"holds '0\.txt', which is packed once more or is larger than 1\.05 MB"):
        open_data(Settings(dataset_name=str(tmp_path / "set"), caption_column="txt"), Base())


def test_members_that_are_packed_once_more_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "set" / "a.tar", [("0.png", numbered(0)), ("0.txt.gz", gzip.compress(ZEROS))])
    with pytest.raises(DataError, match=r"holds '0\.txt\.gz', which is packed once more"):
        open_data(Settings(dataset_name=str(tmp_path / "set")), Base())


def test_a_row_cannot_name_a_file_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "secret.png").write_bytes(numbered(1))
    (tmp_path / "set" / "own.png").write_bytes(numbered(2))
    paths = [tmp_path / "secret.png", tmp_path / "set" / ".." / "secret.png", tmp_path / "set" / "own.png"]
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    cells = pyarrow.array([{"bytes": None, "path": str(path)} for path in paths], kind)
    parquet.write_table(pyarrow.table({"image": cells, "text": ["a", "b", "c"]}), tmp_path / "set" / "a.parquet")
    (tmp_path / "set" / "own.png").rename(tmp_path / "own.png")  # a folder with pictures is none of rows
    opened = Settings(dataset_name=str(tmp_path / "set"), max_dropped=1.0)
    with pytest.raises(DataError, match="2 pictures: its path leads out of the dataset: row 0, row 1"):
        open_data(opened, Base())
