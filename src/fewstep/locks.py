"""One run a folder: whoever writes into it holds its lock, which the operating system takes back from the dead."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from fewstep.errors import InputError
from fewstep.files import write_text_atomic

LOCK, OWNER = ".lock", ".owner"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Nobody else writes into `folder` inside; it is made if need be.

    Raises:
        InputError: somebody does already; the line says who.
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
    try:
        write_text_atomic(owner, f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        owner.unlink(missing_ok=True)
        # Removed while it is held: filelock looks whether what it got is still there. Windows keeps open files.
        with suppress(OSError):
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()
