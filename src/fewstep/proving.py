"""Whether a base with an answer key is worth distilling: is its teacher good, and do few steps hurt it?

Draws the same captions from the same noise with the teacher and with every few-step sampler that needs no training,
and sets their shares of all-right pictures and their Fréchet distances side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.arms import Arm, sampler_timesteps
from fewstep.backbone import Backbone
from fewstep.metrics.frechet import frechet_distance
from fewstep.metrics.halves import half_sample_distances, half_samples, with_spread
from fewstep.metrics.intervals import wilson
from fewstep.pictures import answer_judge, evaluate
from fewstep.report.verdict import percent
from fewstep.reporting import SILENT, Reporter


@dataclass(frozen=True)
class Drawn:
    """What an arm's pictures, one a prompt, were found to be."""

    all_right: Tensor  # bool [N]
    by_attribute: dict[str, float]
    features: Tensor  # fp32 [N, D]

    @property
    def share(self) -> float:
        """Share of pictures with everything right."""
        return self.all_right.double().mean().item()


def untrained_arm(sampler: Literal["ddim", "dpmpp", "lcm"], steps: int, guidance: float) -> Arm:
    """The base without adapter under `sampler`: `ddim-4-guided`, `lcm-2-unguided`, …"""
    name = f"{sampler}-{steps}-{'guided' if guidance > 1 else 'unguided'}"
    timesteps = sampler_timesteps(sampler, steps, 1000)
    return Arm(
        id=name, role="base", adapter=False, sampler=sampler, steps=steps, timesteps=timesteps, guidance=guidance
    )


def untrained_arms(guidance: float) -> list[Arm]:
    """The teacher, and every sampler that a student has to beat without training."""
    return [
        untrained_arm("ddim", 50, guidance),
        untrained_arm("ddim", 50, 1.0),
        untrained_arm("ddim", 4, guidance),
        untrained_arm("ddim", 4, 1.0),
        untrained_arm("ddim", 2, guidance),
        untrained_arm("dpmpp", 4, 1.0),
        untrained_arm("dpmpp", 2, guidance),
        untrained_arm("lcm", 4, guidance),
        untrained_arm("lcm", 4, 1.0),
        untrained_arm("lcm", 2, 1.0),
    ]


def draw_arm(
    backbone: Backbone,
    arm: Arm,
    prompts: Sequence[str],
    seed: int,
    *,
    batch_size: int = 50,
    reporter: Reporter = SILENT,
) -> Drawn:
    """One picture a prompt, read and turned into features."""
    abilities = backbone.abilities
    assert abilities is not None, "only a base with an answer key can be proved"
    extract = abilities.features()
    found = evaluate(
        backbone,
        prompts,
        arm,
        seed=seed,
        batch_size=batch_size,
        judges={"answers": answer_judge(abilities), "features": lambda batch: {"all": extract(batch.unit_pixels)}},
        reporter=reporter,
    ).found
    answers = found["answers"]
    shares = {name: round(right.double().mean().item(), 4) for name, right in answers.items()}
    return Drawn(answers["all_right"], shares, found["features"]["all"])


def reference_features(backbone: Backbone, prompts: Sequence[str], per_prompt: int, seed: int) -> Tensor:
    """Features [N · per_prompt, D] of drawings of the same captions, through the VAE as the pictures came."""
    abilities = backbone.abilities
    assert abilities is not None, "only a base with its own pictures can be proved"
    extract = abilities.features()
    features = []
    for first in range(0, len(prompts), 20):
        pixels = abilities.reference_pictures(list(prompts[first : first + 20]), per_prompt, seed + first)
        batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = backbone.encode(batch)
        features.append(extract(backbone.decode(latents).cpu()))
    return torch.cat(features)


def frechet_figure(features: Tensor, reference: Tensor, per_prompt: int) -> dict[str, float | None]:
    """Fréchet distance of one picture a prompt to `per_prompt` drawings a prompt, with its standard error."""
    prompts = list(range(len(features)))
    repeated = [prompt for prompt in prompts for _ in range(per_prompt)]
    halves = half_samples(prompts, halves=30)
    in_halves = half_sample_distances(features, prompts, reference, repeated, halves, frechet_distance)
    figure = with_spread(frechet_distance(features, reference), in_halves, prompts, least=0.0)
    return {"value": figure.value, "standard_error": figure.standard_error}


def prove_base(
    backbone: Backbone, prompts: Sequence[str], composed: Sequence[str], *, seed: int, reporter: Reporter = SILENT
) -> dict[str, Any]:
    """What the teacher and every untrained few-step sampler draw of `prompts`.

    Args:
        composed: captions of combinations held out of training, for the teacher alone.
    """
    count = len(prompts)
    reference = reference_features(backbone, prompts, 5, seed)
    figures: dict[str, Any] = {"pictures_an_arm": count, "guidance": backbone.guidance_scale, "arms": {}}
    for arm in untrained_arms(backbone.guidance_scale):
        drawn = draw_arm(backbone, arm, prompts, seed, reporter=reporter)
        frechet = frechet_figure(drawn.features, reference, 5)
        figures["arms"][arm.id] = {"all_right": round(drawn.share, 4), "frechet": frechet, "read": drawn.by_attribute}
        distance = f"Fréchet {frechet['value']:.2f} ± {1.96 * (frechet['standard_error'] or 0):.2f}"
        reporter.say(f"{arm.id}: all right {percent(wilson(drawn.share * count, count))}, {distance}")
    held_out = draw_arm(backbone, untrained_arm("ddim", 50, backbone.guidance_scale), composed, seed, reporter=reporter)
    figures["teacher_all_right_composed"] = round(held_out.share, 4)
    reporter.say(f"teacher on combinations held out of training: all right {100 * held_out.share:.1f} %")
    return figures
