"""results.csv, timing.csv and the printed table as text. Missing figures are empty cells."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from fewstep.records import ArmSummary, BenchmarkRecord, Row
from fewstep.report.columns import columns

PRINTED = {
    *("All right", "against teacher", "Alignment", "Floor", "Retention, floor off"),
    *("Fréchet", "Time a picture", "Speed-up", "Speed-up over plain", "against plain", "Alignment against plain"),
}
"""Columns of the table that is printed, by their titles."""


def results_csv(rows: Sequence[Row]) -> str:
    """One line an arm and prompt: the contract's ten columns first, then ours, then a share for each attribute."""
    plain = [field.name for field in fields(Row) if field.name != "attributes"]
    attributes = list(dict.fromkeys(name for row in rows for name in row.attributes))
    lines = [[getattr(row, name) for name in plain] + [row.attributes.get(name) for name in attributes] for row in rows]
    return _csv([*plain, *(f"right_{name}" for name in attributes)], lines)


def markdown(arms: Sequence[ArmSummary]) -> str:
    """The main columns, aligned for a terminal and ready to be pasted into a README; the page has them all."""
    shown = [column for column in columns(arms) if column.title in PRINTED]
    table = [("Arm", *(arm.arm.id for arm in arms)), *((column.title, *column.cells) for column in shown)]
    widths = [max(map(len, column)) for column in table]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in zip(*table, strict=True)
    ]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def timing_csv(record: BenchmarkRecord) -> str:
    """One line an arm and batch size; seconds a batch, but for ``time_per_image_s``.

    ``floor_s`` is what the operations alone would take at the rate of a large matrix product that was measured in the
    arm's precision; ``share_of_floor`` is it over the time taken, 1 where nothing is lost.
    """
    names = [
        "arm", "steps", "batch_size", "repeats", "end_to_end_median_s", "end_to_end_iqr_s", "time_per_image_s",
        "text_median_s", "text_iqr_s", "unet_calls", "unet_forward_median_s", "unet_forward_iqr_s", "unet_total_s",
        "decode_median_s", "decode_iqr_s", "network_evaluations_per_image", "device", "precision", "threads",
        "peak_memory_mb", "gflop", "floor_s", "share_of_floor",
        "decode_gflop",
    ]  # fmt: skip
    lines = [
        [
            arm.arm.id, arm.arm.steps, timing.batch_size, timing.end_to_end.repeats, timing.end_to_end.median,
            timing.end_to_end.iqr, timing.time_per_image, timing.text.median, timing.text.iqr, timing.unet_calls,
            timing.unet_forward.median, timing.unet_forward.iqr, timing.unet_total, timing.decode.median,
            timing.decode.iqr, arm.arm.evaluations, record.machine.get("device"), timing.precision,
            record.machine.get("threads"),
            None if timing.peak_memory_bytes is None else timing.peak_memory_bytes / 1e6, timing.flops / 1e9,
            timing.floor, timing.share_of_floor, timing.decode_flops / 1e9,
        ]
        for arm in record.summary.values()
        for timing in arm.timings
    ]  # fmt: skip
    return _csv(names, lines)


def _csv(columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(value) for value in line] for line in lines)
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
