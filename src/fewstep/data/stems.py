"""Pictures and caption files that belong together because their names do, up to the ending."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from fewstep.data.pairs import READERS, Pair
from fewstep.data.report import Drops
from fewstep.reporting import SILENT, Reporter

HERE = PurePosixPath()

Read = Callable[[str], tuple[list[str], list[str]]]
"""The name of a caption file to its captions and to what is wrong with others, as `captions.clean_list` has them."""


@dataclass
class Listing:
    """Names of files by the stem that pairs them."""

    pictures: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    captions: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add_picture(self, file: PurePosixPath, below: PurePosixPath = HERE) -> None:
        """Take up a picture; `below` is a part of its name, not of its stem."""
        self.pictures[str(file.with_suffix(""))].append(str(below / file))

    def add_caption(self, file: PurePosixPath, below: PurePosixPath = HERE) -> None:
        """Take up a file of captions."""
        self.captions[str(file.with_suffix(""))].append(str(below / file))


def pair_by_stem(listing: Listing, read: Read, drops: Drops, reporter: Reporter = SILENT) -> list[Pair]:
    """One picture and one caption file of the same stem make a pair; sorted by the picture's name.

    What has no partner, or several, is counted in `drops`, as is a picture whose captions are no good.
    """
    couples: list[tuple[str, str]] = []
    for stem, pictures in sorted(listing.pictures.items()):
        texts = listing.captions.get(stem, [])
        if len(pictures) > 1:
            for name in pictures:
                drops.add("pictures", "another picture has the same stem", name)
        elif not texts:
            drops.add("pictures", "no caption file of the same stem", pictures[0])
        elif len(texts) > 1:
            drops.add("pictures", "several caption files of the same stem", pictures[0])
        else:
            couples.append((pictures[0], texts[0]))
    for stem, texts in sorted(listing.captions.items()):
        if stem not in listing.pictures:
            for name in texts:
                drops.add("captions", "no picture of the same stem", name)

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
