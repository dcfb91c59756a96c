"""Signals: the first one ends a run after its step, resumable; the second at once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from fewstep.checkpoint import checkpoints, verify
from tests.faults.conftest import Words
from tests.faults.harness import RUN, Child, assert_same_run, descendants, run_here, steps_recorded

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_run_which_goes_on(
    number: signal.Signals, words: Words, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / RUN
    with Child(words(tmp_path), tmp_path / "said") as child:
        child.until(lambda: steps_recorded(folder) >= 3)
        child.send(number)
        ended = child.end().assert_clean(75)
    newest = checkpoints(folder)[0]
    assert verify(newest).step == steps_recorded(folder)
    assert f"stopped at step {verify(newest).step} of 12" in ended.error
    again = run_here(words(tmp_path)).assert_clean(2)
    assert "--resume_from_checkpoint latest" in again.error
    run_here(words(tmp_path, "--resume_from_checkpoint", "latest")).assert_clean(0)
    assert_same_run(folder, undisturbed)


def test_a_scheduler_that_signals_every_process_of_the_job(words: Words, undisturbed: Path, tmp_path: Path) -> None:
    """Those that load data get it too, before the main one, and are still needed for its last step."""
    folder = tmp_path / RUN
    with Child(words(tmp_path), tmp_path / "said", fault="loading_worker") as child:
        child.until(lambda: steps_recorded(folder) >= 3)
        workers = descendants(child.process.pid)
        assert workers
        for one in workers:
            os.kill(one, signal.SIGTERM)
        time.sleep(0.2)
        child.send(signal.SIGTERM)
        child.end().assert_clean(75)
    run_here(words(tmp_path, "--resume_from_checkpoint", "auto")).assert_clean(0)
    assert_same_run(folder, undisturbed)


@pytest.mark.parametrize("said", ["base: ", "settings:"])
def test_a_signal_before_the_first_update_is_resumable_too(
    said: str, words: Words, undisturbed: Path, tmp_path: Path
) -> None:
    """While the base is opened, and while everything else is got ready."""
    again = words(tmp_path, "--resume_from_checkpoint", "auto")
    with Child(again, tmp_path / "said") as child:
        child.until(lambda: said in child.said)
        child.send(signal.SIGTERM)
        ended = child.end().assert_clean(75)
    assert "--resume_from_checkpoint" in ended.error
    run_here(again).assert_clean(0)
    assert_same_run(tmp_path / RUN, undisturbed)


def test_a_second_signal_ends_the_run_at_once(words: Words, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / RUN
    with Child(words(tmp_path), tmp_path / "said") as child:
        child.until(lambda: steps_recorded(folder) >= 3)
        child.send(signal.SIGINT)
        child.until(lambda: "once more stops at once" in child.said)
        child.send(signal.SIGINT)
        child.end().assert_clean(130)
    run_here(words(tmp_path, "--resume_from_checkpoint", "auto")).assert_clean(0)
    assert_same_run(folder, undisturbed)
