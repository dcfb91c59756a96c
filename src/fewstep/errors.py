"""The exceptions that users see: one line each, saying what came, what is allowed, and how to put it right.

Each class carries the exit code with which the command line ends when nobody catches it. An exception that does not
derive from `FewstepError` is a bug of ours and ends with 1.
"""

from __future__ import annotations

import re


class FewstepError(Exception):
    """Base of every error that is not a bug: catch this one to catch them all."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """What somebody else's error says in its first line, short enough to stand in one of ours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # colours
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether somebody's error says that memory is full; only CUDA's allocator has a class of its own for it."""
    full = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    said = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in full)
    return said or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


class InputError(FewstepError):
    """A flag, a setting, a base model or a value that cannot be used."""

    exit_code = 2


class DataError(FewstepError):
    """Training data that is missing, unreadable, or dropped beyond what was allowed."""

    exit_code = 3


class CheckpointError(FewstepError):
    """A checkpoint or an adapter that is missing, damaged, or does not do what it says."""

    exit_code = 4


class Interrupted(FewstepError):
    """The run was asked to stop; it saved its state first and can be resumed."""

    exit_code = 75


class StopAsked(KeyboardInterrupt):
    """A first signal asked to stop, between two pieces of work: what is saved is whole, and nothing was cut off."""
