"""State as files: nested dictionaries, lists and tuples; tensors to safetensors, all else to JSON, both exactly."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import CheckpointError
from ..files import write_tensors_atomic
from .names import STATE

if TYPE_CHECKING:
    from torch import Tensor


class Stateful(Protocol):
    """Whatever can be put away and taken up again: optimizers, schedulers, scalers, adapters, counters."""

    def state_dict(self) -> Mapping[Any, Any]:
        """Nested dictionaries, lists and tuples of tensors, numbers, texts, booleans and None."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> object:
        """Take up what `state_dict()` gave."""
        ...


def write_states(folder: Path, states: Mapping[str, Mapping[Any, Any]]) -> None:
    folder.mkdir()
    trees: dict[str, Any] = {}
    for name, state in states.items():
        if not re.fullmatch(r"[a-z0-9_-]+", name):
            raise ValueError(f"{name!r} names an object of a checkpoint; allowed are a-z, 0-9, _ and -")
        tensors: dict[str, Tensor] = {}
        trees[name] = flatten(state, name, tensors)
        if tensors:
            write_tensors_atomic(folder / f"{name}.safetensors", tensors)
    (folder / STATE).write_text(json.dumps({"objects": trees}), encoding="utf-8")


def tensor_bytes(state: Any) -> int:
    """How many bytes the tensors in nested dictionaries, lists and tuples hold."""
    import torch

    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    parts = state.values() if isinstance(state, Mapping) else state if isinstance(state, list | tuple) else ()
    return sum(tensor_bytes(part) for part in parts)


def flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
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
        items = [[_key(key, path), flatten(item, f"{path}.{key}", tensors)] for key, item in value.items()]
        return {"dict": items}
    if isinstance(value, list | tuple):
        items = [flatten(item, f"{path}.{number}", tensors) for number, item in enumerate(value)]
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


def unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unflatten(item, tensors) for key, item in content}
    items = [unflatten(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(path)) if path.is_file() else {}
