"""Local folders that hold pictures and captions: which layout it is, and which caption belongs to which picture.

Pairs are made by name alone, never by order. Whatever is ambiguous belongs to nobody: it is dropped and counted.
Names that start with a dot are skipped, as are files that are neither pictures nor captions by their ending, and a
README.txt or the like beside the data. Pictures and captions of endings that are known and not read are counted.
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
from fewstep.data.pictures import KNOWN, SUFFIXES
from fewstep.data.report import Drops, shown
from fewstep.data.shards import scan_shards
from fewstep.data.stems import HERE, Listing, pair_by_stem
from fewstep.errors import DataError, InputError
from fewstep.reporting import SILENT, Reporter

LAYOUTS = (
    "COCO (annotations/captions_train2017.json + train2017/, 2014 and val alike), metadata.jsonl, images/ + captions/ "
    "with files of the same stem, pictures with a .txt of the same stem beside each, .tar shards of such pairs, or "
    ".parquet"
)

_NOTES = ("readme", "license", "notice")  # .txt files that belong to no picture, unless one has that stem


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


def require_there(place: Path | None) -> None:
    """Refuse a folder or file of data, where one was named, that is not there: to be called before anything long.

    Raises:
        DataError: it is not.
    """
    if place is None or place.is_dir() or place.is_file():
        return
    fix = "pass shards by URL as --dataset_name" if place.parts[:1] in (("http:",), ("https:",)) else "check the path"
    raise DataError(f"data_dir {place} does not exist; allowed is a folder: {LAYOUTS}; {fix}")


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
    require_there(place)
    if (place / "metadata.jsonl").is_file():
        return _with_metadata(place / "metadata.jsonl", drops, image_column, caption_column)
    annotations = coco.find_annotations(place)
    if annotations is not None:
        refuse_columns(image_column, caption_column, place)
        other = coco.other_split(annotations)
        if other is not None:
            reporter.say(f"data: {annotations.name} is read; for {other.name} pass --data_dir {other}")
        return _with_coco(annotations, drops)
    if (place / "images").is_dir() and (place / "captions").is_dir():
        pictures, texts = PurePosixPath("images"), PurePosixPath("captions")
        source = f"images/ + captions/ in {place}"
    else:
        pictures = texts = HERE
        source = f"pictures with .txt in {place}"
    listing, parts = _listing(place, pictures, texts)
    shards = sorted(file for file in place.glob("*.tar") if not file.name.startswith("."))
    if shards and not listing.pictures:
        return _with_shards(shards, drops, image_column, caption_column, reporter)
    if shards:
        raise InputError(
            f"data_dir {place} holds pictures and also shards, such as {shards[0].name}; allowed is one of the two; "
            "move the others elsewhere"
        )
    if parts and not listing.pictures.keys() & listing.captions.keys():
        raise _in_parts(place, parts)
    refuse_columns(image_column, caption_column, place)
    if not listing.pictures or not listing.captions:
        found = [
            f"{sum(map(len, listing.pictures.values()))} pictures and "
            f"{sum(map(len, listing.captions.values()))} caption files",
            *listing.unread(),
        ]
        raise DataError(
            f"data_dir {place} has {', and '.join(found)}; allowed is one of these layouts: {LAYOUTS}; or "
            "captions alone, with --prompts_file FILE"
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


def _listing(place: Path, pictures: PurePosixPath, texts: PurePosixPath) -> tuple[Listing, list[Path]]:
    """(files in the folders of the pictures and of the captions below `place`; folders that have a metadata.jsonl)."""
    listing = Listing()
    parts: list[Path] = []
    for file in _files(place / pictures):
        if file.suffix.lower() in KNOWN:
            listing.add_picture(file, pictures)
        elif file.name == "metadata.jsonl" and (place / pictures / file).is_file():
            parts.append(place / pictures / file.parent)
    taken = listing.pictures.keys() | listing.unread_pictures.keys()
    for file in _files(place / texts):
        is_note = file.stem.lower() in _NOTES and file.parent == HERE and file.stem not in taken
        if file.suffix.lower() in captions.UNREAD | {".txt"} and not is_note:
            listing.add_caption(file, texts)
    return listing, parts


def _in_parts(place: Path, parts: Sequence[Path]) -> DataError:
    """The error for a folder whose parts, such as train/ and test/, have a metadata.jsonl each."""
    best = next((part for part in parts if part.name == "train"), parts[0])
    named = ", ".join(shown(str(part.relative_to(place) / "metadata.jsonl")) for part in parts[:3])
    return DataError(
        f"data_dir {place} has no metadata.jsonl, but {named}{', ...' if len(parts) > 3 else ''}; allowed is the "
        f"folder of one of them; pass --data_dir {best}"
    )


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
    """A JSON object a line: the picture's file name and its caption, or a list of captions.

    Several lines may name the same picture: it has the captions of them all.
    """
    image_column = image_column or "file_name"
    lines = list(_objects(file, drops))
    keys = sorted({key for _, values in lines for key in values})
    if keys:
        captions.check_column("image_column", image_column, keys, str(file))
    if caption_column is None:
        caption_column = captions.guess_column(keys, str(file))
    elif keys:
        captions.check_column("caption_column", caption_column, keys, str(file))
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
        good: dict[str, None] = {}
        bad: list[tuple[int, str]] = []
        for number, value in entries:
            texts, reasons = captions.clean_list(value)
            good.update(dict.fromkeys(texts))
            bad += [(number, reason) for reason in reasons]
        for number, reason in bad if good else bad[:1]:
            drops.add("captions" if good else "pictures", reason, name, f"line {number}")
        if good:
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
