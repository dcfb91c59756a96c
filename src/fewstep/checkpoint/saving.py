"""Writing a checkpoint: whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from ..errors import CheckpointError
from ..files import replace_folder_atomic
from .manifest import Record, write_manifest
from .names import RESUME, SETTINGS
from .state import Stateful, tensor_bytes, write_states

SMALL_FILES = 2**20
"""Bytes that are set aside for what a checkpoint holds besides tensors."""


def save(
    folder: Path,
    write_adapter: Callable[[Path], object],
    *,
    settings: str,
    record: Record,
    stateful: Mapping[str, Stateful] | None = None,
    adapter_bytes: int = 0,
) -> Path:
    """Write a checkpoint; it appears under its name when everything in it is on the disk.

    Args:
        folder: its place, `RUN/lora/checkpoint-N`, `RUN/lora/final` or `RUN/lora/best`; one that is there is replaced.
            RUN itself has to be there.
        write_adapter: writes the adapter and its scheduler into the folder that it is given and proves them there:
            if it raises, nothing is published.
        settings: the run's settings as TOML.
        record: goes into the manifest.
        stateful: what it takes to resume, by name; None for an adapter alone.
        adapter_bytes: how much `write_adapter` writes; it may need twice that on the way.

    Returns:
        The folder.

    Raises:
        CheckpointError: an object's state holds something that JSON and safetensors cannot; or the disk has no room
            for it or cannot be written to. What was there before is as it was.
    """
    from safetensors import SafetensorError

    partial = folder.with_name(f".{folder.name}.partial")
    states = {name: thing.state_dict() for name, thing in (stateful or {}).items()}
    try:
        if not folder.parent.exists():
            folder.parent.mkdir(exist_ok=True)
            _synchronise_folder(folder.parent.parent)
        shutil.rmtree(partial, ignore_errors=True)  # what an interrupted run left
        _require_room(folder, 2 * adapter_bytes + tensor_bytes(states) + SMALL_FILES)
        partial.mkdir()
        write_adapter(partial)
        (partial / SETTINGS).write_text(settings, encoding="utf-8")
        if stateful is not None:
            write_states(partial / RESUME, states)
        write_manifest(partial, record)
        _synchronise(partial)
        replace_folder_atomic(partial, folder)
        _synchronise_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise _unwritten(folder, reason) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise _unwritten(folder, f"it needs {needed:,} bytes, {free:,} are free")


def _unwritten(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{folder.name} cannot be written to {str(folder.parent)!r}: {reason}; what was saved before is whole; make "
        "room there, or the folder writable, then go on with --resume_from_checkpoint auto"
    )


def _synchronise(folder: Path) -> None:
    """Wait until every file below `folder` is on the disk, and every name of one too."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        else:
            _synchronise_folder(path)
    _synchronise_folder(folder)


def _synchronise_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows writes names through and opens no folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
