"""Several benchmarks on one page: their arms beside each other, as long as they answer the same question."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import count

from fewstep.errors import InputError
from fewstep.records import ArmSummary, BenchmarkRecord, Run

ALIKE = ("prompts", "alignment_model", "preference_model", "feature_extractor")
"""What two benchmarks must share for their figures to be set side by side."""

ODD = {
    "seed": "{name} drew with seed {own}, {first} with {theirs}: its pictures start from other noise",
    "num_images": "{name} drew {own} pictures a prompt, {first} {theirs}: Fréchet distances differ by that",
    "resolution": "{name} drew at a resolution of {own}, {first} of {theirs}: quality and times differ by that",
    "prediction_type": "{name} took its base to predict {own}, {first} {theirs}: all its arms are shown",
    "negative_prompt": "{name} drew with the negative prompt {own}, {first} with {theirs}: guided arms differ by that",
    "frechet_images": "{name} took {own} references a prompt, {first} {theirs}: Fréchet distances differ by that",
}
"""Settings in which two benchmarks may differ, but not without a word."""


def side_by_side(records: Mapping[str, BenchmarkRecord]) -> tuple[BenchmarkRecord, dict[str, tuple[str, str]]]:
    """One record of all arms; the first run's teacher is the teacher, and what a later run drew alike is left out.

    Differences stay those that each run measured, against its own teacher, which the record's `runs` know. Left out is
    what is the same pictures, never what is only called the same.

    Args:
        records: by a name for each run.

    Returns:
        The record, and where each of its arms comes from: its id to (name of the run, id there).

    Raises:
        InputError: the runs have other prompts, or were judged by other models.
    """
    (first_name, first), *others = records.items()
    summary, scores = dict(first.summary), list(first.scores)
    origins = {arm: (first_name, arm) for arm in summary}
    adapters = dict(first.adapters)
    said_by_all = [warning for warning in first.warnings if all(warning in record.warnings for _, record in others)]
    warnings = [*said_by_all, *_said_by_it_alone(first_name, first, said_by_all)]
    drawn = {_same_pictures(first, arm): arm for arm in summary}
    runs, prefixes = {first_name: _run(first, first.summary)}, [slug(first_name)]
    for name, record in others:
        for what in ALIKE:
            if getattr(record, what) != getattr(first, what):
                raise InputError(
                    f"the runs {first_name} and {name} have different {what}; allowed are runs of the same prompts, "
                    "judged alike; draw one of them again"
                )
        if _has_answers(record) != _has_answers(first):
            with_key, without = (first_name, name) if _has_answers(first) else (name, first_name)
            raise InputError(
                f"the run {with_key} has an answer key, {without} has none; allowed are runs that are ranked by the "
                "same figure; report them apart"
            )
        warnings += _odd_about(name, record, first_name, first)
        prefix = _prefix(name, [*record.summary, *record.adapters], [*prefixes, *summary, *adapters])
        prefixes.append(prefix)
        shared = {arm: drawn[same] for arm in record.summary if (same := _same_pictures(record, arm)) in drawn}
        renamed = {arm: shared.get(arm, f"{prefix}-{arm}") for arm in record.summary}
        runs[name] = _run(record, {renamed[arm]: _renamed(found, renamed) for arm, found in record.summary.items()})
        for arm in record.summary:
            if arm in shared:
                continue
            new = renamed[arm]
            found = runs[name].arms[new]
            summary[new] = _of_another_run(found)
            origins[new] = (name, arm)
            scores += [replace(score, arm=new) for score in record.scores if score.arm == arm]
            if not found.arm.adapter:
                drawn[_same_pictures(record, arm)] = new  # a run after this one may have the same
        adapters |= {f"{prefix}-{key}": facts for key, facts in record.adapters.items()}
        if record.adapter:
            adapters[prefix] = record.adapter
        warnings += _said_by_it_alone(name, record, said_by_all)
    merged = replace(
        first,
        summary=summary,
        scores=tuple(scores),
        adapters=adapters,
        warnings=tuple(warnings),
        runs=runs if others else {},
    )
    return merged, origins


def slug(name: str) -> str:
    """A name as it stands in ids: small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "run"


def numbered(name: str) -> Iterator[str]:
    """The name, then the same with -2, -3 and so on behind."""
    yield name
    yield from (f"{name}-{number}" for number in count(2))


def _prefix(name: str, ids: Collection[str], taken: Collection[str]) -> str:
    """What stands before the ids of a run's arms and adapters, so that neither it nor one of them is taken."""
    return next(
        prefix for prefix in numbered(slug(name)) if not {prefix, *(f"{prefix}-{one}" for one in ids)} & {*taken}
    )


def _run(record: BenchmarkRecord, arms: dict[str, ArmSummary]) -> Run:
    return replace(record.run_of(next(iter(arms))), arms=arms)


def _said_by_it_alone(name: str, record: BenchmarkRecord, said_by_all: Collection[str]) -> list[str]:
    return [f"{name}: {warning}" for warning in record.warnings if warning not in said_by_all]


def _has_answers(record: BenchmarkRecord) -> bool:
    return any(arm.all_right is not None for arm in record.summary.values())


def _of_another_run(found: ArmSummary) -> ArmSummary:
    """As the record shows it: a teacher of its own run is no longer the teacher, and has no difference to itself."""
    if not found.arm.is_baseline:
        return found
    return replace(
        found,
        arm=replace(found.arm, is_baseline=False),
        delta_alignment=None,
        delta_preference=None,
        delta_all_right=None,
        delta_attributes={},
    )


def _renamed(found: ArmSummary, names: Mapping[str, str]) -> ArmSummary:
    """The same figures, under the new name and with the new names of what they are compared with."""
    return replace(
        found,
        arm=replace(found.arm, id=names[found.arm.id]),
        control=names.get(found.control) if found.control else None,
        over_solvers={names[solver]: over for solver, over in found.over_solvers.items()},
        plain=names.get(found.plain) if found.plain else None,
    )


def _odd_about(name: str, record: BenchmarkRecord, first_name: str, first: BenchmarkRecord) -> list[str]:
    """What sets a run apart from the first one, without forbidding to compare them."""
    own, theirs = (one.machine.get("precision", "an unknown precision") for one in (record, first))
    found = []
    if own != theirs:
        found.append(
            f"{name} drew in {own}, {first_name} in {theirs}: all its arms are shown, differences and speed-ups are to "
            f"its own teacher in {own}"
        )
    if {**record.machine, "precision": theirs} != {**first.machine, "precision": theirs}:
        found.append(f"{name} was timed on another machine than {first_name}: times differ by that")
    mine, others = (one.versions.get("torch", "an unknown version") for one in (record, first))
    if mine != others:
        found.append(f"{name} was timed with torch {mine}, {first_name} with {others}: times differ by that")
    batch, usual = (one.run_of(next(iter(one.summary))).batch_size for one in (record, first))
    if batch is not None and usual is not None and batch != usual:
        found.append(f"{name} was timed at batch {batch}, {first_name} at {usual}: times differ by that")
    for setting, told in ODD.items():
        mine, others = (one.settings.get(setting, "the default") for one in (record, first))
        if mine != others:
            found.append(told.format(name=name, own=mine, first=first_name, theirs=others))
    if record.base["fingerprint"] != first.base["fingerprint"]:
        mine, others = (f"{one.base.get('name', '?')}, {one.base['fingerprint'][:8]}" for one in (record, first))
        found.append(f"{name} drew with another base ({mine}) than {first_name} ({others}): all its arms are shown")
    teachers = [one.baseline.arm for one in (record, first) if one.baseline is not None]
    if len({(teacher.steps, teacher.guidance) for teacher in teachers}) > 1:
        mine, others = (f"{teacher.steps} steps at guidance {teacher.guidance:g}" for teacher in teachers)
        found.append(
            f"{name}'s teacher takes {mine}, {first_name}'s {others}: differences and speed-ups are to its own teacher"
        )
    return found


def _same_pictures(record: BenchmarkRecord, arm: str) -> object:
    """What makes two runs' arms the same pictures; with an adapter they never count as the same."""
    found = record.summary[arm].arm
    names = ["seed", "num_images", "resolution", "negative_prompt", "prediction_type"]
    if not found.is_drawn:
        names += ["data_dir", "dataset_name"]
    return (
        found,
        record.base["fingerprint"],
        record.machine.get("precision"),
        tuple(record.settings.get(name) for name in names),
        id(record) if found.adapter else None,
    )
