"""How a procedure tells its caller what it is doing, be that a terminal, a notebook or a test."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from fewstep.hiding import without_secrets


class Bar(Protocol):
    """One progress bar."""

    def advance(self, n: int = 1, **values: float) -> None:
        """`n` more units are done; `values` are shown beside the bar until the next call replaces them."""


class Reporter(Protocol):
    """What procedures report to."""

    def say(self, text: str) -> None:
        """One line of information."""

    def warn(self, text: str) -> None:
        """One line that the user should not miss."""

    def progress(self, name: str, total: int) -> AbstractContextManager[Bar]:
        """A bar of `total` units, shown while the context is open."""


def in_bytes(count: float) -> str:
    """A number of bytes in words, in powers of ten: ``3.19 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


class _Silence:
    """A reporter, and a bar, that keeps everything to itself."""

    def say(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def advance(self, n: int = 1, **values: float) -> None: ...

    @contextmanager
    def progress(self, name: str, total: int) -> Iterator[Bar]:
        yield self


SILENT: Reporter = _Silence()
"""What parts of a procedure report to when they are given no reporter."""


class _Log(_Silence):
    """Python's own log: lines are its information, warnings its warnings, which it shows unless told otherwise."""

    def __init__(self) -> None:
        self._logger = logging.getLogger("fewstep")

    def say(self, text: str) -> None:
        self._logger.info("%s", without_secrets(text))

    def warn(self, text: str) -> None:
        self._logger.warning("%s", without_secrets(text))


LOG: Reporter = _Log()
"""What whole procedures report to when a program that calls them gives no reporter: bars do not show, warnings do."""


class Wordless:
    """For a process beside the one that speaks for all: nothing is said, and its bars are where it may be stopped.

    Args:
        reporter: whose bars they are; a quiet one that holds signals back until a bar advances, or none that shows.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def say(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def progress(self, name: str, total: int) -> AbstractContextManager[Bar]:
        """The reporter's own."""
        return self._reporter.progress(name, total)
