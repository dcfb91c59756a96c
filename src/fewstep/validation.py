"""Validation: how good the student is as training goes on, on the same prompts from the same noise each time.

What is right in a picture is asked of the base's answer key; without one, a CLIP model says how well pictures fit their
prompts, if one is at hand. A student can get worse when it is trained for too long: the best one is kept apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from fewstep.backbone import Backbone
from fewstep.checkpoint import Record
from fewstep.config import TrainSettings, spell
from fewstep.errors import CheckpointError
from fewstep.methods.kstep import KStep
from fewstep.metrics.alignment import CLIPAlignment, align_x100
from fewstep.metrics.pretrained import ModelNotAtHand
from fewstep.pictures import AnswerKey, Judge, PictureBatch, encode_prompts, evaluate
from fewstep.reporting import Reporter

FIGURE, MEASURE = "validation", "validation_measure"
"""Names of the figure that the best student has most of, with /N at N steps alone, and of what it is the figure of."""


class Validation:
    """Judges the student at each promised step count, one picture a prompt.

    Args:
        prompts: one a picture.
        judge: gives each picture a "score", the more the better.
        measure: what the score is, in words; figures of different measures are not compared.
        resolution: side of a picture in pixels.
        seed: of the noise; the same each time.
        batch_size: pictures drawn at once; does not change them.
    """

    def __init__(
        self,
        backbone: Backbone,
        method: KStep,
        prompts: Sequence[str],
        judge: Judge,
        *,
        measure: str,
        resolution: int,
        seed: int,
        batch_size: int,
    ) -> None:
        self._arms = [method.arm(steps) for steps in method.step_counts]
        self.measure = f"{measure}, {len(prompts)} pictures each at {spell(method.step_counts)} steps"
        self._evaluate = partial(
            evaluate,
            backbone,
            encode_prompts(backbone, prompts),
            judges={FIGURE: judge},
            resolution=resolution,
            seed=seed,
            batch_size=batch_size,
        )

    def figures(self) -> dict[str, float]:
        """Of the adapter as it is now: the mean over the step counts, and each one's own."""
        found = {}
        for arm in self._arms:
            scores = self._evaluate(arm).found[FIGURE]["score"]
            found[f"{FIGURE}/{arm.steps}"] = scores.double().mean().item()
        return {FIGURE: sum(found.values()) / len(found), **found}

    def prefers(self, figures: Mapping[str, float], best: Record | None) -> bool:
        """Whether a student with these figures is better than the one of the record."""
        if best is None or best.more.get(MEASURE) != self.measure:
            return True
        return figures[FIGURE] > best.more[FIGURE]


def open_validation(
    backbone: Backbone, method: KStep, prompts: Sequence[str], settings: TrainSettings, reporter: Reporter
) -> Validation | None:
    """The validation of a run by whatever can judge its pictures, which is said; None where nothing at hand can."""
    if backbone.abilities is not None:
        measure, judge = "share of attributes that are right, on captions of its own", _reader(backbone.abilities)
    else:
        model = settings.clip_model_id
        try:
            clip = CLIPAlignment(model, device="cpu", allow_pickle=settings.allow_pickle, fetch=False)
        except CheckpointError as error:
            why = error.reason if isinstance(error, ModelNotAtHand) else str(error)
            reporter.say(
                f"validation: previews alone, for the base has no answer key and no CLIP {model!r} is at hand: {why}"
            )
            return None
        measure, judge = f"alignment x 100 by {model}", _alignment(clip, prompts)
    validation = Validation(
        backbone,
        method,
        prompts,
        judge,
        measure=measure,
        resolution=settings.resolution or backbone.resolution,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )
    reporter.say(f"validation: {validation.measure}")
    return validation


def _reader(abilities: AnswerKey) -> Judge:
    def judge(batch: PictureBatch) -> dict[str, Tensor]:
        answers = abilities.answers(batch.unit_pixels, list(batch.prompts))
        # All right at once is rarer and so takes more pictures to tell two students apart.
        return {
            "score": torch.stack([right.double() for name, right in answers.items() if name != "all_right"]).mean(0)
        }

    return judge


def _alignment(clip: CLIPAlignment, prompts: Sequence[str]) -> Judge:
    texts = clip.texts(prompts)

    def judge(batch: PictureBatch) -> dict[str, Tensor]:
        own = texts[[prompt for prompt, _ in batch.ids]]
        return {"score": align_x100((clip.images(batch.pixels) * own).sum(dim=-1))}

    return judge
