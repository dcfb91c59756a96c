"""The checkpoints of a run: found, chosen, pruned."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

from ..errors import CheckpointError
from ..files import at_home, remove_folder_at_once
from .manifest import verify


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


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)
