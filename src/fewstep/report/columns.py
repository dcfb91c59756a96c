"""The table of a benchmark, column by column, as text: for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fewstep.records import ArmSummary, Interval
from fewstep.report.verdict import decimals, percent, seconds, signed


@dataclass(frozen=True)
class Column:
    """A column of the table: its title, what it means, and a cell for each arm, empty where there is no figure."""

    title: str
    meaning: str
    cells: tuple[str, ...]


def columns(arms: Sequence[ArmSummary]) -> list[Column]:
    """The whole table: only columns that some arm has a figure for."""
    return [column for _, group in column_groups(arms) for column in group]


def column_groups(arms: Sequence[ArmSummary]) -> list[tuple[str, list[Column]]]:
    """The same in parts that fit on paper, each with a title."""
    groups = [(title, _filled(table, arms)) for title, table in _TABLES.items()]
    return [(title, group) for title, group in groups if group]


def option_columns(arms: Sequence[ArmSummary]) -> list[Column]:
    """The table of the arms with an option and of the plain ones that they are compared with."""
    return _filled(_OPTIONS, arms)


def _filled(table: _Table, arms: Sequence[ArmSummary]) -> list[Column]:
    found = [Column(title, meaning, tuple(cell(arm) for arm in arms)) for title, meaning, cell in table]
    return [column for column in found if any(column.cells)]


def attribute_columns(arms: Sequence[ArmSummary]) -> list[Column]:
    """For each attribute of the answer key the share of pictures that have it right, and its difference."""
    names = list(dict.fromkeys(name for arm in arms for name in arm.attributes))
    found = []
    for name in names:
        found.append(Column(name, "", tuple(_share(arm.attributes.get(name)) for arm in arms)))
        against = tuple(_difference(arm, arm.delta_attributes.get(name), 100, 1) for arm in arms)
        if any(against):
            found.append(Column("against teacher", "", against))
    return found


def _spread(found: Interval | None) -> str:
    if found is None:
        return ""
    if found.low is None or found.high is None:
        return _number(found.value)
    return f"{_number(found.value)} ({_number(found.low)} to {_number(found.high)})"


def _number(value: float) -> str:
    return f"{value:.{decimals(value)}f}" if abs(value) < 1000 else f"{value:,.0f}"


def _share(found: Interval | None) -> str:
    return "" if found is None else percent(found)


def _difference(arm: ArmSummary, found: Interval | None, scale: float, digits: int) -> str:
    """The baseline's difference to itself is no finding."""
    return "" if found is None or arm.arm.is_baseline else signed(found, scale, digits)


def _scaled(name: str, scale: float = 1.0) -> Callable[[ArmSummary], str]:
    """The cell of one of `ArmSummary.distances`."""

    def cell(arm: ArmSummary) -> str:
        found = arm.distances.get(name)
        if found is None:
            return ""
        bounds = (found.low, found.high)
        low, high = (None if bound is None else scale * bound for bound in bounds)
        return _spread(Interval(value=scale * found.value, low=low, high=high)).replace("-", "−")

    return cell


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.0f} MB"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"


def _part(arm: ArmSummary, name: Literal["unet_total", "decode"]) -> str:
    """Seconds a picture of one part of the work."""
    if not arm.timings:
        return ""
    timing = arm.timings[0]
    return seconds((timing.unet_total if name == "unet_total" else timing.decode.median) / timing.batch_size)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _decoder(arm: ArmSummary) -> str:
    if not arm.timings:
        return ""
    timing = arm.timings[0]
    return f"{_percent(timing.decode_share)}, {_percent(timing.decode_share_of_flops)}"


def _time(arm: ArmSummary) -> str:
    return "" if arm.time_per_image_s is None else seconds(arm.time_per_image_s)


_Table = list[tuple[str, str, Callable[[ArmSummary], str]]]
"""Title, meaning, and how an arm's cell is spelled."""

_QUALITY: _Table = [
    ("Evaluations", "network evaluations a picture; guidance takes two a step", lambda a: str(a.arm.evaluations or "")),
    ("Guidance", "w in u + w (c − u)", lambda a: f"{a.arm.guidance:g}" if a.arm.is_drawn else ""),
    ("All right", "pictures with every captioned attribute right", lambda a: _share(a.all_right)),
    (
        "against teacher",
        "paired difference in points: same prompt, same noise (real pictures have none)",
        lambda a: _difference(a, a.delta_all_right, 100, 1),
    ),
    (
        "against base",
        "paired difference in points to the same sampler and steps without adapter",
        lambda a: _difference(a, a.gain_all_right, 100, 1),
    ),
    (
        "against plain",
        "paired difference in points to the same arm without the option",
        lambda a: _difference(a, a.change_all_right, 100, 1),
    ),
    ("Alignment", "100 × max(0, cos) of CLIP's picture and caption", lambda a: _spread(a.alignment)),
    (
        "Floor",
        "the same pictures with everyone else's captions",
        lambda a: _spread(a.floor),
    ),
    (
        "Alignment against teacher",
        "paired difference: same prompt, same noise (real pictures have none)",
        lambda a: _difference(a, a.delta_alignment, 1, 2),
    ),
    (
        "Alignment against plain",
        "paired difference to the same arm without the option",
        lambda a: _difference(a, a.change_alignment, 1, 2),
    ),
    ("Retention, raw", "alignment over the teacher's; flatters a broken student", lambda a: _share(a.retention_raw)),
    (
        "Retention, floor off",
        "(score − floor) over the teacher's (score − floor)",
        lambda a: _share(a.retention_corrected),
    ),
    (
        "Preference",
        "scaled cosine of the preference model; only differences mean something",
        lambda a: _spread(a.preference),
    ),
    (
        "Preference against teacher",
        "paired difference: same prompt, same noise (real pictures have none)",
        lambda a: _difference(a, a.delta_preference, 1, 2),
    ),
]

_DISTANCES: _Table = [
    (
        "Fréchet",
        "distance to pictures of the same captions, passed through the VAE",
        lambda a: _spread(a.frechet.through_vae if a.frechet else None),
    ),
    (
        "Fréchet, raw",
        "distance to the same pictures as they were drawn",
        lambda a: _spread(a.frechet.raw if a.frechet else None),
    ),
    ("KID × 1000", "kernel distance to the same pictures, over the same features; unbiased", _scaled("kid", 1000)),
    ("CMMD", "kernel distance × 1000 to the same pictures, over the alignment model's embeddings", _scaled("cmmd")),
    ("Precision", "share of the arm's pictures within the real ones' manifold", _scaled("precision")),
    ("Recall", "share of real pictures within the arm's manifold", _scaled("recall")),
    (
        "Fréchet to teacher",
        "distance to the teacher's pictures; as biased by N as the other",
        _scaled("frechet_teacher"),
    ),
    ("KID × 1000 to teacher", "kernel distance to the teacher's pictures; unbiased", _scaled("kid_teacher", 1000)),
    ("CMMD to teacher", "kernel distance × 1000 to the teacher's pictures", _scaled("cmmd_teacher")),
    ("Precision to teacher", "share of the arm's pictures within the teacher's manifold", _scaled("precision_teacher")),
    ("Recall to teacher", "share of the teacher's pictures within the arm's manifold", _scaled("recall_teacher")),
    (
        "Diversity",
        "feature distance among the pictures of a prompt, over the teacher's",
        lambda a: _spread(a.diversity),
    ),
    (
        "Faithfulness",
        "feature distance to the teacher's picture from the same noise; 0 is the same picture",
        lambda a: _spread(a.faithfulness),
    ),
    (
        "Saturation",
        "spread of the latents over the teacher's, mean over channels",
        lambda arm: _spread(arm.mean_saturation),
    ),
]

_COST: _Table = [
    ("Time a picture", "median, end to end, at the smallest timed batch", _time),
    (
        "Peak memory",
        "at the smallest timed batch: allocated on a GPU, resident on a CPU",
        lambda a: _megabytes(a.timings[0].peak_memory_bytes if a.timings else None),
    ),
    (
        "Share of the floor",
        "time of the operations alone at the rate of a large matrix product, over the time taken",
        lambda a: _percent(a.timings[0].share_of_floor if a.timings else None),
    ),
    ("Decoder", "its share of the time, and of the operations", _decoder),
    (
        "Speed-up",
        "over the teacher",
        lambda a: "" if a.speedup_vs_baseline is None else f"{a.speedup_vs_baseline:.1f}×",
    ),
    ("Speed-up over plain", "over the same arm without the option", lambda a: _times(a.speedup_vs_plain)),
]

_TABLES = {"Picture by picture": _QUALITY, "All pictures together": _DISTANCES, "Cost": _COST}

_OPTIONS: _Table = [
    ("Speed-up over plain", "", lambda a: _times(a.speedup_vs_plain)),
    ("Time a picture", "", _time),
    ("of that UNet", "", lambda a: _part(a, "unet_total")),
    ("of that decoder", "", lambda a: _part(a, "decode")),
    ("All right against plain", "", lambda a: _difference(a, a.change_all_right, 100, 1)),
    ("Alignment against plain", "", lambda a: _difference(a, a.change_alignment, 1, 2)),
    ("Peak memory", "", lambda a: _megabytes(a.timings[0].peak_memory_bytes if a.timings else None)),
]
