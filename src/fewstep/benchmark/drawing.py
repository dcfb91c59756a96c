"""An arm's pictures: drawn from the noise that every arm has, judged and saved batch by batch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.arms import Arm
from fewstep.benchmark.cells import ArmCells
from fewstep.benchmark.plan import Plan
from fewstep.files import replace_folder_atomic
from fewstep.metrics.alignment import alignment_and_floor
from fewstep.metrics.saturation import latent_moments
from fewstep.pictures import Conditioning, Evaluation, Judge, PictureBatch, answer_judge, evaluate
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
    abilities = plan.backbone.abilities
    if abilities is not None:
        judges["answers"] = answer_judge(abilities)
        if plan.settings.frechet_images:
            network = abilities.features()
            judges["features"] = lambda batch: {"all": features_of(network, batch.unit_pixels)}
    return judges


@torch.no_grad()
def features_of(network: nn.Module, pixels: Tensor) -> Tensor:
    """Features [B, D] on the CPU of pixels [B, 3, H, W] in 0 ... 1, wherever the network is."""
    place = next(network.parameters(), pixels).device
    found: Tensor = network(pixels.to(place))
    return found.cpu()


def draw(
    plan: Plan,
    arm: Arm,
    conditioning: Conditioning,
    judges: Mapping[str, Judge],
    cells: ArmCells,
    share: tuple[int, int],
    reporter: Reporter,
) -> Evaluation:
    """An arm's pictures, saved and judged, batch by batch; a batch that was finished before is not drawn again."""
    settings, folder = plan.settings, plan.folders[arm.id]

    def save(batch: PictureBatch) -> None:
        for (prompt, picture), pixels in zip(batch.ids, batch.pixels, strict=True):
            save_picture(picture_path(folder, prompt, picture), pixels.permute(1, 2, 0).numpy())

    with plan.painter(arm) as painter:
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
