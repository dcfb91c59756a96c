"""What distillation achieves on a base with an answer key, beside what needs no training.

    python benchmarks/distillation.py --adapters run1/lora/final run2/lora/final run3/lora/final --count 2000

Draws `--count` unseen captions, one picture each, from the same noise: the teacher, the untrained arms with as many
network evaluations as a 4-step student, every adapter at 1, 2, 4 and 8 steps, and the base in its place. Prints
all-right shares, Fréchet distances to drawings of the same captions, and what distillation has to show: the paired
difference to the teacher, the share of the gap closed between the best untrained arm and the teacher, students against
the base in their place and 8 steps against 4, each with intervals over captions. Captions are drawn 500 at a time and
kept in `--cache`: a run that was stopped goes on, and 2,000 captions after 500 cost the 1,500 that are new.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.arms import Arm, base_arm, student_arm
from fewstep.backbone import Backbone, load_backbone
from fewstep.files import write_tensors_atomic
from fewstep.lora import digest, load_adapter, locate
from fewstep.metrics.frechet import frechet_distance
from fewstep.metrics.halves import half_sample_distances, half_samples
from fewstep.metrics.intervals import gap_closed, paired_difference, share
from fewstep.metrics.pretrained import fingerprint
from fewstep.opening import recorded_sampling
from fewstep.proving import Drawn, draw_arm, reference_features, untrained_arm, untrained_arms
from fewstep.reporting import SILENT

REFERENCES = 5
"""Drawings a caption that pictures are compared with."""

PART = 500
"""Captions drawn, and kept, at once."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", default="scenes")
    parser.add_argument("--adapters", nargs="*", type=Path, default=[])
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--batch_size", type=int, default=50, help="pictures drawn at once; more on a GPU")
    parser.add_argument("--cache", type=Path, default=Path("outputs/distillation_cache"))
    args = parser.parse_args()

    backbone = load_backbone(args.base_model, device="auto", dtype="no")
    assert backbone.abilities is not None, "this benchmark needs a base with an answer key, such as scenes"
    prompts = backbone.abilities.prompts(args.count, args.seed)
    abilities = backbone.abilities
    cache = Cache(args.cache / f"{backbone.fingerprint}-{args.seed}", prompts, args.seed)
    judge_of_all = fingerprint(abilities.features())

    def compared_with(captions: list[str], seed: int) -> dict[str, Tensor]:
        return {"features": reference_features(backbone, captions, REFERENCES, seed)}

    drawings = hashlib.sha256(abilities.reference_pictures(prompts[:20], 1, args.seed).tobytes()).hexdigest()
    reference = cache.tensors("reference", [judge_of_all, drawings, REFERENCES], compared_with)["features"]

    def drawn_by(base: Backbone, arm: Arm, name: str, weights: str | None = None) -> Drawn:
        draw = partial(draw_arm, base, arm, batch_size=args.batch_size)
        return cache.drawn(name, [judge_of_all, asdict(arm), weights], draw)

    def untrained(arm: Arm) -> Drawn:
        return drawn_by(backbone, arm, arm.id)

    guidance = backbone.guidance_scale
    teacher = untrained_arm("ddim", 50, guidance)
    rivals = [arm for arm in untrained_arms(guidance) if arm.evaluations == 4]
    judge = Comparison(untrained(teacher), {arm.id: untrained(arm) for arm in rivals}, reference)
    few = untrained_arm("ddim", 4, guidance)  # no rival, with eight evaluations: what few steps cost the teacher
    for name, drawn in {teacher.id: judge.teacher, few.id: untrained(few), **judge.rivals}.items():
        judge.print_arm(name, drawn)
    runs: dict[Path, dict[int, Drawn]] = {}
    for folder in args.adapters:
        base = load_backbone(args.base_model, device="auto", dtype="no")
        load_adapter(base, folder)
        weights = digest(base.unet)
        wanted = recorded_sampling(locate(folder), SILENT)
        runs[folder] = {}
        for steps in args.steps:
            arm = student_arm(steps, sampler=wanted.sampler, span=wanted.span)
            drawn = drawn_by(base, arm, f"{weights[:12]}-{steps}", weights)
            control = base_arm(steps, sampler=wanted.sampler, span=wanted.span)
            judge.print_arm(f"{arm.id} {folder}", drawn)
            judge.print_arm(control.id, untrained(control))
            judge.print_difference(f"{arm.id} against {control.id}", drawn, untrained(control))
            runs[folder][steps] = drawn
        if 4 in runs[folder]:
            in_its_place = base_arm(4, sampler=wanted.sampler, span=wanted.span)
            judge.print_gap(runs[folder][4], {in_its_place.id: untrained(in_its_place)})
        if {4, 8} <= set(runs[folder]):
            judge.print_difference("8 steps against 4", runs[folder][8], runs[folder][4])
    for steps in args.steps if len(runs) > 1 else ():
        shares = [100 * run[steps].share for run in runs.values()]
        mean, spread = statistics.mean(shares), statistics.stdev(shares)
        over = f"student-{steps} over {len(runs)} runs"
        print(f"{over}: all right {mean:.1f}, standard deviation {spread:.1f}; {judge.over(runs, steps)}")


class Cache:
    """What was drawn of the captions, in parts: keyed by base, seed, captions and whatever else it depends on."""

    def __init__(self, folder: Path, prompts: list[str], seed: int) -> None:
        self.parts = [(first, prompts[first : first + PART]) for first in range(0, len(prompts), PART)]
        self.folder, self.seed = folder, seed

    def tensors(
        self, name: str, depends_on: Any, compute: Callable[[list[str], int], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Of all captions, from `compute(captions, seed)` of each part."""
        found = []
        for first, captions in self.parts:
            key = hashlib.sha256(json.dumps([captions, depends_on]).encode()).hexdigest()[:12]
            file = self.folder / f"{first}-{first + len(captions)}" / f"{name}-{key}.safetensors"
            if not file.exists():
                computed = compute(captions, self.seed + first)
                write_tensors_atomic(file, computed)
            found.append(load_file(file))
        return {key: torch.cat([part[key] for part in found]) for key in found[0]}

    def drawn(self, name: str, depends_on: Any, draw: Callable[[list[str], int], Drawn]) -> Drawn:
        def compute(captions: list[str], seed: int) -> dict[str, Tensor]:
            drawn = draw(captions, seed)
            return {"all_right": drawn.all_right.to(torch.uint8), "features": drawn.features}

        found = self.tensors(name, depends_on, compute)
        return Drawn(found["all_right"].bool(), {}, found["features"])  # by attribute: nothing here prints it


class Comparison:
    """Every arm against the teacher and the best untrained rival, over the same captions."""

    def __init__(self, teacher: Drawn, rivals: dict[str, Drawn], reference: Tensor) -> None:
        self.teacher, self.rivals, self.reference = teacher, rivals, reference
        self.prompts = list(range(len(teacher.all_right)))
        self.repeated = [prompt for prompt in self.prompts for _ in range(REFERENCES)]
        self.halves = half_samples(self.prompts, halves=40)

    def distances(self, drawn: Drawn) -> tuple[float, np.ndarray]:
        halves = half_sample_distances(
            drawn.features, self.prompts, self.reference, self.repeated, self.halves, frechet_distance
        )
        return frechet_distance(drawn.features, self.reference), np.array(halves)

    def print_arm(self, name: str, drawn: Drawn) -> None:
        whole = share(drawn.all_right.numpy(), self.prompts)
        # A one-sided 95 % bound is the lower end of a two-sided 90 % interval.
        paired = paired_difference(drawn.all_right.numpy(), self.teacher.all_right.numpy(), self.prompts, level=0.9)
        distance, halves = self.distances(drawn)
        spread = 1.96 * halves.std(ddof=1)
        interval = f"[{100 * (whole.low or 0):.1f}, {100 * (whole.high or 0):.1f}]"
        bound = f"one-sided bound {100 * (paired.low or 0):+.1f}, allowed {-5 * self.teacher.share:+.1f}"
        print(
            f"{name:40} all right {100 * whole.value:5.1f} % {interval}  "
            f"minus teacher {100 * paired.value:+5.1f} ({bound})  Fréchet {distance:.3f} ± {spread:.3f}",
            flush=True,
        )

    def over(self, runs: Mapping[Path, Mapping[int, Drawn]], steps: int) -> str:
        """What all runs together lose against the teacher: their mean of each caption, over the captions."""
        mean = np.mean([run[steps].all_right.double().numpy() for run in runs.values()], axis=0)
        paired = paired_difference(mean, self.teacher.all_right.double().numpy(), self.prompts, level=0.9)
        return (
            f"minus teacher {100 * paired.value:+.1f} (one-sided bound {100 * (paired.low or 0):+.1f}, allowed "
            f"{-5 * self.teacher.share:+.1f})"
        )

    def print_difference(self, name: str, one: Drawn, other: Drawn) -> None:
        paired = paired_difference(one.all_right.numpy(), other.all_right.numpy(), self.prompts)
        (nearer, in_halves), (farther, in_those) = self.distances(one), self.distances(other)
        spread = 1.96 * (in_halves - in_those).std(ddof=1)
        print(
            f"{name}: all right {100 * paired.value:+.1f} ({100 * (paired.low or 0):+.1f} to "
            f"{100 * (paired.high or 0):+.1f}), Fréchet {nearer - farther:+.2f} ± {spread:.2f}",
            flush=True,
        )

    def print_gap(self, student: Drawn, control: Mapping[str, Drawn]) -> None:
        """To all that takes four evaluations and no training, the base in the student's place included."""
        s, ss = self.distances(student)
        t, ts = self.distances(self.teacher)
        for name, rival in {**self.rivals, **control}.items():
            errors = [1 - drawn.all_right.double().numpy() for drawn in (rival, student, self.teacher)]
            closed = gap_closed(*errors, self.prompts, level=0.9)
            bound = "none" if closed.low is None else f"{closed.low:.2f}"
            u, us = self.distances(rival)
            nearer = (u - s) / (u - t)
            spread = ((us - ss) / (us - ts)).std(ddof=1)
            print(
                f"gap closed to {name}: all-right errors {closed.value:.2f}, lower bound {bound}; Fréchet "
                f"{nearer:.2f}, lower bound {nearer - 1.645 * spread:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
