"""Shards by URL: `.tar` files of pictures with captions on a web server, fetched whole, one after the other."""

from __future__ import annotations

import hashlib
import itertools
import re
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse, IncompleteRead, InvalidURL
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit

from fewstep.data.pairs import READERS, LocalPictures, keep_readable
from fewstep.data.report import Drops, shown
from fewstep.data.shards import scan_shards
from fewstep.data.stream import OpenedShard
from fewstep.errors import DataError, InputError
from fewstep.reporting import SILENT, Reporter

ATTEMPTS = 5
"""At anything that is asked of a server."""

PAUSE = 1.0
"""Seconds before the second attempt; twice as many before each further one."""

SILENCE = 30.0
"""Seconds without a byte after which a server is taken to be gone."""

_MOST_SHARDS = 1_000_000
_AT_ONCE = 2**20
_PASSING = {408, 425, 429, 500, 502, 503, 504}  # answers that may be others the next time
_NO_HEAD = {403, 405, 501}  # answers of servers that know GET alone, or sign URLs for it alone

ResultT = TypeVar("ResultT")


def is_url(name: str) -> bool:
    """Whether `name` is the address of something on a web server."""
    return re.match(r"https?://", name) is not None


def expand(pattern: str) -> list[str]:
    """The URLs that a pattern stands for: {0000..0123} is every number from the one to the other, as wide as the first.

    Raises:
        InputError: it names no .tar, has a range that no numbers are in, or holds a user's name.
    """
    _refuse_users(pattern)
    said = shown(_bare(pattern))
    parts = re.split(r"\{(\d+\.\.\d+)\}", pattern)
    ranges = []
    count = 1
    for span in parts[1::2]:
        first, last = span.split("..")
        size = int(last) - int(first) + 1
        count *= max(size, 0)
        if size < 1 or count > _MOST_SHARDS:
            raise InputError(
                f"dataset_name {said!r} has the range {{{span}}}; allowed is {{FIRST..LAST}} with FIRST up to LAST, "
                f"of at most {_MOST_SHARDS:,} shards; for example {{0000..0123}}"
            )
        ranges.append([f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)])
    urls = [
        "".join(itertools.chain(*itertools.zip_longest(parts[::2], numbers, fillvalue="")))
        for numbers in itertools.product(*ranges)
    ]
    if not all(urlsplit(url).path.endswith(".tar") and urlsplit(url).hostname for url in urls):
        raise InputError(
            f"dataset_name {said!r} is no shard; allowed by URL are .tar files as webdataset writes them, several "
            "as https://HOST/PATH-{0000..0123}.tar; other data has to be downloaded first"
        )
    return urls


def _refuse_users(pattern: str) -> None:
    """Say no to an address with a user's name in it, without repeating what may be a password.

    Python's client takes the name for a part of the host, and repeats it in its errors.
    """
    if "@" in pattern.split("/")[2]:
        raise InputError(
            "dataset_name is an address with a user name in it; allowed is one without; use a signed address, or for a "
            "dataset of the Hub its ID with HF_TOKEN set"
        )
    try:
        _ = urlsplit(re.sub(r"\{(\d+)\.\.\d+\}", r"\1", pattern)).port
    except ValueError:  # such as of a password with a slash in it
        raise InputError(
            "dataset_name is an address whose host or port cannot be read; allowed is https://HOST/PATH.tar or "
            "https://HOST:PORT/PATH.tar, without a user name; check the address"
        ) from None


@dataclass(frozen=True)
class _State:
    """What a server says of a file: its length, if it says one, and what changes when the file does."""

    length: int | None
    version: str


class RemoteShards:
    """Shards on a web server: a `ShardSource`."""

    def __init__(
        self,
        urls: Sequence[str],
        resolution: int,
        max_dropped: float,
        caption_column: str | None = None,
        reporter: Reporter = SILENT,
    ) -> None:
        """Ask for every shard whether it is there.

        Args:
            urls: of .tar files.
            resolution: side in pixels.
            max_dropped: share of a shard's pictures that may be unusable.
            caption_column: as of `scan_shards`.

        Raises:
            DataError: one is not there, or the server cannot be reached.
        """
        self._urls = list(urls)
        self._resolution, self._max_dropped, self._column = resolution, max_dropped, caption_column
        with reporter.progress("asking for the shards", len(urls)) as bar, ThreadPoolExecutor(READERS) as askers:
            self._states: list[_State] = []
            for state in askers.map(_state_of, urls):
                self._states.append(state)
                bar.advance()

    @property
    def key(self) -> str:
        return _digest(f"{_bare(url)} {state}" for url, state in zip(self._urls, self._states, strict=True))

    def fingerprint(self, first: OpenedShard) -> str:
        """Of what the server says of each shard (name, length, ETag or time of change), and of the first one's content.

        A server that is started again on the same files says the same. Where it says neither ETag nor time, a shard
        that gives way to another of its length goes unnoticed here: what is kept of an item is told apart all the same,
        for the item's number is of its shard's content (`StreamedPictures`).
        """
        said = (
            f"{_bare(url)} {state.length} {state.version}" for url, state in zip(self._urls, self._states, strict=True)
        )
        return _digest([*said, self._column or "", first.fingerprint])

    def __len__(self) -> int:
        return len(self._urls)

    def name(self, number: int) -> str:
        return shown(_bare(self._urls[number]))

    def fetch(self, number: int, folder: Path) -> None:
        url = self._urls[number]
        _download(url, self._file(number, folder), self._states[number])

    def open(self, number: int, folder: Path) -> OpenedShard:
        drops = Drops()
        files, found = scan_shards([self._file(number, folder)], drops, caption_column=self._column)
        pairs, fingerprint = keep_readable(files, found, drops)
        report = drops.report(self.name(number), len(pairs), sum(len(pair.captions) for pair in pairs))
        report.check(self._max_dropped)
        return OpenedShard(data=LocalPictures(files, pairs, self._resolution), report=report, fingerprint=fingerprint)

    def _file(self, number: int, folder: Path) -> Path:
        return folder / PurePosixPath(unquote(urlsplit(self._urls[number]).path)).name


# ---------------------------------------------------------------------------------------------------------------- HTTP


def _state_of(url: str) -> _State:
    """Ask about a file without fetching it.

    Raises:
        DataError: it is not there, or the server does not answer.
    """

    def ask() -> _State:
        try:
            with _asked(url, "HEAD") as reply:
                return _said_by(reply)
        except HTTPError as error:
            if error.code not in _NO_HEAD:
                raise
        with _asked(url, "GET", {"Range": "bytes=0-0"}) as reply:
            return _said_by(reply)

    return _insisting(url, ask)


def _download(url: str, file: Path, expected: _State) -> None:
    """Fetch a file whole; what came before a connection broke is not fetched again.

    Raises:
        DataError: the server does not give it, or gives another one than `expected`.
        OSError: it cannot be written.
    """

    def fetch() -> None:
        have = file.stat().st_size if file.exists() else 0
        if have and have == expected.length:
            return
        with _asked(url, "GET", {"Range": f"bytes={have}-"} if have else {}) as reply:
            said = _said_by(reply)
            # A server need not say the length each time.
            known = said.length is not None and expected.length is not None
            if said.version != expected.version or (known and said.length != expected.length):
                raise DataError(
                    f"{shown(_bare(url))} was changed after the data was scanned; training data must stay as it is "
                    "during a run; put it back and resume from the last checkpoint"
                )
            with _Kept(file, append=reply.status == 206) as kept:
                while chunk := reply.read(_AT_ONCE):
                    kept.write(chunk)
        size, whole = file.stat().st_size, said.length if expected.length is None else expected.length
        if whole is not None and size != whole:
            raise IncompleteRead(b"", whole - size)

    _insisting(url, fetch)


class _Unwritable(Exception):
    """The disk failed, not the server."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


class _Kept:
    """A file that is written to, whose errors are told from those of the network."""

    def __init__(self, file: Path, *, append: bool) -> None:
        self._file, self._append = file, append

    def __enter__(self) -> _Kept:
        self._stream: BinaryIO = self._try(lambda: self._file.open("ab" if self._append else "wb"))
        return self

    def write(self, chunk: bytes) -> None:
        self._try(lambda: self._stream.write(chunk))

    def __exit__(self, *_: object) -> None:
        self._try(self._stream.close)

    def _try(self, work: Callable[[], ResultT]) -> ResultT:
        try:
            return work()
        except OSError as error:
            raise _Unwritable(error) from error


def _asked(url: str, method: str, headers: Mapping[str, str] | None = None) -> HTTPResponse:
    request = urllib.request.Request(url, method=method, headers={"User-Agent": "fewstep", **(headers or {})})
    reply: HTTPResponse = urllib.request.urlopen(request, timeout=SILENCE)
    return reply


def _said_by(reply: HTTPResponse) -> _State:
    whole = re.fullmatch(r"bytes \d+-\d+/(\d+)", reply.headers.get("Content-Range") or "")
    length = whole[1] if whole else reply.headers.get("Content-Length")
    version = reply.headers.get("ETag") or reply.headers.get("Last-Modified") or ""
    return _State(int(length) if length is not None and length.isdigit() else None, version)


def _insisting(url: str, work: Callable[[], ResultT]) -> ResultT:
    """`work`, tried again where what went wrong may pass.

    Raises:
        DataError: it did not pass, or is not of that kind.
    """
    reason, name = "", shown(_bare(url))
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            return work()
        except _Unwritable as error:
            raise error.error from None
        except (InvalidURL, UnicodeError):  # what they say may hold a part of the address that is secret
            raise DataError(
                f"{name} cannot be had: its address, or one that the server passed on to, is none that can be asked "
                "for; allowed is https://HOST/PATH.tar in ASCII without spaces (%20 stands for one); check the URL"
            ) from None
        except HTTPError as error:
            reason = f"the server says {error.code} {error.reason}"
            if error.code not in _PASSING:
                raise DataError(
                    f"{name} cannot be had: {reason}; allowed is a file that anyone may read; check the URL"
                ) from error
        except URLError as error:
            reason = str(error.reason)
        except (OSError, HTTPException) as error:
            reason = str(error) or type(error).__name__
    raise DataError(
        f"{name} cannot be had: {shown(reason)}, {ATTEMPTS} times in a row; check the network and the server; "
        "where a run has checkpoints, go on with --resume_from_checkpoint latest"
    )


def _bare(url: str) -> str:
    """A URL without what may be secret in it: user, password and query."""
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{place}{parts.path}"


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for line in lines:
        digest.update(line.encode() + b"\0")
    return digest.hexdigest()
