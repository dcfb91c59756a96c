"""The command line: each command fills one settings class, and the class alone says what is right.

Flags are handed on as the texts that were typed; they are merged with the settings file and checked once, by the
settings class. Nothing heavy is imported before a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import errno
import inspect
import os
import sys
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Group, MissingArgumentError, Parameter, UnusedCliTokensError

from fewstep import __version__
from fewstep.allocator import keep_freed_memory
from fewstep.config import (
    BenchSettings,
    CacheSettings,
    Checked,
    DemoSettings,
    DoctorSettings,
    ExportSettings,
    GenerateSettings,
    PretrainSettings,
    ReportSettings,
    TrainCommand,
    allowed,
    merged,
    refusal,
    spell,
)
from fewstep.errors import FewstepError, Interrupted, StopAsked, is_out_of_memory
from fewstep.hiding import without_secrets

if typing.TYPE_CHECKING:
    from fewstep.ui import ConsoleReporter

DONE, BUG, WRONG_INPUT, STOPPED_AT_ONCE = 0, 1, 2, 130
TRACEBACK = "FEWSTEP_TRACEBACK"


@dataclass(frozen=True)
class Command:
    """A command: the settings it fills and the procedure that it hands them to."""

    settings: type[Checked]
    procedure: str
    """``module:function``, imported when the command runs."""
    again: str | None = None
    """How to go on after a signal that came when there was nothing to save; None where it takes a new start."""


COMMANDS = {
    "demo": Command(DemoSettings, "fewstep.walkthrough:walkthrough", again="run the same again"),
    "train": Command(TrainCommand, "fewstep.train:train", again="go on with --resume_from_checkpoint auto"),
    "cache": Command(CacheSettings, "fewstep.train.fill:fill", again="run the same again"),
    "doctor": Command(DoctorSettings, "fewstep.doctor:doctor"),
    "bench": Command(BenchSettings, "fewstep.benchmark:benchmark", again="go on with --resume"),
    "generate": Command(GenerateSettings, "fewstep.generate:generate"),
    "report": Command(ReportSettings, "fewstep.redraw:report"),
    "export": Command(ExportSettings, "fewstep.export:export"),
    "pretrain": Command(PretrainSettings, "fewstep.pretrain:pretrain", again="run the same again"),
}

# The order of the help. Names are shared by the commands: each takes the ones that its settings have.
SECTIONS = {
    "Prompts": "prompt prompts_file negative_prompt num_prompts",
    "Pictures": "num_images steps flash_guidance safety_checker",
    "Adapter": "lora_path lora_id lora_rank lora_alpha lora_targets init_lora",
    "Comparison": "compare_baseline baseline_steps baseline_guidance baseline_outdir solver_steps solver_karras "
    "adapters_file adapters fast_options tiny_vae clip_model_id preference_model feature_model batch_sizes "
    "timing_repeats frechet_images",
    "Data": "dataset_name streaming data_dir image_column caption_column max_dropped",
    "Training": "size stage max_steps learning_rate lr_schedule lr_warmup_steps gradient_accumulation_steps "
    "gradient_checkpointing compile channels_last max_grad_norm ema_decay resume_from_checkpoint",
    "Method": "sampler timestep_span guidance_scale guidance_interval teacher_solver num_ddim_steps "
    "num_inference_steps pure_noise_share start pairs_per_rollout pairs_per_visit teacher_rollouts teacher_cache "
    "cache_dir loss loss_weighting",
    "Base model": "base_model default_base revision prediction_type resolution allow_pickle",
    "Results": "runs output_dir run_name outdir outfile resume overwrite dry_run log_file checkpoint_every keep_last "
    "keep_every validate_every validate_images log_every oracle_images",
    "Running": "seed batch_size device mixed_precision config",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fewstep`` with these arguments (the process's own by default) and return its exit code."""
    app = App(name="fewstep", help=_tagline(), version=f"fewstep {__version__}", **_APP)
    for position, (name, command) in enumerate(COMMANDS.items()):
        app.command(_function(command, {}), name=name, sort_key=position)
    return _run(app, argv, "fewstep")


def script(name: str, command: str, *, default_base: str, argv: Sequence[str] | None = None) -> int:
    """Run one command as a script of its own, with another default base; return its exit code."""
    app = App(name=name, version=f"fewstep {__version__}", **_APP)
    app.default(_function(COMMANDS[command], {"default_base": default_base}))
    return _run(app, argv, name)


# Flags are shown as the settings spell them; cyclopts reads `_` and `-` alike. Interrupts and errors are ours.
_APP: dict[str, Any] = {
    "default_parameter": Parameter(name_transform=str, negative_iterable=()),
    "suppress_keyboard_interrupt": False,
    "version_flags": ["--version"],
}


def _tagline() -> str:
    return "Distil a text-to-image diffusion model into a LoRA that draws in 1 to 8 steps, and measure what it cost."


# ------------------------------------------------------------------------------------------------ flags from settings


def _function(command: Command, defaults: Mapping[str, Any]) -> Callable[..., None]:
    """What cyclopts calls: its signature has one keyword a setting, and ``config``."""

    def run(*words: Any, **flags: Any) -> None:
        flags |= dict(zip(run.__signature__.parameters, words, strict=False))  # type: ignore[attr-defined]
        given = {name: value for name, value in flags.items() if value is not None}
        config = given.pop("config", None)
        settings = merged(command.settings, given, config=config, defaults=defaults, warn=_reporter().warn)
        _call(command, settings)

    sections = {name: section for section, names in SECTIONS.items() for name in names.split()}
    groups = {section: Group(section, sort_key=position) for position, section in enumerate(SECTIONS)}
    names = [name for name in sections if name in command.settings.model_fields]
    parameters = [_flag(name, command.settings, groups[sections[name]], defaults) for name in names]
    config = Parameter(
        help="TOML file of settings, keys as the flags; flags win.", metavar="FILE", group=groups[sections["config"]]
    )
    parameters.append(_keyword("config", str, config))
    parameters.sort(key=lambda parameter: parameter.kind)
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.settings = command.settings  # type: ignore[attr-defined]
    run.__doc__ = command.settings.__doc__
    return run


def _keyword(name: str, kind: Any, parameter: Parameter) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, parameter]
    )


def _flag(name: str, settings: type[Checked], group: Group, defaults: Mapping[str, Any]) -> inspect.Parameter:
    field = settings.model_fields[name]
    default = defaults.get(name, None if field.is_required() else field.default)
    words = field.description or ""
    if field.annotation is bool:
        return _keyword(name, bool, Parameter(help=words, group=group, negative=f"--no_{name}"))
    choices = _choices(field.annotation)
    if choices:
        words = f"{words} One of: {', '.join(choices)}."
    shown: dict[str, Any] = {
        "help": words,
        "group": group,
        "show_default": False if default is None else spell(default),
    }
    # The scripts' own default, not a thing to choose: --base_model is.
    shown["show"] = name != "default_base"
    kind = allowed(field)
    if _several(kind):
        if field.is_required():  # what the command is about stands without a flag's name
            bare = Parameter(metavar=_metavar(kind), required=False, **shown)
            either = inspect.Parameter.POSITIONAL_OR_KEYWORD
            return inspect.Parameter(name, either, default=None, annotation=Annotated[list[str] | None, bare])
        # A minimum of one: else a flag without values would be an empty list.
        return _keyword(name, list[str], Parameter(consume_multiple=(1, None), metavar=_metavar(kind), **shown))
    return _keyword(name, str, Parameter(allow_leading_hyphen=False, metavar=_metavar(kind), **shown))


def _choices(annotation: Any) -> tuple[str, ...]:
    options = [annotation, *typing.get_args(annotation)]
    return next((typing.get_args(option) for option in options if typing.get_origin(option) is Literal), ())


def _several(kind: str) -> bool:
    return ", each " in kind


def _metavar(kind: str) -> str:
    several = " ..." if _several(kind) else ""
    words = {"a whole number": "N", "a number": "X", "a path": "PATH"}
    return next((short for word, short in words.items() if word in kind), "NAME" if several else "TEXT") + several


# ------------------------------------------------------------------------------------------------------ running, ending


def _reporter() -> ConsoleReporter:
    from fewstep.ui import ConsoleReporter

    # torchrun and accelerate give each process its number: the first one speaks for all.
    return ConsoleReporter(quiet=os.environ.get("RANK", "0") != "0")


def _call(command: Command, settings: Checked) -> None:
    keep_freed_memory()
    reporter = _reporter()
    with reporter.holding_signals(), reporter.hearing_warnings():
        module, function = command.procedure.split(":")
        try:
            getattr(import_module(module), function)(settings, reporter=reporter)
        except StopAsked:
            if command.again is None:
                raise
            raise Interrupted(f"stopped between two saves; what was saved is whole; {command.again}") from None


def _run(app: App, argv: Sequence[str] | None, program: str) -> int:
    """Parse, call, and turn whatever happens into one line and an exit code."""
    from fewstep import ui

    ui.tolerate_narrow_encodings()
    try:
        app(
            sys.argv[1:] if argv is None else list(argv),
            exit_on_error=False,
            print_error=False,
            help_on_error=False,
            result_action="return_none",
        )
        if sys.stdout is not None:  # as after `>&-`
            sys.stdout.flush()
    except CycloptsError as error:
        return _fail(_usage_error(error, program), WRONG_INPUT)
    except FewstepError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("stopped at once; what was not saved is lost", STOPPED_AT_ONCE)
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`). Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BUG
    except Exception as error:
        message = _of_the_machine(error)
        if message:
            return _fail(message, WRONG_INPUT)
        name = type(error).__name__
        return _fail(f"a bug in fewstep: {name}: {error} (set {TRACEBACK}=1 to see where)", BUG)
    return DONE


def _fail(message: str, code: int) -> int:
    from fewstep import ui

    if os.environ.get(TRACEBACK):
        sys.stderr.write(without_secrets(traceback.format_exc()))
    ui.error(" ".join(message.split()))
    return code


def _usage_error(error: CycloptsError, program: str) -> str:
    """What cyclopts could not read, in one line that ends with the fix."""
    command = " ".join([program, *(error.command_chain or ())])
    settings = getattr(error.target, "settings", None)
    if isinstance(error, MissingArgumentError) and error.argument is not None and settings is not None:
        name = error.argument.field_info.name
        if name in settings.model_fields:
            return refusal(name, "", settings)
    if isinstance(error, UnusedCliTokensError):
        extra = " ".join(error.unused_tokens or ())
        if extra.lower() in ("true", "false"):
            fix = "a switch is on where it is named, and off with no_ before its name, as in --no_compare_baseline"
        else:
            example = ", as --prompt before a prompt" if settings and "prompt" in settings.model_fields else ""
            fix = f"texts with spaces need quotes, and every value needs its flag{example}"
        reason = f"{extra!r} belongs to no flag; {fix}"
    else:
        reason = str(error)
        if reason.endswith("?"):
            return f"{reason} See {command} --help"
        if not reason.endswith("..."):  # a list that goes on
            reason = reason.rstrip(".")
    return f"{reason}; see {command} --help"


def _of_the_machine(error: Exception) -> str | None:
    """The line for what is no bug but the machine's limits: memory, disk, rights; ``None`` for everything else."""
    if is_out_of_memory(error):
        return (
            "out of memory; lower --batch_size (in training, with as much more --gradient_accumulation_steps it stays "
            "the same run) or --resolution, pass --mixed_precision bf16, or, in training, --gradient_checkpointing"
        )
    if isinstance(error, RuntimeError) and any(f"CUDA error: {words}" in str(error) for words in _UNUSABLE_GPU):
        return (
            f"the GPU cannot be used: {str(error).splitlines()[0]}; install a torch build and a driver for it (fewstep "
            "doctor tells what is here), or pass --device cpu"
        )
    if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:
        return f"{error.strerror}: {error.filename or 'while writing'}; choose another folder or make room"
    return None


_UNUSABLE_GPU = (
    *("no kernel image", "CUDA driver", "no CUDA-capable device", "all CUDA-capable devices are busy"),
    *("system has unsupported display driver", "the provided PTX was compiled with an unsupported toolchain"),
)
"""How CUDA's errors begin that tell of the card or its driver, as those of a kernel gone wrong do not."""

_MACHINE_ERRORS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR, errno.EISDIR),
    errno.EEXIST,  # where a folder is to be made
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EMFILE),
}
