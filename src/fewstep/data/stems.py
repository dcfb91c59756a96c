"""Pictures and caption files that belong together because their names do, up to the ending."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from fewstep.data import captions
from fewstep.data.pairs import READERS, Pair
from fewstep.data.pictures import UNREAD
from fewstep.data.report import Drops
from fewstep.reporting import SILENT, Reporter

HERE = PurePosixPath()

Read = Callable[[str], tuple[list[str], list[str]]]
"""The name of a caption file to its captions and to what is wrong with others, as `captions.clean_list` has them."""


@dataclass
class Listing:
    """Names of files by the stem that pairs them; those whose ending is known and not read are kept apart."""

    pictures: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    captions: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    unread_pictures: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    unread_captions: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add_picture(self, file: PurePosixPath, below: PurePosixPath = HERE) -> None:
        """Take up a picture; `below` is a part of its name, not of its stem."""
        kind = self.unread_pictures if file.suffix.lower() in UNREAD else self.pictures
        kind[str(file.with_suffix(""))].append(str(below / file))

    def add_caption(self, file: PurePosixPath, below: PurePosixPath = HERE) -> None:
        """Take up a file of captions."""
        kind = self.unread_captions if file.suffix.lower() in captions.UNREAD else self.captions
        kind[str(file.with_suffix(""))].append(str(below / file))

    def unread(self) -> list[str]:
        """How many files of an ending are not read, and what to do about it; one text an ending."""
        names = [name for kind in (self.unread_pictures, self.unread_captions) for of in kind.values() for name in of]
        counts = Counter(map(_ending, names))
        return [f"{count} {_not_read(ending)}" for ending, count in sorted(counts.items())]


def _ending(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _not_read(ending: str) -> str:
    """Why files of a known ending are missed."""
    fix = "rename them to .txt" if ending in captions.UNREAD else "convert them to .jpg or .png"
    return f"{ending} files are not read ({fix})"


def pair_by_stem(listing: Listing, read: Read, drops: Drops, reporter: Reporter = SILENT) -> list[Pair]:
    """One picture and one caption file of the same stem make a pair; sorted by the picture's name.

    What has no partner, or several, is counted in `drops`, as is a picture whose captions are no good. So are files of
    endings that are not read, unless they are another form of what is read: IMG.heic beside IMG.jpg is no loss.
    """
    couples: list[tuple[str, str]] = []
    for stem, pictures in sorted(listing.pictures.items()):
        texts = listing.captions.get(stem, [])
        if len(pictures) > 1:
            for name in pictures:
                drops.add("pictures", "another picture has the same stem", name)
        elif not texts and stem in listing.unread_captions:
            text = listing.unread_captions[stem][0]
            drops.add("pictures", _not_read(_ending(text)), text)
        elif not texts:
            drops.add("pictures", "no caption file of the same stem", pictures[0])
        elif len(texts) > 1:
            drops.add("pictures", "several caption files of the same stem", pictures[0])
        else:
            couples.append((pictures[0], texts[0]))
    seen = listing.pictures.keys() | listing.unread_pictures.keys()
    for stem, texts in sorted([*listing.captions.items(), *listing.unread_captions.items()]):
        if stem not in seen:
            for name in texts:
                drops.add("captions", "no picture of the same stem", name)
    for stem, pictures in sorted(listing.unread_pictures.items()):
        if stem not in listing.pictures:
            for name in pictures:
                drops.add("pictures", _not_read(_ending(name)), name)

    pairs: list[Pair] = []
    with reporter.progress("reading the captions", len(couples)) as bar, ThreadPoolExecutor(READERS) as readers:
        found = readers.map(read, (text for _, text in couples))
        for (picture, text), (good, bad) in zip(couples, found, strict=True):
            if good:
                pairs.append(Pair(picture, tuple(good)))
                for reason in bad:
                    drops.add("captions", reason, text)
            else:
                drops.add("pictures", bad[0], text)
            bar.advance()
    return sorted(pairs, key=lambda pair: pair.name)
