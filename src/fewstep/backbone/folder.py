"""Open a diffusers folder, component by component, checking what is there before reading it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..errors import CheckpointError, InputError
from ..pickles import is_bomb
from ..quiet import quiet_libraries
from . import fingerprint
from .loading import Parts, read_json
from .shapes import Shapes

COMPONENTS = {
    "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "vae": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "text_encoder": ("model", "pytorch_model"),
}
"""Component -> the stems of its safetensors and its pickled file."""

VARIANTS = {None: "", "fp16": ".fp16"}
"""What diffusers calls a variant -> what the names of its files have before their ending; the best first."""

CONFIGS = dict.fromkeys(COMPONENTS, "config.json") | {"scheduler": "scheduler_config.json"}

Network = TypeVar("Network", bound=torch.nn.Module)


@dataclass(frozen=True)
class Weights:
    """The files that hold a component's weights."""

    files: tuple[Path, ...]
    variant: str | None
    """One of VARIANTS."""
    pickled: bool


def find_weights(folder: Path, component: str, allow_pickle: bool) -> Weights | None:
    """The weights of `component`: safetensors, whole or in shards, else a pickle; plain, else in half precision."""
    place = folder / component
    stem, pickled_stem = COMPONENTS[component]
    for variant, part in VARIANTS.items():
        single = place / f"{stem}{part}.safetensors"
        if single.is_file():
            return Weights((single,), variant, pickled=False)
        index = place / f"{stem}.safetensors.index{part}.json"
        if index.is_file():
            names = set(read_json(index, str(folder)).get("weight_map", {}).values())
            shards = tuple(sorted(place / name for name in names))
            if shards and all(shard.is_file() for shard in shards):
                return Weights(shards, variant, pickled=False)
    for variant, part in VARIANTS.items():
        pickle = place / f"{pickled_stem}{part}.bin"
        if allow_pickle and pickle.is_file():
            return Weights((pickle,), variant, pickled=True)
    return None


def weight_patterns(component: str, allow_pickle: bool) -> list[Sequence[str]]:
    """What to fetch of a repository until `find_weights` finds something, the best first."""
    stem, pickled_stem = COMPONENTS[component]
    parts = VARIANTS.values()
    wanted: list[Sequence[str]] = [
        (f"{component}/{stem}{part}.safetensors", f"{component}/{stem}{part}-*-of-*.safetensors") for part in parts
    ]
    return wanted + [(f"{component}/{pickled_stem}{part}.bin",) for part in parts] if allow_pickle else wanted


def read_shapes(folder: Path, name: str) -> Shapes:
    """The shapes of the architecture in a diffusers folder.

    Raises:
        InputError: it is no diffusers folder.
    """
    missing = [f"{part}/{file}" for part, file in CONFIGS.items() if not (folder / part / file).is_file()]
    if missing:
        if any((folder / file).is_file() for file in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")):
            hint = "this is an adapter: pass it as --lora_path, and its base as --base_model"
        else:
            hint = "pass the folder that has model_index.json in it"
        raise InputError(
            f"base model {name!r} is no diffusers folder: it has no {missing[0]}; allowed is a folder with "
            f"unet, vae, text_encoder, tokenizer and scheduler; {hint}"
        )
    return Shapes.from_configs(*(read_json(folder / part / CONFIGS[part], name) for part in COMPONENTS))


def load_folder(folder: Path, *, name: str, dtype: torch.dtype, allow_pickle: bool) -> Parts:
    """Read the diffusers folder of the base `name`; nothing is fetched, and the files' own precision does not matter.

    Raises:
        InputError: not a diffusers folder, not a supported architecture, or only pickled weights without leave.
        CheckpointError: files that are damaged, or weights that are missing in them.
    """
    read_shapes(folder, name).check(name)
    weights = {component: _weights(folder, component, name, allow_pickle) for component in COMPONENTS}
    _check_vocabulary(folder / "tokenizer", name)
    with quiet_libraries():
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        unet = _load(UNet2DConditionModel, folder, "unet", weights["unet"], name, dtype)
        vae = _load(AutoencoderKL, folder, "vae", weights["vae"], name, dtype)
        text_encoder = _load(CLIPTextModel, folder, "text_encoder", weights["text_encoder"], name, dtype)
        try:
            tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"), local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(_damaged(name, "tokenizer", error)) from None
    if text_encoder.config.vocab_size < len(tokenizer):
        raise CheckpointError(
            f"base model {name!r}: its tokenizer knows {len(tokenizer)} tokens and its text encoder "
            f"{text_encoder.config.vocab_size}; they must come from the same model; fetch or copy the folder again"
        )
    own = folder / "fewstep.json"
    configs = [folder / part / file for part, file in CONFIGS.items()]
    configs += [file for file in (folder / "tokenizer").iterdir() if file.is_file() and not file.name.startswith(".")]
    return Parts(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler_config=read_json(folder / "scheduler" / CONFIGS["scheduler"], name),
        fingerprint=fingerprint.of_files(folder, configs, [file for part in weights.values() for file in part.files]),
        defaults=read_json(own, name) if own.is_file() else {},
    )


def _weights(folder: Path, component: str, name: str, allow_pickle: bool) -> Weights:
    found = find_weights(folder, component, allow_pickle)
    if found is not None and found.pickled and is_bomb(found.files[0]):
        raise CheckpointError(
            f"base model {name!r}: {found.files[0].name} of the {component} is compressed, and unpacks to more than it "
            "is; allowed are files as torch saves them; fetch it from whoever made it"
        )
    if found is not None:
        return found
    if find_weights(folder, component, allow_pickle=True) is not None:
        raise InputError(
            f"base model {name!r}: the {component}'s weights are pickled; allowed are safetensors, or pickles that you "
            "trust, of which only tensors are read; add --allow_pickle"
        )
    others = sorted(file.name for file in (folder / component).iterdir() if file.name != CONFIGS[component])
    held = f"; it holds {', '.join(others[:3])}{f' and {len(others) - 3} more' if len(others) > 3 else ''}"
    raise InputError(
        f"base model {name!r} has no weights in {component}/{held if others else ''}; expected "
        f"{COMPONENTS[component][0]}.safetensors, or all its shards and their index; complete the folder"
    )


def _check_vocabulary(place: Path, name: str) -> None:
    """Refuse a tokenizer without its vocabulary: the library would make one of three tokens up, and say nothing."""
    lost = [file for file in ("vocab.json", "merges.txt") if not (place / file).is_file()]
    if lost and not (place / "tokenizer.json").is_file():
        raise CheckpointError(
            f"base model {name!r}: its tokenizer/ has no tokenizer.json, and no {' or '.join(lost)}; needed is "
            "tokenizer.json, or vocab.json and merges.txt; fetch or copy them from where the base is from"
        )


def _load(cls: type[Network], folder: Path, component: str, weights: Weights, name: str, dtype: torch.dtype) -> Network:
    """One network, every weight of it from the files: a library would fill gaps with random numbers and only warn."""
    loader: Any = cls
    try:
        network, info = loader.from_pretrained(
            str(folder / component),
            dtype=dtype,
            use_safetensors=not weights.pickled,  # pickles are read with weights_only=True by both libraries
            variant=weights.variant,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a damaged file makes of the libraries: they document no set of exceptions
        raise CheckpointError(_damaged(name, component, error)) from error
    missing = sorted(key for key in info["missing_keys"] if not key.endswith("position_ids"))
    if missing or info["mismatched_keys"]:
        which = missing[0] if missing else str(next(iter(info["mismatched_keys"])))
        raise CheckpointError(
            f"base model {name!r}: the {component}'s files do not fit its config.json, first at {which}; "
            "fetch or copy the folder again"
        )
    loaded: Network = network
    return loaded


def _damaged(name: str, component: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return f"base model {name!r}: its {component} cannot be read ({reason}); fetch or copy it again"
