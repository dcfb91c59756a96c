"""Batches for every (update, micro-batch) of a run, the same whoever loads them and wherever the run begins.

The run's samples form one endless sequence, `global_batch` of them an update. Which item, and which of its captions,
stands at a place of it follows from the seed and that place alone (`data.order`), so that neither processes nor workers
nor micro-batches change what an update sees, and a resumed run needs no state but its update.

A picture whose content turns out to be no good only when it is decoded (its header and its end were looked at in the
scan) gives way to another, drawn by the seed and the place: the batch stays full, the choice is the same in every
repetition, and each one is named in the batch. More of them than the scan's allowance ends the run. A picture that is
*gone* ends the run at once: that is no property of the data but something happening to it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fewstep.data.order import sample_index
from fewstep.data.pairs import NO_PICTURE, PictureData
from fewstep.data.pictures import PictureError
from fewstep.errors import DataError, FewstepError
from fewstep.randomness import generator
from fewstep.signals import leave_to_the_main_process

_PREFETCH = 2  # micro-batches that a worker is asked for in advance

_ATTEMPTS = 32  # at finding a replacement; that many failures in a row are no accident


@dataclass(frozen=True, kw_only=True)
class Slices:
    """How a global batch is cut: by micro-batches, then by processes, then by samples.

    Attributes:
        batch_size: samples a process and micro-batch.
        accumulation: micro-batches an update.
        processes: that share each micro-batch.
        rank: this process, from 0.
    """

    batch_size: int
    accumulation: int = 1
    processes: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if min(self.batch_size, self.accumulation, self.processes) < 1 or not 0 <= self.rank < self.processes:
            raise ValueError(f"{self} came; allowed are counts from 1 and a rank below the number of processes")

    @property
    def global_batch(self) -> int:
        """Samples an update, over all micro-batches and processes."""
        return self.batch_size * self.accumulation * self.processes

    def positions(self, micro: int) -> range:
        """Positions in the global batch that this process handles in micro-batch `micro`."""
        first = (micro * self.processes + self.rank) * self.batch_size
        return range(first, first + self.batch_size)

    def first_place(self, update: int, micro: int) -> int:
        """Where those positions begin in the sequence of all samples of the run."""
        return update * self.global_batch + self.positions(micro).start


@runtime_checkable
class InItsOwnOrder(Protocol):
    """Data that says itself which item stands where, for it cannot be read at random as a whole."""

    def index_at(self, seed: int, place: int, attempt: int = 0) -> int:
        """Which item stands at a place of the endless sequence; at a later attempt, another in its place."""
        ...

    def expect(self, spread: int) -> None:
        """Told how far apart places of the sequence are that are read at the same time, at most."""
        ...

    def notes(self) -> tuple[str, ...]:
        """What became known of the data since the last call, a line each."""
        ...


@dataclass(frozen=True)
class Noted:
    """What became known of the data while it was read."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Replaced:
    """A picture that another one stands in for."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}; another picture took its place"


def refuse_too_many(replaced: Mapping[str, str], allowance: int) -> None:
    """Refuse data of which more than `allowance` pictures, by name and reason, turned out to be no good.

    Raises:
        DataError: see above.
    """
    if len(replaced) > allowance:
        named = "; ".join(f"{name}: {reason}" for name, reason in list(replaced.items())[-3:])
        raise DataError(
            f"{len(replaced)} pictures turned out to be no good when they were decoded ({named}); allowed is "
            f"{allowance} more than the scan dropped; repair or remove them, or raise --max_dropped"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """One micro-batch of one process.

    Attributes:
        update: number of the optimizer update, from 0.
        micro: number of the micro-batch in it, from 0.
        positions: of the B samples in the global batch.
        items: numbers of the B items in the data.
        pictures: uint8 [B, R, R, 3], RGB; R is 0 where the data is captions alone.
        captions: B of them, none empty.
        replaced: pictures that were met for the first time here and could not be used, and what else became known.
        spared: rows whose picture was not asked for, and is black.
    """

    update: int
    micro: int
    positions: tuple[int, ...]
    items: tuple[int, ...]
    pictures: Tensor
    captions: tuple[str, ...]
    replaced: tuple[Replaced | Noted, ...]
    spared: tuple[int, ...] = ()

    def pixels(self, device: torch.device | str = "cpu") -> Tensor:
        """The pictures as a model takes them: fp32 [B, 3, R, R] in -1 … 1, converted on `device`."""
        return to_pixels(self.pictures.to(device, non_blocking=True))


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8 [B, R, R, 3] in 0 … 255 to fp32 [B, 3, R, R] in -1 … 1: x / 127.5 - 1."""
    return pictures.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


class Batches:
    """The batches of updates `start` to `end` of one process, in order; can be iterated again."""

    def __init__(
        self,
        data: PictureData,
        slices: Slices,
        *,
        seed: int,
        start: int,
        end: int,
        allowance: int = 0,
        workers: int = 0,
        skip: Callable[[int, int], bool] = lambda _first, _count: False,
        spared: Container[int] = frozenset(),
    ) -> None:
        """Nothing is loaded yet.

        Args:
            data: what to load.
            slices: which part of each global batch this process handles.
            seed: of order and captions.
            start: update to begin with: the number of updates that are done.
            end: update to stop before.
            allowance: how many different pictures may turn out to be no good (`OpenedData.allowance`).
            workers: processes that load ahead; 0 loads in this one. Changes nothing but the speed.
            skip: told the first place of a micro-batch in the endless sequence and its length: whether to leave it out.
            spared: numbers of items whose captions alone are needed: their pictures are not decoded.
        """
        self._source = _Source(data, slices, seed, spared)
        self._order = [
            (update, micro)
            for update in range(start, end)
            for micro in range(slices.accumulation)
            if not skip(slices.first_place(update, micro), slices.batch_size)
        ]
        self._allowance = allowance
        self._workers = workers
        if isinstance(data, InItsOwnOrder) and (workers or slices.processes > 1):
            ahead = 2 * slices.accumulation if slices.processes > 1 else 1  # at most an update before another process
            data.expect((workers * _PREFETCH + ahead) * slices.batch_size * slices.processes)
        self.replaced: dict[str, str] = {}
        """Names of the pictures that turned out to be no good, and why."""
        self._noted: set[str] = set()

    def __len__(self) -> int:
        """Number of micro-batches."""
        return len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        """The batches in order.

        Raises:
            DataError: the data is gone, or more pictures than allowed are no good.
        """
        loader: DataLoader[_Loaded | FewstepError] = DataLoader(
            self._source,
            batch_size=None,  # the source makes whole batches
            sampler=self._order,
            collate_fn=_as_it_is,
            num_workers=self._workers,
            prefetch_factor=_PREFETCH if self._workers else None,
            worker_init_fn=leave_to_the_main_process,
            generator=torch.Generator(),  # else the loader draws from, and so changes, torch's global generator
        )
        for loaded in loader:
            if isinstance(loaded, FewstepError):
                raise loaded
            yield self._checked(loaded)

    def _checked(self, loaded: _Loaded) -> Batch:
        new = tuple(replaced for replaced in loaded.replaced if replaced.name not in self.replaced)
        self.replaced |= {replaced.name: replaced.reason for replaced in new}
        noted = [Noted(text) for text in loaded.notes if text not in self._noted]  # each worker says it
        self._noted.update(loaded.notes)
        refuse_too_many(self.replaced, self._allowance)
        return Batch(
            update=loaded.update,
            micro=loaded.micro,
            positions=loaded.positions,
            items=loaded.items,
            pictures=torch.from_numpy(loaded.pictures),
            captions=loaded.captions,
            replaced=(*noted, *new),
            spared=loaded.spared,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Loaded:
    """A batch on its way from a worker; arrays, since tensors would need shared memory, which containers lack."""

    update: int
    micro: int
    positions: tuple[int, ...]
    items: tuple[int, ...]
    pictures: np.ndarray
    captions: tuple[str, ...]
    replaced: tuple[Replaced, ...]
    spared: tuple[int, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Source(Dataset["_Loaded | FewstepError"]):
    """(update, micro-batch) to its batch, or to the error in its way: the loader would garble one that is raised."""

    data: PictureData
    slices: Slices
    seed: int
    spared: Container[int]

    def __getitem__(self, key: tuple[int, int]) -> _Loaded | FewstepError:
        update, micro = key
        positions = tuple(self.slices.positions(micro))
        replaced: list[Replaced] = []
        try:
            samples = [self._sample(update * self.slices.global_batch + position, replaced) for position in positions]
        except FewstepError as error:
            return error.with_traceback(None)
        items, pictures, captions = zip(*samples, strict=True)
        black = np.zeros_like(next((picture for picture in pictures if picture is not None), NO_PICTURE))
        return _Loaded(
            update=update,
            micro=micro,
            positions=positions,
            items=items,
            pictures=np.stack([black if picture is None else picture for picture in pictures]),
            captions=captions,
            replaced=tuple({bad.name: bad for bad in replaced}.values()),
            spared=tuple(row for row, picture in enumerate(pictures) if picture is None),
            notes=self.data.notes() if isinstance(self.data, InItsOwnOrder) else (),
        )

    def _sample(self, place: int, replaced: list[Replaced]) -> tuple[int, np.ndarray | None, str]:
        """(number, pixels, caption) of the item at a place of the endless sequence; no pixels where they are spared."""
        for attempt in range(_ATTEMPTS):
            index = self._index_at(place, attempt)
            try:
                pixels: np.ndarray | None
                if index in self.spared:
                    pixels, captions = None, self.data.captions(index)
                else:
                    pixels, captions = self.data.item(index)
            except PictureError as error:
                replaced.append(Replaced(self.data.name(index), str(error)))
            else:
                return index, pixels, captions[_draw(len(captions), generator(self.seed, "caption", place))]
        bad = replaced[-1]
        raise DataError(
            f"{_ATTEMPTS} pictures in a row are no good, the last {bad.name}: {bad.reason}; allowed are a few; check "
            "the data"
        )

    def _index_at(self, place: int, attempt: int) -> int:
        """The item at a place, or the one drawn in its stead at a later attempt."""
        if isinstance(self.data, InItsOwnOrder):
            return self.data.index_at(self.seed, place, attempt)
        if attempt:
            return _draw(len(self.data), generator(self.seed, "replacement", place, attempt - 1))
        return sample_index(self.seed, place, len(self.data))


def _draw(n: int, rng: torch.Generator) -> int:
    """One of 0 … n-1."""
    return int(torch.randint(n, (), generator=rng)) if n > 1 else 0


def _as_it_is(loaded: Any) -> Any:
    return loaded
