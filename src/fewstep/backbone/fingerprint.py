"""A short name for the very weights of a base: cheap to take, different for any other training of the same model."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

LENGTH = 32
"""Hexadecimal digits of a fingerprint: 128 bits."""

SAMPLE = 4096
"""Bytes read at the start and at the end of every tensor."""


def of_files(root: Path, configs: Iterable[Path], weights: Iterable[Path], *, note: str = "") -> str:
    """Fingerprint of a base by its files, whatever precision they are loaded in afterwards.

    Configurations count in full. Of safetensors the header counts in full (every name, shape and dtype) and each tensor
    by its two ends: training, merging or swapping a part changes every value of the tensors it touches, so reading a
    few megabytes tells it. Of other files the size, both ends and 1,024 places in between count; the end of a pickled
    checkpoint is its zip directory, with a checksum of every tensor.

    Args:
        root: what the paths are named relative to, so that a copy elsewhere has the same fingerprint.
        configs: configuration and vocabulary files.
        weights: weight files.
        note: anything else that the base depends on.
    """
    digest = hashlib.sha256(note.encode())
    for path in sorted(configs):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    for path in sorted(weights):
        with path.open("rb") as file:
            digest.update(path.relative_to(root).as_posix().encode() + b"\0")
            if path.suffix == ".safetensors":
                _add_safetensors(digest, file)
            else:
                _add_places(digest, file, path.stat().st_size)
    return digest.hexdigest()[:LENGTH]


def of_text(text: str) -> str:
    """Fingerprint of a base that a text describes in full, such as random weights by architecture and seed."""
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def _add_safetensors(digest: hashlib._Hash, file: BinaryIO) -> None:
    (size,) = struct.unpack("<Q", file.read(8))
    header = file.read(size)
    digest.update(header)
    start = 8 + size
    for name, entry in sorted(json.loads(header).items()):
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        for place in (begin, max(begin, end - SAMPLE)):
            file.seek(start + place)
            digest.update(file.read(min(SAMPLE, end - place)))


def _add_places(digest: hashlib._Hash, file: BinaryIO, size: int) -> None:
    digest.update(size.to_bytes(8, "little"))
    for number in range(1025):
        file.seek(max(0, size - SAMPLE) * number // 1024)
        digest.update(file.read(SAMPLE))
    file.seek(max(0, size - 2**20))
    digest.update(file.read())
