"""The shapes of what a benchmark finds: plain frozen data, the same in Python, in JSON and in the report.

Nothing here computes or imports torch. `clipscore_results.json` is a `BenchmarkRecord` written out; reading it back
gives an equal object, so that a report can be drawn again from the file alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fewstep.arms import Arm
from fewstep.errors import InputError

SCHEMA_VERSION = 4
"""Of `clipscore_results.json`; goes up whenever a reader of the old shape would misread the new one."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure with its 95 % interval; ``low`` and ``high`` are None where the data allow none (one prompt alone)."""

    value: float
    low: float | None = None
    high: float | None = None
    standard_error: float | None = None
    method: str = "none"

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval exists and lies on one side of zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True, kw_only=True)
class Frechet:
    """Fréchet distance of an arm's pictures to reference pictures of the same captions, and what it rests on.

    ``through_vae``: the references encoded and decoded first, so that the VAE's own loss is not held against an arm.
    ``raw``: the references as they are. ``difference``: through_vae minus the baseline's, on the same halves.
    ``dimensions``: of the feature space; with ``pictures`` near it or below, the distance is badly biased.
    """

    through_vae: Interval
    raw: Interval
    difference: Interval | None
    pictures: int
    references: int
    dimensions: int


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and interquartile range of repeated timings, in seconds."""

    median: float
    iqr: float
    repeats: int


@dataclass(frozen=True, kw_only=True)
class ArmTiming:
    """What one batch costs an arm, in seconds; every figure was warmed up at this very shape.

    ``end_to_end``: from the prompts' text to finished pictures in main memory.
    ``unet_forward``: one forward of the network at this arm's shape (2 x batch under guidance), of ``unet_calls``.
    ``flops``: operations of the batch, counted; ``decode_flops``: of these the decoder's.
    ``peak_memory_bytes``: allocated on a GPU, resident on a CPU.
    ``precision``: of the networks. ``matrix_rate``: operations a second of a large matrix product in it, on this
    machine.
    """

    batch_size: int
    end_to_end: Spread
    text: Spread
    unet_forward: Spread
    unet_calls: int
    decode: Spread
    flops: int
    decode_flops: int
    peak_memory_bytes: int | None
    precision: str
    matrix_rate: float

    @property
    def time_per_image(self) -> float:
        return self.end_to_end.median / self.batch_size

    @property
    def floor(self) -> float:
        """Seconds that the batch's operations take where all of them run as fast as a large matrix product."""
        return self.flops / self.matrix_rate

    @property
    def share_of_floor(self) -> float:
        """The floor over the time taken: 1 where nothing is lost."""
        return self.floor / self.end_to_end.median

    @property
    def decode_share(self) -> float:
        """The decoder's share of the time."""
        return self.decode.median / self.end_to_end.median

    @property
    def decode_share_of_flops(self) -> float:
        """The decoder's share of the operations."""
        return self.decode_flops / self.flops

    @property
    def unet_total(self) -> float:
        """Seconds that all forwards of one batch take together: the median forward times their number."""
        return self.unet_forward.median * self.unet_calls


@dataclass(frozen=True, kw_only=True)
class PictureScore:
    """What was found about one picture; None where the metric does not exist on this base or was turned off."""

    arm: str
    prompt_idx: int
    picture_idx: int
    clip_align_x100: float | None
    clip_floor_x100: float | None
    preference: float | None
    right: dict[str, bool] | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of results.csv: an arm on a prompt. The first ten fields are contract, name and order alike.

    ``attributes``: share of pictures with each attribute right, where there is an answer key; a column each.
    """

    arm: str
    steps: int
    is_baseline: bool
    prompt_idx: int
    avg_clip_align_x100: float | None
    std_clip_align_x100: float | None
    time_total_s: float | None
    time_per_image_s: float | None
    speedup_vs_baseline: float | None
    delta_clip_vs_baseline: float | None
    num_images: int
    guidance: float
    sampler: str
    adapter: bool
    clip_floor_x100: float | None
    all_right_share: float | None
    delta_all_right_vs_baseline: float | None
    avg_preference: float | None
    delta_preference_vs_baseline: float | None
    option: str | None
    speedup_vs_plain: float | None
    delta_clip_vs_plain: float | None
    delta_all_right_vs_plain: float | None
    prompt: str
    attributes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """One arm over all prompts. Differences are paired: same prompt, same initial noise; real pictures have no noise.

    ``time_per_image_s``: None for real pictures, which nothing drew.
    ``floor``: alignment of the arm's own pictures with everyone else's captions.
    ``retention_raw``: score over the baseline's. ``retention_corrected``: the same with each one's floor taken off;
    without it there is no raw one either.
    ``gain_*``: over the control, which is the base without adapter at the same steps, sampler and guidance.
    ``over_solvers``: a student's paired difference to each arm of the teacher by a better solver, in the share with
    everything right, else in alignment.
    ``change_*`` and ``speedup_vs_plain``: of an arm with an option, over the same arm without, which ``plain`` names.
    ``distances``: "kid", "cmmd", "precision" and "recall" against pictures of the same captions, and these and
    "frechet", each with "_teacher" behind, against the teacher's; what was not measured is absent. Those of the real
    pictures, like their ``frechet``, are real against other real ones: what the figures are when nothing is wrong.
    ``diversity``: mean feature distance among the pictures of a prompt, over the teacher's. ``faithfulness``: mean
    feature distance to the teacher's picture from the same noise.
    ``saturation``: per-channel latent std over the baseline's; ``mean_saturation``: its mean over channels.
    """

    arm: Arm
    prompts: int
    pictures: int
    time_per_image_s: float | None
    speedup_vs_baseline: float | None
    timings: tuple[ArmTiming, ...]
    alignment: Interval | None = None
    alignment_std: float | None = None
    floor: Interval | None = None
    delta_alignment: Interval | None = None
    gain_alignment: Interval | None = None
    retention_raw: Interval | None = None
    retention_corrected: Interval | None = None
    preference: Interval | None = None
    delta_preference: Interval | None = None
    all_right: Interval | None = None
    delta_all_right: Interval | None = None
    gain_all_right: Interval | None = None
    attributes: dict[str, Interval] = field(default_factory=dict)
    delta_attributes: dict[str, Interval] = field(default_factory=dict)
    frechet: Frechet | None = None
    distances: dict[str, Interval] = field(default_factory=dict)
    diversity: Interval | None = None
    faithfulness: Interval | None = None
    saturation: tuple[float, ...] | None = None
    mean_saturation: Interval | None = None
    control: str | None = None
    over_solvers: dict[str, Interval] = field(default_factory=dict)
    plain: str | None = None
    change_alignment: Interval | None = None
    change_all_right: Interval | None = None
    speedup_vs_plain: float | None = None


@dataclass(frozen=True, kw_only=True)
class FloorRecord:
    """Alignment with shuffled captions: the baseline's (the first arm's, without one), and every arm's."""

    value: float
    arm: str
    by_arm: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A benchmark among several in one record: what its arms were compared with, and how they were drawn and timed.

    ``arms``: by their ids in the record, with the figures that this run found itself, also of an arm that the record
    shows once for several runs. Their differences, speed-ups and Fréchet differences are to this run's ``baseline``.
    """

    settings: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, str]
    base: dict[str, str]
    adapter: dict[str, str] | None
    arms: dict[str, ArmSummary]

    @property
    def batch_size(self) -> int | None:
        """The smallest that was timed; None where nothing was."""
        return next((arm.timings[0].batch_size for arm in self.arms.values() if arm.timings), None)

    @property
    def baseline(self) -> ArmSummary | None:
        return _baseline(self.arms)


def _baseline(arms: dict[str, ArmSummary]) -> ArmSummary | None:
    return next((arm for arm in arms.values() if arm.arm.is_baseline), None)


@dataclass(frozen=True, kw_only=True)
class BenchmarkRecord:
    """Everything a benchmark found: the whole of `clipscore_results.json`.

    ``runs``: by name, the benchmarks whose arms are set side by side here; empty in the record of one.
    """

    schema_version: int
    created: str
    settings: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, str]
    base: dict[str, str]
    adapter: dict[str, str] | None
    adapters: dict[str, dict[str, str]]
    alignment_model: str | None
    preference_model: str | None
    prompts: tuple[str, ...]
    floor: FloorRecord | None
    feature_extractor: str | None
    warnings: tuple[str, ...]
    summary: dict[str, ArmSummary]
    scores: tuple[PictureScore, ...]
    runs: dict[str, Run] = field(default_factory=dict)

    @property
    def baseline(self) -> ArmSummary | None:
        return _baseline(self.summary)

    @property
    def real(self) -> ArmSummary | None:
        """The real pictures, where there were any."""
        return next((arm for arm in self.summary.values() if not arm.arm.is_drawn), None)

    def run_of(self, arm: str) -> Run:
        """The benchmark that an arm, by its id, comes from; the first one where several drew it alike."""
        whole = Run(
            settings=self.settings,
            versions=self.versions,
            machine=self.machine,
            base=self.base,
            adapter=self.adapter,
            arms=self.summary,
        )
        return next((run for run in self.runs.values() if arm in run.arms), whole)

    def to_json(self) -> str:
        found = asdict(self)
        if not self.runs:
            del found["runs"]
        return json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> BenchmarkRecord:
        """Read `to_json`'s text back; an `InputError` where it is not that."""
        try:
            record = TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the top"
            raise InputError(
                f"this is no benchmark record of schema {SCHEMA_VERSION}: {first['msg']} at {where}; "
                "allowed is a clipscore_results.json of fewstep bench"
            ) from None
        if record.schema_version != SCHEMA_VERSION:
            raise InputError(
                f"schema_version {record.schema_version} came; allowed is {SCHEMA_VERSION}; run the benchmark again"
            )
        return record
