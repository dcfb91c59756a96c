"""Where an adapter is: a file, a folder, or a repository on the Hub."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path

from .. import hub
from ..errors import CheckpointError
from ..files import at_home

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
PEFT_NAME = "adapter_model.safetensors"
PEFT_CONFIG_NAME = "adapter_config.json"

PATTERNS = (WEIGHTS_NAME, PEFT_NAME, PEFT_CONFIG_NAME, "manifest.json", "settings.toml", "scheduler/*.json")
"""What is fetched of a repository: the adapter and what says how it was made."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class AdapterSource:
    """A file with an adapter's weights, and the folder that may say more about it."""

    name: str
    """As it was asked for."""
    weights: Path
    folder: Path


def locate(path: str | Path | None = None, hub_id: str | None = None, *, flag: str = "lora_path") -> AdapterSource:
    """Find the file with the weights of an adapter, fetching it if need be; it is not read.

    Args:
        path: a file, or a folder with one.
        hub_id: OWNER/NAME, or OWNER/NAME/FILE for a file of another name than the usual ones.
        flag: where the path came from, for whoever got it wrong.

    Raises:
        CheckpointError: there is none, or there are several and none has a usual name.
        ValueError: neither of the two was given, or both.
    """
    if (path is None) == (hub_id is None):
        raise ValueError("locate takes a path or a hub_id")
    if path is not None:
        name, place = str(path), at_home(path)
        if place.is_file():
            return AdapterSource(name, place, place.parent)
        if not place.is_dir():
            hint = ", or name one on the Hub with --lora_id" if flag == "lora_path" else ""
            raise CheckpointError(
                f"no adapter {name!r}: there is no such file or folder; allowed is a folder with {WEIGHTS_NAME} or a "
                f".safetensors file; check --{flag}{hint}"
            )
    else:
        name = str(hub_id)
        place, wanted = _fetch(name)
        if wanted is not None:
            return AdapterSource(name, wanted, wanted.parent)
    return AdapterSource(name, _choose(place, name), place)


def _choose(folder: Path, name: str) -> Path:
    for usual in (WEIGHTS_NAME, PEFT_NAME):
        if (folder / usual).is_file():
            return folder / usual
    found = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    if len(found) == 1:
        return found[0]
    inside = sorted(file for usual in (WEIGHTS_NAME, PEFT_NAME) for file in folder.glob(f"**/{usual}"))
    pickles = [file.name for file in folder.iterdir() if file.suffix in PICKLES]
    if found:
        came, fix = f"holds {len(found)} .safetensors files and none called {WEIGHTS_NAME}", "name the file itself"
    elif inside:
        came, fix = f"holds no {inside[-1].name} itself", f"pass the folder inside, for example {inside[-1].parent}"
    elif pickles:
        came, fix = f"holds pickled weights alone ({pickles[0]})", "name the file itself, with --allow_pickle"
    else:
        came, fix = "holds no .safetensors file", "pass the folder that was written by training, lora/final"
    raise CheckpointError(f"adapter {name!r} {came}; allowed is one file with an adapter; {fix}")


def _fetch(hub_id: str) -> tuple[Path, Path | None]:
    """The cached folder of a repository, and the file in it if one was asked for by name."""
    repository, _, file = hub_id, "", ""
    if hub_id.count("/") > 1:
        owner, project, file = hub_id.split("/", 2)
        repository = f"{owner}/{project}"
    command = f"`hf download {repository}{' ' + file if file else ''}`"
    try:
        if not hub.looks_like_id(repository):
            raise hub.NotAtHand("that is no OWNER/NAME")
        inside, exactly = glob.escape(file.rpartition("/")[0]), glob.escape(file)  # names with brackets are names
        beside = tuple(f"{inside}/{pattern}" for pattern in PATTERNS) if inside else PATTERNS
        folder = hub.snapshot(repository, (*beside, exactly) if file else beside)
        if file and not (folder / file).is_file():
            raise hub.NotAtHand(f"it has no file {file}, or the copy here lacks it")
        if not file and not any((folder / usual).is_file() for usual in (WEIGHTS_NAME, PEFT_NAME)):
            raise hub.NotAtHand(
                f"it has no {WEIGHTS_NAME}, or the copy here lacks it; name its file as {repository}/FILE"
            )
    except hub.NotAtHand as reason:
        raise CheckpointError(
            f"adapter {hub_id!r} is not at hand: {reason}, and it is not in the cache {hub.cache_folder()}; "
            f"fetch it with {command}, or pass a local copy with --lora_path"
        ) from None
    return folder, folder / file if file else None
