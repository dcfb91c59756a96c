"""`fewstep cache`: the latents and embeddings of a training, before it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState

from fewstep.config import CacheSettings
from fewstep.data import Batches, open_data, require_there
from fewstep.errors import Interrupted
from fewstep.processes import join_processes, noticing_losses, own_device, require_agreement
from fewstep.reporting import LOG, Reporter, Wordless
from fewstep.telemetry import LoggedReporter
from fewstep.train import start
from fewstep.train.rollouts import Teacher
from fewstep.train.unusable import Unusable


@dataclass(frozen=True, kw_only=True)
class FillResult:
    """What the cache holds now, of all that it was ever filled with.

    Attributes:
        folder: the cache.
        latents, captions: how many of each.
    """

    folder: Path
    latents: int
    captions: int


@noticing_losses("run the same again")
def fill(
    settings: CacheSettings, *, reporter: Reporter = LOG, should_stop: Callable[[], bool] = lambda: False
) -> FillResult:
    """Go through the batches that `fewstep train` with these settings would make, and compute what it would ask for.

    Several processes share the work. What is there is not computed again, so that a stopped one goes on.

    Raises:
        InputError, DataError, CheckpointError: as `distill`.
        Interrupted: stopped on request, and what was computed is kept; or another process of the run has died.
    """
    processes = join_processes(settings.device)
    with ExitStack() as cleanup:
        if not processes.is_main_process:
            reporter = Wordless(reporter)
        elif settings.log_file is not None:
            reporter = cleanup.enter_context(LoggedReporter(reporter, settings.log_file))
        return _fill(settings, processes, reporter, should_stop)


def _fill(
    settings: CacheSettings, processes: PartialState, reporter: Reporter, should_stop: Callable[[], bool]
) -> FillResult:
    require_there(settings.data_dir)
    origin = start.origin_of(settings, None)
    backbone, resolved = start.open_base(settings, own_device(settings.device, processes), origin, reporter)
    opened = open_data(resolved, backbone, streaming=resolved.streaming, reporter=reporter)
    slices = start.slices_of(settings, processes)
    require_agreement(start.to_agree_on(resolved, backbone, opened))
    method, shape = start.method_of(resolved, backbone), backbone.latent_shape(resolved.resolution)
    cache = start.cache_of(settings.cache_dir, resolved, backbone, opened)
    teacher = Teacher(backbone, cache, method, settings.seed, shape, resolved.starts_from)
    places = start.rollouts_to_keep(resolved, slices)  # as many as there are samples, where it keeps none
    batches = Batches(
        opened.data,
        slices,
        seed=settings.seed,
        start=0,
        end=places // slices.global_batch,
        allowance=opened.allowance,
        workers=start.loading_workers(backbone.device),
        spared=teacher.spared(),
    )
    unusable = Unusable(opened.allowance, reporter.warn)
    cache.embed([""])
    with reporter.progress("cache", len(batches)) as bar:
        for batch in batches:
            teacher.prepare(batch)
            unusable.meet(batch.replaced)
            if start.asked_to_stop(bar, should_stop):
                cache.flush()
                raise Interrupted(f"stopped; what was computed is kept in {settings.cache_dir}; run the same again")
    cache.flush()
    unusable.share()
    whole = start.cache_of(settings.cache_dir, resolved, backbone, opened)  # with what the others computed
    latents, captions = whole.sizes()
    reporter.say(f"cache: {latents:,} latents and {captions:,} captions in {settings.cache_dir}")
    return FillResult(folder=settings.cache_dir, latents=latents, captions=captions)
