"""An arm's pictures: drawn from the noise that every arm has, judged and saved batch by batch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from fewstep.arms import Arm
from fewstep.benchmark.cells import ArmCells
from fewstep.benchmark.plan import Plan
from fewstep.benchmark.real import RealPictures, looks_through_vae
from fewstep.files import replace_folder_atomic
from fewstep.metrics.alignment import CLIPAlignment, alignment_and_floor
from fewstep.metrics.saturation import latent_moments
from fewstep.pictures import (
    Conditioning,
    Evaluation,
    Judge,
    PictureBatch,
    answer_judge,
    encode_prompts,
    evaluate,
    evaluate_batches,
)
from fewstep.report import picture_path, save_picture
from fewstep.reporting import Reporter


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

    Real pictures are judged by "through_vae" as well, see `looks_through_vae`.
    """
    settings, folder = plan.settings, plan.folders[arm.id]

    def save(batch: PictureBatch) -> None:
        for (prompt, picture), pixels in zip(batch.ids, batch.pixels, strict=True):
            save_picture(picture_path(folder, prompt, picture), pixels.permute(1, 2, 0).numpy())

    if not arm.is_drawn:
        return evaluate_batches(
            # Another seed than that of the references, which they are compared with.
            RealPictures(plan, settings.num_images, settings.seed + 1).batch,
            arm,
            prompts=len(plan.prompts),
            pictures_per_prompt=settings.num_images,
            batch_size=settings.batch_size,
            judges={**judges, "through_vae": lambda batch: looks_through_vae(plan, batch)},
            on_batch=save,
            kept=cells,
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
            kept=cells,
            share=share,
            reporter=reporter,
        )
