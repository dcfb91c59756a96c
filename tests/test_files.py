"""Files and folders appear whole or not at all; and the reporter that says nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fewstep.errors import CheckpointError, DataError, FewstepError, InputError, Interrupted
from fewstep.files import (
    at_home,
    remove_folder_at_once,
    remove_leftovers,
    remove_old_leftovers,
    replace_folder_atomic,
    sha256,
    write_bytes_atomic,
    write_tensors_atomic,
    write_text_atomic,
)
from fewstep.reporting import SILENT


def test_leftovers_are_removed_where_others_write_when_they_are_old(tmp_path: Path) -> None:
    for name in (".old.1.partial", ".new.2.partial", "kept.safetensors"):
        (tmp_path / name).write_text("x")
    os.utime(tmp_path / ".old.1.partial", (0, 0))
    remove_old_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".new.2.partial", "kept.safetensors"]


def test_a_file_is_written_with_its_folders_and_nothing_else(tmp_path: Path) -> None:
    path = write_text_atomic(tmp_path / "a" / "b.txt", "ᾱ\n")
    assert path.read_bytes() == "ᾱ\n".encode()
    assert write_bytes_atomic(str(path), b"new") == path
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


def test_tensors_may_be_read_by_whoever_may_read_other_files(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        path = write_tensors_atomic(tmp_path / "a" / "b.safetensors", {"x": torch.arange(6).view(2, 3).T}, {"of": "y"})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("x"), torch.arange(6).view(2, 3).T) and file.metadata() == {"of": "y"}
    assert [p.name for p in path.parent.iterdir()] == ["b.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_text_atomic(tmp_path / "a.txt", "old")

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    for content in ("one", "two"):
        write_text_atomic(tmp_path / "partial" / "file", content)
        replace_folder_atomic(tmp_path / "partial", tmp_path / "runs" / "final")
        assert (tmp_path / "runs" / "final" / "file").read_text() == content
    assert not (tmp_path / "partial").exists()
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["final"]


def test_a_folder_that_cannot_take_the_place_leaves_the_one_that_is_there(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "final" / "file", "old")
    with pytest.raises(OSError, match="No such file"):
        replace_folder_atomic(tmp_path / "missing", tmp_path / "final")
    assert (tmp_path / "final" / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_a_folder_that_was_about_to_be_replaced_gets_its_name_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the two renames."""
    write_text_atomic(tmp_path / "best" / "file", "old")
    write_text_atomic(tmp_path / ".best.partial" / "file", "new")
    honest, renames = Path.rename, []

    def killed_at_the_second(self: Path, target: Path) -> Path:
        renames.append(target)
        if len(renames) == 2:
            raise KeyboardInterrupt
        return honest(self, target)

    monkeypatch.setattr(Path, "rename", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        replace_folder_atomic(tmp_path / ".best.partial", tmp_path / "best")
    monkeypatch.setattr(Path, "rename", honest)
    assert not (tmp_path / "best").exists()
    remove_leftovers(tmp_path)
    assert (tmp_path / "best" / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_a_folder_that_was_being_removed_does_not_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text_atomic(tmp_path / "checkpoint-1" / "file", "x")
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # killed before it was emptied
    remove_folder_at_once(tmp_path / "checkpoint-1")
    monkeypatch.undo()
    assert not (tmp_path / "checkpoint-1").exists()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_sha256(tmp_path: Path) -> None:
    path = write_bytes_atomic(tmp_path / "x", b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_home_is_a_folder_and_a_stranger_is_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert at_home("~/runs") == Path("/home/me/runs")
    assert at_home("~nobody-of-that-name/runs") == Path("~nobody-of-that-name/runs")


def test_exit_codes() -> None:
    codes = {kind: kind.exit_code for kind in (FewstepError, InputError, DataError, CheckpointError, Interrupted)}
    assert list(codes.values()) == [1, 2, 3, 4, 75]
    assert all(issubclass(kind, FewstepError) for kind in codes)


def test_silence_is_a_reporter(capsys: pytest.CaptureFixture[str]) -> None:
    SILENT.say("a")
    SILENT.warn("b")
    with SILENT.progress("c", 3) as bar:
        bar.advance()
        bar.advance(2, loss=0.5)
    assert capsys.readouterr() == ("", "")


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (
        ".a.png.17.partial",
        "best/file",
        ".best.old/file",
        ".b.partial/file",
        "c.partial",
        ".lock",
        "below/.d.partial",
    ):
        write_text_atomic(tmp_path / name, "x")
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "nowhere")
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"best/file", "c.partial", ".lock", "below/.d.partial"}
