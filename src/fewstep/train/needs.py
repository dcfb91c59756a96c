"""How much disk a run fills, from its settings alone."""

from __future__ import annotations

import shutil
from math import prod
from pathlib import Path

from fewstep.backbone import Backbone
from fewstep.config import TrainSettings
from fewstep.data import DataReport, Slices
from fewstep.train.loop import PREVIEW_PROMPTS
from fewstep.train.start import rollouts_to_keep

FP32, FP16 = 4, 2
"""Bytes a number."""


def disk_of_run(
    settings: TrainSettings, backbone: Backbone, data: DataReport, slices: Slices, trainable: int
) -> dict[str, int]:
    """Bytes of all that a run leaves, by what it is; upper bounds, for whatever is there already is counted too.

    Args:
        settings: as resolved.
        trainable: numbers of the adapter.
    """
    adapter = FP32 * trainable
    resumable = adapter * (5 if settings.ema_decay else 4)  # published, raw, AdamW's two moments, the average
    looks = _times(settings.max_steps, settings.validate_every)
    alone = 2 if looks and settings.validate_images else 1  # final, and best
    page = PREVIEW_PROMPTS * (len(settings.num_inference_steps) + 1) * 3 * (settings.resolution or 0) ** 2
    needed = {
        "checkpoints": _checkpoints(settings) * resumable + alone * adapter,
        "previews": looks * page,
    }
    latent, samples = prod(backbone.latent_shape(settings.resolution)), rollouts_to_keep(settings, slices)
    embedding = backbone.max_tokens * backbone.text_encoder.config.hidden_size
    if settings.keeps_rollouts:
        pairs = min(settings.pairs_per_rollout or 1, settings.teacher_steps)
        needed["rollouts"] = samples * FP32 * (pairs * 2 * latent + embedding)
    if settings.cache_dir is not None:
        needed["cache"] = FP16 * (min(samples, data.pictures) * latent + min(samples, data.captions) * embedding)
    return needed


def _times(steps: int, every: int) -> int:
    """How often something is done that is done every so many steps and at the end; never where `every` is 0."""
    return -(-steps // every) if every else 0


def _checkpoints(settings: TrainSettings) -> int:
    """How many are there at the end."""
    made = max(1, _times(settings.max_steps, settings.checkpoint_every))
    if not settings.keep_last:
        return made
    return min(made, settings.keep_last + (settings.max_steps // settings.keep_every if settings.keep_every else 0))


def free_disk(folder: Path) -> int:
    """Bytes free where `folder` is or will be."""
    return shutil.disk_usage(existing(folder)).free


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder
