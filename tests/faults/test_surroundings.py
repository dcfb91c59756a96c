"""What happens around a run: data and folders that go away, clocks that jump, losses that are no numbers, rivals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.checkpoint import verify
from tests.faults.conftest import Words
from tests.faults.harness import (
    PATIENCE,
    RUN,
    STEPS,
    Child,
    assert_same_run,
    descendants,
    run,
    run_here,
    steps_recorded,
    training,
)

pytestmark = pytest.mark.faults


def test_a_picture_that_disappears(base: Path, pictures: Path, undisturbed: Path, tmp_path: Path) -> None:
    data = shutil.copytree(pictures, tmp_path / "data")
    words, folder = training(base, data, tmp_path), tmp_path / RUN
    with Child(words, tmp_path / "said") as child:
        child.until(lambda: steps_recorded(folder) >= 3)
        with child.held():
            (data / "007.png").rename(tmp_path / "away.png")
        ended = child.end().assert_clean(3)
    assert "007.png" in ended.error
    (tmp_path / "away.png").rename(data / "007.png")
    run_here([*words, "--resume_from_checkpoint", "auto"]).assert_clean(0)
    assert_same_run(folder, undisturbed)


def test_an_output_folder_that_disappears(words: Words, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / RUN
    with Child(words(tmp_path / "runs"), tmp_path / "said") as child:
        child.until(lambda: steps_recorded(folder) >= 3)
        with child.held():
            shutil.rmtree(tmp_path / "runs")
        ended = child.end().assert_clean(2)
    assert "was removed or replaced while it was being written to" in ended.error
    assert not (tmp_path / "runs").exists()


def test_a_process_that_loads_data_and_dies(words: Words, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / RUN
    with Child(words(tmp_path), tmp_path / "said", fault="loading_worker") as child:
        child.until(lambda: steps_recorded(folder) >= 3)
        for worker in descendants(child.process.pid):
            os.kill(worker, signal.SIGKILL)
        ended = child.end().assert_clean(3)
    assert "a process that loads data was ended" in ended.error
    run_here(words(tmp_path, "--resume_from_checkpoint", "auto")).assert_clean(0)
    assert_same_run(folder, undisturbed)


def test_a_process_that_loads_data_for_a_cache_and_dies(words: Words, tmp_path: Path) -> None:
    fill = ["cache", *words(tmp_path)[1:], "--cache_dir", str(tmp_path / "cache")]
    with Child(fill, tmp_path / "said", fault="loading_worker") as child:
        child.until(lambda: descendants(child.process.pid))
        for worker in descendants(child.process.pid):
            os.kill(worker, signal.SIGKILL)
        ended = child.end().assert_clean(3)
    assert "a process that loads data was ended" in ended.error and ended.error.endswith("then run the same again")
    run_here(fill).assert_clean(0)


def test_whoever_reads_what_is_printed_goes_away(words: Words, undisturbed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fewstep", *words(tmp_path), "--log_file", str(tmp_path / "log")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"base: ")
        process.stdout.close()
        assert process.wait(PATIENCE) == 0
    assert f"training: {STEPS} steps" in (tmp_path / "log").read_text()
    assert_same_run(tmp_path / RUN, undisturbed)


def test_a_clock_that_jumps(words: Words, undisturbed: Path, tmp_path: Path) -> None:
    run(words(tmp_path), tmp_path / "said", fault="jumping_clock").assert_clean(0)
    assert_same_run(tmp_path / RUN, undisturbed)


def test_a_loss_that_is_no_number_once(words: Words, tmp_path: Path) -> None:
    ended = run(words(tmp_path), tmp_path / "said", fault="nan_once").assert_clean(0)
    assert ended.err.count("warning: update 3 is skipped") == 1
    rows = [json.loads(line) for line in (tmp_path / RUN / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_updates"] for row in rows] == [float(step == 3) for step in range(1, STEPS + 1)]


def test_losses_that_are_numbers_no_more(words: Words, tmp_path: Path) -> None:
    ended = run(words(tmp_path), tmp_path / "said", fault="nan_for_good").assert_clean(2)
    last = tmp_path / RUN / "lora" / "checkpoint-8"
    assert "not finite at step 10, nor before; allowed is training that converges; " in ended.error
    assert f"the last checkpoint is {last}" in ended.error
    verify(last)


def test_a_second_run_in_the_folder(words: Words, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / RUN
    with Child(words(tmp_path), tmp_path / "said") as first:
        first.until(lambda: steps_recorded(folder) >= 3)
        with first.held():
            second = run_here(words(tmp_path, "--resume_from_checkpoint", "auto")).assert_clean(2)
        assert f"is being written to by process {first.process.pid} on " in second.error
        first.end().assert_clean(0)
    assert_same_run(folder, undisturbed)
