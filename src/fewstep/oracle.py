"""The oracle: what a perfect student would reach, measured before the first update.

A student is trained to say in one forward what the teacher says after K guided DDIM steps. Put the teacher's K steps
themselves in the student's place under the student's sampler, and what comes out is the ceiling of the method with this
K, this guidance and these step counts: no adapter, rank or budget gets above it.

One picture at 1, 2, 4 and 8 steps costs 15 rollouts, which with K = 8 and guidance are 240 forwards: hence few
pictures, and by default none where nobody can tell what is right in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fewstep.arms import Arm, teacher_arm
from fewstep.backbone import Backbone
from fewstep.methods.kstep import KStep
from fewstep.metrics.saturation import latent_moments, saturation
from fewstep.pictures import Evaluation, Judge, PictureBatch, answer_judge, encode_prompts, evaluate
from fewstep.reporting import SILENT, Reporter
from fewstep.solver import Denoiser

Oracle = dict[str, dict[str, float]]
"""Arm ("teacher", "1", "2", ...) to its figures: "all_right", the share of pictures with every attribute right, 0 to 1,
where the base has an answer key; "saturation", the standard deviation of the latents over the teacher's, mean over
channels."""


@torch.no_grad()
def measure_oracle(
    backbone: Backbone,
    method: KStep,
    prompts: Sequence[str],
    *,
    resolution: int,
    seed: int,
    batch_size: int,
    on_teachers: Callable[[PictureBatch], object] | None = None,
    reporter: Reporter = SILENT,
) -> Oracle:
    """Draw one picture a prompt with the teacher's full sampling, and with the perfect student at each step count.

    Args:
        prompts: one a picture.
        resolution: side in pixels.
        seed: of the noise, which is the same in every arm.
        batch_size: pictures drawn at once; does not change them.
        on_teachers: called with each batch of the teacher's pictures.
    """
    conditioning = encode_prompts(backbone, prompts)
    perfect_student = method.oracle(backbone.denoiser(adapter=False), conditioning.uncond)
    judges: dict[str, Judge] = {"latents": lambda batch: latent_moments(batch.latents)}
    if backbone.abilities is not None:
        judges["answers"] = answer_judge(backbone.abilities)
    timesteps = method.schedule.num_train_timesteps
    arms: dict[str, tuple[Arm, Denoiser | None]] = {
        "teacher": (teacher_arm(backbone.teacher_steps, method.guidance, timesteps), None)
    }
    arms |= {str(steps): (method.arm(steps), perfect_student) for steps in method.step_counts}
    found = {
        name: evaluate(
            backbone,
            conditioning,
            arm,
            seed=seed,
            batch_size=batch_size,
            resolution=resolution,
            judges=judges,
            denoiser=denoiser,
            on_batch=on_teachers if name == "teacher" else None,
            reporter=reporter,
        )
        for name, (arm, denoiser) in arms.items()
    }
    return {name: _figures(evaluation, found["teacher"]) for name, evaluation in found.items()}


def _figures(evaluation: Evaluation, teacher: Evaluation) -> dict[str, float]:
    figures = {}
    channels = saturation(evaluation.found["latents"], teacher.found["latents"])
    if channels is not None:
        figures["saturation"] = sum(channels) / len(channels)
    if evaluation.all_right is not None:
        figures["all_right"] = evaluation.all_right
    return figures


def describe(oracle: Oracle, pictures: int) -> str:
    """The oracle as the line that is printed before training."""
    if "all_right" in oracle["teacher"]:
        key, title, spell = "all_right", "every attribute right", "{:.1%}".format
    else:
        key, title, spell = "saturation", "spread of the latents over the teacher's", "{:.3f}".format
    figures = [f"{spell(values[key])} at {arm}" for arm, values in oracle.items() if arm != "teacher" and key in values]
    return (
        f"oracle, the teacher's rollout in the student's place ({title}, {pictures} pictures): "
        f"{', '.join(figures)} steps; teacher {spell(oracle['teacher'].get(key, float('nan')))}"
    )
