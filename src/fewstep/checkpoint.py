"""Checkpoints: an adapter with all that is needed to go on from it, whole or not there at all, and without pickle.

    lora/checkpoint-N/   pytorch_lora_weights.safetensors  scheduler/  settings.toml  manifest.json
                         resume/{NAME.safetensors, state.json}
    lora/final/          the same without resume/
    lora/best/           as final: the one that validation liked best

A checkpoint is written beside its place under another name, synchronised to disk, and renamed; before that, the disk is
asked for room. `manifest.json` lists every other file with its SHA-256, and has one of its own; a folder whose files do
not fit it is broken and is not loaded.

What can be resumed is a dictionary of named objects with `state_dict()` and `load_state_dict()`, the contract of
torch's optimizers and schedulers. Tensors go to safetensors and all else to JSON, both exactly, so that a resumed run
is the run, bit for bit. An object that is asked for and missing raises, and so does one that is there and not asked
for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tomllib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .errors import CheckpointError
from .files import at_home, remove_folder_at_once, replace_folder_atomic, sha256

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
SETTINGS = "settings.toml"
RESUME = "resume"
STATE = "state.json"
FINAL = "final"
BEST = "best"
SCHEMA_VERSION = 3

SMALL_FILES = 2**20
"""Bytes that are set aside for what a checkpoint holds besides tensors."""


class Stateful(Protocol):
    """Whatever can be put away and taken up again: optimizers, schedulers, scalers, adapters, counters."""

    def state_dict(self) -> Mapping[Any, Any]:
        """Nested dictionaries, lists and tuples of tensors, numbers, texts, booleans and None."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> object:
        """Take up what `state_dict()` gave."""
        ...


@dataclass(frozen=True, kw_only=True)
class Record:
    """What an adapter has to know about itself for others to use it rightly.

    Attributes:
        step: optimizer updates that it was trained for.
        base_model: the base as it was asked for: a Hub id, a path, or a registered name.
        base_fingerprint: of the very weights and configurations of the base.
        step_counts: the step counts promised, those whose timesteps it was trained on.
        revision: of the base on the Hub, if one was asked for.
        more: anything else that JSON can hold: rank, alpha, versions, figures.
    """

    step: int
    base_model: str
    base_fingerprint: str
    step_counts: tuple[int, ...]
    revision: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


# -------------------------------------------------------------------------------------------------------------- writing


def save(
    folder: Path,
    write_adapter: Callable[[Path], object],
    *,
    settings: str,
    record: Record,
    stateful: Mapping[str, Stateful] | None = None,
    adapter_bytes: int = 0,
) -> Path:
    """Write a checkpoint; it appears under its name when everything in it is on the disk.

    Args:
        folder: its place, `RUN/lora/checkpoint-N`, `RUN/lora/final` or `RUN/lora/best`; one that is there is replaced.
            RUN itself has to be there.
        write_adapter: writes the adapter and its scheduler into the folder that it is given and proves them there:
            if it raises, nothing is published.
        settings: the run's settings as TOML.
        record: goes into the manifest.
        stateful: what it takes to resume, by name; None for an adapter alone.
        adapter_bytes: how much `write_adapter` writes; it may need twice that on the way.

    Returns:
        The folder.

    Raises:
        CheckpointError: an object's state holds something that JSON and safetensors cannot; or the disk has no room
            for it or cannot be written to. What was there before is as it was.
    """
    from safetensors import SafetensorError

    partial = folder.with_name(f".{folder.name}.partial")
    states = {name: thing.state_dict() for name, thing in (stateful or {}).items()}
    try:
        if not folder.parent.exists():
            folder.parent.mkdir(exist_ok=True)
            _synchronise_folder(folder.parent.parent)
        shutil.rmtree(partial, ignore_errors=True)  # what an interrupted run left
        _require_room(folder, 2 * adapter_bytes + _tensor_bytes(states) + SMALL_FILES)
        partial.mkdir()
        write_adapter(partial)
        (partial / SETTINGS).write_text(settings, encoding="utf-8")
        if stateful is not None:
            _write_states(partial / RESUME, states)
        _write_manifest(partial, record)
        _synchronise(partial)
        replace_folder_atomic(partial, folder)
        _synchronise_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise _unwritten(folder, reason) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise _unwritten(folder, f"it needs {needed:,} bytes, {free:,} are free")


def _unwritten(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{folder.name} cannot be written to {str(folder.parent)!r}: {reason}; what was saved before is whole; make "
        "room there, or the folder writable, then go on with --resume_from_checkpoint auto"
    )


def _tensor_bytes(state: Any) -> int:
    """How many bytes the tensors in nested dictionaries, lists and tuples hold."""
    import torch

    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    parts = state.values() if isinstance(state, Mapping) else state if isinstance(state, list | tuple) else ()
    return sum(_tensor_bytes(part) for part in parts)


def _write_manifest(folder: Path, record: Record) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content = {"schema_version": SCHEMA_VERSION, **asdict(record), "files": files}
    content["sha256"] = _digest(content)
    (folder / MANIFEST).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content, its own digest left out."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _synchronise(folder: Path) -> None:
    """Wait until every file below `folder` is on the disk, and every name of one too."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        else:
            _synchronise_folder(path)
    _synchronise_folder(folder)


def _synchronise_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows writes names through and opens no folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_states(folder: Path, states: Mapping[str, Mapping[Any, Any]]) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    trees: dict[str, Any] = {}
    for name, state in states.items():
        if not re.fullmatch(r"[a-z0-9_-]+", name):
            raise ValueError(f"{name!r} names an object of a checkpoint; allowed are a-z, 0-9, _ and -")
        tensors: dict[str, Tensor] = {}
        trees[name] = _flatten(state, name, tensors)
        if tensors:
            save_file(tensors, folder / f"{name}.safetensors")
    (folder / STATE).write_text(json.dumps({"objects": trees}), encoding="utf-8")


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors put into `tensors` under a number and their path.

    JSON has neither tuples nor keys other than texts, so tuples and dictionaries become tagged lists. Python writes
    floats so that they read back as they were.
    """
    import torch

    if isinstance(value, torch.Tensor):
        name = f"{len(tensors)}:{path}"  # numbered, for {"a": {"b": x}, "a.b": y} has two tensors at a.b
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()  # a copy: shared memory is refused
        return {"tensor": name}
    if isinstance(value, Mapping):
        items = [[_key(key, path), _flatten(item, f"{path}.{key}", tensors)] for key, item in value.items()]
        return {"dict": items}
    if isinstance(value, list | tuple):
        items = [_flatten(item, f"{path}.{number}", tensors) for number, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise CheckpointError(
        f"{path} is a {type(value).__name__}, which a checkpoint cannot hold; allowed are tensors, numbers, texts, "
        "None, and dictionaries, lists and tuples of them"
    )


def _key(key: Any, path: str) -> int | str:
    if type(key) in (int, str):
        return key
    raise CheckpointError(f"{path} has a key that is a {type(key).__name__}; allowed are texts and whole numbers")


def _unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unflatten(item, tensors) for key, item in content}
    items = [_unflatten(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


# -------------------------------------------------------------------------------------------------------------- reading

_UNUSABLE = (KeyError, TypeError, ValueError, AttributeError, OverflowError)
"""What JSON of another form than ours brings about where it is used."""


def verify(folder: Path) -> Record:
    """Check every file of a checkpoint against its manifest.

    Returns:
        What the manifest records.

    Raises:
        CheckpointError: no checkpoint, or a broken one: one line with the first thing that is wrong.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint {str(folder)!r}: there is no such folder; check the path")
    content = _manifest(folder)
    if content is None:
        raise CheckpointError(f"{str(folder)!r} is not a whole checkpoint: it has no {MANIFEST}; pass another one")
    try:
        version, listed = content["schema_version"], dict(content["files"])
        if version != SCHEMA_VERSION:
            raise CheckpointError(
                f"checkpoint {str(folder)!r} has schema_version {version}, this release reads {SCHEMA_VERSION}; "
                "use the release of fewstep that wrote it"
            )
        if content["sha256"] != _digest(content):
            raise _broken(folder, f"{MANIFEST} is not the file that was written")
        for name, facts in listed.items():
            path = folder / name
            if not path.is_file():
                raise _broken(folder, f"{name} is missing")
            if path.stat().st_size != facts["bytes"] or sha256(path) != facts["sha256"]:
                raise _broken(folder, f"{name} is not the file that was written")
        return _record(content)
    except (*_UNUSABLE, OSError) as error:
        raise _broken(folder, f"{MANIFEST} cannot be used ({type(error).__name__}: {error})") from None


def load(folder: Path, stateful: Mapping[str, Stateful]) -> Record:
    """Verify a checkpoint and put its state into the given objects.

    All states are read before the first object is touched.

    Args:
        folder: `RUN/lora/checkpoint-N`.
        stateful: the objects, under the names that they were saved with.

    Raises:
        CheckpointError: broken, without state, or with other objects than those asked for.
    """
    record = verify(folder)
    path = folder / RESUME / STATE
    if not path.is_file():
        raise CheckpointError(
            f"{str(folder)!r} holds an adapter but nothing to resume from; allowed is a checkpoint-N folder; "
            "pass --resume_from_checkpoint latest"
        )
    trees = json.loads(path.read_text(encoding="utf-8"))["objects"]
    if trees.keys() != stateful.keys():
        missing, extra = sorted(stateful.keys() - trees.keys()), sorted(trees.keys() - stateful.keys())
        what = f"holds no {', '.join(missing)}" if missing else f"also holds {', '.join(extra)}, which nothing asks for"
        raise CheckpointError(
            f"checkpoint {str(folder)!r} {what}; resume with the settings that are saved in it, {SETTINGS}"
        )
    states = {name: _unflatten(trees[name], _tensors(folder / RESUME / f"{name}.safetensors")) for name in stateful}
    for name, thing in stateful.items():
        thing.load_state_dict(states[name])
    return record


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(path)) if path.is_file() else {}


def _broken(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {str(folder)!r} is broken: {what}; pass another one")


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest's content, or None where there is no file of that name."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(folder, f"{MANIFEST} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise _broken(folder, f"{MANIFEST} holds no JSON object")
    return content


def _record(content: Mapping[str, Any]) -> Record:
    return Record(
        step=int(content["step"]),
        base_model=str(content["base_model"]),
        base_fingerprint=str(content["base_fingerprint"]),
        step_counts=tuple(int(count) for count in content["step_counts"]),
        revision=content.get("revision"),
        more=dict(content.get("more", {})),
    )


# -------------------------------------------------------------------------------------------------------------- finding


def resolve(run_folder: Path, which: str | Path, *, warn: Callable[[str], None] | None = None) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means.

    Args:
        run_folder: OUTPUT_DIR/RUN_NAME.
        which: "latest": the newest whole one; "auto": the same, or None where the run has none at all; else its folder.
        warn: told, in one line, of each broken checkpoint that was passed over; without it a Python warning is issued.

    Returns:
        A folder that has been verified, or None for a fresh start.

    Raises:
        CheckpointError: there is none, or none that is whole.
    """
    if str(which) not in ("latest", "auto"):
        folder = at_home(which)
        verify(folder)
        return folder
    found = checkpoints(run_folder)
    for folder in found:
        try:
            verify(folder)
        except CheckpointError as error:
            (warn or _warn)(f"passed over: {error}")
        else:
            return folder
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {str(run_folder / 'lora')!r} is whole; "
            "start again under another --run_name, or pass the folder of one from elsewhere"
        )
    if str(which) == "auto":
        return None
    raise CheckpointError(
        f"no checkpoint in {str(run_folder / 'lora')!r}; allowed is 'latest' where there is one, 'auto' for that or a "
        "fresh start, or the folder of one; check --output_dir and --run_name"
    )


def prune(run_folder: Path, *, keep_last: int, keep_every: int = 0) -> list[Path]:
    """Remove a run's checkpoints beyond the newest `keep_last`; the finished adapter is none of them.

    Args:
        keep_last: 0 keeps all.
        keep_every: those whose step is a multiple of it stay as well; 0 for none.

    Returns:
        What was removed, each at once.
    """
    removed = []
    for folder in checkpoints(run_folder)[keep_last:] if keep_last else []:
        step = int(folder.name.removeprefix("checkpoint-"))
        if keep_every and step % keep_every == 0:
            continue
        remove_folder_at_once(folder)
        removed.append(folder)
    return removed


def drop_newer(run_folder: Path, resumed: Path) -> list[Path]:
    """Remove the checkpoints that were passed over for an older one, which a run is about to go on from.

    They are broken: left there, they would be the newest that `prune` keeps, in the place of whole ones.

    Returns:
        What was removed; nothing where `resumed` is none of the run's.
    """
    found = checkpoints(run_folder)
    places = [folder.resolve() for folder in found]
    newer = found[: places.index(resumed.resolve())] if resumed.resolve() in places else []
    for folder in newer:
        remove_folder_at_once(folder)
    return newer


def checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoint-N folders of a run, whole or not, the newest first."""
    numbered = {
        int(match[1]): path
        for path in (run_folder / "lora").glob("checkpoint-*")
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return [path for _, path in sorted(numbered.items(), reverse=True)]


def recorded(folder: Path) -> Record | None:
    """What an adapter's manifest records, without checking its files; None where it has no manifest of ours.

    Raises:
        CheckpointError: it has one that cannot be read.
    """
    content = _manifest(folder)
    if content is None or "base_fingerprint" not in content:
        return None
    try:
        return _record(content)
    except _UNUSABLE as error:
        raise _broken(folder, f"{MANIFEST} cannot be used ({type(error).__name__}: {error})") from None


def recorded_base(folder: Path) -> str | None:
    """The base that the adapter in `folder` was trained for: from its manifest, else from its settings, else None."""
    record = recorded(folder)
    if record is not None:
        return record.base_model
    base = _settings(folder).get("base_model")
    return base if isinstance(base, str) else None


def recorded_steps(folder: Path) -> tuple[int, ...] | None:
    """The step counts that the adapter in `folder` promises, or None where nothing states them."""
    record = recorded(folder)
    if record is not None:
        return record.step_counts
    steps = _settings(folder).get("num_inference_steps")
    if not isinstance(steps, list) or any(type(count) is not int for count in steps):
        return None
    return tuple(steps)


def recorded_span(folder: Path) -> float:
    """The share of the schedule in which the timesteps of the adapter in `folder` lie; 1 where nothing states it."""
    span = _settings(folder).get("timestep_span", 1.0)
    return float(span) if isinstance(span, float | int) and 0 < span <= 1 else 1.0


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read ({error}); fetch or copy the adapter again") from None


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)
