"""Captions as they are trained on: UTF-8, white space evened out, and never empty."""

from __future__ import annotations

import re
import stat
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from fewstep.data.report import shown
from fewstep.errors import InputError

COLUMNS = ("text", "caption", "captions", "prompt", "description")
"""Names that a column of captions is known by."""

UNREAD = frozenset({".caption", ".captions", ".text"})
"""Endings of caption files that are known, so that they are missed, and not read."""

MAX_CHARACTERS = 65_536  # a text encoder reads some 300; what is longer than this is no caption but another file
_MAX_BYTES = 4 * MAX_CHARACTERS + 3  # as UTF-8 with a byte-order mark

_BLANK = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")
_SURROGATE = re.compile("[\ud800-\udfff]")


class CaptionError(Exception):
    """A caption that cannot be used; the message is the reason, worded alike for all that share it."""


def clean(text: object) -> str:
    """One caption with every run of white space and control characters made one space.

    Raises:
        CaptionError: it is not text, has nothing visible in it, is absurdly long or holds half a surrogate pair.
    """
    if not isinstance(text, str):
        raise CaptionError("caption is not text")
    if len(text) > MAX_CHARACTERS:
        raise CaptionError(f"caption is longer than {MAX_CHARACTERS} characters")
    text = _BLANK.sub(" ", text).strip(" ")
    # Letters, numbers, punctuation and symbols can be seen; marks, separators and format characters alone cannot.
    if not any(unicodedata.category(letter)[0] in "LNPS" for letter in text):
        raise CaptionError("caption is empty")
    if _SURROGATE.search(text):
        raise CaptionError("caption is not valid Unicode")
    return text


def decode(raw: bytes) -> str:
    """`clean` of the content of a caption file; a byte-order mark is passed over.

    Raises:
        CaptionError: as `clean`, or the bytes are not UTF-8.
    """
    if len(raw) > _MAX_BYTES:
        raise CaptionError(f"caption is longer than {MAX_CHARACTERS} characters")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CaptionError("caption is not UTF-8") from error
    return clean(text)


def clean_list(value: object) -> tuple[list[str], list[str]]:
    """The captions in a cell that holds one or a list of them.

    Returns:
        (captions that can be used, each once and in order; the reasons of the others, one each).
    """
    good: dict[str, None] = {}
    reasons: list[str] = []
    for text in value if isinstance(value, list | tuple) else [value]:
        try:
            good[clean(text)] = None
        except CaptionError as error:
            reasons.append(str(error))
    if not good and not reasons:
        reasons.append("caption is empty")
    return list(good), reasons


def read(file: Path) -> str:
    """`decode` of a whole file.

    Raises:
        CaptionError: as `decode`, or the file cannot be read.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe would be waited for
            raise CaptionError("caption file is no file but a folder, a pipe or a device")
        with file.open("rb") as stream:
            return decode(stream.read(_MAX_BYTES + 1))
    except OSError as error:
        raise CaptionError(f"caption file cannot be read ({error.strerror or error})") from error


def check_column(setting: str, column: str, columns: Sequence[str], source: str) -> None:
    """Raise an `InputError` that says which columns there are, unless `column` is one of them.

    Args:
        setting: which one chooses the column: image_column or caption_column.
    """
    if column not in columns:
        raise InputError(
            f"{source} has no {setting} {shown(column)!r}; allowed: {_named(columns)}; say which with --{setting} NAME"
        )


def guess_column(columns: Sequence[str], source: str) -> str:
    """The one column that is named as captions are.

    Raises:
        InputError: there is none, or there are several.
    """
    known = [name for name in COLUMNS if name in columns]
    if len(known) == 1:
        return known[0]
    raise InputError(
        f"{source} has {'several' if known else 'no'} columns that may be the captions (columns: {_named(columns)}); "
        f"allowed is one named {', '.join(COLUMNS)}; say which with --caption_column NAME"
    )


def _named(columns: Sequence[str]) -> str:
    return ", ".join(shown(name) for name in columns[:20]) or "none"
