"""Taking up the state that a checkpoint holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..errors import CheckpointError
from .manifest import Record, verify
from .names import RESUME, SETTINGS, STATE
from .state import Stateful, read_tensors, unflatten


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
    states = {name: unflatten(trees[name], read_tensors(folder / RESUME / f"{name}.safetensors")) for name in stateful}
    for name, thing in stateful.items():
        thing.load_state_dict(states[name])
    return record
