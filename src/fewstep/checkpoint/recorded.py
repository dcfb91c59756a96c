"""What an adapter's folder says of it, for those who only draw with it; its files are not checked."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .manifest import MANIFEST, UNUSABLE, Record, broken, read_manifest, record_of
from .names import SETTINGS

ASKED_FOR = ("base_model", "num_inference_steps", "timestep_span", "prediction_type")
"""The settings that are read here: a text without any of them is not ours."""


def recorded(folder: Path) -> Record | None:
    """What an adapter's manifest records, without checking its files; None where it has no manifest of ours.

    Raises:
        CheckpointError: it has one that cannot be read.
    """
    content = read_manifest(folder)
    if content is None or "base_fingerprint" not in content:
        return None
    try:
        return record_of(content)
    except UNUSABLE as error:
        raise broken(folder, f"{MANIFEST} cannot be used ({type(error).__name__}: {error})") from None


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


def recorded_span(folder: Path) -> float | None:
    """The share of the schedule in which the timesteps of the adapter in `folder` lie; None where nothing states it."""
    span = _settings(folder).get("timestep_span")
    return float(span) if isinstance(span, float | int) and 0 < span <= 1 else None


@dataclass(frozen=True)
class Origin:
    """The base that an adapter was trained on, as far as that is recorded; `prediction_type`: what it predicted."""

    base_model: str
    revision: str | None = None
    prediction_type: str | None = None


def recorded_origin(folder: Path) -> Origin | None:
    """The base of the adapter in `folder`, and how it was opened; None where nothing states it."""
    base, record = recorded_base(folder), recorded(folder)
    if base is None:
        return None
    return Origin(base, record.revision if record else None, recorded_prediction_type(folder))


def recorded_prediction_type(folder: Path) -> str | None:
    """What the base predicted when the adapter in `folder` was trained; None where nothing states it."""
    found = _settings(folder).get("prediction_type")
    return found if found in ("epsilon", "v_prediction") else None


def _settings(folder: Path) -> dict[str, Any]:
    """Those of training; none where there is no such file, or where it is another program's that TOML cannot read."""
    path, text = folder / SETTINGS, ""
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        if text and not any(name in text for name in ASKED_FOR):
            return {}
        raise CheckpointError(f"{str(path)!r} cannot be read ({error}); fetch or copy the adapter again") from None
