"""What a `scenes` picture is about: the captioned attributes, their values, and what is held out.

An *attribute* is named in the caption and must be got right. Everything else a picture shows is
its *layout* (`fewstep.scenes.layout`), which the caption leaves open.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

VALUES: dict[str, tuple[str, ...]] = {
    "building": ("house", "tower", "church", "windmill", "castle", "lighthouse"),
    "colour": ("red", "orange", "green", "blue", "purple", "white"),
    "place": ("left", "middle", "right"),
    "sky": ("blue", "sunset", "night", "grey"),
    "light": ("sun", "moon"),
    "ground": ("grass", "sand", "snow", "heath"),
    "weather": ("fair", "cloudy", "rainy"),
    "birds": ("0", "1", "2", "3"),
    "windows": ("0", "1", "2", "3"),
    "flowers": ("0", "1", "2", "3"),
}
"""Attribute name to its allowed values, in the order in which reader and parameters use them."""

COMBINATIONS = int(np.prod([len(values) for values in VALUES.values()]))
"""How many different sets of attributes there are (663,552)."""

Split = Literal["train", "unseen", "composed"]
"""Which pictures may show a combination. No training picture shows an `unseen` one, though it shows all its parts
in other company; nor a `composed` one, whose very triple of building, colour and place it never shows."""

HELD_OUT_SHARE = 0.1
"""Share of (building, colour, place) triples that are `composed`, and of all other combinations that are `unseen`."""


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """One value an attribute; what a caption says and what the reader must find in the picture."""

    building: str
    colour: str
    place: str
    sky: str
    light: str
    ground: str
    weather: str
    birds: str
    windows: str
    flowers: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value not in VALUES[field.name]:
                raise ValueError(f"{field.name} is {value!r}; allowed: {', '.join(VALUES[field.name])}")

    def indices(self) -> tuple[int, ...]:
        """The position of each value in `VALUES`, attribute by attribute."""
        return tuple(VALUES[name].index(getattr(self, name)) for name in VALUES)

    @property
    def split(self) -> Split:
        """Which pictures may show this combination: fixed by its names, for every seed and machine."""
        if _hash_share(f"{self.building}/{self.colour}/{self.place}") < HELD_OUT_SHARE:
            return "composed"
        return "unseen" if _hash_share("/".join(getattr(self, name) for name in VALUES)) < HELD_OUT_SHARE else "train"


def _hash_share(key: str) -> float:
    """A number in 0…1 that is the same for a key everywhere."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32


def sample_attributes(rng: np.random.Generator, split: Split = "train") -> Attributes:
    """Draw attributes uniformly from the combinations of a split."""
    while True:
        picks = {name: values[int(rng.integers(len(values)))] for name, values in VALUES.items()}
        attributes = Attributes(**picks)
        if attributes.split == split:
            return attributes
