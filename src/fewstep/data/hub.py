"""A dataset of the Hugging Face Hub, or a local one in parquet or other files of rows, memory-mapped by `datasets`.

Pictures are read as the bytes that were stored and decoded here, like any other: same formats, same limits. A dataset
that is streamed is fetched file by file (`data.stream`), each of which is then read like a dataset of its own.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np

from fewstep.data import captions
from fewstep.data.pairs import add_to_fingerprint
from fewstep.data.pictures import PictureError, decode, decode_file, inspect, inspect_file, quiet_pillow
from fewstep.data.report import Drops, shown
from fewstep.data.stream import OpenedShard
from fewstep.errors import DataError, InputError
from fewstep.reporting import SILENT, Reporter

if TYPE_CHECKING:
    import datasets

Rows = Any
"""A `datasets.Dataset`, or an `IterableDataset`: both have columns and features."""

_ROWS = 256  # looked over at a time
_FILE = "rows.arrow"


class HubPictures:
    """The usable rows of a dataset, decoded when they are asked for."""

    def __init__(self, rows: datasets.Dataset, columns: tuple[str, str], kept: np.ndarray, resolution: int) -> None:
        """Take the dataset `rows`, its columns (image undecoded, caption) and the numbers of the usable rows.

        Paths in those have been looked at: see `_place`.
        """
        self._rows = rows
        self._image, self._caption = columns
        self._captions = rows.select_columns(self._caption)
        self._kept = kept
        self._resolution = resolution

    def __len__(self) -> int:
        return len(self._kept)

    def name(self, index: int) -> str:
        return f"row {int(self._kept[index])}"

    def item(self, index: int) -> tuple[np.ndarray, tuple[str, ...]]:
        row = self._rows[int(self._kept[index])]
        cell = row[self._image]
        if cell["bytes"] is not None:
            pixels = decode(io.BytesIO(cell["bytes"]), self._resolution)
        else:
            pixels = decode_file(Path(cell["path"]), self._resolution)
        return pixels, tuple(captions.clean_list(row[self._caption])[0])

    def captions(self, index: int) -> tuple[str, ...]:
        return tuple(captions.clean_list(self._captions[int(self._kept[index])][self._caption])[0])


@dataclass(frozen=True, kw_only=True)
class ScannedRows:
    """What was found in a dataset; `captions` counts those of the rows that are kept."""

    data: HubPictures
    source: str
    captions: int
    fingerprint: str


def scan_hub(
    name: str,
    resolution: int,
    drops: Drops,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    reporter: Reporter = SILENT,
) -> ScannedRows:
    """Open a dataset and look over its rows: captions whole, pictures by header and end.

    Args:
        name: ID, ID:CONFIGURATION or ID:CONFIGURATION:SPLIT (the configuration may be empty). Split: train, or the
            only one. Or a local .parquet, or a folder of parquet or other files that `datasets` opens.
        resolution: side in pixels.
        drops: counts the rows that cannot be used.
        image_column, caption_column: found by type and by name if None.

    Raises:
        DataError: the dataset cannot be had, or has no such split.
        InputError: the columns are not there, or it is not clear which are meant.
    """
    loaded, split, _ = _load(name)
    rows, columns = _chosen(loaded, name, image_column, caption_column)
    found = scan_rows(rows, columns, resolution, drops, reporter, roots=_roots(name))
    return ScannedRows(
        data=found.data,
        source=f"dataset {name}, split {split}",
        captions=found.captions,
        fingerprint=found.fingerprint,
    )


def scan_rows(
    rows: datasets.Dataset,
    columns: tuple[str, str],
    resolution: int,
    drops: Drops,
    reporter: Reporter = SILENT,
    *,
    roots: Sequence[Path],
) -> ScannedRows:
    """Look over rows whose columns (image undecoded, caption) are known; `drops` counts those that cannot be used.

    Args:
        roots: the folders in which files that rows name may lie.
    """
    image, caption = columns
    kept: list[int] = []
    count = 0
    digest = hashlib.blake2b(digest_size=16)
    tables = rows.with_format("arrow")
    with quiet_pillow(), reporter.progress("looking over the pictures", len(rows)) as bar:
        for first in range(0, len(rows), _ROWS):
            table = tables[first : first + _ROWS]
            for number, (cell, value) in enumerate(zip(table[image], table[caption], strict=True), start=first):
                good, bad = captions.clean_list(value.as_py())
                if not good:
                    drops.add("pictures", bad[0], f"row {number}")
                    continue
                try:
                    mark = _inspect_cell(cell, roots)
                except PictureError as error:
                    drops.add("pictures", error.reason, f"row {number}", error.detail)
                    continue
                for reason in bad:
                    drops.add("captions", reason, f"row {number}")
                kept.append(number)
                count += len(good)
                add_to_fingerprint(digest, str(number), mark, good)
            bar.advance(len(table))
    return ScannedRows(
        data=HubPictures(rows, columns, np.array(kept, dtype=np.int64), resolution),
        source="",
        captions=count,
        fingerprint=digest.hexdigest(),
    )


def _inspect_cell(cell: Any, roots: Sequence[Path]) -> str:
    """`inspect` of an Arrow struct {bytes, path}; reads the header through the memory map, without a copy."""
    import pyarrow  # type: ignore[import-untyped]

    if cell.is_valid and cell["bytes"].is_valid:
        return inspect(cast(BinaryIO, pyarrow.BufferReader(cell["bytes"].as_buffer())))
    if cell.is_valid and cell["path"].is_valid:
        return inspect_file(_place(cell["path"].as_py(), roots))
    raise PictureError("no picture in the row")


def _roots(name: str) -> tuple[Path, ...]:
    """The folders in which a dataset's own files lie: its own, and where it was fetched or unpacked to."""
    from datasets import config
    from huggingface_hub import constants

    place = Path(name)
    own = (place if place.is_dir() else place.parent,) if place.exists() else (Path(constants.HF_HUB_CACHE),)
    caches = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH)
    roots = (*own, *map(Path, caches))
    return (*roots, *(Path(os.path.realpath(root)) for root in roots))  # `datasets` goes through links to a local one


def _place(path: str, roots: Sequence[Path]) -> Path:
    """A picture's path as a row has it.

    Raises:
        PictureError: it leads out of the dataset: whoever made it does not say which files of this machine are read.
    """
    place = Path(os.path.abspath(path))
    if "\0" in path or not any(place.is_relative_to(os.path.abspath(root)) for root in roots):
        raise PictureError("its path leads out of the dataset")
    return place


class HubShards:
    """The files of a dataset's split, each fetched when it is needed: a `ShardSource`."""

    def __init__(
        self,
        name: str,
        resolution: int,
        max_dropped: float,
        image_column: str | None = None,
        caption_column: str | None = None,
    ) -> None:
        """Find out which files there are; raises as `scan_hub`."""
        rows, self._split, builder = _load(name, streaming=True)
        self._place = str(builder.cache_dir)  # its name has a hash of the files' places and times, or of the commit
        self._version = _version(builder)
        if rows.features is None:  # such as of .json, whose columns are known once some rows were read
            rows = rows._resolve_features()
        self._rows, self._columns = _chosen(rows, name, image_column, caption_column)
        self._name, self._resolution, self._max_dropped = name, resolution, max_dropped

    @property
    def key(self) -> str:
        return _digest(self._name, self._split, self._place, self._version)

    def fingerprint(self, first: OpenedShard) -> str:
        """Of the split's files and what changes when they do, of the columns read, and of the first file's content.

        What changes is the dataset's commit on the Hub, whatever was committed; of local files it is their times.
        """
        return _digest(self._split, self._version, *self._columns, str(len(self)), first.fingerprint)

    def __len__(self) -> int:
        return int(self._rows.num_shards)

    def name(self, number: int) -> str:
        return f"dataset {self._name}, split {self._split}, file {number} of {len(self)}"

    def fetch(self, number: int, folder: Path) -> None:
        import pyarrow

        schema = self._rows.features.arrow_schema
        tables = self._rows.shard(len(self), number).with_format("arrow").iter(batch_size=_ROWS)
        with pyarrow.OSFile(str(folder / _FILE), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as stream:
            while (table := self._next(tables, number)) is not None:
                stream.write_table(table.cast(schema))

    def open(self, number: int, folder: Path) -> OpenedShard:
        import datasets

        drops = Drops()
        try:
            rows = datasets.Dataset.from_file(str(folder / _FILE))
        except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
            raise DataError(
                f"{str(folder / _FILE)!r} cannot be read ({_line(error)}); allowed is what was fetched there; check "
                "the disk, and go on from the last checkpoint"
            ) from error
        found = scan_rows(rows, self._columns, self._resolution, drops, roots=_roots(self._name))
        report = drops.report(self.name(number), len(found.data), found.captions)
        report.check(self._max_dropped)
        return OpenedShard(data=found.data, report=report, fingerprint=found.fingerprint)

    def _next(self, tables: Iterator[Any], number: int) -> Any:
        """The next rows, None at the end; what goes wrong is of the file or of the network."""
        try:
            return next(tables, None)
        except Exception as error:  # of httpx, of fsspec, of pyarrow, of the builder's own code
            raise DataError(
                f"{self.name(number)} cannot be read ({_line(error)}); check the network and the dataset; where a run "
                "has checkpoints, go on with --resume_from_checkpoint latest"
            ) from error


def _load(name: str, *, streaming: bool = False) -> tuple[Rows, str, datasets.DatasetBuilder]:
    """The dataset that `name` stands for, which split of it was taken, and who read it."""
    import datasets

    repo, config, split = (name, "", "") if Path(name).exists() else [*name.split(":", 2), "", ""][:3]
    kind, files = ("parquet", [repo]) if Path(repo).is_file() else (repo, None)
    try:
        builder = datasets.load_dataset_builder(kind, config or None, data_files=files)
        splits = sorted(str(known) for known in builder.info.splits or builder.config.data_files or ())
        split = split or (splits[0] if len(splits) == 1 else "train")
        if splits and split.partition("[")[0] not in splits:  # train[:1000] is a part of train
            raise DataError(
                f"dataset {repo} has no split {split!r}; allowed: {', '.join(splits)}; "
                f"pass --dataset_name {repo}:{config}:{splits[0]}"
            )
        if streaming:
            rows: Rows = builder.as_streaming_dataset(split=split)
        else:
            builder.download_and_prepare(dl_manager=_bounded_downloads(builder))
            rows = builder.as_dataset(split=split)
    except ConnectionError as error:
        raise DataError(
            f"dataset {repo} is not in the cache {datasets.config.HF_DATASETS_CACHE} and the Hub cannot be reached "
            f"({_line(error)}); allowed is a cached, a reachable or a local one; where there is a network, run "
            f"`hf download {repo} --repo-type dataset --local-dir FOLDER`, then pass --dataset_name FOLDER"
        ) from error
    except FileNotFoundError as error:
        raise DataError(
            f"dataset {repo} was not found or is not yours to read ({_line(error)}); allowed is the id of a public "
            "dataset, or of a gated one with HF_TOKEN set; check the id"
        ) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, NotImplementedError) as error:
        if isinstance(error.__cause__, DataError):  # ours, raised while rows were made
            raise error.__cause__ from None
        raise DataError(
            f"dataset {repo} cannot be opened ({_line(error)}); allowed is ID, ID:CONFIGURATION or "
            "ID:CONFIGURATION:SPLIT of a dataset stored as files, not as a script; check the name"
        ) from error
    return rows, split, builder


def _version(builder: datasets.DatasetBuilder) -> str:
    """The names of a dataset's files, and what changes when they do: the Hub's commit, or their times or ETags.

    Local files are the same in another place.
    """
    found = [str(builder.config.name)]
    for split, files in (builder.config.data_files or {}).items():
        found += [str(split), *(file if "://" in file else Path(file).name for file in files)]
        found += [" ".join(origin) for origin in files.origin_metadata]
    return _digest(*found)


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _bounded_downloads(builder: datasets.DatasetBuilder) -> datasets.DownloadManager:
    """What `builder` would make for itself, but for the bound on what files unpack to."""
    import datasets

    from fewstep.data.unpacking import BoundedDownloads

    return BoundedDownloads(
        dataset_name=builder.dataset_name,
        download_config=datasets.DownloadConfig(
            cache_dir=builder._cache_downloaded_dir,
            use_etag=False,
            token=builder.token,
            storage_options=builder.storage_options,
        ),
        data_dir=builder.config.data_dir,
        base_path=builder.base_path,
        record_checksums=False,
    )


def _chosen(
    rows: Rows, name: str, image_column: str | None, caption_column: str | None
) -> tuple[Rows, tuple[str, str]]:
    """The two columns that count, pictures undecoded, and their names."""
    import datasets

    image = _image_column(rows, name, image_column)
    caption = _caption_column(rows, name, caption_column, image)
    chosen = rows.select_columns([image, caption]).cast_column(image, datasets.Image(decode=False))
    return chosen, (image, caption)


def _image_column(rows: Rows, name: str, wanted: str | None) -> str:
    import datasets

    features = {str(column): feature for column, feature in rows.features.items()}
    pictures = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    # Files that `datasets` did not write do not say that a column's bytes are pictures.
    pictures = pictures or [column for column, feature in features.items() if _holds_bytes(feature)]
    if wanted is None and len(pictures) == 1:
        return pictures[0]
    if wanted is not None and wanted in pictures:
        return wanted
    came = f"no image_column {wanted!r} of pictures" if wanted else f"{len(pictures)} columns of pictures"
    raise InputError(
        f"dataset {name} has {came} (columns: {_columns(rows)}); allowed is a column of pictures"
        f"{': ' + ', '.join(map(shown, pictures)) if pictures else ''}; say which with --image_column NAME"
    )


def _holds_bytes(feature: Any) -> bool:
    """Whether a column's cells are bytes, or structs {bytes, …} as `datasets` stores pictures."""
    inner = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(inner, "dtype", "") in ("binary", "large_binary")


def _caption_column(rows: Rows, name: str, wanted: str | None, image: str) -> str:
    columns = [column for column in rows.column_names if column != image]
    if wanted is None:
        return captions.guess_column(columns, f"dataset {name}")
    if wanted not in columns:
        raise InputError(
            f"dataset {name} has no caption_column {wanted!r}; allowed: {_columns(rows)}; say which with "
            "--caption_column NAME"
        )
    return wanted


def _columns(rows: Rows) -> str:
    return ", ".join(shown(column) for column in rows.column_names)


def _line(error: Exception) -> str:
    """What another library says, as part of our one line."""
    return shown(" ".join(str(error).split())) or type(error).__name__
