"""report.html: one page that opens from disk, in light and dark, on a desk and on a phone; nothing is loaded."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from fewstep.config import BenchSettings, command_line
from fewstep.errors import first_line
from fewstep.records import ArmSummary, BenchmarkRecord
from fewstep.report.bars import attribute_bars, time_bars
from fewstep.report.columns import attribute_columns, column_groups, option_columns
from fewstep.report.figures import NARROW, ROLES, frontier
from fewstep.report.layout import picture_path
from fewstep.report.verdict import MAIN, headline, verdict

GALLERY_PROMPTS = 40
"""More would make a page of tens of megabytes; all pictures lie beside it."""
GALLERY_WORST = 12
"""Of these, the prompts where the student loses most, wherever they stand."""
GALLERY_SIDE = 256
"""Pixels of a gallery picture's longer side."""


def page(record: BenchmarkRecord, folders: Mapping[str, Path], warn: Callable[[str], object] = lambda _: None) -> str:
    """The whole page as text.

    Args:
        record: what was found.
        folders: arm id to the folder of its pictures; arms that are missing here stay out of the gallery.
        warn: told of pictures that cannot be read; the gallery goes without them.
    """
    # autoescape whatever the template's name: captions and paths come from outside.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fewstep.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    arms, sentences, compared = list(record.summary.values()), verdict(record), _compared(record)
    losses = _losses(record)
    shown = [arm for arm in arms if arm.arm.id in folders]
    return environment.get_template("page.html.j2").render(
        title=f"fewstep: {record.base.get('name', 'a base')} in few steps",
        record=record,
        arms=arms,
        verdict=sentences[:MAIN],
        besides=sentences[MAIN:],
        groups=column_groups(arms),
        attributes=attribute_columns(arms),
        faster=_with_options(arms),
        faster_columns=option_columns(_with_options(arms)),
        frontier=_plots(frontier(arms), frontier(arms, NARROW)),
        compared=compared,
        attribute_bars=_plots(attribute_bars(compared), attribute_bars(compared, NARROW)),
        time_bars=_plots(time_bars(arms), time_bars(arms, NARROW)),
        roles=[role for role in ROLES if any(arm.arm.role == role for arm in arms)],
        notes=_notes(record),
        made=_made(record),
        batches=sorted({arm.timings[0].batch_size for arm in arms if arm.timings}),
        gallery_arms=shown,
        gallery=_gallery(record, {arm.arm.id: folders[arm.arm.id] for arm in shown}, losses, warn),
        can_sort=len(set(losses.values())) > 1,
        gallery_left_out=max(0, len(record.prompts) - GALLERY_PROMPTS),
        has_worst=bool(losses),
        one_noise=len(_noises(record)) < 2,
    )


def _noises(record: BenchmarkRecord) -> set[object]:
    """What the initial noise of the runs on the page depends on, each once."""
    return {(run.settings.get("seed"), run.settings.get("resolution")) for run in record.runs.values()}


def _made(record: BenchmarkRecord) -> list[dict[str, Any]]:
    """How each run on the page was made, by its name where there are several."""
    runs = record.runs or {"": record.run_of("")}
    return [
        {"name": name, "run": run, "command": command_line("bench", BenchSettings, run.settings)}
        for name, run in runs.items()
    ]


def _plots(wide: str, narrow: str) -> Markup:
    """A plot for desks and paper and one for phones. Our own SVG; every text in it is escaped where it is made."""
    if not wide:
        return Markup()
    return Markup(f'<div class="scroll wide">{wide}</div>\n<div class="scroll narrow">{narrow}</div>')


def _notes(record: BenchmarkRecord) -> list[str]:
    """What a careful reader must know about the table."""
    arms = list(record.summary.values())
    pictures = sum(arm.pictures for arm in arms)
    notes = [
        f"{_counted(len(record.prompts), 'prompt')}, {_counted(pictures, 'picture')} in {_counted(len(arms), 'arm')}; "
        f"a picture starts from the same noise in every arm{' of a run' if len(_noises(record)) > 1 else ''}. "
        "Intervals are 95 %, over prompts: by bootstrap, where all pictures agree by Wilson's, and for distances, "
        "precision, recall and saturation by half-sampling. Differences are paired."
    ]
    if record.runs:
        notes += _teachers(record)
    if record.alignment_model:
        notes.append(f"Alignment by {record.alignment_model}.")
    if record.preference_model:
        notes.append(f"Preference by {record.preference_model}.")
    notes += _about_frechet(record)
    if record.feature_extractor and any(arm.distances or arm.diversity or arm.faithfulness for arm in arms):
        notes.append(
            f"Distances, precision, recall, diversity and faithfulness over {record.feature_extractor}; CMMD over the "
            "alignment model's embeddings. Pictures are resized by the models' own preprocessing. Precision and recall "
            "depend on N."
        )
    if record.real:
        notes.append(
            "real is no competitor but the ceiling: real pictures of the same captions, as many as an arm draws. "
            "Alignment and answer key see them as they are; their distances are to other real pictures, which is what "
            "the figures are when nothing is wrong."
        )
    return notes + _about_times(record)


def _about_times(record: BenchmarkRecord) -> list[str]:
    """What was timed how, and what the machine could do at best."""
    timed = {name: arm.timings[0] for name, arm in record.summary.items() if arm.timings}
    if not timed:
        return []
    alike: dict[str, list[str]] = {}
    for name, timing in timed.items():
        how = f"{_counted(timing.end_to_end.repeats, 'repeat')} at batch {timing.batch_size}"
        alike.setdefault(how, []).append(name)
    each = "; ".join(f"{how} ({', '.join(names)})" if len(alike) > 1 else how for how, names in alike.items())
    reached = sorted({round(100 * timing.share_of_floor) for timing in timed.values()})
    rates = sorted({round(timing.matrix_rate / 1e9) for timing in timed.values()})
    return [
        f"Times are medians of {each}, warmed up and synchronised, from text to finished picture, on "
        f"{_devices(record)}.",
        f"A large matrix product runs at {_range(rates)} GFLOP/s in the precisions used; at that rate the arms' "
        f"operations alone would take {_range(reached)} % of their times (timing.csv).",
    ]


def _range(values: Sequence[int]) -> str:
    """Sorted numbers from the first to the last."""
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def _counted(count: int, name: str) -> str:
    return f"{count} {name}{'s' if count != 1 else ''}"


def _about_frechet(record: BenchmarkRecord) -> list[str]:
    """What the distances rest on, and which of them may be compared: those of as many pictures and references."""
    found = {name: arm.frechet for name, arm in record.summary.items() if arm.frechet}
    arms: dict[tuple[int, int], list[str]] = {}
    for name, frechet in found.items():
        arms.setdefault((frechet.pictures, frechet.references), []).append(name)
    if not arms:
        return []
    dimensions = next(iter(found.values())).dimensions
    few = any(min(sizes) <= dimensions for sizes in arms)
    real = record.real.frechet if record.real else None
    if len(arms) == 1:
        ((pictures, references),) = arms
        told = (
            f"Fréchet distance in {dimensions} dimensions, N = {pictures} pictures against {references} of the same "
            "captions. It grows with small N: compare within this table alone."
        )
        told += f" Real pictures against real ones at this N: {real.through_vae.value:.2f}." if real else ""
        return [told + (" There are no more pictures than dimensions: it says little." if few else "")]
    each = "; ".join(
        f"N = {pictures} against {references} in {', '.join(names)}" for (pictures, references), names in arms.items()
    )
    told = (
        f"Fréchet distance in {dimensions} dimensions to pictures of the same captions, of several N: {each}. It grows "
        "with small N: distances of different N are not comparable with each other."
    )
    if real:
        told += (
            f" Real pictures against real ones at N = {real.pictures} against {real.references}: "
            f"{real.through_vae.value:.2f}."
        )
    return [told + (" Where there are no more pictures than dimensions, it says little." if few else "")]


def _teachers(record: BenchmarkRecord) -> list[str]:
    """Which arm is the teacher of which run, where that is not one for all."""
    names = {name: run.baseline.arm.id for name, run in record.runs.items() if run.baseline is not None}
    if len(set(names.values())) < 2:
        return []
    each = ", ".join(f"{teacher} for those of {name}" for name, teacher in names.items())
    return [f"The teacher that an arm's differences, ratios and speed-ups are taken against: {each}."]


def _devices(record: BenchmarkRecord) -> str:
    """What the arms were timed on."""
    first = record.machine.get("device", "?")
    others = {name: run.machine.get("device", "?") for name, run in record.runs.items()}
    return ", ".join([first, *(f"those of {name} on {place}" for name, place in others.items() if place != first)])


def _teacher(student: ArmSummary, record: BenchmarkRecord) -> ArmSummary | None:
    """The teacher of a student's own run; without one, the record's."""
    return record.run_of(student.arm.id).baseline or record.baseline


def _compared(record: BenchmarkRecord) -> list[ArmSummary]:
    """The arms that the verdict is about: the student, its teacher and its control, and the real pictures."""
    student = headline(list(record.summary.values()))
    control = None if student is None else record.summary.get(student.control or "")
    teacher = record.baseline if student is None else _teacher(student, record)
    return [arm for arm in (teacher, student, control, record.real) if arm is not None]


def _with_options(arms: Sequence[ArmSummary]) -> list[ArmSummary]:
    """The arms with an option, and the plain ones that they are compared with."""
    plain = {arm.plain for arm in arms}
    return [arm for arm in arms if arm.plain or arm.arm.id in plain]


def _losses(record: BenchmarkRecord) -> dict[int, float]:
    """Prompt number to what the student of the verdict loses there against the teacher, the worst the highest."""
    student = headline(list(record.summary.values()))
    if student is None:
        return {}
    found: dict[tuple[str, int], list[float]] = {}
    for score in record.scores:
        value = float(score.right["all_right"]) if score.right and "all_right" in score.right else score.clip_align_x100
        if value is not None:
            found.setdefault((score.arm, score.prompt_idx), []).append(value)
    means = {key: sum(values) / len(values) for key, values in found.items()}
    teacher = _teacher(student, record)
    own = teacher.arm.id if teacher else ""
    return {
        prompt: means.get((own, prompt), 0.0) - mean for (arm, prompt), mean in means.items() if arm == student.arm.id
    }


def _chosen(prompts: int, losses: Mapping[int, float]) -> list[int]:
    """The numbers of the prompts in the gallery: the first ones, and the worst of all."""
    worst = sorted(losses, key=lambda number: -losses[number])[:GALLERY_WORST] if prompts > GALLERY_PROMPTS else []
    rest = (number for number in range(prompts) if number not in worst)
    return sorted([*worst, *islice(rest, GALLERY_PROMPTS - len(worst))])


def _gallery(
    record: BenchmarkRecord, folders: Mapping[str, Path], losses: Mapping[int, float], warn: Callable[[str], object]
) -> list[dict[str, Any]]:
    """A row a prompt, a picture an arm: picture 0 of each."""
    return [
        {
            "prompt": record.prompts[number],
            "number": number,
            "loss": losses.get(number, 0.0),
            "pictures": [
                {"arm": arm, "src": source}
                for arm, folder in folders.items()
                if (source := _embedded(picture_path(folder, number, 0), warn)) is not None
            ],
        }
        for number in _chosen(len(record.prompts), losses)
    ]


def _embedded(path: Path, warn: Callable[[str], object]) -> str | None:
    """A picture as a data: address, small enough for a page of hundreds; None where it is not there, or not whole."""
    if not path.exists():
        return None
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except OSError as error:
        warn(f"the picture {path} cannot be read ({first_line(error)}): the gallery goes without it")
        return None
    small.thumbnail((GALLERY_SIDE, GALLERY_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
