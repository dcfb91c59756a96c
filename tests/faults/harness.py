"""Runs the real command, in a child process where it is to be killed or starved, and reads what it leaves behind."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.checkpoint import checkpoints, verify
from fewstep.cli import main

RUN = "run"
STEPS, CHECKPOINT_EVERY = 12, 2
PATIENCE = 180.0
"""Seconds that any step of a run may take on a busy machine before a test fails."""

INJECTED = Path(__file__).parent / "injected.py"
WEIGHTS = "pytorch_lora_weights.safetensors"


def training(base: Path, data: Path, output: Path, *more: str, batch_size: int = 2) -> list[str]:
    """The command's words: everything on that a run can have, updates of two micro-batches."""
    flags = {
        "base_model": base,
        "data_dir": data,
        "output_dir": output,
        "run_name": RUN,
        "max_steps": STEPS,
        "batch_size": batch_size,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-3,
        "lr_schedule": "cosine",
        "lr_warmup_steps": 2,
        "ema_decay": 0.9,
        "num_ddim_steps": 2,
        "checkpoint_every": CHECKPOINT_EVERY,
        "validate_every": 6,
        "log_every": 1,
        "device": "cpu",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return ["train", *words, "--num_inference_steps", "1", "4", *more]


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a failing command ends with."""
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return line

    def assert_clean(self, *codes: int) -> Ended:
        """It ended with one of `codes`, without a trace of Python's."""
        assert self.code in codes, f"{self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err and "Traceback" not in self.out, self.err
        return self


class Child:
    """A command in a process of its own.

    Args:
        words: of the command, after its name.
        folder: for what it prints.
        fault: what `injected.py` is to break in it.
        launcher: words before the program's, such as torchrun's.
        environment: added to this process's.
    """

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        *,
        fault: str | None = None,
        launcher: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("*.out")))
        self._out, self._err = folder / f"{number}.out", folder / f"{number}.err"
        program = ["-m", "fewstep"] if fault is None else [str(INJECTED), fault]
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(environment or {})}
        with self._out.open("w") as out, self._err.open("w") as err:
            command = [sys.executable, *launcher, *program, *words]
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=env)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    @property
    def said(self) -> str:
        """What it has printed so far."""
        return self._out.read_text() + self._err.read_text()

    def until(self, condition: Callable[[], object]) -> None:
        """Wait until something has come about while the command runs."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, f"it ended too early\n{self.said}"
            assert time.monotonic() < end, f"nothing came about\n{self.said}"
            time.sleep(0.001)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    @contextmanager
    def held(self) -> Iterator[None]:
        """The process stands still inside."""
        self.send(signal.SIGSTOP)
        try:
            yield
        finally:
            self.send(signal.SIGCONT)

    def end(self, seconds: float = PATIENCE) -> Ended:
        """Wait for the end."""
        code = self.process.wait(seconds)
        return Ended(code, self._out.read_text(), self._err.read_text())


def run(words: Sequence[str], folder: Path, **more: Any) -> Ended:
    """A command from its start to its end."""
    with Child(words, folder, **more) as child:
        return child.end()


def run_here(words: Sequence[str]) -> Ended:
    """A command in this process, which has imported everything already."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(words)
    return Ended(code, out.getvalue(), err.getvalue())


# --------------------------------------------------------------------------------------------------- what a run leaves


def steps_recorded(folder: Path) -> int:
    """How many lines a run has written to metrics.jsonl."""
    try:
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def is_writing_a_checkpoint(folder: Path, since: float = 0.0) -> bool:
    """Whether a checkpoint is being written, or was when the run was killed; older than `since` it is a leftover."""
    try:
        return any(path.parent.stat().st_mtime > since for path in (folder / "lora").glob(".*.partial/*"))
    except FileNotFoundError:  # it has got its name meanwhile
        return False


OF_THE_MACHINE = ("_per_second", "_seconds", "_bytes", "utilisation")
"""Ends of the names of figures that no two runs share."""


def contents(folder: Path) -> dict[str, Any]:
    """What two runs have to have in common to be the same run, bit for bit: adapter, state, history, previews."""
    lora = folder / "lora"
    files = [lora / "final" / WEIGHTS, *(lora / f"checkpoint-{STEPS}" / "resume").glob("*"), *folder.glob("previews/*")]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        **{path.relative_to(folder).as_posix(): path.read_bytes() for path in files},
        "history": [{key: row[key] for key in row if not key.endswith(OF_THE_MACHINE)} for row in rows],
        "leftovers": [path.name for path in folder.rglob(".*")],
    }


def assert_same_run(mine: Path, theirs: Path) -> None:
    one, other = contents(mine), contents(theirs)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value == other[name], name
    for path in (*checkpoints(mine), mine / "lora" / "final"):
        verify(path)


# ------------------------------------------------------------------------------------------------------------ accidents


HARMS = ("cut", "emptied", "flipped", "removed")


def harm(file: Path, how: str) -> None:
    """What can happen to a file."""
    content = file.read_bytes()
    middle = len(content) // 2
    if how == "removed":
        file.unlink()
    elif how == "flipped":
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        file.write_bytes(content[:middle] if how == "cut" else b"")


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those that they have."""
    try:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [one for child in children for one in (child, *descendants(child))]
