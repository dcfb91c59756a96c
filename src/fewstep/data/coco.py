"""COCO's captions, 2014 and 2017: one annotation file, several captions an image, paired by the image's id.

    ROOT/annotations/captions_train2017.json    ROOT/train2017/000000000009.jpg
    ROOT/annotations/captions_train2014.json    ROOT/train2014/COCO_train2014_000000000009.jpg

The same for val. Pictures may also lie in ROOT/images/train2017/. The annotations of both splits come in one archive,
so that a split counts as there where its pictures are.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep.data import captions
from fewstep.data.pairs import Pair, safe_name
from fewstep.data.report import Drops, shown
from fewstep.errors import DataError, InputError

_NAME = re.compile(r"captions_((?:train|val)(?:2014|2017))\.json")


def is_annotations(file: Path) -> bool:
    """Whether a file is named as COCO names its captions."""
    return _NAME.fullmatch(file.name) is not None


def find_annotations(root: Path) -> Path | None:
    """The annotation file to train on: train's if its pictures are there, else val's; None if this is no COCO folder.

    Raises:
        InputError: 2014 and 2017 are both there (they hold the same pictures, split in two ways).
        DataError: there are annotations, but the pictures of none.
    """
    files = _annotations(root)
    for split in ("train", "val"):
        present = [file for file in files if split in file.name and _has_pictures(file)]
        if len(present) > 1:
            raise InputError(
                f"{root} holds COCO {split} of 2014 and of 2017; allowed is one of them; name the annotation file: "
                f"--data_dir {present[1]}"
            )
        if present:
            return present[0]
    if files:
        raise _no_pictures(files)
    return None


def other_split(annotations: Path) -> Path | None:
    """The annotations of val where those are of train, and the pictures of val are there too."""
    other = annotations.with_name(annotations.name.replace("train", "val"))
    return other if other != annotations and other.is_file() and _has_pictures(other) else None


def picture_folder(annotations: Path) -> Path:
    """The folder of the pictures that an annotation file speaks of.

    Raises:
        DataError: it is not there.
    """
    for place in _places(annotations):
        if place.is_dir():
            return place
    raise _no_pictures([annotations])


def _annotations(root: Path) -> list[Path]:
    """The annotation files in a COCO folder."""
    names = [f"captions_{split}{year}.json" for split in ("train", "val") for year in (2014, 2017)]
    return [file for name in names if (file := root / "annotations" / name).is_file()]


def _places(annotations: Path) -> list[Path]:
    """Where the pictures of an annotation file may lie.

    Raises:
        DataError: it is not named as COCO's are.
    """
    match = _NAME.fullmatch(annotations.name)
    if match is None:
        raise DataError(f"{annotations} came; allowed is a file named like captions_train2017.json; rename it")
    root = annotations.parent.parent if annotations.parent.name == "annotations" else annotations.parent
    return [root / match[1], root / "images" / match[1]]


def _has_pictures(annotations: Path) -> bool:
    return any(place.is_dir() for place in _places(annotations))


def _no_pictures(files: Sequence[Path]) -> DataError:
    """The error for annotation files of whose pictures nothing is there."""
    places = [place for file in files for place in _places(file)]
    zips = dict.fromkeys(f"{place.name}.zip" for place in places)
    one = len(files) == 1
    return DataError(
        f"{' and '.join(map(str, files))} {'is' if one else 'are'} there but {'its' if one else 'their'} pictures are "
        f"not; allowed is {' or '.join(map(str, places))}; unpack {' or '.join(zips)} there"
    )


def read_pairs(annotations: Path, drops: Drops) -> list[Pair]:
    """Images and their captions, by id; names start from `picture_folder(annotations)`, sorted.

    Ids without an image entry, images without a caption, entries that make no sense and names that are claimed twice
    are counted in `drops`. Whether the files exist is not looked at here.

    Raises:
        DataError: the file cannot be read or is not COCO's.
    """
    images, texts = _load(annotations)
    name_of: dict[int | str, str | None] = {}  # None: several files claim this id
    ids_of: dict[str, set[int | str]] = defaultdict(set)
    for number, entry in enumerate(images):
        image = _id(entry, "id")
        name = safe_name(entry.get("file_name")) if isinstance(entry, dict) else None
        if image is None or name is None:
            drops.add("pictures", "image entry without a usable id and file_name", f"images[{number}]")
            continue
        ids_of[name].add(image)
        if name_of.setdefault(image, name) != name:
            name_of[image] = None

    captions_of: dict[int | str, dict[str, None]] = defaultdict(dict)
    for number, entry in enumerate(texts):
        image = _id(entry, "image_id")
        if image is None:
            drops.add("captions", "annotation without a usable image_id", f"annotations[{number}]")
        elif image not in name_of:
            drops.add("captions", "annotation whose image_id has no image entry", f"image_id {image}")
        else:
            try:
                captions_of[image][captions.clean(entry.get("caption"))] = None
            except captions.CaptionError as error:
                drops.add("captions", str(error), name_of[image] or f"image_id {image}", f"annotations[{number}]")

    pairs: list[Pair] = []
    for name, ids in sorted(ids_of.items()):
        image = next(iter(ids))
        if len(ids) > 1 or name_of[image] is None:
            drops.add("pictures", "image ids and file names do not match one to one", name)
        elif not captions_of[image]:
            drops.add("pictures", "no caption", name)
        else:
            pairs.append(Pair(name, tuple(captions_of[image])))
    return pairs


def _load(annotations: Path) -> tuple[list[Any], list[Any]]:
    """The entries under "images" and under "annotations"."""
    try:
        content = json.loads(annotations.read_bytes())
    except OSError as error:
        raise DataError(
            f"{annotations} cannot be read: {error.strerror or error}; check the file and the disk"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{annotations} is not JSON ({shown(str(error))}); allowed is COCO's own file; download it again"
        ) from error
    images, texts = (content.get(key) if isinstance(content, dict) else None for key in ("images", "annotations"))
    if not isinstance(images, list) or not isinstance(texts, list):
        raise DataError(
            f"{annotations} has no lists 'images' and 'annotations'; allowed is COCO's own file; download it again"
        )
    return images, texts


def _id(entry: Any, key: str) -> int | str | None:
    """An entry's id, or None where it has none that identifies anything."""
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None
