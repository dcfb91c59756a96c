"""Pictures that the base model's own abilities draw: number i of a seed is always the same one."""

from __future__ import annotations

import hashlib
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from fewstep.data import captions
from fewstep.data.pairs import add_to_fingerprint
from fewstep.data.pictures import square_pixels
from fewstep.errors import DataError

_COUNT = 2**31 - 1  # more than any run sees, so that no picture comes twice
_SAMPLES = 4  # pictures that tell one set of drawings from another


@runtime_checkable
class DrawsPictures(Protocol):
    """The ability that a base needs in order to be trained without any data."""

    def training_item(self, seed: int, index: int) -> tuple[np.ndarray, str]:
        """Picture number `index`, uint8 [H, W, 3] RGB, and its caption."""
        ...

    def training_caption(self, seed: int, index: int) -> str:
        """That caption alone."""
        ...


class GeneratedPictures:
    """As many pictures as anyone asks for, drawn when they are asked for."""

    def __init__(self, artist: DrawsPictures, seed: int, resolution: int) -> None:
        self._artist = artist
        self._seed = seed
        self._resolution = resolution

    def __len__(self) -> int:
        return _COUNT

    def name(self, index: int) -> str:
        return f"drawing {index}"

    def item(self, index: int) -> tuple[np.ndarray, tuple[str, ...]]:
        pixels, caption = self._artist.training_item(self._seed, index)
        return square_pixels(Image.fromarray(pixels), self._resolution), _cleaned(caption, index)

    def captions(self, index: int) -> tuple[str, ...]:
        return _cleaned(self._artist.training_caption(self._seed, index), index)

    def fingerprint(self) -> str:
        """Tells what is drawn by drawing the first few."""
        digest = hashlib.blake2b(digest_size=16)
        for index in range(_SAMPLES):
            pixels, caption = self.item(index)
            add_to_fingerprint(digest, hashlib.blake2b(pixels.tobytes()).hexdigest(), str(pixels.size), caption)
        return digest.hexdigest()


def _cleaned(caption: str, index: int) -> tuple[str]:
    try:
        return (captions.clean(caption),)
    except captions.CaptionError as error:
        raise DataError(f"drawing {index} of the base came with a bad caption: {error}; repair the base") from error
