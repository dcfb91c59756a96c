"""What a benchmark has found so far, on disk batch by batch, so that a run that was stopped goes on where it was.

A cell is one batch of one arm: what the judges found about it, written when its pictures are saved. Several processes
share the work by writing cells into the same folder. An arm is taken up again only if it is the same arm in every
respect, so that steps or adapters may be added to a finished benchmark, and nothing is ever mixed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.arms import Arm
from fewstep.errors import InputError
from fewstep.files import write_tensors_atomic, write_text_atomic
from fewstep.pictures import Cell
from fewstep.records import ArmTiming

KEY, TIMING, MADE_WITH = "key.json", "timing.json", "made_with.json"


class Cells:
    """The cells of a benchmark, in ``OUTDIR/cells``.

    Args:
        folder: where they are.
        key: everything that all arms depend on.

    Raises:
        InputError: the folder holds cells of other settings; the line names the first that differs.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder = folder
        differing = _claim(folder, key)
        if differing is not None:
            name, found, wanted = differing[0], *_told(*differing[1:])
            raise InputError(
                f"{name} {wanted} came, the benchmark in {str(folder.parent)!r} has {found}; allowed is the same, "
                "or other steps and adapters; choose another --outdir"
            )

    def of(self, arm: Arm, key: Mapping[str, Any]) -> ArmCells:
        """The cells of one arm.

        Args:
            key: what its pictures depend on besides the arm itself, such as the weights that it draws with.

        Raises:
            InputError: there are cells of another arm of that name.
        """
        folder = self.folder / arm.id
        differing = _claim(folder, {**asdict(arm), **key})
        if differing is not None:
            name, found, wanted = differing[0], *_told(*differing[1:])
            raise InputError(
                f"arm {arm.id} came with {name} {wanted}, the one in {str(folder)!r} has {found}; allowed is the "
                "same; choose another --outdir, or another id for the adapter"
            )
        return ArmCells(folder)


def _told(found: Any, wanted: Any) -> tuple[str, str]:
    """Two values that differ; of two lists where they do first."""
    if not (isinstance(found, list | tuple) and isinstance(wanted, list | tuple)):
        return repr(found), repr(wanted)
    at = next((n for n, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), min(len(found), len(wanted)))

    def told(values: Sequence[Any]) -> str:
        there = f", number {at} of them {values[at]!r:.100}" if at < len(values) else ""
        return f"(a list of {len(values)}{there})"

    return told(found), told(wanted)


@dataclass(frozen=True)
class _Timed:
    """The content of `TIMING`."""

    conditions: dict[str, str]
    timings: tuple[ArmTiming, ...]


class ArmCells:
    """The cells of one arm: `Kept` for `evaluate`, and its timing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, number: int) -> Cell | None:
        """Cell `number`; None where it is not there, or not whole."""
        path = self._path(number)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                names = json.loads(file.metadata()["names"])  # safetensors keeps an order of its own
                tensors = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError):
            return None
        seconds = tuple(tensors.pop("seconds").tolist())
        found: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            judge, _, key = name.partition("/")
            found.setdefault(judge, {})[key] = value
        return Cell(found, seconds)

    def put(self, number: int, cell: Cell) -> None:
        """Keep a cell; its file appears whole or not at all."""
        tensors = {f"{judge}/{key}": value for judge, found in cell.found.items() for key, value in found.items()}
        tensors["seconds"] = torch.tensor(cell.seconds, dtype=torch.float64)
        names = {"names": json.dumps(list(tensors))}
        write_tensors_atomic(self._path(number), tensors, names)

    def timings(self, conditions: Mapping[str, str]) -> tuple[ArmTiming, ...] | None:
        """What was timed before, if it was under these conditions: times of two machines are never set side by side."""
        path = self._folder / TIMING
        if not path.exists():
            return None
        try:
            found = TypeAdapter(_Timed).validate_json(path.read_bytes())
        except ValidationError:
            return None
        return found.timings if found.conditions == conditions else None

    def put_timings(self, timings: tuple[ArmTiming, ...], conditions: Mapping[str, str]) -> None:
        """Keep what was timed, and under which conditions."""
        kept = {"conditions": dict(conditions), "timings": [asdict(timing) for timing in timings]}
        write_text_atomic(self._folder / TIMING, json.dumps(kept, indent=1) + "\n")

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.safetensors"


def make_room(folder: Path, *, resume: bool, overwrite: bool, finished: bool) -> None:
    """Make room for cells, or leave those that are to be gone on with.

    Args:
        folder: where the cells are.
        resume: whether to go on with them.
        overwrite: whether to begin anew.
        finished: whether the benchmark that they are of was written up.

    Raises:
        InputError: there is a benchmark, and nobody said what is to become of it.
    """
    if resume or not (finished or folder.exists()):
        return
    if not overwrite and (finished or any(folder.glob("*/*.safetensors"))):
        state, further = ("finished", "add to it") if finished else ("stopped", "go on with it")
        raise InputError(
            f"{str(folder.parent)!r} holds a benchmark that was {state}; allowed is to {further} with the settings "
            "that it was begun with, to replace it, or another folder; pass --resume, --overwrite or another --outdir"
        )
    if folder.exists():
        shutil.rmtree(folder)


def mixed(folder: Path, circumstances: Mapping[str, str]) -> dict[str, list[str]]:
    """Note with which versions and on which machine cells come into `folder`; returns what was not always the same.

    Pictures of two machines or releases are set side by side, for they differ by rounding alone as a rule, but not
    without a word.
    """
    file = folder / MADE_WITH
    try:
        found: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or cut short
        found = {}
    for name, now in circumstances.items():
        if now not in found.setdefault(name, []):
            found[name].append(now)
    write_text_atomic(file, json.dumps(found, indent=1) + "\n")
    return {name: values for name, values in found.items() if len(values) > 1}


def _claim(folder: Path, key: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Write `key` into a folder that has none; else the first (name, theirs, ours) that differs, or None."""
    file, wanted = folder / KEY, json.loads(json.dumps(key))
    if not file.exists():
        write_text_atomic(file, json.dumps(wanted, indent=1) + "\n")
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return KEY, "what cannot be read", "a whole file"
    names = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    return (names[0], found.get(names[0]), wanted.get(names[0])) if names else None
