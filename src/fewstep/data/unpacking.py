"""How much a dataset's files may unpack to: what is compressed says nothing about the disk and memory it will take.

`datasets` unpacks archives into its cache and turns rows into Arrow there. Before it does, every file is counted here
without keeping what comes out: archives by their directory or by decompressing them, parquet by its dictionaries, of
which a value of a megabyte may stand in a million rows and in a few kilobytes of file.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from datasets import DownloadManager

from fewstep.errors import DataError
from fewstep.reporting import in_bytes

MOST_TIMES = 200
"""How often its own size a file may unpack to beyond `ALWAYS`: text packs to a tenth, pictures not at all."""

ALWAYS = 2**30
"""Bytes that any file may unpack to."""

_PIECE = 2**20
_ROWS = 64  # at a time: a row may be a picture of megabytes

_STREAMS: dict[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_NOT_COUNTED = (b"Rar!\x1a\x07", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c", b"\x04\x22\x4d\x18")
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".rar")


class BoundedDownloads(DownloadManager):  # type: ignore[misc]  # has no types
    """A manager of downloads that refuses what would unpack to too much."""

    def download(self, url_or_urls: Any) -> Any:
        found = super().download(url_or_urls)
        for path in _flat(found):
            refuse_bomb(Path(path))
        return found

    def iter_archive(self, path_or_buf: Any) -> Iterable[tuple[str, BinaryIO]]:
        return _Members(str(path_or_buf), super().iter_archive(path_or_buf))


@dataclass(frozen=True)
class _Members:
    """The members of an archive, as often as they are asked for.

    They are read whole, and unpacked once more where their names say so: what would be too much is refused.
    """

    archive: str
    members: Iterable[tuple[str, BinaryIO]]

    def __iter__(self) -> Iterator[tuple[str, BinaryIO]]:
        for name, member in self.members:
            size = getattr(getattr(member, "raw", member), "size", 0)  # of a hole in a tar, too
            if name.lower().endswith(_PACKED) or (isinstance(size, int) and size > ALWAYS):
                raise DataError(
                    f"{self.archive} holds {name!r}, which is packed once more or is larger than {in_bytes(ALWAYS)}; "
                    "allowed are pictures and captions as they are; unpack it first"
                )
            yield name, member


def refuse_bomb(path: Path) -> None:
    """Look whether a file unpacks to more than is allowed: than the disk has room for, or than `MOST_TIMES` its size.

    Raises:
        DataError: it does, or nobody here can tell.
        OSError: it cannot be read.
    """
    if not path.is_file():
        return
    limit = min(max(ALWAYS, MOST_TIMES * path.stat().st_size), shutil.disk_usage(path.parent).free)
    unpacked = 0
    try:
        for size in _sizes(path):
            unpacked += size
            if unpacked > limit:
                raise DataError(
                    f"{path} of {in_bytes(path.stat().st_size)} unpacks to more than {in_bytes(limit)}; allowed is "
                    f"what the disk has room for, and at most {in_bytes(ALWAYS)} or {MOST_TIMES} times its own size; "
                    "unpack it yourself if you trust it, and pass the folder"
                )
    except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, ValueError, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path} cannot be opened ({error}); it is cut short or damaged: download or make it again"
        ) from error


def _sizes(path: Path) -> Iterator[int]:
    """Sizes that add up to what the file unpacks to; none of one that is not packed."""
    with path.open("rb") as file:
        start = file.read(8)
    if start.startswith(_NOT_COUNTED):
        raise DataError(
            f"{path} is packed in a way that is not read here; allowed are zip, gz, bz2, xz; unpack it first"
        )
    if start.startswith(b"PAR1"):
        yield from _parquet_sizes(path)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:  # no member is ever read beyond what the directory says
            yield from (member.file_size for member in archive.infolist())
    for magic, opened in _STREAMS.items():
        if start.startswith(magic):
            with opened(path) as stream:
                while piece := stream.read(_PIECE):
                    yield len(piece)


def _parquet_sizes(path: Path) -> Iterator[int]:
    """Bytes of texts and other bytes in each batch of rows, which are counted by their numbers in the dictionaries."""
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import compute, parquet

    try:
        leaves = [column.path for column in parquet.ParquetFile(path).schema if column.physical_type == "BYTE_ARRAY"]
        for batch in parquet.ParquetFile(path, read_dictionary=leaves).iter_batches(batch_size=_ROWS):
            for column in batch.columns:
                yield from _array_sizes(column, pyarrow, compute)
    except pyarrow.ArrowException as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None


def _array_sizes(array: Any, pyarrow: Any, compute: Any) -> Iterator[int]:
    kind = array.type
    if pyarrow.types.is_struct(kind):
        for part in array.flatten():
            yield from _array_sizes(part, pyarrow, compute)
    elif pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        yield from _array_sizes(array.flatten(), pyarrow, compute)
    elif pyarrow.types.is_dictionary(kind):
        lengths = compute.binary_length(array.dictionary)
        yield compute.sum(lengths.take(array.indices)).as_py() or 0
    else:
        yield array.nbytes


def _flat(paths: Any) -> Iterator[str]:
    """The paths in nested dictionaries and lists."""
    if isinstance(paths, dict):
        paths = list(paths.values())
    if isinstance(paths, list | tuple):
        for part in paths:
            yield from _flat(part)
    else:
        yield str(paths)
