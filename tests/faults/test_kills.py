"""SIGKILL at any moment: the run goes on from its last checkpoint and ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import Words
from tests.faults.harness import (
    RUN,
    STEPS,
    Child,
    assert_same_run,
    is_writing_a_checkpoint,
    run,
    run_here,
    steps_recorded,
)

RUNS, KILLS = 4, 5
"""Runs that are killed, and how often each is."""

LONGEST_WAIT = {"start": 6.0, "update": 0.3, "checkpoint": 0.06}
"""Seconds between the moment that is waited for and the kill, at most."""


def kill(child: Child, moment: str, folder: Path, numbers: random.Random) -> bool:
    """Kill a run at a random time after its start, after an update, or after it began to write a checkpoint.

    Returns:
        Whether it was writing a checkpoint.
    """
    started, until = time.time(), steps_recorded(folder) + numbers.randint(1, 3)
    if moment == "update":
        child.until(lambda: steps_recorded(folder) >= min(until, STEPS))
    elif moment == "checkpoint":
        child.until(lambda: is_writing_a_checkpoint(folder, started))
    time.sleep(numbers.uniform(0, LONGEST_WAIT[moment]))
    with child.held():
        too_late = moment == "checkpoint" and not is_writing_a_checkpoint(folder, started)
        if not too_late:
            child.send(signal.SIGKILL)
    if too_late:
        return kill(child, moment, folder, numbers)
    child.process.wait()
    return is_writing_a_checkpoint(folder, started)


@pytest.mark.faults
@pytest.mark.parametrize("number", range(RUNS))
def test_a_run_that_is_killed_again_and_again_is_the_same_run(
    number: int, words: Words, undisturbed: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    again = words(tmp_path, "--resume_from_checkpoint", "auto")
    numbers = random.Random(number)
    moments = numbers.sample(["start", "update", "update", "checkpoint", "checkpoint"], KILLS)
    inside = 0
    for moment in moments:
        with Child(again, tmp_path / "said") as child:
            inside += kill(child, moment, tmp_path / RUN, numbers)
        assert child.process.returncode == -signal.SIGKILL
    run(again, tmp_path / "said").assert_clean(0)
    assert_same_run(tmp_path / RUN, undisturbed)
    assert inside > 0
    record_property("kills survived", KILLS)
    record_property("of them while a checkpoint was written", inside)


def test_a_checkpoint_that_was_being_written_was_never_there(words: Words, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / RUN
    with Child(words(tmp_path), tmp_path / "said") as child:
        child.until(lambda: steps_recorded(folder) >= 4 and is_writing_a_checkpoint(folder))
        child.send(signal.SIGKILL)
        child.end()
    assert sorted(path.name for path in (folder / "lora").iterdir()) == [".checkpoint-4.partial", "checkpoint-2"]
    ended = run_here(words(tmp_path, "--resume_from_checkpoint", "latest")).assert_clean(0)
    assert f"resumed from {folder / 'lora' / 'checkpoint-2'} at step 2" in ended.out
    assert_same_run(folder, undisturbed)
