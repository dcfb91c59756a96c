"""The stages one after another, and the figures that each leaves beside the weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.config import PretrainSettings
from fewstep.locks import alone_in
from fewstep.pretrain.denoiser import half_of_denoiser, half_of_refine, refine_denoiser, train_denoiser
from fewstep.pretrain.judges import train_judges
from fewstep.pretrain.sizes import STAGES
from fewstep.pretrain.vae import refine_vae, train_vae
from fewstep.pretrain.workshop import Workshop
from fewstep.reporting import LOG, Reporter

TRAIN: dict[str, Callable[[Workshop], dict[str, Any]]] = {
    "vae": train_vae,
    "vae-refine": refine_vae,
    "judges": train_judges,
    "denoiser-half": half_of_denoiser,
    "denoiser": train_denoiser,
    "refine-half": half_of_refine,
    "refine": refine_denoiser,
}
"""What each stage does; it returns what it measured."""


@dataclass(frozen=True, kw_only=True)
class PretrainResult:
    """Where the base was written, and what it can do."""

    folder: Path
    figures: dict[str, Any]


def pretrain(settings: PretrainSettings, *, reporter: Reporter = LOG) -> PretrainResult:
    """Train the stages asked for and write `base/`, `judge/`, `alignment/` and `figures.json` to the output folder.

    Raises:
        InputError: the folder's work was begun with another size or seed, a stage is missing before one asked for, or
            another run writes into the folder.
    """
    reporter.say("settings: " + ", ".join(f"{name}={value}" for name, value in settings))
    work = Workshop(settings, reporter)
    with alone_in(settings.output_dir):
        work.begin()
        for stage in STAGES if settings.stage == "all" else (settings.stage,):
            minutes = work.sizes.minutes[stage]
            fewer = "" if work.device.type == "cpu" else f", far fewer on {work.device}"
            reporter.say(
                f"{stage}: about {minutes} minutes on two cores{fewer}; stopped, it goes on from its last save"
            )
            started = time.monotonic()
            figures = TRAIN[stage](work)
            taken = (time.monotonic() - started) / 60
            work.record(stage, figures | {"minutes_of_the_last_run": round(taken, 1)})
    return PretrainResult(folder=settings.output_dir, figures=work.figures)
