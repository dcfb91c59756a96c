"""Where pictures and tables lie in an output folder, and how a picture gets there."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewstep.errors import InputError
from fewstep.files import write_bytes_atomic

CELLS = "cells"
"""The folder with what a benchmark found so far."""

RECORD_FILE = "clipscore_results.json"
"""Everything that a benchmark found."""

RESULT_FILES = ("results.csv", "timing.csv", RECORD_FILE, "report.html")
"""What a finished benchmark writes last, in this order."""


def holds_benchmark(outdir: Path) -> bool:
    """Whether a benchmark is in this folder, finished or not."""
    return any((outdir / name).exists() for name in (CELLS, RECORD_FILE))


def refuse_another_run(outdir: Path, kind: str) -> None:
    """Refuse, by an `InputError`, the folder of a training run or of a demo, whose settings would be replaced.

    Args:
        kind: of run that may be there, in a word.
    """
    known = (outdir / "images").exists() or holds_benchmark(outdir)
    if (outdir / "settings.toml").exists() and not known:
        raise InputError(
            f"outdir {str(outdir)!r} holds a run that is no {kind}; allowed is a new folder, or that of a "
            f"{kind}; choose another --outdir"
        )


def arm_folder(outdir: Path, arm: str) -> Path:
    """``OUTDIR/images/ARM``."""
    return outdir / "images" / arm


@contextmanager
def free_prompts(outdir: Path, arms: Sequence[str], count: int) -> Iterator[int]:
    """The first of ``count`` numbers in a row that no prompt in ``OUTDIR/images`` has, to be drawn inside.

    The prompts' folders are made at once, so that of two calls at one time each has numbers of its own; those that are
    still empty at the end, as after an error, go.
    """
    images = outdir / "images"
    for arm in arms:
        arm_folder(outdir, arm).mkdir(parents=True, exist_ok=True)
    while True:
        taken = (int(path.name) for path in images.glob("*/[0-9]*") if path.name.isdigit())
        first = 1 + max(taken, default=-1)
        mine: list[Path] = []
        try:
            # The last one first: whoever looks from then on counts on from it.
            for prompt in reversed(range(first, first + count)):
                for arm in arms:
                    folder = picture_path(arm_folder(outdir, arm), prompt, 0).parent
                    folder.mkdir()
                    mine.append(folder)
            break
        except FileExistsError:
            _remove_empty(mine)
    try:
        yield first
    finally:
        _remove_empty(mine)


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # not empty
            folder.rmdir()


def picture_path(folder: Path, prompt: int, picture: int) -> Path:
    """``ARM/PPP/III.png`` in an arm's folder; prompt and picture numbers start at 0."""
    return folder / f"{prompt:03d}" / f"{picture:03d}.png"


def save_picture(path: Path, pixels: NDArray[np.uint8]) -> Path:
    """Save pixels [H, W, 3] as PNG, whole or not at all."""
    return save_image(path, Image.fromarray(pixels))


def save_image(path: Path, image: Image.Image) -> Path:
    """Save an image as PNG, whole or not at all."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=4)  # a third of the time of Pillow's 6, for 3 % more bytes
    return write_bytes_atomic(path, buffer.getvalue())
