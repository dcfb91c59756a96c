"""Captions alone, one a line of a text file: data for a teacher that makes its own pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fewstep.data import captions
from fewstep.data.pairs import NO_PICTURE, Strings, add_to_fingerprint
from fewstep.data.report import Drops
from fewstep.errors import DataError


class Prompts:
    """Captions without pictures."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self._captions = Strings(prompts)

    def __len__(self) -> int:
        return len(self._captions)

    def name(self, index: int) -> str:
        return f"prompt {index}"

    def item(self, index: int) -> tuple[np.ndarray, tuple[str, ...]]:
        return NO_PICTURE, self.captions(index)

    def captions(self, index: int) -> tuple[str, ...]:
        return (self._captions[index],)

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for caption in self._captions:
            add_to_fingerprint(digest, "", "0", [caption])
        return digest.hexdigest()


def scan_prompts(file: Path, drops: Drops) -> Prompts:
    """The lines of a file, in order, each cleaned as every caption is; a line that comes twice is seen twice as often.

    Blank lines are passed over; others that are no caption are counted in `drops`.

    Raises:
        DataError: the file cannot be read.
    """
    prompts: list[str] = []
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    prompts.append(captions.decode(line))
                except captions.CaptionError as error:
                    drops.add("captions", str(error), f"line {number}")
    except OSError as error:
        raise DataError(
            f"prompts_file {file} cannot be read: {error.strerror or error}; allowed is a text file in UTF-8 with a "
            "caption a line; check the path"
        ) from error
    return Prompts(prompts)
