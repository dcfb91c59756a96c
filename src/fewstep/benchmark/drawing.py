"""An arm's pictures: drawn from the noise that every arm has, judged and saved batch by batch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from fewstep.arms import Arm
from fewstep.benchmark.cells import ArmCells
from fewstep.benchmark.plan import Plan
from fewstep.benchmark.real import Ids, RealPictures, latents_of, through_vae
from fewstep.files import replace_folder_atomic
from fewstep.metrics.alignment import CLIPAlignment, alignment_and_floor
from fewstep.metrics.saturation import latent_moments
from fewstep.pictures import (
    Cell,
    Conditioning,
    Evaluation,
    Judge,
    PictureBatch,
    answer_judge,
    encode_prompts,
    evaluate,
    evaluate_batches,
    picture_ids,
)
from fewstep.report import picture_path, save_picture
from fewstep.reporting import Reporter
from fewstep.solver import OnStep

FILES = "files"
"""Under which a cell keeps what is in its pictures' files: several benchmarks may draw into one --baseline_outdir."""


@contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """A folder to fill; it takes the place of ``final`` once it is whole, and is gone if it never is."""
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        replace_folder_atomic(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def judges_of(plan: Plan) -> dict[str, Judge]:
    """Whoever looks at the pictures, by the name under which the findings are kept."""
    judges: dict[str, Judge] = {"latents": lambda batch: latent_moments(batch.latents)}
    if plan.alignment is not None:
        clip, prompts = plan.alignment, plan.prompts
        texts = clip.texts(prompts)

        def aligned(batch: PictureBatch) -> dict[str, Tensor]:
            embeddings = clip.images(batch.pixels)
            found = alignment_and_floor(embeddings, texts, [prompt for prompt, _ in batch.ids], prompts)
            return found | {"embedding": embeddings}

        judges["alignment"] = aligned
    if plan.preference is not None:
        judges["preference"] = _preference_judge(plan.preference, plan.prompts)
    if plan.backbone.abilities is not None:
        judges["answers"] = answer_judge(plan.backbone.abilities)
    if plan.features is not None:
        features = plan.features
        judges["features"] = lambda batch: {"all": features(batch.pixels)}
    return judges


def _preference_judge(model: CLIPAlignment, prompts: Sequence[str]) -> Judge:
    """PickScore (Kirstain et al. 2023): the scaled cosine of a CLIP model that was trained on people's choices."""
    texts = model.texts(prompts)

    def preferred(batch: PictureBatch) -> dict[str, Tensor]:
        own = texts[[prompt for prompt, _ in batch.ids]]
        return {"score": model.logit_scale * (model.images(batch.pixels) * own).sum(dim=-1)}

    return preferred


def looks_of(plan: Plan, pixels: Tensor) -> dict[str, Tensor]:
    """What distances are taken between, of pixels uint8 [B, 3, H, W]: "features", "embedding", as far as they exist."""
    found = {}
    if plan.features is not None:
        found["features"] = plan.features(pixels)
    if plan.alignment is not None:
        found["embedding"] = plan.alignment.images(pixels)
    return found


def features_among(looks: Mapping[str, Tensor]) -> Tensor:
    """The features; the alignment model's embeddings where there are none."""
    return looks["features"] if "features" in looks else looks["embedding"]


def features_of(plan: Plan, pixels: Tensor) -> Tensor:
    """`features_among` the looks of pixels uint8 [B, 3, H, W], and no other look."""
    if plan.features is not None:
        return plan.features(pixels)
    assert plan.alignment is not None, "without either there is nothing to take distances between"
    return plan.alignment.images(pixels)


def _real_batch(plan: Plan, real: RealPictures, ids: Ids, on_step: OnStep) -> PictureBatch:
    """Real pictures as if they had been drawn, in no time."""
    pixels = real.shown(ids)
    on_step()
    prompts = tuple(plan.prompts[prompt] for prompt, _ in ids)
    return PictureBatch(tuple(ids), prompts, latents_of(plan.backbone, pixels), pixels, 0.0)


def _others(plan: Plan, real: RealPictures, batch: PictureBatch) -> dict[str, Tensor]:
    """`looks_of` other real pictures after the VAE, and "raw", their features before it."""
    pixels = real.others(batch.ids)
    raw = features_of(plan, pixels)
    known = batch.latents if torch.equal(pixels, batch.pixels) else None  # they may be the very same ones
    return looks_of(plan, through_vae(plan.backbone, pixels, known)) | {"raw": raw}


@dataclass(frozen=True)
class _WithPictures:
    """Cells whose pictures are in their folder, as they were saved there: else the batch is drawn again."""

    cells: ArmCells
    folder: Path
    ids: Ids
    batch_size: int

    def get(self, number: int) -> Cell | None:
        cell = self.cells.get(number)
        if cell is None:
            return None
        found = dict(cell.found)
        saved = found.pop(FILES, {}).get("digest")
        now = self._digests(number)
        return replace(cell, found=found) if saved is not None and now is not None and saved.equal(now) else None

    def put(self, number: int, cell: Cell) -> None:
        digests = self._digests(number)
        assert digests is not None, "pictures are saved before their cell"
        self.cells.put(number, replace(cell, found={**cell.found, FILES: {"digest": digests}}))

    def _digests(self, number: int) -> Tensor | None:
        """The first 63 bits of each file's SHA-256, [B]; None where one is missing."""
        own = self.ids[number * self.batch_size : (number + 1) * self.batch_size]
        try:
            files = [picture_path(self.folder, prompt, picture).read_bytes() for prompt, picture in own]
        except FileNotFoundError:
            return None
        return torch.tensor([int.from_bytes(sha256(file).digest()[:8]) >> 1 for file in files])


def draw(
    plan: Plan,
    arm: Arm,
    conditioning: Conditioning,
    judges: Mapping[str, Judge],
    cells: ArmCells,
    share: tuple[int, int],
    reporter: Reporter,
) -> Evaluation:
    """An arm's pictures, saved and judged, batch by batch; a batch that was finished before is not drawn again.

    Real pictures have a judge more, "others": what their distances are taken between.
    """
    settings, folder = plan.settings, plan.folders[arm.id]
    kept = _WithPictures(cells, folder, picture_ids(len(plan.prompts), settings.num_images), settings.batch_size)

    def save_one(numbered: tuple[tuple[int, int], Tensor]) -> None:
        (prompt, picture), pixels = numbered
        save_picture(picture_path(folder, prompt, picture), pixels.permute(1, 2, 0).numpy())

    def save(batch: PictureBatch) -> None:
        with ThreadPoolExecutor() as pool:  # each waits for the disk
            list(pool.map(save_one, zip(batch.ids, batch.pixels, strict=True)))

    if not arm.is_drawn and plan.real is not None:
        if plan.features is not None or plan.alignment is not None:
            judges = {**judges, "others": partial(_others, plan, plan.real)}
        return evaluate_batches(
            partial(_real_batch, plan, plan.real),
            arm,
            prompts=len(plan.prompts),
            pictures_per_prompt=settings.num_images,
            batch_size=settings.batch_size,
            judges=judges,
            on_batch=save,
            kept=kept,
            share=share,
            reporter=reporter,
        )
    with plan.painter(arm) as painter:
        if arm.option is not None:  # its text encoder may be another one
            conditioning = encode_prompts(painter, plan.prompts, settings.negative_prompt)
        return evaluate(
            painter,
            conditioning,
            arm,
            seed=settings.seed,
            pictures_per_prompt=settings.num_images,
            batch_size=settings.batch_size,
            resolution=settings.resolution,
            judges=judges,
            on_batch=save,
            kept=kept,
            share=share,
            reporter=reporter,
        )
