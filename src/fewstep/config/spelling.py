"""Errors of one line: what came, what is allowed, and how it is typed."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo


def spell(value: Any) -> str:
    """A value as one types it on the command line: lists without brackets, words and numbers bare."""
    if isinstance(value, list | tuple):
        return " ".join(spell(item) for item in value)
    if isinstance(value, str | Path):
        text = str(value)
        return text if re.fullmatch(r"[^\s'\"]+", text) else repr(text)
    return f"{value:g}" if isinstance(value, float) else str(value)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that was most likely meant, if any is near."""
    found = difflib.get_close_matches(name.replace("-", "_"), list(names), n=1, cutoff=0.6)
    return found[0] if found else None


def one_line(error: ValidationError, settings: type[BaseModel]) -> str:
    """A pydantic error in one line: what came, what is allowed, the fix; further ones are counted."""
    details = error.errors(include_url=False)
    first = details[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        message = unknown_name(name, settings)
    elif first["type"] == "value_error":
        reason = str(first["ctx"]["error"])
        message = f"{name}: {reason}" if name else reason
    else:
        nothing = first["type"] == "missing" and len(first["loc"]) == 1  # else it is one of several that is missing
        message = refusal(name, "" if nothing else first["input"], settings)
    others = len({detail["loc"][:1] for detail in details}) - 1
    return " ".join(message.split()) + (f" (and {others} more)" if others else "")


def refusal(name: str, came: Any, settings: type[BaseModel]) -> str:
    """What came for a field, what is allowed there, and an example of it."""
    field = settings.model_fields[name]
    message = f"{name}: {_came(came)} came; allowed: {allowed(field)}"
    if not field.is_required() and field.default is not None and not isinstance(field.default, bool):
        message += f"; for example --{name} {spell(field.default)}"
    return message


def unknown_name(name: str, settings: type[BaseModel]) -> str:
    """The line for a name that no field has: the nearest one, or all of them where none is near."""
    near = nearest(name, settings.model_fields)
    fix = f"did you mean {near}?" if near else f"known are {', '.join(sorted(settings.model_fields))}"
    return f"unknown setting {name!r}; {fix}"


def _came(value: Any) -> str:
    """A value as it is quoted in an error: short."""
    text = spell(value) if value not in ("", (), []) else "nothing"
    return text if len(text) <= 60 else f"{text[:57]}..."


def allowed(field: FieldInfo) -> str:
    """In words, what a field takes: ``a whole number, at least 1``."""
    return _allowed(field.annotation, field.metadata)


def _allowed(annotation: Any, metadata: Iterable[Any]) -> str:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        inner, *extra = typing.get_args(annotation)
        return _allowed(inner, [*metadata, *extra])
    if origin in (typing.Union, types.UnionType):
        inner = next(part for part in typing.get_args(annotation) if part is not type(None))
        return _allowed(inner, metadata)
    if origin is Literal:
        return ", ".join(map(str, typing.get_args(annotation)))
    if origin is tuple:
        inner, *more = typing.get_args(annotation)
        return f"{'one or several' if more == [...] else f'{1 + len(more)} of them'}, each {_allowed(inner, [])}"
    kind = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}.get(annotation, "a text")
    return ", ".join([kind, *_bounds(metadata)])


def _bounds(metadata: Iterable[Any]) -> list[str]:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "multiple_of": "a multiple of"}
    # ``Annotated[int, Field(ge=1)]`` keeps its constraints one level down.
    flat = [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
    words |= {"pattern": "matching", "max_length": "of a length of at most", "min_length": "of a length of at least"}
    return [
        f"{word} {spell(getattr(part, bound))}"
        for part in flat
        for bound, word in words.items()
        if getattr(part, bound, None) is not None
    ]
