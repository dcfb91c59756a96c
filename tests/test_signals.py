"""Processes that work for a main one: deaf to what asks it to stop, and gone when it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

MAIN = """
import multiprocessing, os, signal, sys, time
from fewstep.signals import STOPPING, leave_to_the_main_process

def work(answers):
    leave_to_the_main_process()
    for number in STOPPING:
        signal.raise_signal(number)
    print(os.getpid(), flush=True)
    answers.put(bytes(1_000_000))  # more than a pipe holds: without a reader this never ends

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    answers = context.Queue()
    context.Process(target=work, args=(answers,), daemon=True).start()
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with another")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_hear_no_signal_and_end_with_a_main_process_that_is_killed(method: str, tmp_path: Path) -> None:
    program = tmp_path / "main.py"
    program.write_text(MAIN)
    with subprocess.Popen([sys.executable, program, method], stdout=subprocess.PIPE, text=True) as main:
        assert main.stdout is not None
        worker = psutil.Process(int(main.stdout.readline()))
        time.sleep(0.2)
        assert worker.is_running() and main.poll() is None
        os.kill(main.pid, signal.SIGKILL)
        psutil.wait_procs([worker], timeout=10)
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
