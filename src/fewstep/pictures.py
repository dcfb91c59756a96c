"""Picture-making: an arm, prompts and picture numbers in; latents, pixels and judgements out.

A picture depends on its arm, its prompt, its number and the seed alone: never on the batch it is drawn in, nor on which
other arms are drawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep.arms import Arm
from fewstep.errors import CheckpointError
from fewstep.reporting import SILENT, Reporter
from fewstep.sampling import SAMPLERS, PictureNoise, tcd_sample
from fewstep.schedule import NoiseSchedule
from fewstep.solver import Denoiser, OnStep
from fewstep.transfer import upload

EMBED_AT_ONCE = 16
"""Prompts embedded in one call, whatever the batch size, so that embeddings do not depend on it."""


class AnswerKey(Protocol):
    """The one ability of a base that is asked for here."""

    def answers(self, pixels: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Pixels [B, 3, H, W] in 0 ... 1 to booleans [B]: each attribute, "intact", "all_right"."""
        ...


class Painter(Protocol):
    """What picture-making needs of a `Backbone`."""

    @property
    def schedule(self) -> NoiseSchedule: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def resolution(self) -> int: ...
    @property
    def abilities(self) -> Any: ...
    def latent_shape(self, resolution: int) -> tuple[int, int, int]: ...
    def embed(self, prompts: list[str]) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def denoiser(self, adapter: bool = True) -> Denoiser: ...


@dataclass(frozen=True)
class Conditioning:
    """Prompts as the network reads them: ``cond`` [P, L, D] and ``uncond`` [1, L, D], fp32, on any device.

    Those of thousands of prompts take gigabytes: `encode_prompts` leaves them in main memory.
    """

    prompts: tuple[str, ...]
    cond: Tensor
    uncond: Tensor


def encode_prompts(painter: Painter, prompts: Sequence[str], negative_prompt: str | None = None) -> Conditioning:
    """Embed the prompts, and the empty or negative one, once for all arms."""
    with torch.no_grad():
        parts = [
            painter.embed(list(prompts[first : first + EMBED_AT_ONCE])).cpu()
            for first in range(0, len(prompts), EMBED_AT_ONCE)
        ]
        uncond = painter.embed([negative_prompt or ""])
    return Conditioning(tuple(prompts), torch.cat(parts), uncond)


@dataclass(frozen=True)
class PictureBatch:
    """Some finished pictures, on the CPU.

    Args:
        ids: (prompt number, picture number) of each of the B pictures.
        prompts: their texts.
        latents: [B, C, h, w] fp32.
        pixels: [B, 3, H, W] uint8, as they are saved; all judgements are on these.
        seconds: wall clock from noise to pixels in main memory (copying there waits for the device).
    """

    ids: tuple[tuple[int, int], ...]
    prompts: tuple[str, ...]
    latents: Tensor
    pixels: Tensor
    seconds: float

    @property
    def unit_pixels(self) -> Tensor:
        """The saved pictures as fp32 in 0 ... 1, [B, 3, H, W]."""
        return self.pixels.float() / 255


def picture_ids(prompts: int, pictures: int) -> list[tuple[int, int]]:
    """(prompt number, picture number) of every picture, prompt by prompt."""
    return [(prompt, picture) for prompt in range(prompts) for picture in range(pictures)]


@torch.no_grad()
def draw_latents(
    painter: Painter,
    arm: Arm,
    conditioning: Conditioning,
    ids: Sequence[tuple[int, int]],
    *,
    seed: int,
    resolution: int | None = None,
    denoiser: Denoiser | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """One batch of an arm's latents [B, C, h, w] fp32 on the painter's device.

    Args:
        ids: (prompt number, picture number) of each picture.
        seed: with an id, it gives the picture's noise: the same first noise in every arm.
        resolution: side in pixels; the painter's own by default.
        denoiser: another network than the arm's own (for instance the perfect student's).
        on_step: called after every step of the sampler.
    """
    cond = upload(conditioning.cond[[prompt for prompt, _ in ids]], painter.device)
    sample = partial(tcd_sample, eta=arm.eta) if arm.sampler == "tcd" else SAMPLERS[arm.sampler]
    return sample(
        denoiser or painter.denoiser(adapter=arm.adapter),
        painter.schedule,
        PictureNoise(ids, seed),
        painter.latent_shape(resolution or painter.resolution),
        arm.timesteps,
        cond,
        conditioning.uncond,
        arm.guidance,
        on_step,
    )


def as_bytes(pixels: Tensor) -> Tensor:
    """Pixels in 0 ... 1 to the uint8 that is saved, on the CPU, rounded to the nearest."""
    return (pixels.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


@torch.no_grad()
def draw_pictures(
    painter: Painter,
    arm: Arm,
    conditioning: Conditioning,
    ids: Sequence[tuple[int, int]],
    *,
    seed: int,
    batch_size: int = 8,
    resolution: int | None = None,
    denoiser: Denoiser | None = None,
    on_step: OnStep | None = None,
) -> Iterator[PictureBatch]:
    """An arm's pictures, batch by batch in the order of ``ids``; arguments as in `draw_latents`.

    Raises:
        CheckpointError: latents or pictures overflow, which half precision and broken adapters bring about.
    """
    for first in range(0, len(ids), batch_size):
        some = tuple(ids[first : first + batch_size])
        started = time.perf_counter()
        latents = draw_latents(
            painter, arm, conditioning, some, seed=seed, resolution=resolution, denoiser=denoiser, on_step=on_step
        )
        decoded = painter.decode(latents)
        pixels = as_bytes(decoded)
        seconds = time.perf_counter() - started
        if not bool(latents.isfinite().all()):
            raise CheckpointError(
                f"arm {arm.id} draws latents that are not finite; allowed are numbers; try --mixed_precision no, or "
                "another adapter"
            )
        if not bool(decoded.isfinite().all()):
            raise CheckpointError(
                f"arm {arm.id} draws pictures that are not finite, from latents that are: the decoder overflows; "
                "allowed are numbers; try --mixed_precision no, or another base"
            )
        yield PictureBatch(
            some, tuple(conditioning.prompts[prompt] for prompt, _ in some), latents.float().cpu(), pixels, seconds
        )


def make_pictures(
    painter: Painter,
    arm: Arm,
    conditioning: Conditioning,
    ids: Sequence[tuple[int, int]],
    *,
    seed: int,
    batch_size: int = 8,
    resolution: int | None = None,
    denoiser: Denoiser | None = None,
    reporter: Reporter = SILENT,
) -> PictureBatch:
    """All of an arm's pictures at once: `draw_pictures` joined into one batch."""
    if not ids:
        raise ValueError("no picture ids came; allowed is at least one")
    with reporter.progress(arm.id, len(ids)) as bar:
        batches = []
        for batch in draw_pictures(
            painter, arm, conditioning, ids, seed=seed, batch_size=batch_size, resolution=resolution, denoiser=denoiser
        ):
            batches.append(batch)
            bar.advance(len(batch.ids))
    return PictureBatch(
        tuple(one for batch in batches for one in batch.ids),
        tuple(one for batch in batches for one in batch.prompts),
        torch.cat([batch.latents for batch in batches]),
        torch.cat([batch.pixels for batch in batches]),
        sum(batch.seconds for batch in batches),
    )


# ------------------------------------------------------------------------------------------------------------ judging

Judge = Callable[[PictureBatch], Mapping[str, Tensor]]
"""What a judge finds about a batch: named tensors [B, ...]."""


@dataclass(frozen=True)
class Cell:
    """What was found about one batch of an arm: ``found[judge][name]`` is [B, ...]; and each picture's seconds."""

    found: dict[str, dict[str, Tensor]]
    seconds: tuple[float, ...]


class Kept(Protocol):
    """A place where an arm's cells are kept, by number."""

    def get(self, number: int) -> Cell | None:
        """The cell, if it is there."""
        ...

    def put(self, number: int, cell: Cell) -> None:
        """Keep it."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """An arm's pictures judged: ``found[judge][name]`` is [N, ...] in the order of ``ids``.

    ``seconds`` holds each picture's share of its batch's wall clock.
    """

    arm: Arm
    ids: tuple[tuple[int, int], ...]
    found: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    seconds: tuple[float, ...] = ()

    @property
    def prompt_numbers(self) -> list[int]:
        """The prompt of each picture: the clusters of every interval."""
        return [prompt for prompt, _ in self.ids]

    @property
    def answers(self) -> dict[str, Tensor] | None:
        """Booleans [N] by attribute, with "intact" and "all_right"; None without an answer key."""
        return self.found.get("answers")

    @property
    def all_right(self) -> float | None:
        """Share of pictures with every attribute right."""
        return None if self.answers is None else self.answers["all_right"].double().mean().item()


def answer_judge(abilities: AnswerKey) -> Judge:
    """The base's own answer key as a judge."""
    return lambda batch: abilities.answers(batch.unit_pixels, list(batch.prompts))


def evaluate(
    painter: Painter,
    prompts: Sequence[str] | Conditioning,
    arm: Arm,
    *,
    seed: int,
    pictures_per_prompt: int = 1,
    batch_size: int = 8,
    resolution: int | None = None,
    judges: Mapping[str, Judge] | None = None,
    denoiser: Denoiser | None = None,
    on_batch: Callable[[PictureBatch], object] | None = None,
    kept: Kept | None = None,
    share: tuple[int, int] = (0, 1),
    reporter: Reporter = SILENT,
) -> Evaluation:
    """Draw an arm's pictures and judge them, batch by batch: nothing but the judgements is kept.

    Args:
        prompts: texts, or what `encode_prompts` made of them (to be shared between arms).
        judges: by default the base's answer key under the name ``answers``, where it has one.
        denoiser: see `draw_latents`.
        on_batch: called with every batch that is drawn, for instance to save it.
        kept: cells that are there are taken from it instead of being drawn; those that are drawn are put there.
        share: (i, n) draws every n-th batch from batch i on, for one of n processes; the result covers those alone.
    """
    conditioning = prompts if isinstance(prompts, Conditioning) else encode_prompts(painter, prompts)
    if judges is None:
        judges = {} if painter.abilities is None else {"answers": answer_judge(painter.abilities)}

    def draw(ids: Sequence[tuple[int, int]], on_step: OnStep) -> PictureBatch:
        (batch,) = draw_pictures(
            painter,
            arm,
            conditioning,
            ids,
            seed=seed,
            batch_size=batch_size,
            resolution=resolution,
            denoiser=denoiser,
            on_step=on_step,
        )
        return batch

    return evaluate_batches(
        draw,
        arm,
        prompts=len(conditioning.prompts),
        pictures_per_prompt=pictures_per_prompt,
        batch_size=batch_size,
        judges=judges,
        on_batch=on_batch,
        kept=kept,
        share=share,
        reporter=reporter,
    )


def evaluate_batches(
    draw: Callable[[Sequence[tuple[int, int]], OnStep], PictureBatch],
    arm: Arm,
    *,
    prompts: int,
    pictures_per_prompt: int,
    batch_size: int,
    judges: Mapping[str, Judge],
    on_batch: Callable[[PictureBatch], object] | None = None,
    kept: Kept | None = None,
    share: tuple[int, int] = (0, 1),
    reporter: Reporter = SILENT,
) -> Evaluation:
    """`evaluate` of pictures that come from anywhere.

    Args:
        draw: the pictures of these ids, calling its second argument after every step of the arm, or once if it has
            none.
        prompts: how many there are.
    """
    ids = picture_ids(prompts, pictures_per_prompt)
    batches = [tuple(ids[first : first + batch_size]) for first in range(0, len(ids), batch_size)]
    mine = range(share[0], len(batches), share[1])
    cells: list[Cell] = []
    # Counted in sampler steps: a batch of the teacher takes long, and the bar should move meanwhile.
    steps = max(1, arm.steps)
    with reporter.progress(arm.title, len(mine) * steps) as bar:
        for number in mine:
            cell = kept.get(number) if kept is not None else None
            if cell is None:
                batch = draw(batches[number], bar.advance)
                cell = _judged(batch, judges)
                if on_batch is not None:
                    on_batch(batch)
                if kept is not None:
                    kept.put(number, cell)
            else:
                bar.advance(steps)
            cells.append(cell)
    found = {
        judge: {name: torch.cat([cell.found[judge][name] for cell in cells]) for name in cells[0].found[judge]}
        for judge in (judges if cells else ())
    }
    covered = tuple(one for number in mine for one in batches[number])
    return Evaluation(arm, covered, found, tuple(second for cell in cells for second in cell.seconds))


def _judged(batch: PictureBatch, judges: Mapping[str, Judge]) -> Cell:
    found = {name: {key: value.detach().cpu() for key, value in judge(batch).items()} for name, judge in judges.items()}
    return Cell(found, (batch.seconds / len(batch.ids),) * len(batch.ids))
