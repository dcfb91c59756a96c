"""Shards: .tar files of pictures with captions, as webdataset writes them, indexed once and read at random.

A picture and the .txt or .json of the same stem in the same shard belong together, wherever in it they stand; equal
names in two shards are two samples. Nothing is ever unpacked: a member's name is a label and no place on a disk.
"""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from fewstep.data import captions
from fewstep.data.pairs import READERS, Pair, Strings
from fewstep.data.pictures import KNOWN, SUFFIXES, UNREAD, decode, gone, inspect
from fewstep.data.report import Drops, Kind, shown
from fewstep.data.stems import Listing, pair_by_stem
from fewstep.errors import DataError
from fewstep.reporting import SILENT, Reporter

_LONGEST = 2**20  # bytes of a header, or of a file of captions: nothing longer is read at once while indexing

_ENDINGS = KNOWN | captions.UNREAD | {".txt", ".json"}  # of members that are taken up

_TOO_LONG = f"file of captions is longer than {_LONGEST} bytes"

# What tarfile raises on nonsense.
_BROKEN = (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError)

_Captions = tuple[list[str], list[str]]  # those that are good, and what is wrong with the others


@dataclass(frozen=True)
class _Shard:
    """A shard, and its length and time of change when it was indexed: in another one, other pictures are there."""

    path: Path
    state: tuple[int, int]

    @contextmanager
    def opened(self) -> Iterator[io.FileIO]:
        """The file, unbuffered.

        Raises:
            DataError: it is gone, or another one.
        """
        try:
            with io.FileIO(self.path) as stream:
                if _state(stream) != self.state:
                    raise DataError(
                        f"{self.path} was changed after the data was scanned; training data must stay as it is during "
                        "a run; put it back and resume from the last checkpoint"
                    )
                yield stream
        except OSError as error:
            raise gone(self.path, error) from error


class Shards:
    """The pictures in shards, by name: SHARD.tar/MEMBER."""

    def __init__(self, shards: Sequence[_Shard], places: Mapping[str, tuple[int, int, int]]) -> None:
        """Take the shards, and of each picture (number of its shard, first byte, length)."""
        self._shards = shards
        names = sorted(places)
        # In arrays, which worker processes share: of a dictionary each would come to have a copy of its own.
        self._names = Strings(names)
        self._places = np.array([places[name] for name in names], dtype=np.int64).reshape(-1, 3)

    def inspect(self, name: str) -> str:
        with self._member(name) as member:
            return inspect(member)

    def decode(self, name: str, resolution: int) -> np.ndarray:
        with self._member(name) as member:
            return decode(member, resolution)

    @contextmanager
    def _member(self, name: str) -> Iterator[BinaryIO]:
        number, first, length = self._places[bisect_left(self._names, name)].tolist()
        with self._shards[number].opened() as stream:
            yield io.BufferedReader(_Window(stream, first, length))


def scan_shards(
    paths: Sequence[Path], drops: Drops, *, caption_column: str | None = None, reporter: Reporter = SILENT
) -> tuple[Shards, list[Pair]]:
    """Index shards and pair their pictures with their captions.

    Args:
        paths: of shards whose file names differ.
        drops: counts what belongs to nothing.
        caption_column: key of the caption in the .json files, which then count alone. If None, the .txt counts where
            there is one, and elsewhere the key is found by its name.

    Returns:
        (the pictures, the pairs sorted by name).

    Raises:
        DataError: a shard cannot be read, or is cut short or damaged.
        InputError: it is not clear which key of the .json files is the caption, or none of them has the one named.
    """
    shards: list[_Shard] = []
    places: dict[str, tuple[int, int, int]] = {}
    texts: dict[str, _Captions] = {}
    records: dict[str, dict[str, Any] | str] = {}
    listing = Listing()
    with reporter.progress("indexing the shards", len(paths)) as bar, ThreadPoolExecutor(READERS) as readers:
        for number, index in enumerate(readers.map(_index, paths)):
            shards.append(index.shard)
            below = PurePosixPath(index.shard.path.name)
            for file, place in index.pictures:
                places[str(below / file)] = (number, *place)
                listing.add_picture(below / file)
            with_text = {file.with_suffix("") for file, _ in index.texts}
            for file, text in index.texts if caption_column is None else ():
                texts[str(below / file)] = text
                listing.add_caption(below / file)
            for file, record in index.records:
                if caption_column is not None or file.with_suffix("") not in with_text:
                    records[str(below / file)] = record
                    listing.add_caption(below / file)
            for file in index.unread:
                (listing.add_picture if file.suffix.lower() in UNREAD else listing.add_caption)(below / file)
            for file in index.no_files:
                kind: Kind = "pictures" if file.suffix.lower() in KNOWN else "captions"
                drops.add(kind, "a link or a sparse file in its tar", str(below / file))
            bar.advance()
    column, source = caption_column or "", f"the .json in the shards of {paths[0].parent}"
    keys = sorted({key for record in records.values() if isinstance(record, dict) for key in record})
    if records and caption_column is None:
        column = captions.guess_column(keys, source)
    elif keys:
        captions.check_column("caption_column", column, keys, source)

    def read(name: str) -> _Captions:
        if name in texts:
            return texts[name]
        record = records[name]
        return ([], [record]) if isinstance(record, str) else captions.clean_list(record.get(column))

    return Shards(shards, places), pair_by_stem(listing, read, drops, reporter)


# ------------------------------------------------------------------------------------------------------------ indexing


@dataclass(kw_only=True)
class _Index:
    """What one shard holds, in the order of its members."""

    shard: _Shard
    pictures: list[tuple[PurePosixPath, tuple[int, int]]] = field(default_factory=list)  # first byte, length
    texts: list[tuple[PurePosixPath, _Captions]] = field(default_factory=list)
    records: list[tuple[PurePosixPath, dict[str, Any] | str]] = field(default_factory=list)  # or what is wrong with it
    unread: list[PurePosixPath] = field(default_factory=list)  # of endings that are known and not read
    no_files: list[PurePosixPath] = field(default_factory=list)

    def add(self, member: tarfile.TarInfo, stream: io.FileIO) -> None:
        """Take up a member, if it is a picture or has captions; only the latter are read."""
        file = PurePosixPath(member.name.lstrip("/"))
        suffix = file.suffix.lower()
        hidden = any(part.startswith(".") for part in file.parts)
        if hidden or member.isdir() or suffix not in _ENDINGS:
            return
        if not member.isreg() or member.issparse():
            self.no_files.append(file)
        elif suffix in UNREAD | captions.UNREAD:
            self.unread.append(file)
        elif suffix in SUFFIXES:
            self.pictures.append((file, (member.offset_data, member.size)))
        else:
            raw = None
            if member.size <= _LONGEST:
                stream.seek(member.offset_data)
                raw = stream.read(member.size)
            if suffix == ".txt":
                self.texts.append((file, _text(raw)))
            else:
                self.records.append((file, _record(raw)))


def _index(path: Path) -> _Index:
    """Go through a shard from header to header.

    Raises:
        DataError: it cannot be read, or does not end as a whole one does.
    """
    try:
        if path.is_fifo():  # it would be waited for
            raise OSError(errno.EINVAL, "it is a pipe")
        with _Headers(path) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            index = _Index(shard=_Shard(path, _state(stream)))
            reached = 0
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
                if tar.offset <= reached or member.size < 0:
                    raise tarfile.ReadError("a header points back")
                reached = tar.offset
                index.add(member, stream)
            # tarfile takes a damaged header, or the end of a file that was cut between two members, for the end.
            stream.seek(tar.offset)
            rest = stream.read(_LONGEST)
            if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
                raise tarfile.ReadError(f"no end mark at byte {tar.offset}")
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}; check its permissions and the disk"
        ) from error
    except _BROKEN as error:
        raise DataError(
            f"{path} is cut short or damaged ({shown(str(error))}); allowed is a whole .tar, not compressed; make or "
            "download it again"
        ) from error
    return index


def _text(raw: bytes | None) -> _Captions:
    """The caption in a .txt; None is one that is too long to be read."""
    try:
        return ([], [_TOO_LONG]) if raw is None else ([captions.decode(raw)], [])
    except captions.CaptionError as error:
        return [], [str(error)]


def _record(raw: bytes | None) -> dict[str, Any] | str:
    """The object in a .json, or what is wrong with it; None is one that is too long to be read."""
    if raw is None:
        return _TOO_LONG
    try:
        values = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "caption is not UTF-8"
    except (ValueError, RecursionError):
        return "file of captions is not JSON"
    return values if isinstance(values, dict) else "file of captions is not a JSON object"


class _Headers(io.FileIO):
    """A shard that is being indexed: a header that claims to be huge, or less than nothing, is not followed."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _LONGEST:
            raise tarfile.ReadError("a header is too long")
        return super().read(size)


class _Window(io.RawIOBase):
    """A part of an open file, as a file of its own."""

    def __init__(self, stream: io.FileIO, first: int, length: int) -> None:
        self._stream = stream
        self._first = first
        self._length = length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("a seek to before the start")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        wanted = memoryview(buffer)[: max(0, self._length - self._at)]
        self._stream.seek(self._first + self._at)
        got = self._stream.readinto(wanted)
        self._at += got
        return got


def _state(stream: io.FileIO) -> tuple[int, int]:
    found = os.fstat(stream.fileno())
    return found.st_size, found.st_mtime_ns
