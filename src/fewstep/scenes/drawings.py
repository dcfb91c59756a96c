"""Numbered drawings: picture `i` of a seed is always the same picture, whoever draws it and when."""

from __future__ import annotations

import errno
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from fewstep.errors import Interrupted
from fewstep.files import replace_file_atomic
from fewstep.scenes.attributes import Attributes, Split, sample_attributes
from fewstep.scenes.drawing import draw
from fewstep.scenes.layout import SIZE, Flaw, Layout, sample_layout
from fewstep.signals import leave_to_the_main_process

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

FEW = 1_000
"""Drawings that one process has drawn, at 6 ms each, before others have started."""


@dataclass(frozen=True)
class Drawing:
    """One picture with everything that is known about it."""

    attributes: Attributes
    layout: Layout
    pixels: np.ndarray  # uint8 [128, 128, 3]


def numbered_attributes(seed: int, index: int, split: Split = "train") -> Attributes:
    """The attributes of drawing `index` of `seed`."""
    return sample_attributes(np.random.default_rng((seed, index, 0)), split)


def numbered_drawing(
    seed: int, index: int, split: Split = "train", *, attributes: Attributes | None = None, flaw: Flaw | None = None
) -> Drawing:
    """Drawing `index` of `seed`; with `attributes` given, a picture of those instead of its own."""
    attributes = attributes or numbered_attributes(seed, index, split)
    layout = sample_layout(np.random.default_rng((seed, index, 1)), attributes, flaw)
    return Drawing(attributes, layout, draw(attributes, layout))


def _pixels(seed: int, index: int) -> np.ndarray:
    return numbered_drawing(seed, index).pixels


def _on_all_cores(work: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> Iterator[ResultT]:
    """`work` of each item, in order; of few, here: other processes take longer to start than that."""
    if len(items) <= FEW:
        yield from map(work, items)
        return
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(mp_context=context, initializer=leave_to_the_main_process) as pool:
            yield from pool.map(work, items, chunksize=64)
    except BrokenProcessPool as error:
        raise Interrupted(
            "a process that draws was ended from outside, as systems do that run out of memory; make room in it, then "
            "run the same again"
        ) from error


def flawed_drawings(seed: int, kinds: Sequence[Flaw | None]) -> Iterator[Drawing]:
    """Drawing i of `seed` with the flaw `kinds[i]`, in order, drawn on all cores."""
    yield from _on_all_cores(partial(_flawed, seed), list(enumerate(kinds)))


def _flawed(seed: int, numbered: tuple[int, Flaw | None]) -> Drawing:
    return numbered_drawing(seed, numbered[0], flaw=numbered[1])


def drawn_in_chunks(seed: int, count: int, chunk: int = 64) -> Iterator[np.ndarray]:
    """The first `count` drawings of `seed` in order, as uint8 arrays [up to chunk, 128, 128, 3], drawn on all cores."""
    drawn = _on_all_cores(partial(_pixels, seed), range(count))
    while rows := list(islice(drawn, chunk)):
        yield np.stack(rows)


def drawn_pixels(seed: int, count: int, cache: Path | None = None) -> np.ndarray:
    """Pixels of the first `count` drawings of `seed`.

    Args:
        cache: a `.npy` file that keeps them; read back memory-mapped when it is there.

    Returns:
        uint8 array [count, 128, 128, 3].
    """
    if cache is not None and cache.exists():
        pixels = np.load(cache, mmap_mode="r")
        if pixels.shape == (count, SIZE, SIZE, 3):
            return pixels
    pixels = np.stack(list(_on_all_cores(partial(_pixels, seed), range(count))))
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial_file = cache.with_suffix(".partial.npy")
        try:
            np.save(partial_file, pixels)
        except OSError as error:
            partial_file.unlink(missing_ok=True)
            if error.errno is None:  # numpy counts what was written, and does not ask why it was not all
                raise OSError(errno.ENOSPC, "No space left on device", str(cache)) from None
            raise
        replace_file_atomic(partial_file, cache)
    return pixels
