"""What was kept of the data, and what was dropped, why and where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from fewstep.errors import DataError

_EXAMPLES = 3
_LONGEST_NAME = 120

Kind = Literal["pictures", "captions"]


@dataclass(frozen=True, kw_only=True)
class Reason:
    """All that was dropped for one reason."""

    kind: Kind
    reason: str
    count: int
    examples: tuple[str, ...]  # the first few, by name

    def __str__(self) -> str:
        named = ", ".join(self.examples) + (", ..." if self.count > len(self.examples) else "")
        return f"{self.count} {self.kind if self.count != 1 else self.kind[:-1]}: {self.reason}: {named}"


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """The outcome of a scan.

    A picture counts once, whatever is wrong with it. A caption counts as dropped by itself where it belongs to no
    picture or where the picture has others; else it is its picture that is dropped.
    """

    source: str  # the layout and where it was found, for people
    pictures: int  # kept
    captions: int  # kept
    dropped: tuple[Reason, ...]
    endless: bool = False  # drawn on demand: the counts say nothing
    pictures_too: bool = True  # False: captions alone

    def dropped_of(self, kind: Kind) -> int:
        return sum(reason.count for reason in self.dropped if reason.kind == kind)

    @property
    def dropped_share(self) -> float:
        """The larger of the shares of pictures and of captions that were dropped; 0 where there were none at all."""
        return max(
            dropped / (kept + dropped) if dropped else 0.0
            for kept, dropped in (
                (self.pictures, self.dropped_of("pictures")),
                (self.captions, self.dropped_of("captions")),
            )
        )

    def lines(self) -> Iterator[str]:
        """What to tell the user: one line of what is kept, then one a reason of what is not."""
        if self.endless:
            yield f"{self.source}: as many as training asks for"
        elif not self.pictures_too:
            yield f"{self.source}: {self.captions:,}"
        else:
            yield f"{self.source}: {self.pictures:,} pictures, {self.captions:,} captions"
        for reason in self.dropped:
            yield f"dropped {reason}"

    def check(self, max_dropped: float) -> None:
        """Refuse data of which nothing, or too little, is left.

        Raises:
            DataError: nothing is left, or more than the share `max_dropped` was dropped.
        """
        reasons = "; ".join(str(reason) for reason in self.dropped)
        if not self.captions:
            what, where = (
                ("picture with a caption", "folder and its layout") if self.pictures_too else ("caption", "file")
            )
            raise DataError(
                f"{self.source}: no {what} is left to train on{f' ({reasons})' if reasons else ''}; allowed is at "
                f"least one; check the {where}"
            )
        if self.dropped_share > max_dropped:
            raise DataError(
                f"{self.source}: {self.dropped_share:.2%} of the data cannot be used ({reasons}); allowed is "
                f"{max_dropped:.2%}; repair it, or accept it with --max_dropped {_round_up(self.dropped_share)}"
            )


@dataclass
class Drops:
    """Counts what is dropped while data is scanned."""

    _found: dict[tuple[Kind, str], tuple[int, list[str]]] = field(default_factory=dict)

    def add(self, kind: Kind, reason: str, name: str, detail: str = "") -> None:
        """Count one; `name` says which, `detail` what is particular to it."""
        count, examples = self._found.get((kind, reason), (0, []))
        if len(examples) < _EXAMPLES:
            examples.append(f"{shown(name)} ({detail})" if detail else shown(name))
        self._found[kind, reason] = (count + 1, examples)

    def report(
        self, source: str, pictures: int, captions: int, *, endless: bool = False, pictures_too: bool = True
    ) -> DataReport:
        """The report, the most frequent reasons first."""
        ranked = sorted(self._found.items(), key=lambda entry: (-entry[1][0], entry[0]))
        return DataReport(
            source=source,
            pictures=pictures,
            captions=captions,
            dropped=tuple(
                Reason(kind=kind, reason=reason, count=count, examples=tuple(examples))
                for (kind, reason), (count, examples) in ranked
            ),
            endless=endless,
            pictures_too=pictures_too,
        )


def shown(name: str) -> str:
    """Foreign text, fit for one line of ours: what cannot be printed is escaped, and a long one loses its middle."""
    name = name if name.isprintable() else ascii(name)[1:-1]
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME // 2]}...{name[-_LONGEST_NAME // 2 :]}"
    return name


def _round_up(share: float) -> float:
    """`share`, rounded up to what a person would type: it must let the data pass."""
    return min(1.0, (int(share * 100) + 1) / 100)
