"""Local folders that hold pictures and captions: which layout it is, and which caption belongs to which picture.

Pairs are made by name alone, never by order. Whatever is ambiguous belongs to nobody: it is dropped and counted.
Names that start with a dot are skipped, as are files that are neither pictures nor captions by their ending.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fewstep.data import captions, coco
from fewstep.data.pairs import Files, FolderFiles, Pair, safe_name
from fewstep.data.pictures import SUFFIXES
from fewstep.data.report import Drops
from fewstep.data.shards import scan_shards
from fewstep.data.stems import HERE, Listing, pair_by_stem
from fewstep.errors import DataError, InputError
from fewstep.reporting import SILENT, Reporter

LAYOUTS = (
    "COCO (annotations/captions_train2017.json + train2017/, 2014 and val alike), metadata.jsonl, images/ + captions/ "
    "with files of the same stem, pictures with a .txt of the same stem beside each, .tar shards of such pairs, or "
    ".parquet"
)


@dataclass(frozen=True, kw_only=True)
class Scanned:
    """What a layout says is there, before any picture was looked at.

    Attributes:
        source: layout and place, for people.
        files: where the pictures lie that the pairs name.
        pairs: sorted by name.
    """

    source: str
    files: Files
    pairs: list[Pair]


def holds_rows(place: Path) -> bool:
    """Whether `place` is a .parquet, or a folder of them: one with neither pictures, shards nor folders beside them."""
    if not place.is_dir():
        return place.suffix == ".parquet" and place.is_file()
    visible = [file for file in place.glob("*") if not file.name.startswith(".")]
    kinds = {file.suffix.lower() for file in visible}
    others = kinds & {".tar", ".jsonl", *SUFFIXES} or any(file.is_dir() for file in visible)
    return ".parquet" in kinds and not others


def scan_folder(
    place: Path,
    drops: Drops,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    reporter: Reporter = SILENT,
) -> Scanned:
    """Recognise the layout of a folder and pair its pictures with their captions.

    Args:
        place: the folder, or the annotation file itself where a folder has several.
        drops: counts what belongs to nothing.
        image_column, caption_column: names in metadata.jsonl; found by themselves if None.

    Raises:
        DataError: nothing is there, no layout is recognised, or an annotation file cannot be read.
        InputError: the settings do not say which of several things is meant.
    """
    if place.is_file():
        if place.suffix == ".jsonl":
            return _with_metadata(place, drops, image_column, caption_column)
        if place.suffix == ".tar":
            return _with_shards([place], drops, image_column, caption_column, reporter)
        if coco.is_annotations(place):
            refuse_columns(image_column, caption_column, place)
            return _with_coco(place, drops)
        raise DataError(
            f"data_dir {place} is a file; allowed is a folder, a .tar, a .parquet, a metadata.jsonl or COCO's "
            "captions_*.json"
        )
    if not place.is_dir():
        fix = (
            "pass shards by URL as --dataset_name" if place.parts[:1] in (("http:",), ("https:",)) else "check the path"
        )
        raise DataError(f"data_dir {place} does not exist; allowed is a folder: {LAYOUTS}; {fix}")
    if (place / "metadata.jsonl").is_file():
        return _with_metadata(place / "metadata.jsonl", drops, image_column, caption_column)
    annotations = coco.find_annotations(place)
    if annotations is not None:
        refuse_columns(image_column, caption_column, place)
        return _with_coco(annotations, drops)
    if (place / "images").is_dir() and (place / "captions").is_dir():
        pictures, texts = PurePosixPath("images"), PurePosixPath("captions")
        source = f"images/ + captions/ in {place}"
    else:
        pictures = texts = HERE
        source = f"pictures with .txt in {place}"
    listing = Listing()
    for file in _files(place / pictures):
        if file.suffix.lower() in SUFFIXES:
            listing.add_picture(file, pictures)
    for file in _files(place / texts):
        if file.suffix.lower() == ".txt":
            listing.add_caption(file, texts)
    shards = sorted(file for file in place.glob("*.tar") if not file.name.startswith("."))
    if shards and not listing.pictures:
        return _with_shards(shards, drops, image_column, caption_column, reporter)
    if shards:
        raise InputError(
            f"data_dir {place} holds pictures and also shards, such as {shards[0].name}; allowed is one of the two; "
            "move the others elsewhere"
        )
    refuse_columns(image_column, caption_column, place)
    if not listing.pictures or not listing.captions:
        raise DataError(
            f"data_dir {place} has {sum(map(len, listing.pictures.values()))} pictures and "
            f"{sum(map(len, listing.captions.values()))} caption files; allowed is one of these layouts: {LAYOUTS}"
        )
    pairs = pair_by_stem(listing, lambda name: _caption(place / name), drops, reporter)
    return Scanned(source=source, files=FolderFiles(place), pairs=pairs)


def refuse_columns(image_column: str | None, caption_column: str | None, place: Path | str) -> None:
    """Raise an `InputError` where columns are named of data that has none."""
    for setting, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column is not None:
            raise InputError(
                f"{setting} {column!r} came, but {place} has no columns; allowed with metadata.jsonl and with "
                f"--dataset_name; leave --{setting} out"
            )


def _with_shards(
    shards: Sequence[Path], drops: Drops, image_column: str | None, caption_column: str | None, reporter: Reporter
) -> Scanned:
    refuse_columns(image_column, None, shards[0].parent)
    files, pairs = scan_shards(shards, drops, caption_column=caption_column, reporter=reporter)
    where = shards[0] if len(shards) == 1 else f"{len(shards)} shards in {shards[0].parent}"
    return Scanned(source=f"pictures in {where}", files=files, pairs=pairs)


def _with_coco(annotations: Path, drops: Drops) -> Scanned:
    root = coco.picture_folder(annotations)
    source, pairs = f"COCO {annotations.stem} in {root}", coco.read_pairs(annotations, drops)
    return Scanned(source=source, files=FolderFiles(root), pairs=pairs)


# ------------------------------------------------------------------------------------------------------ files by stem


def _files(root: Path) -> Iterator[PurePosixPath]:
    """Every file below `root`, by its path from there; links to folders are followed, but nowhere twice."""

    def stop(error: OSError) -> None:
        raise DataError(
            f"folder {error.filename} cannot be read: {error.strerror}; allowed is a data folder that can be read as a "
            "whole; check its permissions and the disk"
        ) from error

    seen: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(root, onerror=stop, followlinks=True):
        folder = Path(place)
        here = folder.stat()
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = PurePosixPath(folder.relative_to(root).as_posix())
        yield from (below / name for name in sorted(files) if not name.startswith("."))


def _caption(file: Path) -> tuple[list[str], list[str]]:
    try:
        return [captions.read(file)], []
    except captions.CaptionError as error:
        return [], [str(error)]


# ----------------------------------------------------------------------------------------------------- metadata.jsonl


def _with_metadata(file: Path, drops: Drops, image_column: str | None, caption_column: str | None) -> Scanned:
    """A JSON object a line: the picture's file name and its caption, or a list of captions."""
    image_column = image_column or "file_name"
    lines = list(_objects(file, drops))
    caption_column = caption_column or captions.guess_column(
        sorted({key for _, values in lines for key in values}), str(file)
    )
    of_file: dict[str, list[tuple[int, object]]] = defaultdict(list)
    for number, values in lines:
        name = safe_name(values.get(image_column))
        if name is None:
            drops.add(
                "pictures", f"{image_column} is no path below the folder (with forward slashes)", f"line {number}"
            )
        else:
            of_file[name].append((number, values.get(caption_column)))
    pairs: list[Pair] = []
    for name, entries in sorted(of_file.items()):
        numbers = ", ".join(str(number) for number, _ in entries[:3])
        if any(value != entries[0][1] for _, value in entries):
            # Two pictures saved under one name look just like this, and one of the captions would be a lie.
            drops.add("pictures", "several lines with different captions", name, f"lines {numbers}")
            continue
        good, bad = captions.clean_list(entries[0][1])
        if not good:
            drops.add("pictures", bad[0], name, f"line {numbers}")
            continue
        for reason in bad:
            drops.add("captions", reason, name, f"line {numbers}")
        pairs.append(Pair(name, tuple(good)))
    return Scanned(source=f"metadata.jsonl in {file.parent}", files=FolderFiles(file.parent), pairs=pairs)


def _objects(file: Path, drops: Drops) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that holds one."""
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError:
                    drops.add("pictures", "line is not UTF-8", f"line {number}")
                except (ValueError, RecursionError):
                    drops.add("pictures", "line is not JSON", f"line {number}")
                else:
                    if isinstance(values, dict):
                        yield number, values
                    else:
                        drops.add("pictures", "line is not a JSON object", f"line {number}")
    except OSError as error:
        raise DataError(
            f"{file} cannot be read: {error.strerror or error}; check its permissions and the disk"
        ) from error
