"""Where a run's lessons come from: the teacher makes each one as it is asked for, or all of them before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from accelerate import PartialState

from fewstep.backbone import Backbone
from fewstep.config import TrainSettings
from fewstep.data import Batches, OpenedData, Slices
from fewstep.processes import require_one_folder
from fewstep.reporting import Reporter
from fewstep.telemetry import Throughput
from fewstep.train import start
from fewstep.train.rollouts import Lesson, RolloutStore, Teacher, kept_lessons
from fewstep.train.unusable import Unusable


def open_lessons(
    settings: TrainSettings,
    backbone: Backbone,
    opened: OpenedData,
    slices: Slices,
    teacher: Teacher,
    speed: Throughput,
    unusable: Unusable,
    processes: PartialState,
    *,
    store: RolloutStore | None,
    begin: int,
    reporter: Reporter,
    should_stop: Callable[[], bool],
) -> Iterator[Lesson]:
    """The lessons of every update from `begin` on, a micro-batch each; rollouts to be kept are made first.

    Args:
        teacher: makes them.
        speed: is told how long they were waited for.
        unusable: is told of pictures that are no good, met while rollouts are made.
        store: where rollouts are kept; None where each update makes its own.

    Raises:
        Interrupted: stopped on request while the teacher made its rollouts; those that are made are kept.
        CheckpointError: the folder of kept rollouts is damaged.
    """
    batches = partial(
        Batches,
        opened.data,
        slices,
        seed=settings.seed,
        allowance=opened.allowance,
        workers=start.loading_workers(backbone.device),
        spared=teacher.spared(),
    )
    if store is None:
        return map(teacher, speed.waiting(batches(start=begin, end=settings.max_steps)))

    count = start.rollouts_to_keep(settings, slices)
    require_one_folder(store.folder, "teacher_cache", processes)
    # Each gone through once: those of updates that are done are not asked for again.
    behind = begin if count >= settings.max_steps * slices.global_batch else 0
    missing = batches(start=behind, end=count // slices.global_batch, skip=store.holds)
    with speed.paused():
        start.keep_rollouts(store, teacher, missing, slices, unusable, reporter, should_stop)
        processes.wait_for_everyone()
    store.refresh()  # the other processes have put theirs
    kept = kept_lessons(
        store,
        slices,
        count=count,
        seed=settings.seed,
        start=begin,
        end=settings.max_steps,
        pairs_per_visit=settings.pairs_per_visit,
    )
    return (lesson.on(backbone.device) for lesson in speed.waiting(kept))
