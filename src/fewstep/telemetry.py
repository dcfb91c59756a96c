"""What a run leaves behind besides weights: metrics.jsonl, TensorBoard, a log file, and how fast it went."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from fewstep.errors import CheckpointError, InputError
from fewstep.files import write_text_atomic
from fewstep.hiding import without_secrets
from fewstep.reporting import Bar, Reporter
from fewstep.transfer import upload

ItemT = TypeVar("ItemT")


class Telemetry:
    """The figures of a run, one line of JSON and one TensorBoard point each time they are recorded.

    A resumed run goes on in the same files: what was recorded after `resumed_at` belongs to updates that are
    made again, and is taken out, so that the history of a resumed run reads like that of an uninterrupted one.

    Args:
        folder: the run's folder; `metrics.jsonl` and `tensorboard/` are made in it.
        resumed_at: the update of the checkpoint that the run goes on from; None for a new run, which begins with empty
            files whatever an earlier one left there.
        active: False on every process but the first; nothing is written then, and `history` is kept all the same.
    """

    def __init__(self, folder: Path, *, resumed_at: int | None = None, active: bool = True) -> None:
        self.file = folder / "metrics.jsonl"
        self.history: list[dict[str, float]] = []
        self._board: _Board | None = None
        if not active:
            return
        if resumed_at is not None:
            self.history = [row for row in read_metrics(self.file) if row["step"] <= resumed_at]
        write_text_atomic(self.file, "".join(json.dumps(row) + "\n" for row in self.history))
        self._board = _Board(folder / "tensorboard", first_step=0 if resumed_at is None else resumed_at + 1)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Add one line: the update it is about, and named figures."""
        row = {"step": step, **values}
        self.history.append(row)
        if self._board is None:
            return
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")  # one write of one line: a reader never sees half of one
        self._board.add(step, values)

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board is not None:
            self._board.close()


class _Board:
    """TensorBoard's file of events, written where it is called.

    torch's and TensorBoard's own writers do it in a thread, which on a full disk prints a trace and takes the reason
    with it.

    Args:
        folder: made if need be; each run and each resumption has a file of its own in it.
        first_step: what earlier files say about this update and later ones no longer holds.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        # Imported here because TensorBoard takes its time to import, and only one process needs it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{now % 10**9}"
        self._file = (folder / name).open("wb")
        self._writer = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """One point of each curve."""
        points = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=self._summary(value=points))

    def _write(self, **content: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._file.flush()

    def close(self) -> None:
        """Everything is written already; what could not be was reported where it was tried."""
        with suppress(OSError):
            self._file.close()


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, oldest first; a last line that a crash cut short is left out.

    Raises:
        CheckpointError: a line before the last is not one of ours.
    """
    if not file.exists():
        return []
    lines = file.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                raise ValueError
        except (ValueError, RecursionError):
            if number < len(lines):
                raise CheckpointError(
                    f"{file}: line {number} is no JSON object with a step; repair it or move the file away"
                ) from None
        else:
            rows.append(row)
    return rows


class LossByTimestep:
    """Sums of the loss a timestep, kept on the device: nothing waits for it before `means`.

    Args:
        points: every timestep that training visits.
        device: of the losses.
    """

    def __init__(self, points: Sequence[int], device: torch.device) -> None:
        self._points = list(points)
        self._number = {t: number for number, t in enumerate(self._points)}
        precision = torch.float64 if device.type == "cpu" else torch.float32
        self._sums = torch.zeros(len(self._points), 2, dtype=precision, device=device)

    def sums(self) -> Tensor:
        """Of each timestep the sum and the number of its losses since the last call of `means`, [points, 2]."""
        return self._sums

    def take_up(self, sums: Tensor) -> None:
        """Go on from these `sums`."""
        self._sums.copy_(sums)

    @torch.no_grad()
    def add(self, t: Tensor, losses: Tensor) -> None:
        """Add the losses [B] of samples at timesteps `t`, int64 [B] on the CPU."""
        rows = upload(torch.tensor([self._number[one] for one in t.tolist()]), self._sums.device)
        values = losses.detach().to(self._sums.dtype)
        self._sums.index_add_(0, rows, torch.stack([values, torch.ones_like(values)], dim=1))

    def means(self, over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Mean loss since the last call, "loss" over all samples and "loss/t999" over those of a timestep; starts anew.

        What no sample was added for is left out.

        Args:
            over_processes: sums a tensor over all processes.
        """
        sums, counts = over_processes(self._sums).T.tolist()
        self._sums.zero_()
        means = {"loss": sum(sums) / sum(counts)} if sum(counts) else {}
        return means | {
            f"loss/t{t}": total / count for t, total, count in zip(self._points, sums, counts, strict=True) if count > 0
        }


class Throughput:
    """How fast training goes, time spent on anything else left out.

    Args:
        processes: that train side by side, all at the speed of this one.
        forward: operations of one forward of the network for one sample.
        rate: operations a second that the device can do at all.
    """

    def __init__(self, *, processes: int, forward: float, rate: float) -> None:
        self._processes, self._forward, self._rate = processes, forward, rate
        self._start_anew()

    def _start_anew(self) -> None:
        self._started = time.perf_counter()
        self._updates = self._pictures = self._pairs = self._forwards = 0
        self._away = self._waited = 0.0

    def add(self, *, pictures: int, pairs: int, forwards: int) -> None:
        """Count an update of this process: what it was made from, and samples that the teacher was asked about."""
        self._updates += 1
        self._pictures += pictures
        self._pairs += pairs
        self._forwards += forwards

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside: checkpoints and previews are not training."""
        left = time.perf_counter()
        try:
            yield
        finally:
            self._away += time.perf_counter() - left

    def waiting(self, source: Iterable[ItemT]) -> Iterator[ItemT]:
        """Pass on what `source` gives, and count the time until it comes."""
        stream, end = iter(source), object()
        while True:
            asked = time.perf_counter()
            item = next(stream, end)
            self._waited += time.perf_counter() - asked
            if item is end:
                return
            yield cast(ItemT, item)

    def read(self) -> dict[str, float]:
        """What was reached since the last reading; to be called when the device has been waited for.

        "utilisation" is the share of `rate` that the network's operations make: the teacher's forwards, and of the
        student a forward a pair and as much again for the gradient, which passes through frozen weights. What is
        computed again under gradient checkpointing does not count, nor do the VAE and the text encoder.
        "data_wait_seconds" is what an update waited until what it learns from was loaded.
        """
        seconds = max(time.perf_counter() - self._started - self._away, 1e-9)
        everywhere = self._processes / seconds
        found = {
            "pictures_per_second": self._pictures * everywhere,
            "pairs_per_second": self._pairs * everywhere,
            "teacher_forwards_per_second": self._forwards * everywhere,
            "utilisation": (self._forwards + 2 * self._pairs) * self._forward / seconds / self._rate,
            "data_wait_seconds": self._waited / max(self._updates, 1),
        }
        self._start_anew()
        return found


class LoggedReporter:
    """Passes everything on to another reporter, and writes what is said, with the time, to a file as well."""

    def __init__(self, reporter: Reporter, file: Path) -> None:
        self._reporter = reporter
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = file.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise InputError(
                f"log_file {str(file)!r} cannot be written: {error.strerror}; give a path that can be"
            ) from error

    def say(self, text: str) -> None:
        self._write(text)
        self._reporter.say(text)

    def warn(self, text: str) -> None:
        self._write(f"warning: {text}")
        self._reporter.warn(text)

    def progress(self, name: str, total: int) -> AbstractContextManager[Bar]:
        return self._reporter.progress(name, total)

    def _write(self, text: str) -> None:
        self._file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {without_secrets(text)}\n")

    def __enter__(self) -> LoggedReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # on a full disk the error that is on its way out says more
            if error is not None:
                self._write(f"ended: {error}")
            self._file.close()
