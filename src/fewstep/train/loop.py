"""K-step distillation from the first line to the last: base, data, adapter, loop.

    x0* = K guided DDIM steps of the teacher from x_t         adapter off, no gradient
    x0  = one forward of the student at t, without guidance   adapter on
    loss = w(t) |x0 - x0*|^2, at the timesteps that the promised step counts will be sampled at

A step is an optimizer update: gradient_accumulation_steps micro-batches of batch_size pictures on each process. What
an update sees is a function of (seed, update, position in its global batch): nothing draws from a running stream, so
that a resumed run goes on as if it had never stopped, and how the global batch is cut changes the order of summation
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from fewstep import checkpoint, lora
from fewstep.arithmetic import peak_so_far
from fewstep.config import TrainSettings, settings_toml
from fewstep.data import open_data, require_there
from fewstep.ema import EMA
from fewstep.errors import Interrupted
from fewstep.files import remove_leftovers, write_text_atomic
from fewstep.locks import alone_in
from fewstep.oracle import Oracle, describe, measure_oracle
from fewstep.previews import Previews
from fewstep.processes import join_processes, noticing_losses, own_device, require_agreement
from fewstep.reporting import LOG, Reporter, Wordless
from fewstep.telemetry import LoggedReporter, LossByTimestep, Telemetry
from fewstep.train import announcing, engine, resuming, start
from fewstep.train.answers import AnyProcess
from fewstep.train.books import Books
from fewstep.train.keeping import Keeper, Looks
from fewstep.train.lessons import open_lessons
from fewstep.train.progress import Progress
from fewstep.train.rollouts import Teacher
from fewstep.train.unusable import Unusable
from fewstep.train.update import Updater, learning_rate
from fewstep.train.watch import Watch
from fewstep.validation import open_validation

PREVIEW_PROMPTS = 4
"""Rows of a grid of previews."""


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """A finished run.

    Attributes:
        folder: OUTPUT_DIR/RUN_NAME.
        adapter: the folder of the finished adapter, what `--lora_path` takes.
        best: the folder of the adapter that validation liked best; None where nothing was measured.
        steps: updates that it was trained for.
        settings: as resolved.
        oracle: what a perfect student would reach; None where it was not measured, as in a resumed run.
        history: the lines of metrics.jsonl.
    """

    folder: Path
    adapter: Path
    best: Path | None
    steps: int
    settings: TrainSettings
    oracle: Oracle | None
    history: list[dict[str, float]]


def distill(
    settings: TrainSettings, *, reporter: Reporter = LOG, should_stop: Callable[[], bool] = lambda: False
) -> DistillResult:
    """Distil a base model into a few-step LoRA.

    Args:
        settings: everything; what is None is taken from the base.
        reporter: is told what happens. KeyboardInterrupt from its bar of updates, raised when one is done, asks to stop
            as `should_stop` does.
        should_stop: asked after every update; True saves the state and ends the run.

    Raises:
        InputError: settings that cannot be used, or a folder that holds a run already.
        DataError: no data, or too little of it is usable.
        CheckpointError: a checkpoint to resume from that is damaged or of another run; an adapter that does not read
            back as it was saved.
        Interrupted: stopped on request, with the state saved; or another process of the run has died.
    """
    with ExitStack() as cleanup, noticing_losses():
        # ---- Processes: each has a device of its own; the first one speaks, measures and writes for all.
        processes = join_processes(settings.device)
        main = processes.is_main_process
        reporter = reporter if main else Wordless(reporter)
        if settings.log_file is not None and main:
            reporter = cleanup.enter_context(LoggedReporter(reporter, settings.log_file))
        settings = start.as_launched(settings, reporter.warn)
        found = resuming.state_of(settings.run_dir)
        resumed = resuming.checkpoint_to_resume(settings, reporter)
        require_agreement({"the checkpoint to go on from": resuming.told(resumed)})
        processes.wait_for_everyone()  # nobody writes into the run's folder before everybody has looked at it

        # ---- The base, and what its defaults make of the settings.
        require_there(settings.data_dir)
        origin = start.origin_of(settings, resumed)
        backbone, settings = start.open_base(settings, own_device(settings.device, processes), origin, reporter)
        assert settings.resolution is not None
        shape, device = backbone.latent_shape(settings.resolution), backbone.device

        # ---- The data.
        opened = open_data(settings, backbone, streaming=settings.streaming, reporter=reporter)
        slices = start.slices_of(settings, processes)
        require_agreement(start.to_agree_on(settings, backbone, opened))

        # ---- The method, the student, and what trains it.
        method = start.method_of(settings, backbone)
        quick = engine.quickened(backbone, settings, settings.batch_size)
        cleanup.enter_context(engine.compiling(settings))
        parameters = start.student_of(settings, backbone, resumed=resumed is not None, warn=reporter.warn)
        ema = EMA(parameters, settings.ema_decay)
        adamw = engine.adamw_of(parameters, settings, device)
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=settings.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=settings.gradient_accumulation_steps, sync_with_dataloader=False
            ),
        )
        optimizer = accelerator.prepare(adamw)  # unscales and skips under fp16

        # ---- Where the run begins.
        stateful: dict[str, checkpoint.Stateful] = {"adapter": lora.AdapterWeights(backbone.unet), "optimizer": adamw}
        stateful |= {"ema": ema} if settings.ema_decay > 0 else {}
        stateful |= {"scaler": accelerator.scaler} if accelerator.scaler is not None else {}
        losses = LossByTimestep(method.points, device)
        progress = Progress(losses, accelerator)
        stateful |= {"progress": progress}
        identity: dict[str, str | int] = {"data_fingerprint": opened.fingerprint, "global_batch": slices.global_batch}
        step = 0
        if resumed is not None:
            resuming.check_resumed(resumed, settings, backbone, identity)
            step = checkpoint.load(resumed, stateful).step
            reporter.say(f"resumed from {resumed} at step {step}")
            resuming.warn_of_versions(resumed, reporter)
        encoder = start.encoder_of(settings, backbone, opened)
        store = None  # what others have left in shared folders is looked at before anything is written
        if settings.teacher_cache is not None:
            store = start.rollouts_of(settings, backbone, identity)
        for line in announcing.plan(settings, method, slices, backbone):
            reporter.say(line)
        if settings.compile:
            worst = engine.prove(quick, backbone, parameters, settings, settings.batch_size)
            reporter.say(f"compiled: outputs and gradients are the UNet's own to {worst:.1g} of their size")
        check_folder: Callable[[], None] | None = None
        if main:
            check_folder = cleanup.enter_context(alone_in(settings.run_dir))
            resuming.require_unchanged(settings.run_dir, found)
            for folder in (settings.run_dir, settings.run_dir / "lora", settings.run_dir / "previews"):
                remove_leftovers(folder)
            for newer in [] if resumed is None else checkpoint.drop_newer(settings.run_dir, resumed):
                reporter.warn(f"removed: {newer}, which was passed over")
            resuming.drop_best(
                settings.run_dir / "lora" / checkpoint.BEST, resumed=resumed is not None, warn=reporter.warn
            )
            if step < settings.max_steps:
                resuming.drop_final(settings.run_dir / "lora" / checkpoint.FINAL, reporter.say)
            resuming.note_beginning(settings.run_dir, resumed)
            write_text_atomic(settings.run_dir / "settings.toml", settings_toml(settings))
        telemetry = cleanup.enter_context(
            Telemetry(settings.run_dir, resumed_at=None if resumed is None else step, active=main)
        )

        # ---- The ceiling, before any work is put in.
        oracle, previews, validation = None, None, None
        if settings.validate_every and main:
            prompts = start.captions_to_show(PREVIEW_PROMPTS, settings, backbone, opened)
            previews = Previews(
                backbone,
                method,
                prompts,
                resolution=settings.resolution,
                seed=settings.seed,
                batch_size=settings.batch_size,
            )
        oracle_pictures = settings.oracle_images or 0
        if oracle_pictures and main and resumed is None:
            oracle = measure_oracle(
                backbone,
                method,
                start.captions_to_show(oracle_pictures, settings, backbone, opened),
                resolution=settings.resolution,
                seed=settings.seed,
                batch_size=settings.batch_size,
                on_teachers=None if previews is None else previews.take_up,
                reporter=reporter,
            )
            reporter.say(describe(oracle, oracle_pictures))
            telemetry.record(0, {f"oracle/{arm}/{key}": v for arm, found in oracle.items() for key, v in found.items()})
        if settings.validate_every and settings.validate_images and main:
            prompts = start.captions_to_show(settings.validate_images, settings, backbone, opened)
            validation = open_validation(backbone, method, prompts, settings, reporter)
        processes.wait_for_everyone()

        # ---- What is learnt from, what is learnt, and what is kept of it.
        if settings.keeps_rollouts and store is None:
            store = start.rollouts_of(settings, backbone, identity)
        unusable = Unusable(opened.allowance, reporter.warn)
        speed = start.throughput_of(settings, backbone, processes.num_processes)
        lessons = open_lessons(
            settings,
            backbone,
            opened,
            slices,
            Teacher(quick, encoder, method, settings.seed, shape, settings.starts_from),
            speed,
            unusable,
            processes,
            store=store,
            begin=step,
            reporter=reporter,
            should_stop=should_stop,
        )
        watch = Watch(lora.AdapterWeights(backbone.unet).parameters(), reporter.warn)
        watch.remember(telemetry.history)
        update = Updater(
            accelerator, optimizer, parameters, settings, method=method, student=quick.denoiser(), watch=watch
        )
        books = Books(ema, losses, progress, reporter.warn, settings.run_dir)
        in_any = AnyProcess(accelerator)
        keeper = Keeper(settings, backbone, method, parameters, ema, encoder, progress, identity=identity, main=main)
        looks = Looks(
            settings,
            backbone,
            ema,
            keeper,
            telemetry,
            previews=previews,
            validation=validation,
            warn=reporter.warn,
        )

        # ---- The loop.
        looks.rest()
        stopping = False
        with reporter.progress("training", settings.max_steps - step) as bar:
            if resumed is not None and looks.left_undone(step):
                with speed.paused():
                    looks.take(step)
            while step < settings.max_steps and not stopping:
                taught = list(islice(lessons, settings.gradient_accumulation_steps))
                books.close()  # of the update before: a GPU has these lessons to make while it is asked for its result
                made = update(step, taught)
                step += 1
                books.open(step, made, taught)
                if check_folder is not None:
                    check_folder()
                speed.add(
                    pictures=sum(len(lesson.items) for lesson in taught),
                    pairs=sum(len(lesson.pairs.t) for lesson in taught),
                    forwards=sum(lesson.forwards for lesson in taught),
                )
                for lesson in taught:
                    unusable.meet(lesson.replaced)
                    watch.captions(step, lesson.captions, backbone)

                shown: dict[str, float] = {}
                if step % settings.log_every == 0 or step == settings.max_steps:
                    books.close()
                    unusable.share()
                    shown = losses.means(accelerator.reduce)
                    shown |= {"gradient_norm": float(made.norm)} if made.moved else {}
                    shown |= {"learning_rate": learning_rate(settings, step - 1)}
                    shown |= speed.read() | {"skipped_updates": progress.skipped_since_logged}
                    peak = peak_so_far(device)
                    shown |= {} if peak is None else {"peak_memory_bytes": peak}
                    progress.skipped_since_logged = 0
                    watch.losses(step, shown)
                    telemetry.record(step, shown)
                beside = {key: shown[key] for key in ("loss", "pictures_per_second") if key in shown}
                stopping = in_any(start.asked_to_stop(bar, should_stop, **beside))

                last = step == settings.max_steps
                looks_now = looks.due(step) and (last or not stopping)
                saves_now = (
                    last or stopping or (settings.checkpoint_every > 0 and step % settings.checkpoint_every == 0)
                )
                if looks_now or saves_now:
                    books.close()
                    with speed.paused():
                        if looks_now:
                            looks.take(step)  # before the checkpoint: a run that goes on from there has had it
                        if saves_now:
                            keeper.save(f"checkpoint-{step}", step, stateful)
                        processes.wait_for_everyone()

        if step < settings.max_steps:
            raise Interrupted(
                f"stopped at step {step} of {settings.max_steps}, saved in {settings.run_dir}; "
                "go on with --resume_from_checkpoint latest"
            )
        adapter = keeper.save(checkpoint.FINAL, step)
        processes.wait_for_everyone()
        reporter.say(f"adapter: {adapter}")
        reporter.say(announcing.stock_call(method))
        return DistillResult(
            folder=settings.run_dir,
            adapter=adapter,
            best=looks.best(step, reporter.say),
            steps=step,
            settings=settings,
            oracle=oracle,
            history=telemetry.history,
        )
