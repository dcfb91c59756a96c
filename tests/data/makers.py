"""Small pictures and folders to test with."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `open_data` reads of the training settings."""

    data_dir: Path | None = None
    dataset_name: str | None = None
    prompts_file: Path | None = None
    image_column: str | None = None
    caption_column: str | None = None
    max_dropped: float = 0.01
    resolution: int | None = 16
    seed: int = 42


@dataclass(frozen=True, kw_only=True)
class Base:
    """What `open_data` reads of the base."""

    name: str = "some/base"
    resolution: int = 32
    abilities: object | None = None


class Artist:
    """Draws pictures whose colour is their number."""

    def training_item(self, seed: int, index: int) -> tuple[np.ndarray, str]:
        colour = (index % 256, index // 256 % 256, seed % 256)
        return np.full((24, 24, 3), colour, dtype=np.uint8), self.training_caption(seed, index)

    def training_caption(self, seed: int, index: int) -> str:
        return f"drawing  {index}\nof {seed}"


def picture(colour: tuple[int, int, int] = (200, 30, 60), size: tuple[int, int] = (20, 14)) -> Image.Image:
    return Image.new("RGB", size, colour)


def noise(size: tuple[int, int] = (40, 30), seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def number_of(pixels: np.ndarray) -> int:
    """Which of `write_numbered`'s pictures this is: its red, told by the middle pixel."""
    middle = pixels.shape[0] // 2
    return int(pixels[middle, middle, 0])


def numbered(number: int) -> bytes:
    """A picture that carries its number as its colour."""
    return encoded(picture((number, 0, 0)))


def write(root: Path, files: Mapping[str, bytes | str]) -> Path:
    """Write files below a folder, with the folders that they need."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def write_numbered(root: Path, count: int) -> Path:
    """`count` pictures with a .txt beside each; picture i is red i and its caption is "number i"."""
    for number in range(count):
        write(root, {f"{number:04d}.png": numbered(number), f"{number:04d}.txt": f"number {number}"})
    return root


def coco(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> str:
    return json.dumps({"info": {}, "licenses": [], "images": images, "annotations": annotations})
