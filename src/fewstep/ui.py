"""How the command line shows what a procedure reports: bars in a terminal, plain lines everywhere else.

A bar is also where a run can be stopped safely. The first signal of `STOPPING` is held back until the procedure next
advances its innermost bar, between two pieces of work, and is raised there as `StopAsked`, a ``KeyboardInterrupt``; a
procedure that can resume saves itself then and raises `Interrupted`. A second signal does not wait.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fewstep.errors import StopAsked
from fewstep.hiding import without_secrets
from fewstep.reporting import Bar
from fewstep.signals import STOPPING

_SECONDS_BETWEEN_LINES: Final = 10.0
_ONE_REQUEST: Final = 2.0  # seconds within which a SIGTERM is no second request to stop
_PACKAGE: Final = Path(__file__).parent


class _Console(Console):
    """A console that goes quiet when its reader has gone, as in `| head` or with the window of a terminal: what runs
    goes on and saves its results."""

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError as error:
            if error.errno != errno.EIO:  # what a terminal says that was closed
                raise
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Nothing more is shown; nothing ends."""
        self.quiet = True
        devnull = os.open(os.devnull, os.O_WRONLY)
        with suppress(OSError):  # a stand-in for the stream has no descriptor
            os.dup2(devnull, self.file.fileno())  # what is in the stream's buffer still has to go somewhere
        os.close(devnull)


class ConsoleReporter:
    """A `Reporter` that prints to stdout, and warnings to stderr.

    Args:
        quiet: print nothing, as processes other than the first do; signals are held back all the same.
        seconds_between_lines: how often, at most, a bar prints a line where stdout is no terminal.
    """

    def __init__(self, *, quiet: bool = False, seconds_between_lines: float = _SECONDS_BETWEEN_LINES) -> None:
        # Looked up at each print: stdout may be exchanged during the life of a reporter.
        self._out = _Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._err = _Console(quiet=quiet, highlight=False, soft_wrap=True, stderr=True)
        self._seconds_between_lines = seconds_between_lines
        self._progress: Progress | None = None
        self._open_bars = 0
        self._signalled = self._stop_wanted = False

    def say(self, text: str) -> None:
        """One line of information."""
        self._out.print(without_secrets(text), markup=False)

    def warn(self, text: str) -> None:
        """One line that the user should not miss."""
        self._err.print(f"warning: {without_secrets(text)}", markup=False, style="yellow")

    @contextmanager
    def progress(self, name: str, total: int) -> Iterator[Bar]:
        """A bar of `total` units, shown while the context is open; bars may be nested."""
        self._open_bars += 1
        try:
            if self._out.is_terminal:
                with self._terminal_bar(name, total) as bar:
                    yield bar
            else:
                with self._plain_bar(name, total) as bar:
                    yield bar
        finally:
            self._open_bars -= 1

    @contextmanager
    def _terminal_bar(self, name: str, total: int) -> Iterator[Bar]:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.fields[values]}", markup=False),
                console=self._out,
                expand=True,
            )
            self._progress.start()
        progress = self._progress
        task = progress.add_task(name, total=total, values="")
        try:
            yield _TerminalBar(self, progress, task)
        finally:
            if self._open_bars == 1:
                progress.stop()
                self._progress = None
            else:
                progress.remove_task(task)

    @contextmanager
    def _plain_bar(self, name: str, total: int) -> Iterator[Bar]:
        bar = _PlainBar(self, name, total, self._seconds_between_lines)
        yield bar
        bar.finish()

    def stop_here(self) -> None:
        """Where the procedure may be stopped: raise `StopAsked` if a signal was held back, once."""
        if self._stop_wanted:
            self._stop_wanted = False  # bars that are shown while the procedure saves itself go through
            raise StopAsked

    @contextmanager
    def hearing_warnings(self) -> Iterator[None]:
        """Inside, what fewstep says through Python's `warnings` is a line as of `warn`; what others say is as ever."""
        with warnings.catch_warnings():
            ordinary = warnings.showwarning

            def show(message: Any, category: type[Warning], filename: str, *rest: Any, **more: Any) -> None:
                if category is UserWarning and Path(filename).is_relative_to(_PACKAGE):
                    self.warn(str(message))
                else:
                    ordinary(message, category, filename, *rest, **more)

            warnings.showwarning = show
            yield

    @contextmanager
    def holding_signals(self) -> Iterator[None]:
        """Inside, the first SIGINT, SIGTERM or SIGHUP waits for the next `stop_here` if a bar is open.

        Where none is, it is raised at once, as `StopAsked` all the same. A second one does not wait; but a SIGTERM just
        after the first signal is the same request once more, from a scheduler and from the launcher that passes it on.
        """
        first = 0.0

        def on_signal(number: int, _frame: object) -> None:
            nonlocal first
            if number not in (signal.SIGINT, signal.SIGTERM):
                self._let_go_of_the_terminal()
            if self._signalled:
                if number != signal.SIGINT and time.monotonic() - first < _ONE_REQUEST:
                    return
                raise KeyboardInterrupt
            self._signalled, first = True, time.monotonic()
            if not self._open_bars:
                raise StopAsked
            self._stop_wanted = True
            if not self._err.quiet:
                # print() may be what the signal came into the middle of; writing to the descriptor is always allowed.
                with suppress(OSError):
                    os.write(2, b"\nstopping after this step; once more stops at once\n")

        if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread alone
            yield
            return
        heard = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]  # as under nohup
        before = {number: signal.signal(number, on_signal) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _let_go_of_the_terminal(self) -> None:
        """It was closed: nothing can be shown there any more, and what tries to would fail."""
        for console in (self._out, self._err):
            if console.is_terminal:
                console.on_broken_pipe()


class _TerminalBar:
    """One line of the terminal's progress display."""

    def __init__(self, reporter: ConsoleReporter, progress: Progress, task: TaskID) -> None:
        self._reporter, self._progress, self._task = reporter, progress, task

    def advance(self, n: int = 1, **values: float) -> None:
        if values:
            self._progress.update(self._task, advance=n, values=_spell(values))
        else:
            self._progress.update(self._task, advance=n)
        self._reporter.stop_here()


class _PlainBar:
    """A bar as lines of a log: one when it has news and enough time has passed, one at the end."""

    def __init__(self, reporter: ConsoleReporter, name: str, total: int, seconds_between_lines: float) -> None:
        self._reporter, self._name, self._total = reporter, name, total
        self._every = seconds_between_lines
        self._done = 0
        self._values = ""
        self._started = self._said = time.monotonic()

    def advance(self, n: int = 1, **values: float) -> None:
        self._done += n
        if values:
            self._values = _spell(values)
        now = time.monotonic()
        if now - self._said >= self._every and 0 < self._done < self._total:
            self._said = now
            left = (now - self._started) * (self._total - self._done) / self._done
            self._line(f"{100 * self._done // self._total} %, {duration(left)} left")
        self._reporter.stop_here()

    def finish(self) -> None:
        self._line(f"done in {duration(time.monotonic() - self._started)}")

    def _line(self, state: str) -> None:
        parts = [f"{self._name} {self._done}/{self._total}", state, *([self._values] if self._values else [])]
        self._reporter.say(", ".join(parts))


def duration(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``; tenths of a second below ten."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _spell(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def error(text: str) -> None:
    """The one line that a failing command ends with, on stderr."""
    _Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"error: {without_secrets(text)}", markup=False, style="red"
    )


def tolerate_narrow_encodings() -> None:
    """Let a terminal that cannot spell a character show a ``?`` instead of ending the run."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
