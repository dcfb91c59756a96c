"""Going on with a run: which checkpoint, whether it is still the same run, and what of it is out of date."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

from fewstep import checkpoint
from fewstep.backbone import Backbone
from fewstep.config import TrainSettings, load_toml, settings_toml, spell
from fewstep.errors import CheckpointError, InputError
from fewstep.files import remove_folder_at_once, sha256, write_text_atomic
from fewstep.opening import versions
from fewstep.reporting import Reporter

BEGAN = ".began_from"
"""The file in a run's folder that names the other run's checkpoint it began from."""

MAY_CHANGE = {
    *("output_dir", "run_name", "log_file", "checkpoint_every", "validate_every", "log_every", "oracle_images"),
    *("validate_images", "clip_model_id"),
    *("keep_last", "keep_every"),
    *("device", "gradient_checkpointing", "compile", "channels_last", "default_base", "revision", "allow_pickle"),
    *("teacher_cache", "cache_dir"),  # their own keys tell
    *("base_model", "data_dir", "dataset_name", "streaming", "prompts_file"),  # fingerprints tell
    *("image_column", "caption_column"),
    "max_dropped",  # likewise
    *("batch_size", "gradient_accumulation_steps"),  # the global batch tells
    "max_steps",
}
"""Settings that a resumed run may change and still be the same run. Under a cosine, max_steps is not one of them."""


def told(resumed: Path | None) -> str:
    """A checkpoint by its name and content, to tell it from another process's of the same name."""
    return "none" if resumed is None else f"{resumed.name} ({sha256(resumed / checkpoint.MANIFEST)[:8]})"


def checkpoint_to_resume(settings: TrainSettings, reporter: Reporter) -> Path | None:
    """The checkpoint that the run goes on from, None for a new run; no run is ever overwritten by another one.

    Raises:
        InputError: the folder holds a run that is not resumed, or one that has gone on beyond the given checkpoint.
        CheckpointError: there is no such checkpoint, or it is broken.
    """
    run, which = settings.run_dir, settings.resume_from_checkpoint
    holds_a_run = (run / checkpoint.SETTINGS).exists() or (run / "lora").exists()
    saved = checkpoint.checkpoints(run)
    final = run / "lora" / checkpoint.FINAL
    if which is None:
        if holds_a_run:
            way = "latest to go on with it" if saved else "auto to start it again, for it has no checkpoint"
            raise InputError(
                f"{str(run)!r} holds a run already; allowed is a folder without one; choose another --run_name, or "
                f"pass --resume_from_checkpoint {way}"
            )
        return None
    folder = checkpoint.resolve(run, which, warn=reporter.warn)
    other = _origin(run)
    if folder is None and not final.exists() and other is not None:  # stopped before a checkpoint of its own
        reporter.say(f"the run has no checkpoint of its own yet: it begins again from {other}, as it did")
        return checkpoint.resolve(run, str(other), warn=reporter.warn)
    if folder is None and final.exists():
        raise InputError(
            f"the run in {str(run)!r} has come to its end, and there is no checkpoint to go on from; allowed is a "
            f"folder without a finished run; choose another --run_name, or remove {str(final)!r} to train it again"
        )
    if folder is None or which in ("latest", "auto"):
        return folder
    if folder.resolve().parent != (run / "lora").resolve():
        if saved or final.exists() or (holds_a_run and other != folder.resolve()):
            raise InputError(
                f"{str(run)!r} holds a run already, and {which!r} is of another one; choose a new --run_name to go on "
                "from it"
            )
    elif saved and folder.name != saved[0].name:
        raise InputError(
            f"the run in {str(run)!r} has gone on from {folder.name} to {saved[0].name}; allowed is its latest "
            "checkpoint; pass --resume_from_checkpoint latest, or a new --run_name to go on from the older one"
        )
    return folder


def note_beginning(run: Path, resumed: Path | None) -> None:
    """Note in a run's folder which other run's checkpoint it goes on from, until it has one of its own."""
    if resumed is not None and resumed.resolve().parent != (run / "lora").resolve():
        write_text_atomic(run / BEGAN, str(resumed.resolve()))
    elif resumed is None:
        (run / BEGAN).unlink(missing_ok=True)


def _origin(run: Path) -> Path | None:
    file = run / BEGAN
    return Path(file.read_text(encoding="utf-8")) if file.exists() else None


def state_of(run: Path) -> tuple[int | None, tuple[str, ...]]:
    """What tells that somebody has been at work in a run's folder: a start, or a checkpoint that has come."""
    try:
        started = (run / checkpoint.SETTINGS).stat().st_mtime_ns
    except OSError:
        started = None
    return started, tuple(folder.name for folder in checkpoint.checkpoints(run))


def require_unchanged(run: Path, found: object) -> None:
    """Refuse a folder that is not as it was `found` before its lock was taken: base and data take a while to open.

    Raises:
        InputError: another run has begun or gone on there meanwhile.
    """
    if state_of(run) != found:
        raise InputError(
            f"another run was at work in {str(run)!r} while this one got ready; allowed is one run a folder; go on "
            "with it by --resume_from_checkpoint auto, or choose another --run_name"
        )


def check_resumed(folder: Path, settings: TrainSettings, backbone: Backbone, more: Mapping[str, str | int]) -> None:
    """Refuse to go on from a checkpoint in a way that would make it another run.

    Args:
        settings: as resolved.
        more: what else has to be as it was: fingerprint of the data, global batch.

    Raises:
        CheckpointError: it was trained on another base, on other data, or in other batches.
        InputError: a setting differs, or it has more steps than are asked for.
    """
    record, name = checkpoint.verify(folder), str(folder)
    if record.base_fingerprint != backbone.fingerprint:
        raise CheckpointError(
            f"checkpoint {name!r} was trained on another base ({record.base_model}, {record.base_fingerprint}) than "
            f"{backbone.name} ({backbone.fingerprint}); pass that one as --base_model"
        )
    for key, now in more.items():
        if record.more.get(key) != now:
            raise CheckpointError(
                f"checkpoint {name!r} was trained with {key} {record.more.get(key)}, now it is {now}; go on with the "
                "same data and the same batch_size x gradient_accumulation_steps x processes, or with a new --run_name"
            )
    if record.step > settings.max_steps:
        raise InputError(
            f"checkpoint {name!r} is at step {record.step}, max_steps is {settings.max_steps}; allowed is as many or "
            "more; raise --max_steps"
        )
    # A setting that came with a later release was at its default then; one that has gone decides nothing any more.
    defaults = tomllib.loads(settings_toml(TrainSettings()))
    saved = {
        key: value
        for key, value in load_toml(folder / checkpoint.SETTINGS).items()
        if key in TrainSettings.model_fields
    }
    before, after = defaults | saved, tomllib.loads(settings_toml(settings))
    free = MAY_CHANGE if settings.lr_schedule == "constant" else MAY_CHANGE - {"max_steps"}
    changed = [key for key in sorted((before.keys() | after.keys()) - free) if before.get(key) != after.get(key)]
    if changed:
        named = ", ".join(f"{key} {spell(after.get(key))} (not {spell(before.get(key))})" for key in changed)
        raise InputError(
            f"{named} came, unlike what checkpoint {name!r} was trained with; a resumed run keeps its settings; pass "
            f"--config {folder / checkpoint.SETTINGS} or a new --run_name"
        )


def warn_of_versions(folder: Path, reporter: Reporter) -> None:
    """Say which libraries a checkpoint was written with in another release: equal bytes are then not to be had."""
    before, now = dict((checkpoint.verify(folder).more.get("versions")) or {}), versions()
    changed = [f"{name} {now.get(name)} (not {before[name]})" for name in before if now.get(name) != before[name]]
    if changed:
        reporter.warn(f"{', '.join(changed)} now, unlike what {folder} was written with: sums may differ in their ends")


def drop_final(folder: Path, say: Callable[[str], None]) -> None:
    """Remove the `lora/final` of a run that goes on beyond it: it tells that a run has come to its end."""
    if folder.exists():
        remove_folder_at_once(folder)
        say(f"removed: {folder}, for the run goes on beyond it")


def drop_best(folder: Path, *, resumed: bool, warn: Callable[[str], None]) -> None:
    """Remove a `lora/best` that a run cannot go on with: of an earlier start in its folder, or not whole."""
    if not folder.exists():
        return
    if resumed:
        try:
            checkpoint.verify(folder)
            return
        except CheckpointError as error:
            warn(f"removed: {error}")
    shutil.rmtree(folder)
