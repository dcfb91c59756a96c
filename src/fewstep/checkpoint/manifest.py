"""The manifest: what an adapter knows about itself, and the digest of every other file beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import sha256

MANIFEST = "manifest.json"
SCHEMA_VERSION = 3

SIGN = b'"base_fingerprint"'
"""By this key a manifest is told to be ours, even where it is not JSON any more: other programs use the name, too."""

UNUSABLE = (KeyError, TypeError, ValueError, AttributeError, OverflowError)
"""What JSON of another form than ours brings about where it is used."""


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


def write_manifest(folder: Path, record: Record) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content = {"schema_version": SCHEMA_VERSION, **asdict(record), "files": files}
    content["sha256"] = _digest(content)
    (folder / MANIFEST).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def verify(folder: Path) -> Record:
    """Check every file of a checkpoint against its manifest.

    Returns:
        What the manifest records.

    Raises:
        CheckpointError: no checkpoint, or a broken one: one line with the first thing that is wrong.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint {str(folder)!r}: there is no such folder; check the path")
    content = _parsed(folder)
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
            raise broken(folder, f"{MANIFEST} is not the file that was written")
        for name, facts in listed.items():
            path = folder / name
            if not path.is_file():
                raise broken(folder, f"{name} is missing")
            if path.stat().st_size != facts["bytes"] or sha256(path) != facts["sha256"]:
                raise broken(folder, f"{name} is not the file that was written")
        return record_of(content)
    except (*UNUSABLE, OSError) as error:
        raise broken(folder, f"{MANIFEST} cannot be used ({type(error).__name__}: {error})") from None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The content of our manifest; None where there is no file of that name, or another program's.

    Raises:
        CheckpointError: it cannot be read, or names SIGN and is broken.
    """
    path = folder / MANIFEST
    try:
        if not path.is_file() or SIGN not in path.read_bytes():
            return None
    except OSError as error:
        raise broken(folder, f"{MANIFEST} cannot be read ({error})") from None
    return _parsed(folder)


def _parsed(folder: Path) -> dict[str, Any] | None:
    """What a file of the manifest's name holds, whoever wrote it, or None where there is none."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise broken(folder, f"{MANIFEST} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise broken(folder, f"{MANIFEST} holds no JSON object")
    return content


def record_of(content: Mapping[str, Any]) -> Record:
    return Record(
        step=int(content["step"]),
        base_model=str(content["base_model"]),
        base_fingerprint=str(content["base_fingerprint"]),
        step_counts=tuple(int(count) for count in content["step_counts"]),
        revision=content.get("revision"),
        more=dict(content.get("more", {})),
    )


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content, its own digest left out."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def broken(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {str(folder)!r} is broken: {what}; pass another one")
