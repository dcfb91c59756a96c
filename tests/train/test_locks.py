"""One run a folder: the second is refused by name, the dead do not count."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fewstep.config import TrainSettings
from fewstep.errors import CheckpointError, InputError
from fewstep.locks import alone_in
from fewstep.train import DistillResult, distill

HOLD = """
import sys, time
from pathlib import Path
from fewstep.locks import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    with alone_in(tmp_path / "run"):
        with (
            pytest.raises(InputError, match=f"is being written to by process {os.getpid()} on "),
            alone_in(tmp_path / "run"),
        ):
            raise AssertionError("two at once")
        assert (tmp_path / "run" / ".lock").exists()
    assert list((tmp_path / "run").iterdir()) == []
    with alone_in(tmp_path / "run"):
        pass


def test_a_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"process {holder.pid} "), alone_in(tmp_path):
            raise AssertionError("two at once")
        holder.kill()
        holder.wait()
    assert (tmp_path / ".owner").exists()
    time.sleep(0.1)
    with alone_in(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".owner").read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_taken_away_is_the_error_whatever_fails_first(tmp_path: Path) -> None:
    run, gone = tmp_path / "run", "was removed or replaced while it was being written to"
    with pytest.raises(InputError, match=gone), alone_in(run) as check:  # noqa: PT012
        check()
        shutil.rmtree(run)
        check()
    with pytest.raises(InputError, match=gone), alone_in(run):  # noqa: PT012
        shutil.rmtree(run)
        (run / "metrics.jsonl").open("a")
    with pytest.raises(InputError, match=gone), alone_in(run):  # noqa: PT012
        shutil.rmtree(run)
        run.mkdir()
        (run / ".lock").write_text("of another run")
        raise CheckpointError("cannot be written")
    assert (run / ".lock").read_text() == "of another run"
    with pytest.raises(CheckpointError, match="cannot be written"), alone_in(tmp_path / "stays"):
        raise CheckpointError("cannot be written")


def test_a_run_whose_folder_is_taken_away_ends_and_makes_none(settings: TrainSettings, tmp_path: Path) -> None:
    asked = settings.replace(output_dir=tmp_path, validate_every=0, checkpoint_every=0)

    def takes_it_away() -> bool:
        shutil.rmtree(asked.run_dir, ignore_errors=True)
        return False

    with pytest.raises(InputError, match="was removed or replaced"):
        distill(asked, should_stop=takes_it_away)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_goes_on_elsewhere_is_not_resumed(whole: DistillResult, settings: TrainSettings) -> None:
    before = sorted(path.name for path in whole.folder.rglob("*"))
    with alone_in(whole.folder), pytest.raises(InputError, match="is being written to by process"):
        distill(settings.replace(resume_from_checkpoint="latest"))
    assert sorted(path.name for path in whole.folder.rglob("*")) == before
