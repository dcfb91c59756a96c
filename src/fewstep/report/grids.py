"""Grids of pictures as PNG: one an arm and prompt, and one a prompt that sets the arms side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import ceil, sqrt
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fewstep.report.layout import picture_path, save_image

GAP = 4
"""Pixels between pictures."""
PAPER, INK = (255, 255, 255), (32, 32, 32)


def grid(pictures: Sequence[Image.Image]) -> Image.Image:
    """All pictures of one size on white, about as many columns as rows."""
    columns = ceil(sqrt(len(pictures)))
    return _paste([list(pictures[first : first + columns]) for first in range(0, len(pictures), columns)])


def comparison(rows: Mapping[str, Sequence[Image.Image]], *, caption: str) -> Image.Image:
    """A row an arm with its name at the left, a column a picture number: the same initial noise below each other."""
    body = _paste([list(pictures) for pictures in rows.values()])
    height = next(iter(rows.values()))[0].height
    size = max(12, min(20, height // 8))
    font = ImageFont.load_default(size)
    margin = max(ceil(font.getlength(name)) for name in rows) + 4 * GAP
    lines = _wrapped(caption, font, margin + body.width - 2 * GAP)
    top = len(lines) * (size + GAP) + 2 * GAP
    page = Image.new("RGB", (margin + body.width, top + body.height), PAPER)
    page.paste(body, (margin, top))
    pen = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        pen.text((2 * GAP, GAP + number * (size + GAP)), line, fill=INK, font=font)
    for number, name in enumerate(rows):
        pen.text((2 * GAP, top + GAP + number * (height + GAP) + height // 2), name, fill=INK, font=font, anchor="lm")
    return page


def save_grids(
    target: Path,
    folders: Mapping[str, Path],
    prompts: Sequence[str],
    pictures: int,
    on_prompt: Callable[[], object] = lambda: None,
) -> list[Path]:
    """Write ``PPP_ARM.png`` and ``PPP_compare.png`` for every prompt.

    Args:
        target: the folder they are written to.
        folders: arm id to the folder that holds its pictures, in the order of the rows.
        pictures: how many there are a prompt.
    """

    def of_prompt(number: int, prompt: str) -> list[Path]:
        rows = {
            arm: [_opened(picture_path(folder, number, picture)) for picture in range(pictures)]
            for arm, folder in folders.items()
        }
        page = comparison(rows, caption=prompt)
        return [
            *(save_image(target / f"{number:03d}_{arm}.png", grid(images)) for arm, images in rows.items()),
            save_image(target / f"{number:03d}_compare.png", page),
        ]

    paths: list[Path] = []
    with ThreadPoolExecutor() as pool:  # packing is most of the work, and Pillow packs in all threads at once
        for saved in pool.map(of_prompt, range(len(prompts)), prompts):
            paths += saved
            on_prompt()
    return paths


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _paste(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    width, height = rows[0][0].size
    columns = max(len(row) for row in rows)
    page = Image.new("RGB", (GAP + columns * (width + GAP), GAP + len(rows) * (height + GAP)), PAPER)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            page.paste(picture, (GAP + x * (width + GAP), GAP + y * (height + GAP)))
    return page


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The text in lines of at most ``width`` pixels, broken between words, and inside those that are wider."""
    lines: list[str] = []
    for word in text.split():
        while font.getlength(word) > width and len(word) > 1:
            fitting = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:fitting])
            word = word[fitting:]
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines or [""]
