"""What the figures say, in sentences made from them: how good, how fast, and what the adapter is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fewstep.records import ArmSummary, BenchmarkRecord, Interval, Run

SATURATION_TOLERANCE = 0.05

FEWEST_SOLVER_STEPS = 2
"""What a benchmark takes: a solver of second order needs a step before."""

MAIN = 3
"""Sentences that are the verdict; those after them are what a careful reader asks next."""


def verdict(record: BenchmarkRecord) -> list[str]:
    """Up to seven sentences about the student that matters most; what was not measured is not spoken of.

    The first `MAIN` say how good it is, how fast, and whether the teacher by a better solver would not do as well. The
    teacher is the one of its own run, with the figures found there.
    """
    student = headline(list(record.summary.values()))
    if student is None:
        return ["No student was drawn: there is nothing to compare."]
    sentences = [
        _quality(student, record),
        _cost(student, record),
        _solvers(student, record),
        _control(student, record),
        _options(student, record),
        _distribution(student, record),
        _saturation(student, record),
    ]
    return [sentence for sentence in sentences if sentence]


def headline(arms: Sequence[ArmSummary]) -> ArmSummary | None:
    """The student to speak of: the fewest steps of those not shown to be worse than the teacher.

    Where all are, the fewest steps of those inside the interval of the best one.
    """
    students = sorted(
        (arm for arm in arms if arm.arm.role == "student" and arm.arm.option is None), key=lambda arm: arm.arm.steps
    )
    if not students:
        return None
    for student in students:
        difference = _difference(student)
        if difference is not None and difference.high is not None and difference.high >= 0:
            return student
    best = max(students, key=_ranked)
    found = quality(best)
    enough = found.low if found is not None and found.low is not None else _ranked(best)
    return next(student for student in students if _ranked(student) >= enough)


def _ranked(arm: ArmSummary) -> float:
    found = quality(arm)
    return found.value if found else 0.0


def quality(arm: ArmSummary) -> Interval | None:
    """The figure an arm is ranked by: everything right where there is an answer key, else alignment."""
    return arm.all_right or arm.alignment


def _difference(arm: ArmSummary) -> Interval | None:
    return arm.delta_all_right if arm.all_right else arm.delta_alignment


def percent(interval: Interval) -> str:
    """``52.0 % (47.1 to 56.9)``."""
    bounds = "" if interval.low is None else f" ({100 * interval.low:.1f} to {100 * (interval.high or 0):.1f})"
    return f"{100 * interval.value:.1f} %{bounds}"


def decimals(value: float) -> int:
    """How many a figure is shown with: two, and below 1 as many as make three digits that say something."""
    return 2 if abs(value) >= 1 or value == 0 else min(6, 2 - math.floor(math.log10(abs(value))))


def signed(interval: Interval, scale: float = 1.0, digits: int = 1) -> str:
    """``-4.0 (-8.1 to +0.2)``, with a true minus sign."""
    bounds = ""
    if interval.low is not None and interval.high is not None:
        bounds = f" ({scale * interval.low:+.{digits}f} to {scale * interval.high:+.{digits}f})"
    return f"{scale * interval.value:+.{digits}f}{bounds}".replace("-", "−")


def _the_teacher(student: ArmSummary, record: BenchmarkRecord) -> str:
    """How to speak of its own run's teacher: by its id where that is another arm than the record's."""
    teacher = record.run_of(student.arm.id).baseline
    known = record.baseline.arm.id if record.baseline else None
    return "the teacher" if teacher is None or teacher.arm.id == known else teacher.arm.id


def _quality(student: ArmSummary, record: BenchmarkRecord) -> str | None:
    teacher, name = record.run_of(student.arm.id).baseline, student.arm.id
    if student.all_right:
        text = f"{name} gets everything in the caption right in {percent(student.all_right)} of its pictures"
        if teacher is None or teacher.all_right is None or student.delta_all_right is None:
            return f"{text}."
        return (
            f"{text}, {teacher.arm.id} in {percent(teacher.all_right)}: {signed(student.delta_all_right, 100)} points, "
            f"{_judged(student.delta_all_right, record)}."
        )
    if student.alignment:
        whose = f"{_the_teacher(student, record)}'s"
        text = f"{name} scores {student.alignment.value:.2f} in alignment"
        if student.floor is not None:
            text += f", where shuffled captions score {student.floor.value:.2f}"
        if teacher is None or teacher.alignment is None or student.delta_alignment is None:
            return f"{text}."
        kept = (
            f"; of {whose} lift over its floor it keeps {percent(student.retention_corrected)}"
            if student.retention_corrected
            else ""
        )
        return (
            f"{text}, and {teacher.arm.id} scores {teacher.alignment.value:.2f}: "
            f"{signed(student.delta_alignment, 1, 2)}, {_judged(student.delta_alignment, record)}{kept}."
        )
    return None


def _judged(difference: Interval, record: BenchmarkRecord) -> str:
    prompts = len(record.prompts)
    if difference.low is None or difference.high is None:
        return f"which {prompts} prompt{'s' if prompts != 1 else ''} cannot judge"
    if difference.high < 0:
        return "a loss beyond the interval"
    if difference.low > 0:
        return "a gain beyond the interval"
    return f"no difference that {prompts} prompts can show"


def _cost(student: ArmSummary, record: BenchmarkRecord) -> str | None:
    if student.time_per_image_s is None:
        return None
    batch, run = student.timings[0].batch_size, record.run_of(student.arm.id)
    place, teacher = run.machine.get("device", "?"), run.baseline
    measured = quality(student) is not None
    subject = "It" if measured else f"Quality was not measured. {student.arm.id}"
    text = f"{subject} takes {seconds(student.time_per_image_s)} a picture at batch {batch} on {place}"
    if teacher is None or teacher.time_per_image_s is None or student.speedup_vs_baseline is None:
        return f"{text}."
    evaluations = f"{student.arm.evaluations} network evaluation{'s' if student.arm.evaluations != 1 else ''}"
    return (
        f"{text}, {student.speedup_vs_baseline:.1f} times as fast as {teacher.arm.id} with "
        f"{seconds(teacher.time_per_image_s)} ({evaluations} instead of {teacher.arm.evaluations})."
    )


def _solvers(student: ArmSummary, record: BenchmarkRecord) -> str | None:
    """What the alternative that costs no training has to say."""
    solvers = [arm for arm in _comparable(student, record) if arm.arm.role == "solver"]
    reached, own = quality(student), student.time_per_image_s
    if not solvers or reached is None or own is None:
        return None
    timed = [(arm, arm.time_per_image_s) for arm in solvers if arm.time_per_image_s is not None]
    as_good = [(arm, taken) for arm, taken in timed if _as_good(arm, student)]
    missing = "" if any(taken <= own for _, taken in timed) else _not_as_fast(student, solvers)
    if any(_lead(student, arm) is None for arm, _ in timed):
        missing += "; this is by the figures alone, for not all of these arms have a paired interval"
    if not as_good:
        return f"No untrained solver that was drawn is as good ({', '.join(arm.arm.id for arm in solvers)}){missing}."
    best, taken = min(as_good, key=lambda pair: pair[1])
    ratio = taken / own
    found = quality(best)
    if found is not None and found.value < reached.value:
        told = f"{best.arm.id} needs no training, is not shown to be worse"
    else:
        told = f"{best.arm.id} needs no training, is as good"
    if ratio <= 1:
        return f"{told} and takes {seconds(taken)}: at equal time this student has no reason to exist{missing}."
    return f"{told} and takes {ratio:.1f} times as long{missing}."


def _not_as_fast(student: ArmSummary, solvers: Sequence[ArmSummary]) -> str:
    """Which steps of a solver would take as little time as a student that was faster than all that were drawn."""
    each = 2 if solvers[0].arm.guided else 1
    steps = student.arm.evaluations // each
    if steps < FEWEST_SOLVER_STEPS:
        fewest = f"{FEWEST_SOLVER_STEPS} steps, the fewest, are {FEWEST_SOLVER_STEPS * each} evaluations"
        return f"; none took as little time as the student, and none can: {fewest}"
    if all(arm.arm.steps > steps for arm in solvers):
        return f"; none took as little time as the student, which {steps} steps of one would come near"
    return ""


def _comparable(student: ArmSummary, record: BenchmarkRecord) -> list[ArmSummary]:
    """The arms of its own run, as timed there, and those of others that were drawn and timed as they were."""
    own = record.run_of(student.arm.id)
    others = [
        arm
        for name, arm in record.summary.items()
        if name not in own.arms and _conditions(record.run_of(name)) == _conditions(own)
    ]
    return [*own.arms.values(), *others]


def _conditions(run: Run) -> object:
    return run.machine, run.versions, run.batch_size, run.base.get("fingerprint"), run.settings.get("resolution")


def _lead(student: ArmSummary, solver: ArmSummary) -> float | None:
    """What the student has over the solver on the same pictures, at least; None where that has no interval."""
    over = student.over_solvers.get(solver.arm.id)
    return None if over is None else over.low


def _as_good(solver: ArmSummary, student: ArmSummary) -> bool:
    """Whether a student is not shown to be better: by their paired difference, else by the figures alone."""
    lead, found, reached = _lead(student, solver), quality(solver), quality(student)
    if lead is not None:
        return lead <= 0
    return found is not None and reached is not None and found.value >= reached.value


def _control(student: ArmSummary, record: BenchmarkRecord) -> str | None:
    control = record.run_of(student.arm.id).arms.get(student.control or "")
    gain = student.gain_all_right if student.all_right else student.gain_alignment
    reached = quality(control) if control else None
    if control is None or gain is None or reached is None:
        return None
    what, scale, digits, unit = (
        (percent(reached), 100, 1, " points") if student.all_right else (f"{reached.value:.2f}", 1, 2, "")
    )
    told = f"the adapter is worth {signed(gain, scale, digits)}{unit}"
    if gain.low is None:
        told += f", {_judged(gain, record)}"
    elif gain.low <= 0:
        told += ", and nothing here shows that it helps" if gain.high is None or gain.high >= 0 else ": it harms"
    return f"The same sampler and steps without the adapter ({control.arm.id}) reach {what}: {told}."


def _options(student: ArmSummary, record: BenchmarkRecord) -> str | None:
    """The fastest of what was to make it faster, and what that costs; a gain within the timings' spread is none."""
    tried = [
        (arm.speedup_vs_plain, arm)
        for arm in record.summary.values()
        if arm.plain == student.arm.id and arm.speedup_vs_plain is not None
    ]
    if not tried:
        return None
    faster = [(speedup, arm) for speedup, arm in tried if _beyond_the_spread(arm, student)]
    if not faster:
        names = ", ".join(arm.arm.id for _, arm in tried)
        return f"Nothing that was tried makes it faster by more than its timings spread ({names})."
    speedup, best = max(faster, key=lambda pair: pair[0])
    told = f"Of the options, {best.arm.id} is the fastest: {speedup:.2f} times as fast as {student.arm.id}"
    if best.change_all_right:
        told += f", at {signed(best.change_all_right, 100)} points"
    elif best.change_alignment:
        told += f", at {signed(best.change_alignment, 1, 2)} in alignment"
    return f"{told}."


def _beyond_the_spread(option: ArmSummary, plain: ArmSummary) -> bool:
    own, before = option.timings[0].end_to_end, plain.timings[0].end_to_end
    return before.median - own.median > max(own.iqr, before.iqr)


def _distribution(student: ArmSummary, record: BenchmarkRecord) -> str | None:
    frechet = student.frechet
    if frechet is None or frechet.difference is None or frechet.difference.low is None:
        return None
    against = {True: "worse", False: "better"}[frechet.difference.value > 0]
    sure = "" if frechet.difference.excludes_zero else ", within the interval"
    digits = decimals(frechet.through_vae.value)
    return (
        f"The Fréchet distance of {student.arm.id} to pictures of the same captions is "
        f"{frechet.through_vae.value:.{digits}f}, {signed(frechet.difference, 1, digits)} against "
        f"{_the_teacher(student, record)}'s ({against}{sure}; N = {frechet.pictures})."
    )


def _saturation(student: ArmSummary, record: BenchmarkRecord) -> str | None:
    if student.saturation is None:
        return None
    worst = max(student.saturation, key=lambda ratio: abs(ratio - 1))
    if abs(worst - 1) <= SATURATION_TOLERANCE:
        return None
    spread = f"{100 * (worst - 1):+.1f} %".replace("-", "−")
    mean = student.mean_saturation
    told = "of all channels it may be chance"
    if mean is not None and mean.low is not None and mean.high is not None and not mean.low <= 1 <= mean.high:
        told = f"all channels together {'more' if mean.value > 1 else 'less'}, {_over_one(mean)} %"
        if mean.high < 1 - SATURATION_TOLERANCE or mean.low > 1 + SATURATION_TOLERANCE:
            told += f": pictures are {'burnt' if mean.value > 1 else 'washed out'}"
    return (
        f"The latents of {student.arm.id} spread {spread} against {_the_teacher(student, record)}'s in the worst "
        f"channel, where a faithful student stays within 5 %; {told}."
    )


def _over_one(ratio: Interval) -> str:
    """A ratio as what it is above 1, in per cent, with its bounds."""
    assert ratio.low is not None and ratio.high is not None
    return signed(Interval(value=ratio.value - 1, low=ratio.low - 1, high=ratio.high - 1), 100)


def seconds(value: float) -> str:
    """``1.32 s`` or ``86 ms``."""
    return f"{value:.2f} s" if value >= 0.9995 else f"{1000 * value:.3g} ms"
