"""One run a folder: whoever writes into it holds its lock, which the operating system takes back from the dead."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from fewstep.errors import FewstepError, InputError
from fewstep.files import write_text_atomic

LOCK, OWNER = ".lock", ".owner"


@contextmanager
def alone_in(folder: Path) -> Iterator[Callable[[], None]]:
    """Nobody else writes into `folder` inside; it is made if need be.

    Yields:
        A check, for before something is written: it raises `InputError` where the folder is no longer the one that
        was locked.

    Raises:
        InputError: somebody does already, and the line says who; or the folder was taken away meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / LOCK, timeout=0), folder / OWNER
    try:
        lock.acquire()
    except Timeout:
        who = owner.read_text(encoding="utf-8").strip() if owner.exists() else "another process"
        raise InputError(
            f"{str(folder)!r} is being written to by {who}; allowed is one run a folder; wait for it, stop it, or "
            "choose another folder"
        ) from None
    held = _identity(folder / LOCK)

    def check() -> None:
        if _identity(folder / LOCK) != held:
            raise InputError(
                f"{str(folder)!r} was removed or replaced while it was being written to; allowed is a folder that "
                "stays; what was saved in it went with it: put it back, or start again"
            )

    try:
        write_text_atomic(owner, f"process {os.getpid()} on {socket.gethostname()}\n")
        yield check
    except (OSError, FewstepError):
        check()  # where the folder is gone, that is the reason
        raise
    finally:
        if _identity(folder / LOCK) == held:
            owner.unlink(missing_ok=True)
            # Removed while it is held: filelock looks whether what it got is still there. Windows keeps open files.
            with suppress(OSError):
                (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def _identity(file: Path) -> tuple[int, int] | None:
    """What tells a file from another one that came to its name; None where there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
