"""Captions of scenes: from attributes to English in several phrasings, and back.

`read_caption` understands every phrasing that `write_caption` makes and is forgiving with free text: it
returns the attributes that a prompt names, so that a user's own prompt is judged on what it asks for.
"""

from __future__ import annotations

import re

import numpy as np

from fewstep.scenes.attributes import VALUES, Attributes

COUNTS = ("no", "one", "two", "three")
_PLACES = {"left": "on the left", "middle": "in the middle", "right": "on the right"}

PHRASINGS = (
    "a {colour} {building} {place} with {windows}, {ground} ground, {sky} sky, {weather} weather, "
    "a {light}, {birds} and {flowers}",
    "{place} a {colour} {building} with {windows} and {flowers} on {ground}, {birds} and a {light} in the {sky} sky, "
    "{weather} weather",
    "a {light}, {weather} weather, a {sky} sky with {birds}, a {colour} {building} with {windows} {place}, "
    "{flowers} on {ground}",
    "a {colour} {building} {place}, {windows}, {flowers}, {birds}, {light}, {sky} sky, {ground}, {weather}",
    "{birds} and {flowers}, {ground} ground under a {sky} sky, {weather}, a {light}, {place} a {colour} {building}, "
    "{windows}",
)


def _counted(value: str, thing: str) -> str:
    return f"{COUNTS[int(value)]} {thing}{'' if value == '1' else 's'}"


def write_caption(attributes: Attributes, phrasing: int) -> str:
    """One of `PHRASINGS` filled in; every phrasing names every attribute."""
    named = {name: getattr(attributes, name) for name in VALUES}
    named["place"] = _PLACES[attributes.place]
    named["windows"] = _counted(attributes.windows, "lit window")
    named["birds"] = _counted(attributes.birds, "bird")
    named["flowers"] = _counted(attributes.flowers, "flower")
    return PHRASINGS[phrasing].format(**named)


def random_caption(rng: np.random.Generator, attributes: Attributes) -> str:
    """A caption in a phrasing drawn from `rng`."""
    return write_caption(attributes, int(rng.integers(len(PHRASINGS))))


_NUMBER = "(no|one|two|three|an?|[0-3])"
_PATTERNS = {
    "building": rf"\b({'|'.join(VALUES['building'])})s?\b",
    "colour": rf"\b({'|'.join(VALUES['colour'])}) (?:{'|'.join(VALUES['building'])})",
    "place": r"\b(left|middle|cent(?:er|re)|right)\b",
    "sky": r"\b(blue|sunset|night|gr[ea]y) sky\b|\b(?:at) (sunset|night)\b",
    "light": r"\b(sun|moon)\b",
    "ground": r"\b(grass|sand|snow|heath)\b",
    "weather": r"\b(fair|cloudy|rainy)\b",
    "birds": rf"\b{_NUMBER} birds?\b",
    "windows": rf"\b{_NUMBER} lit windows?\b",
    "flowers": rf"\b{_NUMBER} flowers?\b",
}
_SPELLINGS = {"gray": "grey", "center": "middle", "centre": "middle", "a": "1", "an": "1"}
_SPELLINGS |= {word: str(number) for number, word in enumerate(COUNTS)}


def read_caption(caption: str) -> dict[str, str]:
    """The attributes that a caption names, in the values of `VALUES`; what it leaves open is absent."""
    found = {}
    for name, pattern in _PATTERNS.items():
        match = re.search(pattern, caption.lower())
        if match:
            word = next(group for group in match.groups() if group)
            found[name] = _SPELLINGS.get(word, word)
    return found


_WORDS = frozenset(
    re.findall(
        "[a-z]+",
        " ".join(
            [
                *(re.sub(r"\{\w+\}", " ", phrasing) for phrasing in PHRASINGS),
                *(value for values in VALUES.values() for value in values),
                *_PLACES.values(),
                *(_counted(number, thing) for number in "0123" for thing in ("lit window", "bird", "flower")),
            ]
        ),
    )
)


def unknown_words(prompt: str) -> list[str]:
    """The words of a prompt that stand in no caption: the text encoder was never taught them."""
    return [word for word in dict.fromkeys(re.findall(r"\w+", prompt.lower())) if word not in _WORDS]
