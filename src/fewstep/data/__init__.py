"""Training data: pictures with captions from wherever the settings say, scanned, counted and ready to be loaded.

A new kind of dataset is a file of its own that offers `PictureData`, and a line in `open_data`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import floor
from pathlib import Path
from typing import Protocol

from fewstep.data import folder
from fewstep.data.folder import require_there
from fewstep.data.generated import DrawsPictures, GeneratedPictures
from fewstep.data.hub import HubShards, scan_hub
from fewstep.data.loader import Batch, Batches, Slices
from fewstep.data.pairs import LocalPictures, PictureData, keep_readable
from fewstep.data.prompts import scan_prompts
from fewstep.data.remote import RemoteShards, expand, is_url
from fewstep.data.report import DataReport, Drops
from fewstep.data.stream import StreamedPictures
from fewstep.errors import InputError
from fewstep.reporting import SILENT, Reporter

__all__ = [
    "Batch",
    "Batches",
    "DataReport",
    "OpenedData",
    "PictureData",
    "Slices",
    "StreamedPictures",
    "open_data",
    "require_there",
]


class DataSettings(Protocol):
    """The settings that say where the data is."""

    @property
    def data_dir(self) -> Path | None: ...
    @property
    def dataset_name(self) -> str | None: ...
    @property
    def prompts_file(self) -> Path | None: ...
    @property
    def image_column(self) -> str | None: ...
    @property
    def caption_column(self) -> str | None: ...
    @property
    def max_dropped(self) -> float: ...
    @property
    def resolution(self) -> int | None: ...
    @property
    def seed(self) -> int: ...


class Base(Protocol):
    """What is asked of the base model."""

    @property
    def name(self) -> str: ...
    @property
    def resolution(self) -> int: ...
    @property
    def abilities(self) -> object | None: ...


@dataclass(frozen=True, kw_only=True)
class OpenedData:
    """Data that training may start on.

    Attributes:
        data: the pictures, at the run's resolution.
        report: what was kept and what was dropped.
        fingerprint: of the content (names, captions, samples of the pictures' bytes): another one is other data, for a
            resumed run as well.
        allowance: how many more pictures may turn out to be no good before more than `max_dropped` are.
    """

    data: PictureData
    report: DataReport
    fingerprint: str
    allowance: int


def open_data(
    settings: DataSettings, backbone: Base, *, streaming: bool = False, reporter: Reporter = SILENT
) -> OpenedData:
    """Find, scan and check the training data: a folder, a dataset, captions alone, or the base's own drawings.

    Args:
        streaming: fetch a dataset file by file as it is needed; what comes by URL always is.
        reporter: told what was found and what was dropped.

    Raises:
        InputError: nothing says what to train on, or the settings contradict each other or the data.
        DataError: the data is not there, cannot be understood, or too much of it cannot be used.
    """
    resolution = settings.resolution or backbone.resolution
    drops = Drops()
    data: PictureData
    given = [name for name in ("data_dir", "dataset_name", "prompts_file") if getattr(settings, name) is not None]
    if len(given) > 1:
        raise InputError(f"{given[0]} and {given[1]} came together; allowed is one of them; leave one out")
    rows_of = settings.dataset_name
    if settings.data_dir is not None and folder.holds_rows(settings.data_dir):
        rows_of = str(settings.data_dir)
    if settings.dataset_name is not None and (streaming or is_url(settings.dataset_name)):
        data, report, fingerprint = _open_stream(settings.dataset_name, settings, resolution, reporter)
    elif rows_of is not None:
        rows = scan_hub(
            rows_of,
            resolution,
            drops,
            image_column=settings.image_column,
            caption_column=settings.caption_column,
            reporter=reporter,
        )
        data, fingerprint = rows.data, rows.fingerprint
        report = drops.report(rows.source, len(data), rows.captions)
    elif settings.data_dir is not None:
        scanned = folder.scan_folder(
            settings.data_dir,
            drops,
            image_column=settings.image_column,
            caption_column=settings.caption_column,
            reporter=reporter,
        )
        pairs, fingerprint = keep_readable(scanned.files, scanned.pairs, drops, reporter)
        data = LocalPictures(scanned.files, pairs, resolution)
        report = drops.report(scanned.source, len(pairs), sum(len(pair.captions) for pair in pairs))
    elif settings.prompts_file is not None:
        folder.refuse_columns(settings.image_column, settings.caption_column, settings.prompts_file)
        prompts = scan_prompts(settings.prompts_file, drops)
        data, fingerprint = prompts, prompts.fingerprint()
        report = drops.report(f"captions in {settings.prompts_file}", 0, len(data), pictures_too=False)
    else:
        if not isinstance(backbone.abilities, DrawsPictures):
            raise InputError(
                f"no training data came, and base model {backbone.name} draws none of its own; allowed, for fewstep "
                f"train, is --data_dir FOLDER with {folder.LAYOUTS}; --dataset_name ID of a Hugging Face dataset; or "
                "--prompts_file FILE with a caption a line and no pictures"
            )
        folder.refuse_columns(settings.image_column, settings.caption_column, f"what {backbone.name} draws itself")
        drawings = GeneratedPictures(backbone.abilities, settings.seed, resolution)
        data, fingerprint = drawings, drawings.fingerprint()
        report = drops.report(f"pictures drawn by the base model {backbone.name}", len(data), len(data), endless=True)
    report.check(settings.max_dropped)
    for line in report.lines():
        reporter.say(f"data: {line}")
    lost = report.dropped_of("pictures")
    return OpenedData(
        data=data,
        report=report,
        fingerprint=fingerprint,
        allowance=max(0, floor(settings.max_dropped * (report.pictures + lost) + 1e-9) - lost),
    )


def _open_stream(
    name: str, settings: DataSettings, resolution: int, reporter: Reporter
) -> tuple[StreamedPictures, DataReport, str]:
    """Data of which a part at a time is here; its counts are as if every shard were like the first."""
    source: RemoteShards | HubShards
    if is_url(name):
        folder.refuse_columns(settings.image_column, None, name)
        source = RemoteShards(expand(name), resolution, settings.max_dropped, settings.caption_column, reporter)
    else:
        source = HubShards(name, resolution, settings.max_dropped, settings.image_column, settings.caption_column)
    data = StreamedPictures(source)
    first = data.first.report
    report = replace(
        first,
        source=f"{len(source):,} shards, fetched as they are needed; if all are like the first, {source.name(0)}",
        pictures=len(data),
        captions=first.captions * len(source),
    )
    return data, report, source.fingerprint(data.first)
