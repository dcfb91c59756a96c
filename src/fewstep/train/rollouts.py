"""What updates learn from: rollouts of the teacher, each made for its update or kept in a folder and learnt from again.

K guided DDIM steps are 2K forwards, one update of the student about as much as two: most of a training's time is the
teacher's. Kept on disk, a rollout can be learnt from in several epochs, and by other runs that would ask the teacher
the very same (another rank, another loss): that is `teacher_rollouts` and `teacher_cache`.

The rollouts kept are those that the first updates of a run without a cache would make, in that order; as long as none
is used twice the two runs are the same. Afterwards each epoch goes through them in another order, by the seed alone.
With `pairs_per_visit` an update learns from few pairs of many rollouts instead of all pairs of few.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.backbone import Backbone, adapters_off
from fewstep.config import Start
from fewstep.data import Batch, Slices
from fewstep.data.loader import Noted, Replaced
from fewstep.data.order import sample_index
from fewstep.errors import CheckpointError
from fewstep.files import write_tensors_atomic
from fewstep.methods.kstep import Draws, KStep, Pairs
from fewstep.randomness import generator
from fewstep.solver import Denoiser
from fewstep.train.encoding import Encoder
from fewstep.train.keyed import checksum, claim, damaged, opened, unwritten
from fewstep.transfer import upload

KEY = "rollouts.json"
"""The file that says what the rollouts of a folder are of."""

KEPT = ("x_t", "target", "t", "rows", "weight", "cond")
"""The tensors of a file: the lesson's pairs, and its captions as the text encoder has them."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Lesson:
    """What one micro-batch of B samples teaches.

    Attributes:
        pairs: N ≥ B states and where the teacher gets from there; `rows` says whose they are.
        cond: the captions' embeddings, [B, L, D].
        captions: B of them.
        items: numbers of the B items in the data, or of the kept rollouts.
        replaced: pictures met for the first time here that could not be used.
        forwards: samples that the teacher's network was asked about for it; none where it was kept.
    """

    pairs: Pairs
    cond: Tensor
    captions: tuple[str, ...]
    items: tuple[int, ...]
    replaced: tuple[Replaced | Noted, ...] = ()
    forwards: int = 0

    def loss(self, method: KStep, student: Denoiser) -> tuple[Tensor, Tensor]:
        """The batch's loss, a mean over its B samples, and the loss of each pair [N]; both with gradient."""
        pairs = self.pairs
        cond = self.cond[upload(pairs.rows, self.cond.device)]
        each = method.loss(student, pairs.x_t, pairs.t, cond, pairs.target)
        return (pairs.weight * each).sum() / len(self.cond), each

    def on(self, device: torch.device) -> Lesson:
        """The same lesson with what the networks are given on `device`; nothing waits for it."""
        pairs = self.pairs
        there = {name: upload(getattr(pairs, name), device) for name in ("x_t", "weight", "target")}
        return replace(self, pairs=replace(pairs, **there), cond=upload(self.cond, device))


@dataclass(frozen=True, eq=False)
class Teacher:
    """Makes a lesson of a micro-batch of data: the rollouts from its noised latents, or from noise alone.

    Attributes:
        seed: of all that is drawn.
        shape: of one latent, (C, H, W).
        encoder: gives latents of pictures and embeddings of captions.
        start: whose clean latents are noised: those of the data's pictures, or of the teacher's own to the same
            captions, which cost a rollout more each: with 1 2 4 8 promised steps for 53 % of the draws; or guesses of
            the student as it is now, 1.4 of its forwards a draw.
    """

    backbone: Backbone
    encoder: Encoder
    method: KStep
    seed: int
    shape: tuple[int, int, int]
    start: Start = "data"

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Lesson:
        draws, cond = self.draw(batch), self.encoder.embed(batch.captions)
        teacher = Counting(self.backbone.denoiser(adapter=False))
        x_t = self._start(teacher, batch, draws, cond)
        with adapters_off(self.backbone.unet):
            pairs = self.method.pairs(teacher, x_t, draws, cond, self._uncond)
        return Lesson(
            pairs=pairs,
            cond=cond,
            captions=batch.captions,
            items=batch.items,
            replaced=batch.replaced,
            forwards=teacher.samples,
        )

    def spared(self) -> Container[int]:
        """Numbers of the data's items whose captions alone are wanted: encoded already, or no picture is noised."""
        return self.encoder.items() if self.start == "data" else range(2**128)

    def prepare(self, batch: Batch) -> None:
        """Ask the encoder for all that the batch's lesson will ask of it."""
        self.encoder.embed(batch.captions)
        rows = self.draw(batch).noised
        if rows and self.start == "data":
            self.encoder.encode(batch, rows)

    def draw(self, batch: Batch) -> Draws:
        """What chance decides about the batch."""
        return self.method.draw(self.seed, batch.update, batch.positions, self.shape)

    @cached_property
    def _uncond(self) -> Tensor:
        return self.encoder.embed([""])

    def _start(self, teacher: Denoiser, batch: Batch, draws: Draws, cond: Tensor) -> Tensor:
        """x_t [B, C, H, W] fp32."""
        if self.start == "student":
            student = self.backbone.denoiser()
            return self.method.own_states(student, draws, cond, self.seed, batch.update, batch.positions)
        return self.method.start(self._clean(teacher, batch, draws, cond), draws)

    def _clean(self, teacher: Denoiser, batch: Batch, draws: Draws, cond: Tensor) -> Tensor:
        """x0 [B, C, H, W] fp32; only where it is asked for: a sample that starts from pure noise has zeros."""
        device = self.backbone.device
        x0 = torch.zeros_like(draws.noise, device=device)
        rows = draws.noised
        if not rows:
            return x0
        here = upload(torch.tensor(rows), device)
        if self.start == "teacher":
            positions = [batch.positions[row] for row in rows]
            origins = upload(self.method.draw_origins(self.seed, batch.update, positions, self.shape), device)
            with adapters_off(self.backbone.unet):
                latents = self.method.own_pictures(teacher, origins, cond[here], self._uncond)
        else:
            latents = self.encoder.encode(batch, rows)
        return x0.index_copy_(0, here, latents)


class Counting:
    """A denoiser that counts the samples it is asked about."""

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self.samples = 0

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor, /) -> Tensor:
        self.samples += len(x_t)
        return self._denoiser(x_t, t, cond)


class RolloutStore:
    """Rollouts in a folder, a file a micro-batch: `00000016-8.safetensors` has eight, the run's seventeenth and on.

    Every process writes its own files into the folder and reads everybody's. Runs that cut the same global batch into
    other micro-batches write files of other names, each of them whole.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        """Open the folder, or make it.

        Args:
            key: all that the rollouts depend on.

        Raises:
            CheckpointError: the folder holds rollouts of something else.
            InputError: it cannot be written to.
        """
        self.folder = folder
        self._where: dict[int, tuple[Path, int]] = {}
        try:
            claim(folder / KEY, key, held="teacher_cache {} holds rollouts", of="teacher")
        except OSError as error:
            raise unwritten("teacher_cache", folder, error) from None
        self.refresh()

    def refresh(self) -> None:
        """Find out which rollouts the folder holds.

        Raises:
            CheckpointError: a file in it cannot be read.
        """
        self._where = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                first = int(path.stem.partition("-")[0])
                with opened(path) as file:
                    count = len(json.loads(file.metadata()["captions"]))
                    whole = set(KEPT) <= set(file.keys()) and len(json.loads(file.metadata()["sums"])) == count
            except (TypeError, KeyError, ValueError, RecursionError):
                whole = False
            if not whole:
                raise CheckpointError(f"{str(path)!r} is no file of rollouts; remove it")
            self._where |= {first + row: (path, row) for row in range(count)}

    def __len__(self) -> int:
        """How many rollouts there are."""
        return len(self._where)

    def holds(self, first: int, count: int) -> bool:
        """Whether rollouts first … first + count − 1 are there."""
        return all(number in self._where for number in range(first, first + count))

    def file(self, first: int, count: int) -> Path:
        """The file of `count` rollouts that are numbered from `first`."""
        return self.folder / f"{first:08d}-{count}.safetensors"

    def put(self, first: int, lesson: Lesson) -> None:
        """Keep the rollouts of a lesson, numbered from `first`; the file appears whole or not at all.

        Raises:
            InputError: the disk is full, or cannot be written to.
        """
        pairs = lesson.pairs
        tensors = {
            "x_t": pairs.x_t.cpu().contiguous(),
            "target": pairs.target.cpu().contiguous(),
            "t": pairs.t,
            "rows": pairs.rows,
            "weight": pairs.weight.cpu(),
            "cond": lesson.cond.cpu().contiguous(),
        }
        path = self.file(first, len(lesson.captions))
        sums = [
            _checksum(path, caption, _rollout(tensors, lesson.cond[row].cpu(), row))
            for row, caption in enumerate(lesson.captions)
        ]
        about = {"captions": json.dumps(lesson.captions), "sums": json.dumps(sums)}
        try:
            write_tensors_atomic(path, tensors, about)
        except OSError as error:
            raise unwritten("teacher_cache", self.folder, error) from None

    def get(self, numbers: list[int]) -> Lesson:
        """What the rollouts `numbers` teach, in that order, in main memory.

        Raises:
            CheckpointError: one is not there, or not as it was written.
        """
        parts: list[dict[str, Tensor]] = []
        captions, embeddings = list[str](), list[Tensor]()
        for place, number in enumerate(numbers):
            if number not in self._where:
                raise CheckpointError(
                    f"rollout {number} is not in {str(self.folder)!r}; it has to be one folder for all processes; "
                    "start the same command again to make what is missing"
                )
            path, row = self._where[number]
            with opened(path) as file:
                kept = {name: file.get_tensor(name) for name in KEPT if name != "cond"}
                part, about = _rollout(kept, file.get_slice("cond")[row], row), file.metadata()
            caption = json.loads(about["captions"])[row]
            if _checksum(path, caption, part) != json.loads(about["sums"])[row]:
                raise damaged(path, f"rollout {number}")
            captions.append(caption)
            embeddings.append(part.pop("cond"))
            parts.append(part | {"rows": torch.full_like(part["t"], place)})
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        cond = torch.stack(embeddings)
        return Lesson(pairs=Pairs(**joined), cond=cond, captions=tuple(captions), items=tuple(numbers))


def _rollout(kept: Mapping[str, Tensor], cond: Tensor, row: int) -> dict[str, Tensor]:
    """What is kept of one rollout of a file; `cond` is that of its caption."""
    mine = (kept["rows"] == row).nonzero().squeeze(1)
    return {name: kept[name][mine] for name in KEPT if name not in ("rows", "cond")} | {"cond": cond}


def _checksum(path: Path, caption: str, rollout: Mapping[str, Tensor]) -> int:
    return checksum(f"{path.stem} {caption}", [rollout[name] for name in sorted(rollout)])


def numbers_of(slices: Slices, update: int, micro: int, count: int, seed: int) -> list[int]:
    """Which of `count` rollouts a process learns from in a micro-batch: first all in order, then epoch after epoch."""
    places = [update * slices.global_batch + position for position in slices.positions(micro)]
    return [place if place < count else sample_index(seed, place, count) for place in places]


def turns_of(pairs: Pairs, numbers: Sequence[int], visits: Sequence[int], most: int, seed: int) -> Pairs:
    """At most `most` pairs of each rollout: at every visit others, until all have had their turn, then in a new order.

    Pairs of one path are alike; an update learns more from as many pairs of different ones. Weights make up for the
    turns in which a pair is left out: over all of them it weighs what it would without.

    Args:
        numbers: of the rollouts that `pairs.rows` counts.
        visits: how often each of them has been visited before.
        seed: of the orders.
    """
    chosen, weights = [], []
    for row, (number, visit) in enumerate(zip(numbers, visits, strict=True)):
        mine = (pairs.rows == row).nonzero().squeeze(1)
        turns = -(-len(mine) // most)
        order = torch.randperm(len(mine), generator=generator(seed, "turns", number, visit // turns))
        turn = visit % turns
        chosen.append(mine[order[turn * most : (turn + 1) * most].sort().values])
        weights.append(torch.full((len(chosen[-1]),), float(turns)))
    index = torch.cat(chosen)
    there = upload(index, pairs.x_t.device)
    return Pairs(
        x_t=pairs.x_t[there],
        t=pairs.t[index],
        rows=pairs.rows[index],
        weight=pairs.weight[there] * upload(torch.cat(weights), there.device),
        target=pairs.target[there],
    )


def kept_lessons(
    store: RolloutStore,
    slices: Slices,
    *,
    count: int,
    seed: int,
    start: int,
    end: int,
    pairs_per_visit: int | None = None,
) -> Iterator[Lesson]:
    """The lessons of updates `start` to `end` from the first `count` rollouts of the store, in main memory."""
    for update in range(start, end):
        for micro in range(slices.accumulation):
            numbers = numbers_of(slices, update, micro, count, seed)
            lesson = store.get(numbers)
            if pairs_per_visit is not None:
                visits = [(update * slices.global_batch + place) // count for place in slices.positions(micro)]
                lesson = replace(lesson, pairs=turns_of(lesson.pairs, numbers, visits, pairs_per_visit, seed))
            yield lesson
