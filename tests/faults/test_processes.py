"""Two processes: one is killed, and the other ends soon and says why; one is asked to stop, and both do, resumable."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from fewstep.checkpoint import checkpoints, verify
from tests.faults.conftest import Words
from tests.faults.harness import RUN, Child, assert_same_run, descendants, run, steps_recorded

pytestmark = pytest.mark.faults

SOON = 60.0
"""Seconds after which the process that is left must have ended."""

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
CPU = {"ACCELERATE_USE_CPU": "1"}


@pytest.fixture(scope="module")
def halves(words: Words) -> Words:
    """The words of the same training for two processes, each of which makes half of every micro-batch."""
    return partial(words, batch_size=1)


@pytest.fixture(scope="module")
def undisturbed_pair(halves: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    ended = run(halves(folder), folder / "said", launcher=TORCHRUN, environment=CPU).assert_clean(0)
    assert "(1 x 2 micro-batches x 2 processes)" in ended.out
    return folder / RUN


def test_one_of_two_is_killed_under_torchrun(
    halves: Words, undisturbed_pair: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder = tmp_path / RUN
    with Child(halves(tmp_path), tmp_path / "said", launcher=TORCHRUN, environment=CPU) as child:
        child.until(lambda: steps_recorded(folder) >= 3)
        victim = descendants(child.process.pid)[-1]
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        assert child.end(SOON).code == 1, "torchrun's own"
        record_property("seconds until the others had ended", time.monotonic() - killed)
    again = halves(tmp_path, "--resume_from_checkpoint", "auto")
    run(again, tmp_path / "said", launcher=TORCHRUN, environment=CPU).assert_clean(0)
    assert_same_run(folder, undisturbed_pair)


@contextmanager
def pair_of(halves: Words, folder: Path, odd: Sequence[str] = ()) -> Iterator[list[Child]]:
    """Both processes of a run, started without a launcher, which would end one when the other has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**CPU, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                Child(
                    halves(folder, *(odd if rank else ())),
                    folder / f"said-{rank}",
                    environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                )
            )
            for rank in (0, 1)
        ]


@pytest.mark.parametrize("victim", [0, 1])
def test_the_other_one_ends_by_itself_and_says_why(
    victim: int, halves: Words, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder = tmp_path / RUN
    with pair_of(halves, tmp_path) as pair:
        pair[0].until(lambda: steps_recorded(folder) >= 3)
        pair[victim].send(signal.SIGKILL)
        killed = time.monotonic()
        ended = pair[1 - victim].end(SOON).assert_clean(75)
        record_property("seconds until the others had ended", time.monotonic() - killed)
    assert "another process of this run has gone" in ended.error


@pytest.mark.parametrize("asked", [(0,), (1,), (0, 1)])
def test_whichever_is_asked_to_stop_they_save_and_stop_together(
    asked: Sequence[int], halves: Words, undisturbed_pair: Path, tmp_path: Path
) -> None:
    folder = tmp_path / RUN
    with pair_of(halves, tmp_path) as pair:
        pair[0].until(lambda: steps_recorded(folder) >= 3)
        for rank in asked:
            pair[rank].send(signal.SIGINT)
        ended = [child.end(SOON).assert_clean(75) for child in pair]
    newest = checkpoints(folder)[0]
    assert verify(newest).step == steps_recorded(folder) < 12
    assert all(f"stopped at step {verify(newest).step} of 12" in one.error for one in ended)
    again = halves(tmp_path, "--resume_from_checkpoint", "auto")
    run(again, tmp_path / "said", launcher=TORCHRUN, environment=CPU).assert_clean(0)
    assert_same_run(folder, undisturbed_pair)


def test_processes_that_would_not_do_the_same_end_at_once(halves: Words, tmp_path: Path) -> None:
    with pair_of(halves, tmp_path, odd=("--max_grad_norm", "0.5")) as pair:
        ended = [child.end(SOON).assert_clean(2) for child in pair]
    assert all("max_grad_norm is 0.5 in process 1 and " in one.error for one in ended)
    assert not (tmp_path / RUN / "lora").exists()
