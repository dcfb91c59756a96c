"""Settings as flat TOML, from it, and as a command line."""

from __future__ import annotations

import json
import shlex
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fewstep.config.base import Checked, Settings
from fewstep.config.spelling import unknown_name
from fewstep.errors import InputError
from fewstep.files import at_home
from fewstep.hiding import without_query

SettingsT = TypeVar("SettingsT", bound=Checked)


def load_toml(path: Path | str) -> dict[str, Any]:
    """The flat table of a settings file; an `InputError` where it cannot be read or is not flat."""
    path = at_home(path)
    values = read_toml(path)
    for key, value in values.items():
        if isinstance(value, dict):
            raise InputError(
                f"{str(path)!r} has a table [{key}]; settings files are flat; move its keys to the top, without [{key}]"
            )
    return values


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file says; an `InputError` where it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no settings file {str(path)!r}; allowed is a TOML file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} cannot be read ({error}); allowed is a TOML file in UTF-8") from None
    except (ValueError, RecursionError) as error:  # tomllib's own, of numbers without end, of nesting without end
        raise InputError(f"{str(path)!r} is no TOML: {error}; allowed are lines such as max_steps = 300") from None


CHOSEN_FOR = {
    "base_model": (
        *("revision", "prediction_type", "resolution", "guidance_scale", "oracle_images"),
        *("baseline_steps", "baseline_guidance", "frechet_images"),
    ),
    "device": ("mixed_precision",),
    "lora_rank": ("lora_alpha",),
    "sampler": ("start", "num_ddim_steps", "pairs_per_rollout", "timestep_span"),
    "num_inference_steps": ("pairs_per_rollout",),
    "timestep_span": ("pairs_per_rollout",),
}
"""Settings whose value, where none is asked for, follows from another's. A run's file has them all filled in."""

SHUT_OUT = {("start", "student"): ("teacher_rollouts", "teacher_cache", "pairs_per_visit")}
"""Settings that go with all values of another but one."""

SOURCES = ("data_dir", "dataset_name", "prompts_file", "prompt")
INSTEAD = {SOURCES: ("start", "streaming", "num_prompts"), ("lora_path", "lora_id"): (), ("resume", "overwrite"): ()}
"""Settings of which one may be given, so that a flag takes the place of what the file has; and what follows from it."""


def merged(
    settings: type[SettingsT],
    given: Mapping[str, Any],
    *,
    config: Path | str | None = None,
    defaults: Mapping[str, Any] | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> SettingsT:
    """Settings from three sources, the later wins: ``defaults``, the TOML file ``config``, what was ``given``.

    They are checked once, together; a key of the file that is no setting of this class is refused. What the file says
    only for what was given otherwise is left out of it: another base is not drawn at the resolution of the file's.

    Args:
        warn: told what is left out.
    """
    filed = {key.replace("-", "_"): value for key, value in (load_toml(config) if config else {}).items()}
    for key in filed:
        if key not in settings.model_fields:
            raise InputError(f"{str(config)!r}: {unknown_name(key, settings)}")
    for chosen, following, reason, fix in list(_superseded(given, filed)):
        left = {name: filed.pop(name) for name in following if name in filed and name not in given}
        told = ", ".join(
            f"{name} {_words(value)}" for name, value in left.items() if value != settings.model_fields[name].default
        )
        if told:
            warn(f"left out of {str(config)!r} for {chosen} {_words(given[chosen])}, {reason}: {told}{fix}")
    return settings(**{**(defaults or {}), **filed, **given})


def _superseded(given: Mapping[str, Any], filed: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...], str, str]]:
    """What was given, what of the file does not go with it, why, and how to have it all the same."""
    for chosen, following in CHOSEN_FOR.items():
        if chosen in given and chosen in filed and _words(given[chosen]) != _words(filed[chosen]):
            reason = f"for they were chosen for {_words(filed[chosen])}"
            yield chosen, following, reason, "; to keep one, pass it as a flag"
    for (chosen, value), following in SHUT_OUT.items():
        if _words(given.get(chosen)) == value != _words(filed.get(chosen)):
            yield chosen, following, "which does without", ""
    for alternatives, following in INSTEAD.items():
        for chosen in (name for name in alternatives if given.get(name)):
            others = tuple(name for name in alternatives if name in filed and name != chosen)
            if others:
                yield chosen, (*others, *following), "which takes their place", ""


def _words(value: Any) -> str:
    """A value as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def settings_toml(settings: Settings, *, public: bool = False) -> str:
    """The settings as flat TOML, ``None`` left out: reading it back gives equal settings.

    Where it is to be passed on, the data's address comes without its query, which may sign for whoever has it.
    """
    values = {name: value for name, value in dict(settings).items() if value is not None}
    if public and "dataset_name" in values:
        values["dataset_name"] = without_query(values["dataset_name"])
    lines = [f"{name} = {_toml_value(value)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def command_line(command: str, settings: type[Checked], values: Mapping[str, Any]) -> str:
    """The command that these settings came from, or one like it: the flags whose values are not the defaults."""
    words, defaults = ["fewstep", command], settings.model_construct().model_dump(mode="json")
    for name in settings.model_fields:
        value = values.get(name)
        if value is None or value == defaults.get(name):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            several = value if isinstance(value, list | tuple) else [value]
            words += [f"--{name}", *(shlex.quote(str(one)) for one in several)]
    return " ".join(words)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        # A JSON string is a TOML basic string, but for the one control character that JSON leaves alone.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"[{', '.join(_toml_value(item) for item in value)}]"
