"""The benchmark: teacher, student and the base without adapter, drawn from the same noise, judged and timed.

Every figure has a control beside it: alignment its shuffled-caption floor, the student the same sampler without the
adapter, Fréchet distance real pictures against real ones.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.arms import Arm, base_arm, check_arms, control_of, solver_arm, student_arm, teacher_arm
from fewstep.backbone import Backbone, adapters_off
from fewstep.config import BenchSettings, settings_toml
from fewstep.errors import InputError
from fewstep.files import replace_folder_atomic, write_text_atomic
from fewstep.metrics.alignment import CLIPAlignment, alignment_and_floor
from fewstep.metrics.frechet import frechet_distance, half_sample_distances, half_samples, with_spread
from fewstep.metrics.intervals import bootstrap, paired_difference, share
from fewstep.metrics.retention import corrected_retention, retention
from fewstep.metrics.saturation import latent_moments, saturation
from fewstep.opening import open_base, read_prompts, versions, warn_of_prompts
from fewstep.pictures import (
    Conditioning,
    Evaluation,
    Judge,
    PictureBatch,
    answer_judge,
    as_bytes,
    draw_latents,
    encode_prompts,
    evaluate,
)
from fewstep.records import (
    SCHEMA_VERSION,
    ArmSummary,
    ArmTiming,
    BenchmarkRecord,
    FloorRecord,
    Frechet,
    Interval,
    PictureScore,
    Row,
    Spread,
)
from fewstep.report import (
    RESULT_FILES,
    arm_folder,
    markdown,
    page,
    picture_path,
    results_csv,
    save_grids,
    save_picture,
    timing_csv,
    verdict,
)
from fewstep.reporting import SILENT, Bar, Reporter
from fewstep.timing import Timing, machine, measure

REFERENCES = 5
"""Reference pictures a prompt, where none are asked for and the base draws its own."""

NO_ALIGNMENT = "none"
"""What `--clip_model_id` says where alignment is to be left out."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """What was found, and where it lies."""

    outdir: Path
    record: BenchmarkRecord
    rows: tuple[Row, ...]
    folders: Mapping[str, Path]

    @property
    def arms(self) -> tuple[ArmSummary, ...]:
        return tuple(self.record.summary.values())

    @property
    def verdict(self) -> list[str]:
        """The findings in sentences."""
        return verdict(self.record)


def benchmark(
    settings: BenchSettings,
    *,
    reporter: Reporter = SILENT,
    backbone: Backbone | None = None,
    arms: Sequence[Arm] | None = None,
    timing_batch_sizes: Sequence[int] | None = None,
) -> BenchmarkResult:
    """Draw, judge, time, and write the files of contracts.md to ``settings.outdir``.

    Args:
        settings: what to compare.
        reporter: told what happens.
        backbone: a base that is loaded already; with an adapter attached, that is the student.
        arms: other arms than the settings describe.
        timing_batch_sizes: pictures a timed batch; by default 1 and ``settings.batch_size``.

    Raises:
        InputError: prompts, arms or a base that cannot be used; no adapter to measure.
        CheckpointError: an adapter that attaches nothing or changes nothing; CLIP weights that are not at hand.
    """
    reporter = _Listening(reporter)
    prompts = read_prompts(settings)
    wants_adapter = arms is None or any(arm.adapter for arm in arms)
    opened = open_base(
        settings, backbone=backbone, with_adapter=wants_adapter, step_counts=settings.steps, reporter=reporter
    )
    backbone = opened.backbone
    if prompts is None:
        prompts = _own_prompts(settings, backbone)
    settings = _resolved(settings, backbone)
    arms = tuple(arms or _arms(settings, backbone))
    check_arms(arms, settings.negative_prompt)
    warn_of_prompts(prompts, backbone, reporter)
    alignment = _alignment(settings, backbone, reporter)
    if settings.timing_repeats < 5:
        reporter.warn(f"timing_repeats {settings.timing_repeats} came; below 5, medians and spreads mean little")

    # From here on things are written.
    outdir = settings.outdir
    _clear_tables(outdir, reporter)
    reporter.say(settings_toml(settings).strip())
    write_text_atomic(outdir / "settings.toml", settings_toml(settings))

    conditioning = encode_prompts(backbone, prompts, settings.negative_prompt)
    judges = _judges(backbone, conditioning, alignment, with_features=bool(settings.frechet_images))
    evaluations: dict[str, Evaluation] = {}
    timings: dict[str, tuple[ArmTiming, ...]] = {}
    folders: dict[str, Path] = {}
    sizes = sorted(set(timing_batch_sizes or (1, settings.batch_size)))
    for arm in arms:
        apart = settings.baseline_outdir if arm.is_baseline else None
        folders[arm.id] = arm_folder(apart or outdir, arm.id)
        with _adapters_of(arm, backbone):
            evaluations[arm.id] = _draw(backbone, arm, conditioning, settings, judges, folders[arm.id], reporter)
            with reporter.progress(f"timing {arm.id}", len(sizes)) as bar:
                timings[arm.id] = tuple(_time(backbone, arm, prompts, size, settings, bar) for size in sizes)

    references = _references(settings, backbone, prompts, reporter)
    record, rows = _record(
        settings,
        backbone,
        opened.adapter,
        alignment,
        prompts,
        arms,
        evaluations,
        timings,
        references,
        reporter.warnings,
    )
    with _replacing(outdir / "grids") as grids, reporter.progress("grids", len(prompts)) as bar:
        save_grids(grids, folders, prompts, settings.num_images, bar.advance)
    texts = (
        results_csv(rows),
        timing_csv(record.summary.values(), record.machine),
        record.to_json(),
        page(record, folders),
    )
    for name, text in zip(RESULT_FILES, texts, strict=True):
        write_text_atomic(outdir / name, text)
    for line in [markdown(list(record.summary.values())), *verdict(record)]:
        reporter.say(line)
    reporter.say(f"pictures and grids in {outdir}; the report is {outdir / 'report.html'}")
    return BenchmarkResult(outdir=outdir, record=record, rows=tuple(rows), folders=folders)


# -------------------------------------------------------------------------------------------------- before the drawing


class _Listening:
    """A reporter that keeps the warnings, so that the report repeats them."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self.warnings: list[str] = []

    def say(self, text: str) -> None:
        self._reporter.say(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self._reporter.warn(text)

    def progress(self, name: str, total: int) -> AbstractContextManager[Bar]:
        return self._reporter.progress(name, total)


def _own_prompts(settings: BenchSettings, backbone: Backbone) -> list[str]:
    if backbone.abilities is None:
        raise InputError(
            f"no prompt came and the base {backbone.name} brings none; allowed is --prompt TEXT or --prompts_file FILE "
            "with a prompt a line; add one of the two"
        )
    return backbone.abilities.prompts(settings.num_prompts, settings.seed)


def _resolved(settings: BenchSettings, backbone: Backbone) -> BenchSettings:
    """What was left open is the base's; what comes out can be passed back to --config."""
    own_pictures = 0 if backbone.abilities is None else REFERENCES
    return settings.replace(
        base_model=backbone.name,
        resolution=settings.resolution or backbone.resolution,
        frechet_images=own_pictures if settings.frechet_images is None else settings.frechet_images,
        baseline_guidance=backbone.guidance_scale if settings.baseline_guidance is None else settings.baseline_guidance,
    )


def _arms(settings: BenchSettings, backbone: Backbone) -> list[Arm]:
    count = backbone.schedule.num_train_timesteps
    students = [student_arm(steps, settings.flash_guidance, count) for steps in settings.steps]
    if not settings.compare_baseline:
        return students
    guidance = backbone.guidance_scale if settings.baseline_guidance is None else settings.baseline_guidance
    controls = [base_arm(steps, settings.flash_guidance, count) for steps in settings.steps]
    alpha_bar = backbone.schedule.alphas_cumprod.tolist()
    solvers = [
        solver_arm(steps, guidance, alpha_bar, karras=karras)
        for karras in (False, True)
        for steps in settings.solver_steps
        if steps
    ]
    return [teacher_arm(settings.baseline_steps, guidance, count), *solvers, *students, *controls]


def _alignment(settings: BenchSettings, backbone: Backbone, reporter: Reporter) -> CLIPAlignment | None:
    """The alignment model: the base's own, unless another one was asked for; None where it is to be left out."""
    asked = settings.clip_model_id
    if asked == NO_ALIGNMENT:
        reporter.say("alignment is left out, as asked")
        return None
    own = backbone.abilities is not None and asked == BenchSettings.model_fields["clip_model_id"].default
    model = backbone.abilities.alignment_model() if own and backbone.abilities else asked
    return CLIPAlignment(model, device=backbone.device, allow_pickle=settings.allow_pickle)


def _clear_tables(outdir: Path, reporter: Reporter) -> None:
    """Take an earlier run's tables away: beside this run's pictures they would be wrong."""
    stale = [outdir / name for name in RESULT_FILES if (outdir / name).exists()]
    if stale:
        reporter.warn(f"{outdir} holds an earlier benchmark: its tables and pictures are replaced")
    for path in stale:
        path.unlink()


# ------------------------------------------------------------------------------------------------ drawing and judging


@contextmanager
def _adapters_of(arm: Arm, backbone: Backbone) -> Iterator[None]:
    """Adapters off for a whole arm, so that switching costs its forwards no time."""
    with nullcontext() if arm.adapter else adapters_off(backbone.unet):
        yield


@contextmanager
def _replacing(final: Path) -> Iterator[Path]:
    """A folder to fill; it takes the place of ``final`` once it is whole, and is gone if it never is."""
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        replace_folder_atomic(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _judges(
    backbone: Backbone, conditioning: Conditioning, alignment: CLIPAlignment | None, *, with_features: bool
) -> dict[str, Judge]:
    judges: dict[str, Judge] = {"latents": lambda batch: latent_moments(batch.latents)}
    if alignment is not None:
        prompts = conditioning.prompts
        texts, clip = alignment.texts(prompts), alignment

        def aligned(batch: PictureBatch) -> dict[str, Tensor]:
            return alignment_and_floor(clip.images(batch.pixels), texts, [prompt for prompt, _ in batch.ids], prompts)

        judges["alignment"] = aligned
    if backbone.abilities is not None:
        judges["answers"] = answer_judge(backbone.abilities)
        if with_features:
            network = backbone.abilities.features()
            judges["features"] = lambda batch: {"all": _features(network, batch.unit_pixels)}
    return judges


@torch.no_grad()
def _features(network: nn.Module, pixels: Tensor) -> Tensor:
    """Features [B, D] on the CPU of pixels [B, 3, H, W] in 0 ... 1, wherever the network is."""
    place = next(network.parameters(), pixels).device
    found: Tensor = network(pixels.to(place))
    return found.cpu()


def _draw(
    backbone: Backbone,
    arm: Arm,
    conditioning: Conditioning,
    settings: BenchSettings,
    judges: Mapping[str, Judge],
    folder: Path,
    reporter: Reporter,
) -> Evaluation:
    """All pictures of an arm, saved and judged; its folder appears when the last one is there."""
    with _replacing(folder) as partial:

        def save(batch: PictureBatch) -> None:
            for (prompt, picture), pixels in zip(batch.ids, batch.pixels, strict=True):
                save_picture(picture_path(partial, prompt, picture), pixels.permute(1, 2, 0).numpy())

        return evaluate(
            backbone,
            conditioning,
            arm,
            seed=settings.seed,
            pictures_per_prompt=settings.num_images,
            batch_size=settings.batch_size,
            resolution=settings.resolution,
            judges=judges,
            on_batch=save,
            reporter=reporter,
        )


@torch.no_grad()
def _time(
    backbone: Backbone, arm: Arm, prompts: Sequence[str], batch_size: int, settings: BenchSettings, bar: Bar
) -> ArmTiming:
    """What a batch of ``batch_size`` pictures costs, end to end and part by part."""
    texts = [prompts[number % len(prompts)] for number in range(batch_size)]
    ids = [(number, 0) for number in range(batch_size)]
    negative = backbone.embed([settings.negative_prompt or ""])
    resolution = settings.resolution or backbone.resolution

    def encode() -> Conditioning:
        uncond = backbone.embed([settings.negative_prompt or ""]) if arm.guided else negative
        return Conditioning(tuple(texts), backbone.embed(texts), uncond)

    def draw() -> Tensor:
        latents = draw_latents(backbone, arm, encode(), ids, seed=settings.seed, resolution=resolution)
        return as_bytes(backbone.decode(latents))

    # One forward as the sampler makes it: twice the batch under guidance.
    rows = batch_size * (2 if arm.guided else 1)
    latents = torch.zeros(rows, *backbone.latent_shape(resolution), device=backbone.device)
    cond = encode().cond[:1].expand(rows, -1, -1).contiguous()
    t = torch.full((rows,), arm.timesteps[0], device=backbone.device)
    denoise = backbone.denoiser(adapter=arm.adapter)

    def spread(timing: Timing) -> Spread:
        return Spread(median=timing.median, iqr=timing.iqr, repeats=len(timing.seconds))

    repeats, device = settings.timing_repeats, backbone.device
    found = ArmTiming(
        batch_size=batch_size,
        end_to_end=spread(measure(draw, repeats=repeats, device=device)),
        text=spread(measure(encode, repeats=repeats, device=device)),
        unet_forward=spread(measure(lambda: denoise(latents, t, cond), repeats=repeats, device=device)),
        unet_calls=arm.steps,
        decode=spread(measure(lambda: as_bytes(backbone.decode(latents[:batch_size])), repeats=repeats, device=device)),
    )
    bar.advance()
    return found


# ----------------------------------------------------------------------------------------------------- Fréchet distance


@dataclass(frozen=True)
class _References:
    """Features of reference pictures and the prompt of each; ``again`` is a second set, as large as an arm's."""

    through_vae: Tensor
    raw: Tensor
    again: Tensor
    prompts: list[int]
    halves: list[frozenset[int]]


def _references(
    settings: BenchSettings, backbone: Backbone, prompts: Sequence[str], reporter: Reporter
) -> _References | None:
    """Reference pictures of the same captions, in features; None where it was not asked for or cannot be had."""
    per_prompt, abilities = settings.frechet_images or 0, backbone.abilities
    if per_prompt == 0:
        return None
    if abilities is None:
        reporter.warn(f"no Fréchet distance: the base {backbone.name} brings no features and no pictures")
        return None
    if min(per_prompt, settings.num_images) * len(prompts) < 2:
        reporter.warn("no Fréchet distance: it takes at least two pictures")
        return None
    network = abilities.features()
    first = abilities.reference_pictures(list(prompts), per_prompt, settings.seed)
    # Other drawings of the same captions: what the distance is when nothing is wrong.
    second = abilities.reference_pictures(list(prompts), settings.num_images, settings.seed + 1)
    numbers = [prompt for prompt in range(len(prompts)) for _ in range(per_prompt)]
    with reporter.progress("reference pictures", 2 * len(first) + len(second)) as bar:

        def extract(pictures: np.ndarray[Any, Any], *, vae: bool) -> Tensor:
            parts = []
            for start in range(0, len(pictures), settings.batch_size):
                some = torch.from_numpy(np.ascontiguousarray(pictures[start : start + settings.batch_size]))
                pixels = some.permute(0, 3, 1, 2).float() / 255
                if vae:
                    latents = backbone.encode((2 * pixels - 1).to(backbone.device))
                    pixels = as_bytes(backbone.decode(latents)).float() / 255
                parts.append(_features(network, pixels))
                bar.advance(len(some))
            return torch.cat(parts)

        return _References(
            through_vae=extract(first, vae=True),
            raw=extract(first, vae=False),
            again=extract(second, vae=True),
            prompts=numbers,
            halves=half_samples(numbers),
        )


@dataclass(frozen=True)
class _Distance:
    """An arm's Fréchet distances, with those of its half-samples."""

    through_vae: float
    raw: float
    halves_vae: list[float] = field(default_factory=list)
    halves_raw: list[float] = field(default_factory=list)


def _distance(features: Tensor, prompts: Sequence[int], references: _References) -> _Distance:
    return _Distance(
        frechet_distance(features, references.through_vae),
        frechet_distance(features, references.raw),
        half_sample_distances(features, prompts, references.through_vae, references.prompts, references.halves),
        half_sample_distances(features, prompts, references.raw, references.prompts, references.halves),
    )


def _frechet(features: Tensor, own: _Distance, baseline: _Distance | None, references: _References) -> Frechet:
    difference = None
    if baseline is not None:
        halves = [mine - theirs for mine, theirs in zip(own.halves_vae, baseline.halves_vae, strict=True)]
        difference = with_spread(own.through_vae - baseline.through_vae, halves)
    return Frechet(
        through_vae=with_spread(own.through_vae, own.halves_vae),
        raw=with_spread(own.raw, own.halves_raw),
        difference=difference,
        pictures=len(features),
        references=len(references.through_vae),
        dimensions=features.shape[1],
    )


# ----------------------------------------------------------------------------------------------------------- summing up


def _record(
    settings: BenchSettings,
    backbone: Backbone,
    adapter: Mapping[str, str] | None,
    alignment: CLIPAlignment | None,
    prompts: Sequence[str],
    arms: Sequence[Arm],
    evaluations: Mapping[str, Evaluation],
    timings: Mapping[str, tuple[ArmTiming, ...]],
    references: _References | None,
    warnings: Sequence[str],
) -> tuple[BenchmarkRecord, list[Row]]:
    baseline = next((arm for arm in arms if arm.is_baseline), None)
    distances: dict[str, _Distance] = {}
    again = None
    if references is not None:
        for arm in arms:
            found = evaluations[arm.id]
            distances[arm.id] = _distance(found.found["features"]["all"], found.prompt_numbers, references)
        again = frechet_distance(references.again, references.through_vae)

    summary: dict[str, ArmSummary] = {}
    rows: list[Row] = []
    for arm in arms:
        control = control_of(arm, arms)
        found = evaluations[arm.id]
        against = evaluations[baseline.id] if baseline else None
        time = timings[arm.id][0].time_per_image
        speedup = timings[baseline.id][0].time_per_image / time if baseline else None
        frechet = None
        if references is not None:
            theirs = distances[baseline.id] if baseline else None
            frechet = _frechet(found.found["features"]["all"], distances[arm.id], theirs, references)
        summary[arm.id] = ArmSummary(
            arm=arm,
            prompts=len(prompts),
            pictures=len(found.ids),
            time_per_image_s=time,
            speedup_vs_baseline=speedup,
            timings=timings[arm.id],
            frechet=frechet,
            saturation=saturation(found.found["latents"], against.found["latents"]) if against else None,
            control=control.id if control else None,
            **_alignment_figures(found, against, evaluations[control.id] if control else None),
            **_answer_figures(found, against, evaluations[control.id] if control else None),
        )
        rows += _rows(found, against, prompts, time, speedup)

    floors = {name: arm.floor for name, arm in summary.items() if arm.floor is not None}
    floor = None
    if floors:
        name = baseline.id if baseline else next(iter(floors))
        floor = FloorRecord(value=floors[name], arm=name, by_arm=floors)
    record = BenchmarkRecord(
        schema_version=SCHEMA_VERSION,
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        settings=settings.model_dump(mode="json", exclude_none=True),
        versions=versions(),
        machine=machine(backbone.device, str(backbone.dtype).removeprefix("torch.")),
        base={"name": backbone.name, "why": backbone.why, "fingerprint": backbone.fingerprint},
        adapter=dict(adapter) if adapter else None,
        alignment_model=alignment.name if alignment else None,
        prompts=tuple(prompts),
        floor=floor,
        reference_frechet=again,
        warnings=tuple(warnings),
        summary=summary,
        scores=tuple(score for arm in arms for score in _scores(evaluations[arm.id])),
    )
    return record, rows


def _alignment_figures(found: Evaluation, baseline: Evaluation | None, control: Evaluation | None) -> dict[str, Any]:
    own = found.found.get("alignment")
    if own is None:
        return {}
    score, floor, prompts = own["score"], own.get("floor"), found.prompt_numbers
    figures: dict[str, Any] = {
        "alignment": bootstrap(score, prompts),
        "alignment_std": score.double().std().item() if len(score) > 1 else None,
        "floor": None if floor is None else floor.double().mean().item(),
    }
    if baseline is not None:
        theirs = baseline.found["alignment"]
        figures["delta_alignment"] = paired_difference(score, theirs["score"], prompts)
        figures["retention_raw"] = retention(score, theirs["score"], prompts)
        if floor is not None:
            figures["retention_corrected"] = corrected_retention(
                score, floor, theirs["score"], theirs["floor"], prompts
            )
    if control is not None:
        figures["gain_alignment"] = paired_difference(score, control.found["alignment"]["score"], prompts)
    return figures


def _answer_figures(found: Evaluation, baseline: Evaluation | None, control: Evaluation | None) -> dict[str, Any]:
    answers = found.answers
    if answers is None:
        return {}
    prompts = found.prompt_numbers

    def against(other: Evaluation | None) -> Interval | None:
        if other is None or other.answers is None:
            return None
        return paired_difference(answers["all_right"], other.answers["all_right"], prompts)

    return {
        "all_right": share(answers["all_right"], prompts),
        "delta_all_right": against(baseline),
        "gain_all_right": against(control),
        "attributes": {name: share(right, prompts) for name, right in answers.items() if name != "all_right"},
    }


def _rows(
    found: Evaluation, baseline: Evaluation | None, prompts: Sequence[str], time: float, speedup: float | None
) -> list[Row]:
    rows = []
    numbers = torch.tensor(found.prompt_numbers)
    for number, prompt in enumerate(prompts):
        own = numbers == number

        def mean(values: Tensor | None, own: Tensor = own) -> float | None:
            return None if values is None else values[own].double().mean().item()

        score = found.found.get("alignment", {}).get("score")
        right = found.answers or {}
        average, share_right = mean(score), mean(right.get("all_right"))
        theirs = None if baseline is None else mean(baseline.found.get("alignment", {}).get("score"))
        theirs_right = None if baseline is None else mean((baseline.answers or {}).get("all_right"))
        pictures = int(own.sum())
        rows.append(
            Row(
                arm=found.arm.id,
                steps=found.arm.steps,
                is_baseline=found.arm.is_baseline,
                prompt_idx=number,
                avg_clip_align_x100=average,
                std_clip_align_x100=None if score is None or pictures < 2 else score[own].double().std().item(),
                time_total_s=sum(
                    one for one, (owner, _) in zip(found.seconds, found.ids, strict=True) if owner == number
                ),
                time_per_image_s=time,
                speedup_vs_baseline=speedup,
                delta_clip_vs_baseline=_minus(average, theirs),
                num_images=pictures,
                guidance=found.arm.guidance,
                sampler=found.arm.sampler,
                adapter=found.arm.adapter,
                clip_floor_x100=mean(found.found.get("alignment", {}).get("floor")),
                all_right_share=share_right,
                delta_all_right_vs_baseline=_minus(share_right, theirs_right),
                prompt=prompt,
                attributes={
                    name: values[own].double().mean().item() for name, values in right.items() if name != "all_right"
                },
            )
        )
    return rows


def _minus(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _scores(found: Evaluation) -> list[PictureScore]:
    alignment, answers = found.found.get("alignment", {}), found.answers

    def at(values: Tensor | None, position: int) -> float | None:
        return None if values is None else values[position].item()

    return [
        PictureScore(
            arm=found.arm.id,
            prompt_idx=prompt,
            picture_idx=picture,
            clip_align_x100=at(alignment.get("score"), position),
            clip_floor_x100=at(alignment.get("floor"), position),
            right=None if answers is None else {name: bool(values[position]) for name, values in answers.items()},
        )
        for position, (prompt, picture) in enumerate(found.ids)
    ]
