"""`fewstep report`: the page of one benchmark drawn again from its data, or of several side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fewstep.config import ReportSettings
from fewstep.errors import InputError
from fewstep.files import write_text_atomic
from fewstep.records import BenchmarkRecord
from fewstep.report import RECORD_FILE, arm_folder, page, side_by_side
from fewstep.reporting import SILENT, Reporter


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """The page, and the record that it shows."""

    file: Path
    record: BenchmarkRecord


def report(settings: ReportSettings, *, reporter: Reporter = SILENT) -> ReportResult:
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
        places = [arm_folder(Path(place), own) for place in (runs[run], apart) if place]
        place = next((place for place in places if place.is_dir()), None)
        if place is None:
            reporter.warn(f"the pictures of {own} are not in {places[0]}: the gallery goes without them")
        else:
            folders[arm] = place
    file = (settings.outdir or settings.runs[0]) / "report.html"
    write_text_atomic(file, page(record, folders))
    reporter.say(f"report: {file}, {len(record.summary)} arms of {len(runs)} run{'s' if len(runs) > 1 else ''}")
    return ReportResult(file=file, record=record)


def _named(folders: tuple[Path, ...]) -> dict[str, Path]:
    """A short name for each run: its folder's, with the parent's where two are called alike."""
    names = [folder.resolve().name for folder in folders]
    return {
        name if names.count(name) == 1 else f"{folder.resolve().parent.name}-{name}": folder
        for name, folder in zip(names, folders, strict=True)
    }


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
    return BenchmarkRecord.from_json(text)
