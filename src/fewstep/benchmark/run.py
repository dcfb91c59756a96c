"""The benchmark from the first line to the last: plan, draw, judge, time, compare, write."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState

from fewstep.arms import Arm
from fewstep.backbone import Backbone
from fewstep.benchmark.cells import ArmCells, Cells, make_room, mixed
from fewstep.benchmark.cost import Operations, runs_of, time_arm
from fewstep.benchmark.distribution import measure_distributions
from fewstep.benchmark.drawing import draw, judges_of, replacing
from fewstep.benchmark.plan import Plan, make_plan
from fewstep.benchmark.summary import sum_up
from fewstep.config import BenchSettings, settings_toml, spell
from fewstep.errors import Interrupted, StopAsked
from fewstep.files import write_text_atomic
from fewstep.hiding import without_secrets
from fewstep.locks import alone_in
from fewstep.opening import versions
from fewstep.pictures import Evaluation, encode_prompts
from fewstep.processes import join_processes, noticing_losses, own_device
from fewstep.records import ArmSummary, ArmTiming, BenchmarkRecord, Row
from fewstep.report import (
    CELLS,
    RECORD_FILE,
    RESULT_FILES,
    arm_folder,
    markdown,
    page,
    results_csv,
    save_grids,
    timing_csv,
    verdict,
)
from fewstep.reporting import LOG, SILENT, Bar, Reporter
from fewstep.timing import machine


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """What was found, and where it lies; of several processes the first alone has the rows."""

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


@noticing_losses("go on with --resume")
def benchmark(
    settings: BenchSettings,
    *,
    reporter: Reporter = LOG,
    backbone: Backbone | None = None,
    arms: Sequence[Arm] | None = None,
) -> BenchmarkResult:
    """Draw, judge, time, and write the files of contracts.md to ``settings.outdir``.

    Args:
        settings: what to compare.
        reporter: told what happens.
        backbone: a base that is loaded already; with an adapter attached, that is the student.
        arms: other arms than the settings describe.

    Raises:
        InputError: prompts, arms or a base that cannot be used; no adapter to measure; somebody else writes there.
        CheckpointError: an adapter that attaches nothing or changes nothing; CLIP weights that are not at hand.
        Interrupted: stopped on request (`StopAsked` from the reporter), or another process of the run has died; what
            was drawn is kept.
    """
    processes = join_processes(settings.device)
    main = processes.is_main_process
    listening = _Listening(reporter if main else SILENT)
    device = own_device(settings.device, processes)
    plan = make_plan(settings, device=device, backbone=backbone, arms=arms, reporter=listening)
    outdir = plan.settings.outdir

    # From here on things are written.
    with ExitStack() as locks:
        for folder in sorted({outdir.resolve(), (plan.settings.baseline_outdir or outdir).resolve()}) if main else ():
            locks.enter_context(alone_in(folder))
        kept = _make_room(plan, processes, listening)
        rows: list[Row] = []
        try:
            # All processes draw, batch by batch; the first one does the rest alone, when nothing else runs any more.
            evaluations = _draw(plan, kept, processes, listening)
            if main:
                timings = _time(plan, kept, listening)
                distributions = measure_distributions(plan, evaluations, listening)
                record, rows = sum_up(plan, evaluations, timings, distributions, listening.warnings)
                _write(plan, record, rows, listening)
        except StopAsked:
            raise Interrupted(f"stopped; what was drawn is kept in {outdir}; go on with --resume") from None
        processes.wait_for_everyone()
        if not main:
            record = BenchmarkRecord.from_json((outdir / RECORD_FILE).read_text(encoding="utf-8"))
        processes.wait_for_everyone()  # nobody takes the folder over while the others still read
    return BenchmarkResult(outdir=outdir, record=record, rows=tuple(rows), folders=plan.folders)


class _Listening:
    """A reporter that keeps the warnings, so that the report repeats them."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self.warnings: list[str] = []

    def say(self, text: str) -> None:
        self._reporter.say(text)

    def warn(self, text: str) -> None:
        self.warnings.append(without_secrets(text))
        self._reporter.warn(text)

    def progress(self, name: str, total: int) -> AbstractContextManager[Bar]:
        return self._reporter.progress(name, total)


def _make_room(plan: Plan, processes: PartialState, reporter: Reporter) -> dict[str, ArmCells]:
    """The cells of each arm, in a folder that holds nothing of another benchmark any more, and the settings there."""
    settings, outdir = plan.settings, plan.settings.outdir
    if processes.is_main_process:
        finished = all((outdir / name).exists() for name in RESULT_FILES)
        earlier = [arm_folder(outdir, cell.name) for cell in (outdir / CELLS).glob("*/")]
        make_room(outdir / CELLS, resume=settings.resume, overwrite=settings.overwrite, finished=finished)
    processes.wait_for_everyone()
    cells = Cells(outdir / CELLS, plan.key)
    kept = {arm.id: cells.of(arm, plan.key_of(arm)) for arm in plan.arms}
    if processes.is_main_process:
        _warn_of_other_circumstances(plan, reporter)
        _clear(outdir, () if settings.resume else {*plan.folders.values(), *earlier}, reporter)
        text = settings_toml(settings.replace(overwrite=False))  # --config does not consent a second time
        reporter.say(text.strip())
        write_text_atomic(outdir / "settings.toml", text)
    processes.wait_for_everyone()
    return kept


def _warn_of_other_circumstances(plan: Plan, reporter: Reporter) -> None:
    device = machine(plan.backbone.device, str(plan.backbone.dtype))["device"]
    differing = mixed(plan.settings.outdir / CELLS, {"device": device} | versions())
    if differing:
        told = ", ".join(f"{name} {' and '.join(values)}" for name, values in differing.items())
        reporter.warn(
            f"the pictures in {plan.settings.outdir} were drawn with {told}: arms differ by that, too; for figures of "
            "one kind choose another --outdir"
        )


def _clear(outdir: Path, folders: Iterable[Path], reporter: Reporter) -> None:
    """Take an earlier run's tables away, and its pictures from `folders`: beside this run's they would be wrong."""
    stale = [outdir / name for name in RESULT_FILES if (outdir / name).exists()]
    drawn = [folder for folder in folders if folder.exists()]
    for home in dict.fromkeys(folder.parent.parent for folder in drawn):
        reporter.say(f"{home} holds an earlier benchmark, or pictures: tables and pictures are replaced")
    if stale and not drawn:
        reporter.say(f"the tables in {outdir} are taken away; when all is measured they are written anew")
    for path in stale:
        path.unlink()
    for folder in drawn:
        shutil.rmtree(folder, ignore_errors=True)


def _draw(
    plan: Plan, kept: Mapping[str, ArmCells], processes: PartialState, reporter: Reporter
) -> dict[str, Evaluation]:
    """Every arm's pictures, drawn by all processes together; the first one has them all, the others their own."""
    conditioning = encode_prompts(plan.backbone, plan.prompts, plan.settings.negative_prompt)
    judges = judges_of(plan)

    def drawn(share: tuple[int, int]) -> dict[str, Evaluation]:
        found = {}
        with reporter.progress("all arms", sum(map(_work, plan.arms))) as bar:
            for arm in plan.arms:
                found[arm.id] = draw(plan, arm, conditioning, judges, kept[arm.id], share, reporter)
                bar.advance(_work(arm))
        return found

    evaluations = drawn((processes.process_index, processes.num_processes))
    processes.wait_for_everyone()
    if processes.is_main_process and processes.num_processes > 1:
        return drawn((0, 1))  # the others' batches are read
    return evaluations


def _work(arm: Arm) -> int:
    """What drawing an arm takes, about, in network evaluations a picture; decoding counts as one."""
    return arm.evaluations + 1


def _time(plan: Plan, kept: Mapping[str, ArmCells], reporter: Reporter) -> dict[str, tuple[ArmTiming, ...]]:
    """What each arm costs, by batch size from the smallest on."""
    settings, timings = plan.settings, dict[str, tuple[ArmTiming, ...]]()
    sizes = sorted(settings.batch_sizes or {1, settings.batch_size})
    conditions = machine(plan.backbone.device, str(plan.backbone.dtype)) | versions()
    conditions |= {"sizes": spell(sizes), "repeats": str(settings.timing_repeats)}
    counted = dict[tuple[bool, str | None, str | None], Operations]()  # by which networks draw
    for arm in plan.arms:
        if not arm.is_drawn:
            timings[arm.id] = ()
            continue
        known = kept[arm.id].timings(conditions)
        with reporter.progress(f"timing {arm.id}", len(sizes) * runs_of(plan)) as bar:
            if known is not None:
                bar.advance(len(sizes) * runs_of(plan))
            else:
                networks = arm.adapter, arm.source, arm.option
                with plan.painter(arm) as painter:
                    if networks not in counted:
                        counted[networks] = Operations.of(plan, painter, arm)
                    known = tuple(time_arm(plan, painter, arm, counted[networks], size, bar) for size in sizes)
                kept[arm.id].put_timings(known, conditions)
        timings[arm.id] = known
    return timings


def _write(plan: Plan, record: BenchmarkRecord, rows: Sequence[Row], reporter: Reporter) -> None:
    """Grids, tables and page, and in the end what was found in words."""
    outdir, folders = plan.settings.outdir, plan.folders
    with replacing(outdir / "grids") as grids, reporter.progress("grids", len(plan.prompts)) as bar:
        save_grids(grids, folders, plan.prompts, plan.settings.num_images, bar.advance)
    texts = (
        results_csv(rows),
        timing_csv(record),
        record.to_json(),
        page(record, folders),
    )
    for name, text in zip(RESULT_FILES, texts, strict=True):
        write_text_atomic(outdir / name, text)
    for line in [markdown(list(record.summary.values())), *verdict(record)]:
        reporter.say(line)
    reporter.say(f"pictures and grids in {outdir}; the report is {outdir / 'report.html'}")
