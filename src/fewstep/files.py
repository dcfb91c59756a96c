"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fewstep.errors import CheckpointError, first_line, is_out_of_memory


def write_bytes_atomic(path: str | Path, content: bytes) -> Path:
    """Write `content` to `path`, making its folders; a reader sees the old file or the new one, never a part.

    Returns:
        The path that was written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # same folder: os.replace cannot cross file systems
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may keep the rename and lose the content
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def write_text_atomic(path: str | Path, text: str) -> Path:
    """`write_bytes_atomic` for text: UTF-8, line ends as given."""
    return write_bytes_atomic(path, text.encode())


def write_tensors_atomic(
    path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> Path:
    """`write_bytes_atomic` for safetensors, whose own writer lets nobody but the user read what it wrote."""
    from safetensors.torch import save

    whole = {name: value.contiguous() for name, value in tensors.items()}
    return write_bytes_atomic(path, save(whole, dict(metadata) if metadata else None))


def replace_file_atomic(partial: str | Path, final: str | Path) -> Path:
    """Give the finished file `partial` the name `final`, on the disk before its name is.

    Args:
        partial: a file on the same file system as `final`.

    Returns:
        The final path.
    """
    with Path(partial).open("rb+") as file:
        os.fsync(file.fileno())  # else a power cut may keep the rename and lose the content
    return Path(partial).replace(final)


@contextmanager
def read_whole(path: Path, fix: str) -> Iterator[None]:
    """Inside, `path` is read, which this package wrote: what goes wrong then is the file's fault, no bug.

    Args:
        fix: what to do about it, the end of the line.

    Raises:
        CheckpointError: something did.
    """
    try:
        yield
    except Exception as error:  # each format has exceptions of its own
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{str(path)!r} cannot be read ({first_line(error)}); {fix}") from error


def replace_folder_atomic(partial: str | Path, final: str | Path) -> Path:
    """Give the finished folder `partial` the name `final`; a folder that had the name is removed afterwards.

    No system call exchanges two folders everywhere: for an instant an older `final` is called `.NAME.old`, whole. It
    gets its name back if that instant goes wrong, here or, after a kill, in `remove_leftovers`.

    Args:
        partial: a folder on the same file system as `final`.

    Returns:
        The final path.
    """
    partial, final = Path(partial), Path(final)
    old = final.with_name(f".{final.name}.old")
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    try:
        partial.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return final


def remove_folder_at_once(folder: Path) -> None:
    """Remove a folder that a reader finds whole or not at all: it loses its name before its files."""
    going = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(going, ignore_errors=True)
    folder.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def remove_leftovers(folder: str | Path) -> None:
    """Remove what writers of this module left in `folder`, not below it, when they were killed.

    A folder that was about to be replaced gets its name back. To be called where nobody else writes.
    """
    for old in Path(folder).glob(".*.old"):
        final = old.with_name(old.name[1:].removesuffix(".old"))
        if not final.exists():
            old.rename(final)
    for ending in ("partial", "old"):
        for left in Path(folder).glob(f".*.{ending}"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def remove_old_leftovers(folder: str | Path) -> None:
    """The same of files, where others may be writing: what has not been written to for a day."""
    for left in Path(folder).glob(".*.partial"):
        with suppress(OSError):  # gone in the meantime, or not ours
            if time.time() - left.stat().st_mtime > 86_400:
                left.unlink()


def at_home(path: str | Path) -> Path:
    """`path` with a leading ~ or ~NAME made that user's folder; one whom this machine does not know is just a name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
