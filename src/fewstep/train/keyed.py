"""A folder of things that were computed once, with a file that says what from: nothing stale is ever taken from it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.errors import CheckpointError, InputError
from fewstep.files import remove_old_leftovers, write_text_atomic

ENTRIES = ".safetensors"
"""How the names of the files end that hold what was computed."""


def claim(file: Path, key: Mapping[str, Any], *, held: str, of: str) -> None:
    """Compare `key` with the one that the folder's `file` holds, or write it into a folder that holds nothing yet.

    Every process does, for on another machine the folder may be another one. Whoever comes first writes.

    Args:
        key: all that the folder's content depends on.
        held: what the folder holds, in words, with {} for its name.
        of: whose it is, in a word: what has to be the same.

    Raises:
        CheckpointError: the folder's content is of something else or nobody knows of what, or its key cannot be read.
        OSError: the folder cannot be written to.
    """
    remove_old_leftovers(file.parent)
    wanted = json.loads(json.dumps(key))
    holds = held.format(repr(str(file.parent)))
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_name(f".{file.name}.lock")):
            # One look at both: the key is there before the first entry is.
            there = {path.name for path in file.parent.iterdir()}
            if file.name not in there:
                if any(name.endswith(ENTRIES) for name in there):
                    raise CheckpointError(
                        f"{holds}, but no {file.name} that says what of; allowed is a folder with both or with "
                        "neither; choose another folder, or remove this one"
                    )
                write_text_atomic(file, json.dumps(wanted, indent=1) + "\n")
                return
    try:
        found = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{holds}, but {file.name} cannot be read ({error}); choose another folder") from None
    for name in sorted(wanted.keys() | found.keys()):
        if found.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{holds} with {name} {found.get(name)}, this run has {wanted.get(name)}; allowed is the same {of} on "
                "the same data, with all that this file names alike; choose another folder, or remove this one to make "
                "all anew"
            )


def opened(path: Path) -> Any:
    """A safetensors file, to read parts of it through a memory map.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read ({error}); remove it, and it is made again by the same command"
        ) from None


def checksum(name: str, tensors: Sequence[Tensor]) -> int:
    """CRC-32 of tensors and of the name that they are kept under: what a disk gives back is looked at at every read.

    A flipped bit is no damage that a file's own format shows, and a wrong latent trains without an error. A CRC finds
    every flip of up to three bits, and costs a fraction of the read itself.
    """
    found = zlib.crc32(name.encode())
    for tensor in tensors:
        found = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, found)
    return found


def damaged(path: Path, name: str) -> CheckpointError:
    """The error for what `checksum` does not know again."""
    return CheckpointError(
        f"{str(path)!r} is damaged at {name}: what is read is not what was written; remove the file, and it is made "
        "again by the same command; look at the disk"
    )


def unwritten(setting: str, folder: Path, error: OSError) -> InputError:
    """The error for a folder, what `setting` names, that the system does not let be written to."""
    return InputError(
        f"{setting} {str(folder)!r} cannot be written to: {error.strerror or error}; what is there is whole; make "
        "room, or choose another folder"
    )
