"""`fewstep report`: the page of one benchmark drawn again from its data, or of several side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fewstep.config import ReportSettings
from fewstep.errors import InputError
from fewstep.files import write_text_atomic
from fewstep.records import BenchmarkRecord
from fewstep.report import RECORD_FILE, arm_folder, page, picture_path, side_by_side
from fewstep.report.merge import numbered, slug
from fewstep.reporting import LOG, Reporter


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """The page, and the record that it shows."""

    file: Path
    record: BenchmarkRecord


def report(settings: ReportSettings, *, reporter: Reporter = LOG) -> ReportResult:
    """Read the runs and write `report.html`.

    Args:
        settings: which runs, and where to.

    Raises:
        InputError: a folder that holds no finished benchmark, or runs that cannot be compared.
    """
    runs = _named(settings.runs)
    records = {name: _record(folder) for name, folder in runs.items()}
    record, origins = side_by_side(records)
    folders = {}
    for arm, (run, own) in origins.items():
        apart = records[run].settings.get("baseline_outdir") if records[run].summary[own].arm.is_baseline else None
        places = [arm_folder(Path(place), own) for place in (apart, runs[run]) if place]
        place = next((place for place in places if place.is_dir()), None)
        if place is None:
            reporter.warn(f"the pictures of {own} are not in {places[-1]}: the gallery goes without them")
        else:
            folders[arm] = place
            files = [picture_path(place, prompt, 0) for prompt in range(len(record.prompts))]
            missing = [file for file in files if not file.exists()]
            if missing:
                reporter.warn(
                    f"{len(missing)} of the pictures of {own}, such as {missing[0]}, are not there: the gallery goes "
                    "without them"
                )
    file = (settings.outdir or settings.runs[0]) / "report.html"
    write_text_atomic(file, page(record, folders, reporter.warn))
    reporter.say(f"report: {file}, {len(record.summary)} arms of {len(runs)} run{'s' if len(runs) > 1 else ''}")
    return ReportResult(file=file, record=record)


def _named(folders: tuple[Path, ...]) -> dict[str, Path]:
    """A short name for each run, also told apart in ids: its folder's, with its parents' or a number where needed.

    A folder that comes twice is one run.
    """
    places: dict[Path, Path] = {}
    alike: dict[str, list[Path]] = {}
    for folder in folders:
        place = folder.resolve()
        if place not in places:
            places[place] = folder
            alike.setdefault(slug(place.name), []).append(place)
    long = {place: name for group in alike.values() for place, name in zip(group, _told_apart(group), strict=True)}
    named: dict[str, Path] = {}
    for place, folder in places.items():
        taken = {slug(name) for name in named}
        named[next(name for name in numbered(long[place]) if slug(name) not in taken)] = folder
    return named


def _told_apart(places: list[Path]) -> list[str]:
    """The folders' names with as few parents as tell most of them apart."""

    def names(depth: int) -> list[str]:
        return ["-".join(part for part in place.parts[-depth:] if part != place.anchor) for place in places]

    depths = range(1, max(len(place.parts) for place in places) + 1)
    return names(max(depths, key=lambda depth: len({slug(name) for name in names(depth)})))


def _record(folder: Path) -> BenchmarkRecord:
    file = folder / RECORD_FILE
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputError(
            f"{str(file)!r} cannot be read ({reason}); allowed is the --outdir of a finished fewstep bench; check the "
            "path, or finish it with --resume"
        ) from None
    try:
        return BenchmarkRecord.from_json(text)
    except InputError as error:
        raise InputError(f"{str(file)!r}: {error}") from None
