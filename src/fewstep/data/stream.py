"""Data too large or too far away to have here: shards of it, of which a few at a time are fetched, and read at random.

    shards      in a new order each epoch, by the seed; `WINDOW` of them at a time are the buffer
    pictures    of the shards in the buffer in an order of their own, by the seed and the buffer's number

Every shard stands for as many places in the sequence of all samples as the first one has pictures. What stands at a
place then follows from the seed and the place, as with data that is here: nothing is counted on the way, so that a
resumed run fetches the shards of its buffer again and goes on, and workers and processes need not agree on anything. Of
a shard with more pictures some are left out, others each epoch; in one with fewer some come twice.

All processes of a run on a machine share what is fetched; the next buffer is fetched while this one is used, and shards
that are two buffers back are removed, or further back where another process, or those that load ahead, may still be at
them. Another run on the same source has a folder of its own: it is at other shards.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch.distributed import get_world_size, is_initialized

from fewstep.data.order import sample_index
from fewstep.data.pairs import PictureData
from fewstep.data.pictures import PictureError
from fewstep.data.report import DataReport
from fewstep.errors import DataError
from fewstep.files import write_text_atomic
from fewstep.randomness import generator

WINDOW = 4
"""Shards that are read at random at a time."""

_REPEATS = 10  # a shard that another process has removed meanwhile is fetched again, but not for ever

_ROWS = 2**32  # more pictures than any shard has

_IN_USE: dict[Path, FileLock] = {}
"""What this process holds until it ends, so that others see which folders are in use."""

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, kw_only=True)
class OpenedShard:
    """A shard that is here and was looked over.

    Attributes:
        data: its usable pictures, at least one.
        report: what was kept and dropped.
        fingerprint: of its content, hexadecimal.
    """

    data: PictureData
    report: DataReport
    fingerprint: str

    @property
    def mark(self) -> int:
        """64 bits of the fingerprint."""
        return int(self.fingerprint[:16], 16)


@dataclass(frozen=True)
class _Copy:
    """A shard's folder, and which one it was: it may be removed, and fetched again, while somebody reads it."""

    place: Path
    which: tuple[int, int, int] | None

    @classmethod
    def at(cls, place: Path) -> _Copy:
        return cls(place, _which(place))

    @property
    def is_there(self) -> bool:
        return self.which is not None and _which(self.place) == self.which


class ShardSource(Protocol):
    """Where shards come from; may be asked by several threads and processes."""

    @property
    def key(self) -> str:
        """Another one for other shards, and for the same ones once they have changed."""
        ...

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """What to call a shard in a message."""
        ...

    def fetch(self, number: int, folder: Path) -> None:
        """Put a shard into an empty folder.

        Raises:
            DataError: it cannot be had.
            OSError: the folder cannot be written to.
        """
        ...

    def open(self, number: int, folder: Path) -> OpenedShard:
        """Look over the shard that `fetch` put there.

        Raises:
            DataError: it is damaged, or too little of it can be used.
        """
        ...


class StreamedPictures:
    """The pictures of a source's shards.

    Item r · (number of shards) + s is the picture r of shard s. `index_at` adds the mark of the shard's content, as
    (mark · _ROWS + r) · (number of shards) + s: what is kept of an item under its number is of that very content, even
    where nobody notices that a shard was replaced, or another release of Pillow leaves out another picture.
    """

    def __init__(self, source: ShardSource) -> None:
        """Fetch the first shard, which says how many places each of them stands for.

        Raises:
            DataError: it cannot be had or used.
        """
        self._source = source
        self._home = _own_folder(cache_folder() / source.key)
        self._opened: dict[int, OpenedShard] = {}
        self._copies: dict[int, _Copy] = {}  # of what was opened
        self._spread = 0  # places
        self._notes: list[str] = []
        self._window = (0, -1)  # seed and number
        self.first = self._read(0, lambda opened: opened)
        self._each = len(self.first.data)

    def __len__(self) -> int:
        """Places of an epoch."""
        return len(self._source) * self._each

    def name(self, index: int) -> str:
        shard = index % len(self._source)
        return self._at(index, lambda data, row: f"{self._source.name(shard)}: {data.name(row)}")

    def item(self, index: int) -> tuple[np.ndarray, tuple[str, ...]]:
        return self._at(index, lambda data, row: data.item(row))

    def captions(self, index: int) -> tuple[str, ...]:
        return self._at(index, lambda data, row: data.captions(row))

    def index_at(self, seed: int, place: int, attempt: int = 0) -> int:
        """Which item stands at a place of the endless sequence, or for it at a later attempt.

        Raises:
            DataError: a shard of the buffer cannot be had or used.
        """
        window, at = divmod(place, self._width * self._each)
        self._enter(seed, window)
        shards = self._shards_of(seed, window)
        found = [self._read(shard, lambda opened: opened) for shard in shards]
        sizes = [len(opened.data) for opened in found]
        if attempt:
            rng = generator(seed, "replacement", place, attempt)
            number = int(torch.randint(sum(sizes), (), generator=rng))
        else:
            number = sample_index(_derived(seed, f"buffer {window}"), at, sum(sizes))
        for shard, opened, size in zip(shards, found, sizes, strict=True):
            if number < size:
                return (opened.mark * _ROWS + number) * len(self._source) + shard
            number -= size
        raise AssertionError("a number below the sum of the sizes is in one of them")

    def expect(self, spread: int) -> None:
        """Places up to `spread` apart are read at the same time: what is needed for one of them is not removed."""
        self._spread = max(self._spread, spread)

    def notes(self) -> tuple[str, ...]:
        """What was dropped of the shards that were opened since the last call."""
        said, self._notes = tuple(self._notes), []
        return said

    @property
    def _width(self) -> int:
        """Shards of a buffer."""
        return min(WINDOW, len(self._source))

    def _shards_of(self, seed: int, window: int) -> list[int]:
        first = window * self._width
        order = _derived(seed, "shards")
        return [sample_index(order, place, len(self._source)) for place in range(first, first + self._width)]

    def _enter(self, seed: int, window: int) -> None:
        """Fetch what comes next, in the background, and let go of what is over."""
        if self._window == (seed, window):
            return
        self._window = (seed, window)
        following = self._shards_of(seed, window + 1)
        kept = {*self._shards_of(seed, window), *following}
        self._opened = {shard: opened for shard, opened in self._opened.items() if shard in kept}
        apart = ceil(self._spread / (self._width * self._each))  # buffers that others may be behind, or ahead
        for their_seed, theirs in {(seed, window), *self._windows_of_all()}:
            for near in range(max(0, theirs - max(1, apart)), theirs + apart + 2):
                kept.update(self._shards_of(their_seed, near))
        for place in self._home.glob("[0-9]*"):
            if place.is_dir() and int(place.name) not in kept:
                _remove(place)

        def ahead() -> None:
            with suppress(DataError):  # whoever needs it meets the error, or has better luck
                for shard in following:
                    self._here(shard)

        _in_background(ahead)

    def _windows_of_all(self) -> Iterator[tuple[int, int]]:
        """Seed and number of the buffer that each process of the run on this machine reads, this one's noted first.

        Updates keep processes together, but what is done before them does not: kept rollouts, a cache.
        """
        with _writing(self._home):
            write_text_atomic(self._home / f"{os.getpid()}.window", "{} {}".format(*self._window))
        for file in self._home.glob("*.window"):
            if _has_ended(int(file.stem)):
                file.unlink(missing_ok=True)
                continue
            with suppress(OSError, ValueError):
                seed, window = map(int, file.read_text().split())
                yield seed, window

    def _at(self, index: int, work: Callable[[PictureData, int], ResultT]) -> ResultT:
        """`work` on an item: its shard's pictures, and its number among them."""
        rest, shard = divmod(index, len(self._source))
        mark, row = divmod(rest, _ROWS)

        def on(opened: OpenedShard) -> ResultT:
            if mark and mark != opened.mark:
                raise DataError(
                    f"{self._source.name(shard)} was changed after the data was scanned; training data must stay as it "
                    "is during a run; put it back and resume from the last checkpoint"
                )
            return work(opened.data, row % len(opened.data))

        return self._read(shard, on)

    def _read(self, shard: int, work: Callable[[OpenedShard], ResultT]) -> ResultT:
        """`work` on a shard, fetched if need be, and again where another process removes it meanwhile."""
        for left in reversed(range(_REPEATS)):
            if shard not in self._opened:
                self._copies[shard] = _Copy.at(self._here(shard))
            copy = self._copies[shard]
            try:
                if shard not in self._opened:
                    self._opened[shard] = self._look(shard, copy.place)
                return work(self._opened[shard])
            except PictureError:
                raise
            except DataError:
                looked_over = self._opened.pop(shard, None) is not None
                if copy.is_there and not looked_over:
                    self._discard(copy)  # it is damaged: whoever asks next fetches it again
                    raise
                if copy.is_there or not left:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _look(self, shard: int, place: Path) -> OpenedShard:
        opened = self._source.open(shard, place)
        if opened.report.dropped:
            self._notes += [f"{self._source.name(shard)}: {line}" for line in list(opened.report.lines())[1:]]
        return opened

    def _discard(self, copy: _Copy) -> None:
        """Remove what was opened, and nothing that somebody has put into its place."""
        with suppress(OSError), FileLock(self._lock_of(copy.place)):
            if copy.is_there:
                _remove(copy.place)

    def _lock_of(self, place: Path) -> Path:
        """Held while a shard is fetched."""
        return place.with_name(f"{place.name}.lock")

    def _here(self, shard: int) -> Path:
        """The folder of a shard, which is fetched if it is not there; once, whoever asks."""
        place = self._home / f"{shard:06d}"
        if place.is_dir():
            return place
        with _writing(self._home):
            self._home.mkdir(parents=True, exist_ok=True)
            with FileLock(self._lock_of(place)):
                if not place.is_dir():
                    part = self._home / f".{shard:06d}"
                    shutil.rmtree(part, ignore_errors=True)
                    part.mkdir()
                    self._source.fetch(shard, part)
                    part.rename(place)
        return place


def cache_folder() -> Path:
    """Where shards are kept while they are needed: `$XDG_CACHE_HOME/fewstep/shards`, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewstep" / "shards"


def _own_folder(source: Path) -> Path:
    """This run's folder below that of a source; all its processes on this machine have the same one.

    What runs that have ended left there is taken over, since a resumed run goes on with the same shards, or removed.

    Raises:
        DataError: it cannot be made.
    """
    own = source / _run()
    with _writing(source):
        source.mkdir(parents=True, exist_ok=True)
        with FileLock(source / ".lock"):
            for other in sorted(source.glob("run-*")):
                if other == own or _in_use(other):
                    continue
                if own.exists():
                    shutil.rmtree(other, ignore_errors=True)
                else:
                    other.rename(own)
                    for window in own.glob("*.window"):
                        window.unlink()
            own.mkdir(exist_ok=True)
            used = own / f"{os.getpid()}.used"
            if used in _IN_USE:  # taken anew: somebody may have emptied the cache meanwhile
                _IN_USE.pop(used).release()
            lock = FileLock(used)
            lock.acquire()
            _IN_USE[used] = lock
    return own


def _has_ended(process: int) -> bool:
    """Whether a process of this machine is known to have ended."""
    if os.name == "posix":  # elsewhere this would end it
        with suppress(PermissionError):  # somebody else's
            try:
                os.kill(process, 0)  # asks, and sends nothing
            except ProcessLookupError:
                return True
    return False


def _run() -> str:
    """What a run's processes on a machine have in common, and share with no other run: their parent and their port."""
    if is_initialized() and get_world_size() > 1:
        return f"run-{socket.gethostname()}-{os.environ.get('MASTER_PORT', '')}-{os.getppid()}"
    return f"run-{socket.gethostname()}-{os.getpid()}"


def _in_use(folder: Path) -> bool:
    """Whether a process that uses a run's folder lives: of the dead, the operating system has released the locks."""
    for used in folder.glob("*.used"):
        try:
            with FileLock(used, timeout=0):
                pass
        except Timeout:
            return True
        used.unlink(missing_ok=True)
    return False


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{str(folder)!r} cannot be written to: {error.strerror or error}; shards of the data are kept there while "
            "they are needed, about twelve, more where they are small; make room, or set XDG_CACHE_HOME to another "
            "folder"
        ) from error


def _in_background(work: Callable[[], None]) -> None:
    threading.Thread(target=work, daemon=True).start()


def _which(place: Path) -> tuple[int, int, int] | None:
    """What tells a folder from one that comes to its place later; None where there is none."""
    try:
        found = place.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns  # numbers of inodes are given out again


def _remove(place: Path) -> None:
    """Remove a folder at once, as far as others see; whoever was faster has done it."""
    going = place.with_name(f".{place.name}.{os.getpid()}.old")
    with suppress(OSError):
        place.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def _derived(seed: int, what: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{what} {seed}".encode(), digest_size=8).digest(), "little")
