"""Checkpoints with a damaged file: named and refused, never loaded; `latest` falls back to the newest whole one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fewstep.checkpoint import checkpoints
from tests.faults.conftest import Words
from tests.faults.harness import HARMS, RUN, assert_same_run, harm, run_here

FILES = (
    "pytorch_lora_weights.safetensors",
    "scheduler/scheduler_config.json",
    "settings.toml",
    "manifest.json",
    "resume/adapter.safetensors",
    "resume/ema.safetensors",
    "resume/optimizer.safetensors",
    "resume/progress.safetensors",
    "resume/state.json",
)


@pytest.fixture
def copy(undisturbed: Path, tmp_path: Path) -> Path:
    """A run that is going to be damaged."""
    return shutil.copytree(undisturbed, tmp_path / RUN)


def test_every_damaged_file_is_named_and_refused(
    copy: Path, words: Words, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    newest = checkpoints(copy)[0]
    files = {path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file()}
    assert files == set(FILES)
    for name in FILES:
        whole = (newest / name).read_bytes()
        for how in HARMS:
            harm(newest / name, how)
            ended = run_here(words(tmp_path, "--resume_from_checkpoint", str(newest))).assert_clean(4)
            assert str(newest) in ended.error and name in ended.error
            (newest / name).write_bytes(whole)
    record_property("damaged files refused by name", len(FILES) * len(HARMS))


@pytest.mark.faults
@pytest.mark.parametrize(("number", "name"), list(enumerate(FILES)))
def test_latest_falls_back_to_the_newest_whole_one(
    number: int, name: str, copy: Path, words: Words, undisturbed: Path, tmp_path: Path
) -> None:
    newest, next_one = checkpoints(copy)[:2]
    harm(newest / name, HARMS[number % len(HARMS)])
    ended = run_here(words(tmp_path, "--resume_from_checkpoint", "latest")).assert_clean(0)
    (warning,) = [line for line in ended.err.splitlines() if line.startswith("warning: passed over: ")]
    assert str(newest) in warning and name in warning
    assert f"resumed from {next_one} at step 10" in ended.out
    assert_same_run(copy, undisturbed)


def test_a_run_without_a_whole_checkpoint_is_refused(copy: Path, words: Words, tmp_path: Path) -> None:
    for folder in checkpoints(copy):
        harm(folder / "resume" / "state.json", "cut")
    for which in ("latest", "auto"):
        ended = run_here(words(tmp_path, "--resume_from_checkpoint", which)).assert_clean(4)
        assert "none of the 6 checkpoints" in ended.error
        assert ended.err.count("passed over") == 6
