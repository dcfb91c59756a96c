"""Kinds of values that settings have: what is allowed, and what an error says of what is not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from fewstep.config.spelling import spell
from fewstep.files import at_home

EMBEDDED_BASE = "scenes"
"""The base that ships with the package: the default of every ``fewstep`` command."""

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
"""The default base of the two root scripts."""

LONGEST_NAME = 200
"""Bytes of a folder's name: file systems take 255, and what is being written has a longer one for a moment."""

MOST_STUDENT_STEPS = 50
"""LCMScheduler and TCDScheduler pick a student's steps out of 50: no student takes more."""

Precision = Literal["auto", "no", "fp16", "bf16"]
FAST_OPTIONS = ("fused", "tiny-vae", "bf16", "fp16", "channels-last", "compile")
"""What may make few steps faster, in the order in which several are applied; tiny-vae has a flag of its own."""
Start = Literal["data", "teacher", "student", "noise"]


def _as_list(value: Any) -> Any:
    """A single number or name stands for a list of one: ``steps = 4``."""
    return (value,) if isinstance(value, int | str) else value


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    repeated = [value for position, value in enumerate(values) if value in values[:position]]
    if repeated:
        raise ValueError(f"{repeated[0]} came twice in {spell(values)}; allowed is each value once; leave one out")
    return values


def _fast_option(value: str) -> str:
    """One option, or several joined by +, brought into the order in which they are applied."""
    parts = value.split("+")
    odd = next((part for part in parts if part not in FAST_OPTIONS), None)
    names = spell(FAST_OPTIONS).replace(" ", ", ")
    if odd is not None or len(set(parts)) < len(parts) or {"bf16", "fp16"} <= set(parts) or value == "tiny-vae":
        raise ValueError(
            f"{value!r} came; allowed: {names}, each once and one of the precisions, tiny-vae beside others; for "
            "example --fast_options fused bf16 fused+channels-last"
        )
    return "+".join(sorted(parts, key=FAST_OPTIONS.index))


def _solvable(values: tuple[int, ...]) -> tuple[int, ...]:
    if 1 in values or (0 in values and len(values) > 1):
        raise ValueError(f"{spell(values)} came; allowed are step counts from 2, or 0 alone to leave the solvers out")
    return values


def _rising(values: tuple[int, int]) -> tuple[int, int]:
    if values[0] > values[1]:
        raise ValueError(f"{spell(values)} came; allowed is the lower timestep first; write {values[1]} {values[0]}")
    return values


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", value):
        raise ValueError(f"{value!r} came; allowed: auto, cpu, cuda, cuda:N, mps, xpu; for example --device auto")
    return value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("an empty text came; allowed is any other text; leave the setting out to get its default")
    return value


def _path(value: str) -> str:
    if "\0" in value:
        raise ValueError(f"{value!r} came; allowed is a path without NUL characters; leave them out")
    return _not_blank(value)


def _folder_name(value: str) -> str:
    """The name of one folder, on every system: nothing that leads elsewhere, and nothing that one of them reserves."""
    wrong = (
        re.search(r'[/\\\x00-\x1f\x7f<>:"|?*]', value)
        or value[-1] in ". "
        or value[0] == " "
        or re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", value)
        or len(value.encode("utf-8", "replace")) > LONGEST_NAME
    )
    if wrong:
        raise ValueError(
            f"{value[:60]!r} came; allowed is the name of one folder, of at most {LONGEST_NAME} bytes, without "
            '/ \\ : * ? " < > | or control characters, that no system reserves; give its parent as --output_dir'
        )
    return value


Text = Annotated[str, AfterValidator(_not_blank)]
FolderName = Annotated[str, AfterValidator(_path), AfterValidator(_folder_name)]
Folder = Annotated[Path, BeforeValidator(lambda value: _path(value) if isinstance(value, str) else value),
                   AfterValidator(at_home)]  # fmt: skip
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Guidance = Annotated[float, Field(ge=0, le=100)]
Side = Annotated[int, Field(ge=8, le=8192, multiple_of=8)]
Share = Annotated[float, Field(ge=0, le=1)]
StudentSteps = Annotated[int, Field(ge=1, le=MOST_STUDENT_STEPS)]
TeacherSteps = Annotated[int, Field(ge=1, le=1000)]
StepCounts = Annotated[
    tuple[StudentSteps, ...], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_distinct)
]
Span = Annotated[float, Field(gt=0, le=1)]
Timestep = Annotated[int, Field(ge=0, le=999)]
Interval = Annotated[tuple[Timestep, Timestep], BeforeValidator(_as_list), AfterValidator(_rising)]
Counts = Annotated[tuple[Count, ...], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_distinct)]
SolverSteps = Annotated[
    tuple[Annotated[int, Field(ge=0, le=MOST_STUDENT_STEPS)], ...],
    BeforeValidator(_as_list),
    Field(min_length=1),
    AfterValidator(_distinct),
    AfterValidator(_solvable),
]
Names = Annotated[tuple[Text, ...], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_distinct)]
FastOption = Annotated[str, AfterValidator(_fast_option)]
FastOptions = Annotated[
    tuple[FastOption, ...], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_distinct)
]
Folders = Annotated[tuple[Folder, ...], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_distinct)]
Device = Annotated[str, AfterValidator(_device)]

CLIP_MODEL = Field(
    "openai/clip-vit-base-patch32",
    description="CLIP model of the alignment metric. Left as it is: the base's own, where it brings one; none leaves "
    "alignment out.",
)

# Of whatever reads pictures with captions.
IMAGE_COLUMN = Field(
    None, description="Column of the pictures. Unset: of a dataset found by its type, of metadata.jsonl file_name."
)
CAPTION_COLUMN = Field(None, description="Column of the captions, or key of shards' .json. Unset: found by its name.")
MAX_DROPPED = Field(
    0.01, description="Share of unusable pictures, or captions, above which the data is refused, at once or later."
)
