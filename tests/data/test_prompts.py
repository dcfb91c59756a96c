"""Captions alone, a line each: kept in order, cleaned, and counted where they are none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.data import Batches, OpenedData, Slices, open_data
from fewstep.data.prompts import scan_prompts
from fewstep.data.report import Drops
from fewstep.errors import DataError, InputError

from .makers import Artist, Base, Settings, write_numbered
from .test_captions import assert_clean


def opened(file: Path, content: str | bytes, **settings: object) -> OpenedData:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_data(Settings(prompts_file=file, **settings), Base(abilities=Artist()))  # type: ignore[arg-type]


def captions(data: OpenedData) -> list[str]:
    return [data.data.item(index)[1][0] for index in range(len(data.data))]


def test_a_caption_a_line(tmp_path: Path) -> None:
    data = opened(tmp_path / "prompts.txt", "\ufeff  a red\thouse \r\n\n   \nein Haus am See\na red house")
    assert captions(data) == ["a red house", "ein Haus am See", "a red house"]
    assert list(data.report.lines()) == [f"captions in {tmp_path / 'prompts.txt'}: 3"]
    assert data.data.item(0)[0].shape == (0, 0, 3)
    assert data.data.captions(0) == data.data.item(0)[1]
    assert data.data.name(1) == "prompt 1"
    assert data.allowance == 0


def test_batches_of_captions_have_no_pixels(tmp_path: Path) -> None:
    data = opened(tmp_path / "prompts.txt", "\n".join(f"number {i}" for i in range(5)))
    (batch,) = Batches(data.data, Slices(batch_size=5), seed=1, start=0, end=1, workers=1)
    assert batch.pictures.shape == (5, 0, 0, 3)
    assert batch.captions == tuple(f"number {i}" for i in batch.items)
    assert sorted(batch.items) == [0, 1, 2, 3, 4]


def test_lines_that_are_no_captions_are_counted_and_never_empty(tmp_path: Path) -> None:
    content = b"one\n\xff\xfe\n\xe2\x80\x8b\n" + b"x" * 70_000 + b"\n" + b"word " * 2_000 + b"\ntwo"
    with pytest.raises(DataError, match=r"50\.00% .* allowed is 1\.00%; .*--max_dropped 0\.51"):
        opened(tmp_path / "prompts.txt", content)
    data = opened(tmp_path / "prompts.txt", content, max_dropped=0.5)
    assert captions(data) == ["one", ("word " * 2_000).strip(), "two"]
    assert list(data.report.lines())[1:] == [
        "dropped 1 caption: caption is empty: line 3",
        "dropped 1 caption: caption is longer than 65536 characters: line 4",
        "dropped 1 caption: caption is not UTF-8: line 2",
    ]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\n"])
def test_nothing_left_is_an_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"no caption is left to train on.*check the file"):
        opened(tmp_path / "prompts.txt", content, max_dropped=1.0)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing.txt"):
        with pytest.raises(DataError, match=r"cannot be read: .*a caption a line"):
            open_data(Settings(prompts_file=place), Base())


def test_other_captions_are_other_data(tmp_path: Path) -> None:
    contents = ["a\nb", "b\na", "a b", "a\nb\nb"]
    assert len({opened(tmp_path / "prompts.txt", content).fingerprint for content in contents}) == 4
    assert opened(tmp_path / "moved.txt", "a\n\nb\n").fingerprint == opened(tmp_path / "p.txt", "a\nb").fingerprint


def test_pictures_and_columns_do_not_go_with_it(tmp_path: Path) -> None:
    write_numbered(tmp_path / "set", 2)
    with pytest.raises(InputError, match="data_dir and prompts_file came together"):
        opened(tmp_path / "prompts.txt", "a", data_dir=tmp_path / "set")
    with pytest.raises(InputError, match=r"caption_column 'text' came, but .* has no columns"):
        opened(tmp_path / "prompts.txt", "a", caption_column="text")


@given(st.lists(st.binary(max_size=20)))
def test_every_line_is_kept_blank_or_counted(tmp_path_factory: pytest.TempPathFactory, lines: Sequence[bytes]) -> None:
    file = tmp_path_factory.getbasetemp() / "any-lines.txt"
    file.write_bytes(b"\n".join(lines))
    drops = Drops()
    prompts = scan_prompts(file, drops)
    written = [line for line in file.read_bytes().split(b"\n") if line.strip()]
    assert len(prompts) + drops.report("", 0, 0).dropped_of("captions") == len(written)
    for index in range(len(prompts)):
        assert_clean(prompts.item(index)[1][0])
