"""Disks that are full, small or read-only: an error of one line, and no earlier checkpoint is lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fewstep.checkpoint import checkpoints, verify
from tests.faults.conftest import Words
from tests.faults.harness import RUN, Child, assert_same_run, is_writing_a_checkpoint, run_here, steps_recorded

pytestmark = pytest.mark.faults

Options = Callable[[str], None]
"""Mounts the disk, or mounts it again, with options such as "size=2m" or "ro"."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Options]]:
    """A disk of its own, in memory."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> None:
        way = f"remount,{options}" if place.is_mount() else options
        for superuser in ([], ["sudo", "-n"]):
            try:
                done = subprocess.run(
                    [*superuser, "mount", "-t", "tmpfs", "-o", way, "tmpfs", str(place)], capture_output=True, text=True
                )
            except FileNotFoundError:
                continue
            if done.returncode == 0:
                return
        assert not os.environ.get("CI"), f"these tests are never skipped in CI: {done.stderr}"
        pytest.skip(f"mounting a small disk is refused: {done.stderr.strip()}")

    yield place, mount
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=False)


def fill(place: Path) -> Path:
    """Write until nothing goes any more."""
    file = place / "filler"
    with file.open("wb", buffering=0) as open_file:
        for block in (bytes(2**16), bytes(1)):
            try:
                while open_file.write(block):
                    pass
            except OSError:
                continue
    return file


def assert_whole(folder: Path) -> None:
    """There are checkpoints, all whole, and nothing half-written."""
    assert checkpoints(folder)
    for one in checkpoints(folder):
        verify(one)
    assert not list(folder.rglob(".*.partial"))


def test_a_disk_without_room_for_a_checkpoint(
    disk: tuple[Path, Options], words: Words, undisturbed: Path, record_property: Callable[[str, object], None]
) -> None:
    place, mount = disk
    mount("size=2m")
    ended = run_here(words(place)).assert_clean(4)
    assert re.search(r"checkpoint-\d+ cannot be written .* it needs [\d,]+ bytes, [\d,]+ are free; ", ended.error)
    assert_whole(place / RUN)
    mount("size=50m")
    run_here(words(place, "--resume_from_checkpoint", "auto")).assert_clean(0)
    assert_same_run(place / RUN, undisturbed)
    record_property("full disks survived", 1)


@pytest.mark.parametrize("moment", ["in a checkpoint", "between checkpoints"])
def test_a_disk_that_fills_up(
    moment: str,
    disk: tuple[Path, Options],
    words: Words,
    undisturbed: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    place, mount = disk
    mount("size=20m")
    folder = place / RUN
    with Child(words(place), tmp_path / "said") as child:
        child.until(lambda: steps_recorded(folder) >= 4)
        if moment == "in a checkpoint":
            child.until(lambda: is_writing_a_checkpoint(folder))
        else:
            child.until(lambda: steps_recorded(folder) >= 5)
        with child.held():
            filler = fill(place)
        ended = child.end()
    ended.assert_clean(2, 4)
    assert "No space left on device" in ended.error
    filler.unlink()
    assert_whole(folder)
    run_here(words(place, "--resume_from_checkpoint", "auto")).assert_clean(0)
    assert_same_run(folder, undisturbed)
    record_property("full disks survived", 1)


def test_a_disk_that_cannot_be_written_to(
    disk: tuple[Path, Options], words: Words, undisturbed: Path, tmp_path: Path
) -> None:
    place, mount = disk
    mount("ro")
    ended = run_here(words(place)).assert_clean(2)
    assert "Read-only file system" in ended.error
    mount("rw")
    with Child(words(place), tmp_path / "said") as child:
        child.until(lambda: steps_recorded(place / RUN) >= 3)
        child.send(signal.SIGTERM)
        child.end().assert_clean(75)
    mount("ro")
    ended = run_here(words(place, "--resume_from_checkpoint", "auto")).assert_clean(2)
    assert "Read-only file system" in ended.error
    mount("rw")
    run_here(words(place, "--resume_from_checkpoint", "auto")).assert_clean(0)
    assert_same_run(place / RUN, undisturbed)
