"""Summing up: per-picture findings to an arm's figures with their intervals, and to the rows of results.csv."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import torch
from torch import Tensor

from fewstep.arms import control_of, plain_of
from fewstep.benchmark.distribution import Distributions
from fewstep.benchmark.plan import Plan
from fewstep.metrics.intervals import bootstrap, paired_difference, share, share_difference
from fewstep.metrics.retention import corrected_retention, retention
from fewstep.metrics.saturation import mean_saturation, saturation
from fewstep.opening import versions
from fewstep.pictures import Evaluation
from fewstep.records import (
    SCHEMA_VERSION,
    ArmSummary,
    ArmTiming,
    BenchmarkRecord,
    FloorRecord,
    Interval,
    PictureScore,
    Row,
)
from fewstep.timing import machine


@dataclass(frozen=True)
class _Others:
    """What an arm is compared with, each None where it was not drawn.

    ``control`` is the arm without the adapter, ``plain`` the one without the option.
    """

    baseline: Evaluation | None
    control: Evaluation | None
    plain: Evaluation | None


def sum_up(
    plan: Plan,
    evaluations: Mapping[str, Evaluation],
    timings: Mapping[str, tuple[ArmTiming, ...]],
    distributions: Distributions,
    warnings: Sequence[str],
) -> tuple[BenchmarkRecord, list[Row]]:
    """The record and the rows of results.csv, from everything that was found about the arms."""
    arms, prompts, backbone, baseline = plan.arms, plan.prompts, plan.backbone, plan.baseline
    summary: dict[str, ArmSummary] = {}
    rows: list[Row] = []
    for arm in arms:
        found = evaluations[arm.id]
        control, plain = control_of(arm, arms), plain_of(arm, arms)
        others = _Others(*(evaluations[other.id] if other else None for other in (baseline, control, plain)))
        time = timings[arm.id][0].time_per_image if timings[arm.id] else None

        def speedup(other: Evaluation | None, time: float | None = time) -> float | None:
            return timings[other.arm.id][0].time_per_image / time if other and time else None

        summary[arm.id] = ArmSummary(
            arm=arm,
            prompts=len(prompts),
            pictures=len(found.ids),
            time_per_image_s=time,
            speedup_vs_baseline=speedup(others.baseline),
            timings=timings[arm.id],
            frechet=distributions.frechet.get(arm.id),
            distances=distributions.distances.get(arm.id, {}),
            diversity=distributions.variety.get(arm.id, {}).get("diversity"),
            faithfulness=distributions.variety.get(arm.id, {}).get("faithfulness"),
            **_saturation_figures(found, others.baseline),
            control=control.id if control else None,
            over_solvers=_over_solvers(found, evaluations.values()),
            plain=plain.id if plain else None,
            speedup_vs_plain=speedup(others.plain),
            **_alignment_figures(found, others),
            **_preference_figures(found, others),
            **_answer_figures(found, others),
        )
        rows += _rows(found, others, prompts, summary[arm.id])

    floors = {name: arm.floor.value for name, arm in summary.items() if arm.floor is not None}
    floor = None
    if floors:
        name = baseline.id if baseline else next(iter(floors))
        floor = FloorRecord(value=floors[name], arm=name, by_arm=floors)
    record = BenchmarkRecord(
        schema_version=SCHEMA_VERSION,
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        settings=plan.settings.model_dump(mode="json", exclude_none=True),
        versions=versions(),
        machine=machine(backbone.device, str(backbone.dtype).removeprefix("torch.")),
        base={"name": backbone.name, "why": backbone.why, "fingerprint": backbone.fingerprint},
        adapter=dict(plan.adapter) if plan.adapter else None,
        adapters={one.entry.id: dict(one.facts) for one in plan.adapters.further},
        alignment_model=plan.alignment.name if plan.alignment else None,
        preference_model=plan.preference.name if plan.preference else None,
        prompts=prompts,
        floor=floor,
        feature_extractor=distributions.extractor,
        warnings=tuple(warnings),
        summary=summary,
        scores=tuple(score for arm in arms for score in _scores(evaluations[arm.id])),
    )
    return record, rows


def _alignment_figures(found: Evaluation, others: _Others) -> dict[str, Any]:
    own = found.found.get("alignment")
    if own is None:
        return {}
    score, floor, prompts = own["score"], own.get("floor"), found.prompt_numbers
    figures: dict[str, Any] = {
        "alignment": bootstrap(score, prompts),
        "alignment_std": score.double().std().item() if len(score) > 1 else None,
        "floor": None if floor is None else bootstrap(floor, prompts),
    }
    if others.baseline is not None:
        theirs = others.baseline.found["alignment"]
        figures["delta_alignment"] = paired_difference(score, theirs["score"], prompts)
        if floor is not None:
            honest = corrected_retention(score, floor, theirs["score"], theirs["floor"], prompts)
            figures["retention_corrected"] = honest
            # A ratio of raw cosines flatters: it never stands alone.
            figures["retention_raw"] = retention(score, theirs["score"], prompts) if honest else None
    for figure, other in (("gain_alignment", others.control), ("change_alignment", others.plain)):
        if other is not None:
            figures[figure] = paired_difference(score, other.found["alignment"]["score"], prompts)
    return figures


def _saturation_figures(found: Evaluation, baseline: Evaluation | None) -> dict[str, Any]:
    if baseline is None:
        return {}
    mine, theirs = found.found["latents"], baseline.found["latents"]
    return {
        "saturation": saturation(mine, theirs),
        "mean_saturation": mean_saturation(mine, theirs, found.prompt_numbers),
    }


def _preference_figures(found: Evaluation, others: _Others) -> dict[str, Any]:
    score, prompts = _of(found, "preference", "score"), found.prompt_numbers
    if score is None:
        return {}
    theirs = _of(others.baseline, "preference", "score") if others.baseline else None
    return {
        "preference": bootstrap(score, prompts),
        "delta_preference": None if theirs is None else paired_difference(score, theirs, prompts),
    }


def _answer_figures(found: Evaluation, others: _Others) -> dict[str, Any]:
    answers = found.answers
    if answers is None:
        return {}
    prompts = found.prompt_numbers

    def against(other: Evaluation | None) -> Interval | None:
        if other is None or other.answers is None:
            return None
        return share_difference(answers["all_right"], other.answers["all_right"], prompts)

    return {
        "all_right": share(answers["all_right"], prompts),
        "delta_all_right": against(others.baseline),
        "gain_all_right": against(others.control),
        "change_all_right": against(others.plain),
        "attributes": {name: share(right, prompts) for name, right in answers.items() if name != "all_right"},
        "delta_attributes": _attribute_differences(answers, others.baseline, prompts),
    }


def _attribute_differences(
    answers: Mapping[str, Tensor], baseline: Evaluation | None, prompts: Sequence[int]
) -> dict[str, Interval]:
    theirs = baseline.answers if baseline else None
    if theirs is None:
        return {}
    return {
        name: share_difference(right, theirs[name], prompts)
        for name, right in answers.items()
        if name != "all_right" and name in theirs
    }


def _over_solvers(found: Evaluation, others: Iterable[Evaluation]) -> dict[str, Interval]:
    if found.arm.role != "student":
        return {}
    judge, name = ("alignment", "score") if found.answers is None else ("answers", "all_right")
    minus = paired_difference if found.answers is None else share_difference
    own, differences = _of(found, judge, name), {}
    for other in others:
        theirs = _of(other, judge, name)
        if other.arm.role == "solver" and own is not None and theirs is not None:
            differences[other.arm.id] = minus(own, theirs, found.prompt_numbers)
    return differences


def _rows(found: Evaluation, others: _Others, prompts: Sequence[str], summary: ArmSummary) -> list[Row]:
    rows = []
    numbers = torch.tensor(found.prompt_numbers)
    for number, prompt in enumerate(prompts):
        own = numbers == number

        def mean(values: Tensor | None, own: Tensor = own) -> float | None:
            return None if values is None else values[own].double().mean().item()

        def against(other: Evaluation | None, judge: str, name: str, mean: _Mean = mean) -> float | None:
            if other is None:
                return None
            return _minus(mean(_of(found, judge, name)), mean(_of(other, judge, name)))

        score, right = _of(found, "alignment", "score"), found.answers or {}
        pictures = int(own.sum())
        rows.append(
            Row(
                arm=found.arm.id,
                steps=found.arm.steps,
                is_baseline=found.arm.is_baseline,
                prompt_idx=number,
                avg_clip_align_x100=mean(score),
                std_clip_align_x100=None if score is None or pictures < 2 else score[own].double().std().item(),
                time_total_s=_seconds(found, number) if found.arm.is_drawn else None,
                time_per_image_s=summary.time_per_image_s,
                speedup_vs_baseline=summary.speedup_vs_baseline,
                delta_clip_vs_baseline=against(others.baseline, "alignment", "score"),
                num_images=pictures,
                guidance=found.arm.guidance,
                sampler=found.arm.sampler,
                adapter=found.arm.adapter,
                clip_floor_x100=mean(_of(found, "alignment", "floor")),
                all_right_share=mean(right.get("all_right")),
                delta_all_right_vs_baseline=against(others.baseline, "answers", "all_right"),
                avg_preference=mean(_of(found, "preference", "score")),
                delta_preference_vs_baseline=against(others.baseline, "preference", "score"),
                option=found.arm.option,
                speedup_vs_plain=summary.speedup_vs_plain,
                delta_clip_vs_plain=against(others.plain, "alignment", "score"),
                delta_all_right_vs_plain=against(others.plain, "answers", "all_right"),
                prompt=prompt,
                attributes={
                    name: values[own].double().mean().item() for name, values in right.items() if name != "all_right"
                },
            )
        )
    return rows


_Mean = Callable[[Tensor | None], float | None]


def _of(found: Evaluation, judge: str, name: str) -> Tensor | None:
    return found.found.get(judge, {}).get(name)


def _seconds(found: Evaluation, prompt: int) -> float:
    return sum(one for one, (owner, _) in zip(found.seconds, found.ids, strict=True) if owner == prompt)


def _minus(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _scores(found: Evaluation) -> list[PictureScore]:
    alignment, answers = found.found.get("alignment", {}), found.answers

    def at(values: Tensor | None, position: int) -> float | None:
        return None if values is None else values[position].item()

    return [
        PictureScore(
            arm=found.arm.id,
            prompt_idx=prompt,
            picture_idx=picture,
            clip_align_x100=at(alignment.get("score"), position),
            clip_floor_x100=at(alignment.get("floor"), position),
            preference=at(_of(found, "preference", "score"), position),
            right=None if answers is None else {name: bool(values[position]) for name, values in answers.items()},
        )
        for position, (prompt, picture) in enumerate(found.ids)
    ]
