"""Several benchmarks on one page: their arms beside each other, as long as they answer the same question."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from fewstep.errors import InputError
from fewstep.records import BenchmarkRecord

ALIKE = ("prompts", "alignment_model", "preference_model", "feature_extractor")
"""What two benchmarks must share for their figures to be set side by side."""


def side_by_side(records: Mapping[str, BenchmarkRecord]) -> tuple[BenchmarkRecord, dict[str, tuple[str, str]]]:
    """One record of all arms; the first run's teacher is the teacher, and what a later run drew alike is left out.

    Differences stay those that each run measured, against its own teacher.

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
    adapters, warnings = dict(first.adapters), list(first.warnings)
    drawn = {_same_pictures(first, arm): arm for arm in summary}
    for name, record in others:
        for what in ALIKE:
            if getattr(record, what) != getattr(first, what):
                raise InputError(
                    f"the runs {first_name} and {name} have different {what}; allowed are runs of the same prompts, "
                    "judged alike; draw one of them again"
                )
        warnings += _odd_about(name, record, first_name, first)
        renamed = {arm: drawn.get(_same_pictures(record, arm)) or f"{_slug(name)}-{arm}" for arm in record.summary}
        for arm, found in record.summary.items():
            new = renamed[arm]
            if new in summary:
                continue
            summary[new] = replace(
                found,
                arm=replace(found.arm, id=new, is_baseline=False),
                control=renamed.get(found.control) if found.control else None,
                over_solvers={renamed[solver]: over for solver, over in found.over_solvers.items()},
                plain=renamed.get(found.plain) if found.plain else None,
            )
            origins[new] = (name, arm)
            scores += [replace(score, arm=new) for score in record.scores if score.arm == arm]
        adapters |= {f"{_slug(name)}-{key}": facts for key, facts in record.adapters.items()}
        if record.adapter:
            adapters[_slug(name)] = record.adapter
        warnings += [warning for warning in record.warnings if warning not in warnings]
    merged = replace(first, summary=summary, scores=tuple(scores), adapters=adapters, warnings=tuple(warnings))
    return merged, origins


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
    return found


def _same_pictures(record: BenchmarkRecord, arm: str) -> object:
    """What makes two runs' arms the same pictures; with an adapter they never count as the same."""
    found = record.summary[arm].arm
    names = ("seed", "num_images", "resolution", "negative_prompt")
    return (
        found,
        record.base["fingerprint"],
        record.machine.get("precision"),
        tuple(record.settings.get(name) for name in names),
        id(record) if found.adapter else None,
    )


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "run"
