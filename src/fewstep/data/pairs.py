"""Pictures and their captions: what every kind of dataset offers, and the store that all local layouts share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np

from fewstep.data.pictures import PictureError, decode_file, inspect_file, quiet_pillow
from fewstep.data.report import Drops, shown
from fewstep.reporting import SILENT, Reporter

READERS = 8  # threads of a scan: they wait for the disk, most of the time
_CHUNK = 256

NO_PICTURE = np.empty((0, 0, 3), dtype=np.uint8)
"""A picture without a pixel: of captions alone."""


class PictureData(Protocol):
    """Numbered pictures with captions. Reading has no side effects: any process may ask for any item at any time."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call item `index` in a message."""
        ...

    def item(self, index: int) -> tuple[np.ndarray, tuple[str, ...]]:
        """Picture `index`, uint8 [resolution, resolution, 3] RGB, and all its captions, at least one.

        Data that is captions alone has pictures without a pixel, [0, 0, 3].

        Raises:
            PictureError: this picture's content is no good.
            DataError: the data is not there any more.
        """
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """All captions of item `index`, as `item` gives them, without decoding its picture."""
        ...


@dataclass(frozen=True)
class Pair:
    """A picture, by its path in the data with forward slashes, and its captions."""

    name: str
    captions: tuple[str, ...]


class Strings(Sequence[str]):
    """Many strings in two arrays: worker processes share them, and a million of them is no million objects."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        self._ends = np.cumsum([len(string) for string in encoded], dtype=np.int64)
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # slices are not needed
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = int(self._ends[index - 1]) if index else 0
        return self._bytes[start : int(self._ends[index])].decode("utf-8", "surrogateescape")


class Files(Protocol):
    """Where the pictures of pairs lie, by their names."""

    def inspect(self, name: str) -> str:
        """`pictures.inspect` of a picture; it raises `PictureError` alone where only this picture is concerned."""
        ...

    def decode(self, name: str, resolution: int) -> np.ndarray:
        """`pictures.decode` of a picture; raises a `DataError` as well, where it is not there any more."""
        ...


@dataclass(frozen=True)
class FolderFiles:
    """Files below a folder."""

    root: Path

    def inspect(self, name: str) -> str:
        return inspect_file(self.root / name)

    def decode(self, name: str, resolution: int) -> np.ndarray:
        return decode_file(self.root / name, resolution)


class LocalPictures:
    """Pictures in local files, decoded when they are asked for."""

    def __init__(self, files: Files, pairs: Sequence[Pair], resolution: int) -> None:
        self._files = files
        self._resolution = resolution
        self._names = Strings(pair.name for pair in pairs)
        self._captions = Strings(caption for pair in pairs for caption in pair.captions)
        self._ends = np.cumsum([len(pair.captions) for pair in pairs], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return shown(self._names[index])

    def item(self, index: int) -> tuple[np.ndarray, tuple[str, ...]]:
        return self._files.decode(self._names[index], self._resolution), self.captions(index)

    def captions(self, index: int) -> tuple[str, ...]:
        start = int(self._ends[index - 1]) if index else 0
        return tuple(self._captions[number] for number in range(start, int(self._ends[index])))


def keep_readable(
    files: Files, pairs: Sequence[Pair], drops: Drops, reporter: Reporter = SILENT
) -> tuple[list[Pair], str]:
    """Look every picture over (its header and its end, not its pixels) and keep the pairs whose picture is usable.

    Args:
        files: where the pictures lie.
        pairs: in the order that the data is to have.
        drops: counts the others, with reasons.
        reporter: told about progress.

    Returns:
        (pairs that are kept, in order; fingerprint of names, captions, and the pictures' marks).
    """
    kept: list[Pair] = []
    digest = hashlib.blake2b(digest_size=16)

    def look(pair: Pair) -> str | PictureError:
        try:
            return files.inspect(pair.name)
        except PictureError as error:
            return error

    with (
        quiet_pillow(),
        reporter.progress("looking over the pictures", len(pairs)) as bar,
        ThreadPoolExecutor(READERS) as readers,
    ):
        for chunk in _chunks(pairs):
            for pair, found in zip(chunk, readers.map(look, chunk), strict=True):
                if isinstance(found, PictureError):
                    drops.add("pictures", found.reason, pair.name, found.detail)
                else:
                    kept.append(pair)
                    add_to_fingerprint(digest, pair.name, found, pair.captions)
            bar.advance(len(chunk))
    return kept, digest.hexdigest()


def add_to_fingerprint(digest: hashlib.blake2b, name: str, mark: str, captions: Iterable[str]) -> None:
    """Add one item to a fingerprint: each part with its own length, so that no two data sets run into one.

    Args:
        mark: of the picture, such as `pictures.inspect` gives it.
    """
    for part in (name, mark, *captions):
        raw = part.encode("utf-8", "surrogateescape")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    digest.update(b"\xff" * 8)  # no part is this long: the end of the item


def safe_name(name: object) -> str | None:
    """A file name from an annotation file as a path below the root, or None where it would lead out of it.

    Forward slashes; no absolute path, no `..`, nothing that a file system cannot spell.
    """
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return None
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return None
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or path.parts[0].endswith(":"):
        return None
    return str(path)


def _chunks(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    stream = iter(pairs)
    while chunk := list(islice(stream, _CHUNK)):
        yield chunk
