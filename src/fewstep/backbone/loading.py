"""Open a base model: a registered name, a diffusers folder, a Hub id, or a single file in LDM layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import hub
from ..config import EMBEDDED_BASE
from ..errors import CheckpointError, InputError
from ..files import at_home
from ..schedule import NoiseSchedule
from .base import Backbone
from .registry import BASES, abilities_of, folder_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

GUIDANCE_SCALE = 7.5
TEACHER_STEPS = 50

WEIGHT_FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
"""Endings by which a missing path is told from a Hub id."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a source of a base holds, its networks on the CPU, in the precision that was asked for."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler_config: dict[str, Any]
    fingerprint: str
    defaults: Mapping[str, Any]
    """The content of `fewstep.json`: guidance_scale, resolution, teacher_steps, abilities; empty for most bases."""


def load_backbone(
    base_model: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    allow_pickle: bool = False,
    prediction_type: str | None = None,
    why: str = "asked for",
) -> Backbone:
    """Open the base model `base_model`, frozen, ready to take an adapter.

    Args:
        base_model: a registered name, a diffusers folder, an LDM-layout .safetensors or .ckpt file, or a Hub id. A path
            that exists comes before a Hub id of the same spelling.
        revision: branch, tag or commit of a Hub id.
        device: "auto" (the fastest at hand), "cpu", "cuda", "cuda:N", "mps", "xpu".
        dtype: precision of the frozen networks: "no" (fp32), "fp16", "bf16", or "auto" (half on CUDA, else fp32). The
            precision of the files does not matter.
        allow_pickle: also read .ckpt and .bin files, tensors only.
        prediction_type: overrules what the base's scheduler says.
        why: where the name came from, for the first printed line.

    Raises:
        InputError: no such base, not at hand, not of a supported make, or a device or precision that is not to be had.
        CheckpointError: its files are damaged or incomplete.
    """
    from .folder import load_folder
    from .single_file import load_single_file

    name = str(base_model)
    place = choose_device(device)
    precision = choose_dtype(dtype, place)
    path = at_home(name)
    from_hub = name not in BASES and not path.exists() and hub.looks_like_id(name) and not name.endswith(WEIGHT_FILES)
    if revision is not None and not from_hub:
        raise InputError(
            f"revision {revision!r} came with base model {name!r}, which is none of the Hub's; allowed is a Hub id "
            "OWNER/NAME; leave --revision out"
        )
    if not from_hub and name not in BASES and path.exists() and hub.looks_like_id(name):
        name = f"./{name}"  # as it is recorded: from elsewhere, where there is no such folder, it is no Hub id
    if name in BASES:
        parts = load_folder(_shipped_folder(name), name=name, dtype=precision, allow_pickle=False)
    elif path.is_dir():
        parts = load_folder(path, name=name, dtype=precision, allow_pickle=allow_pickle)
    elif path.is_file():
        parts = load_single_file(path, dtype=precision, allow_pickle=allow_pickle)
    elif from_hub:
        parts = _load_from_hub(name, revision=revision, dtype=precision, allow_pickle=allow_pickle, why=why)
    else:
        raise InputError(
            f"no base model {name!r}, {why}: there is no such file or folder; allowed is a diffusers folder, a "
            f".safetensors or .ckpt file, a Hub id OWNER/NAME, or {_names()}; check --base_model"
        )
    return _assemble(
        parts,
        name=name,
        why=why,
        device=place,
        dtype=precision,
        prediction_type=prediction_type,
        revision=revision,
        rebuilt=path if name not in BASES and path.is_dir() else None,
    )


def _assemble(
    parts: Parts,
    *,
    name: str,
    why: str,
    device: torch.device,
    dtype: torch.dtype,
    prediction_type: str | None,
    revision: str | None,
    rebuilt: Path | None,
) -> Backbone:
    schedule = NoiseSchedule.from_config(parts.scheduler_config, prediction_type)
    defaults = Defaults.of(parts, name)
    registered = name if name in BASES else defaults.abilities
    return Backbone(
        name=name,
        why=why,
        unet=parts.unet.to(device),
        vae=parts.vae.to(device),
        text_encoder=parts.text_encoder.to(device),
        tokenizer=parts.tokenizer,
        scheduler_config=parts.scheduler_config | {"prediction_type": schedule.prediction_type},
        schedule=schedule.to(device),
        device=device,
        dtype=dtype,
        guidance_scale=defaults.guidance_scale,
        resolution=defaults.resolution,
        teacher_steps=defaults.teacher_steps,
        abilities=None if registered is None else abilities_of(registered, rebuilt),
        fingerprint=parts.fingerprint,
        revision=revision,
    )


@dataclass(frozen=True)
class Defaults:
    """What is used where nothing is asked for: from the base's own `fewstep.json`, else Stable Diffusion's."""

    guidance_scale: float
    resolution: int
    teacher_steps: int
    abilities: str | None

    @classmethod
    def of(cls, parts: Parts, name: str) -> Defaults:
        """The defaults of a base.

        Raises:
            InputError: `fewstep.json` says something that cannot be.
        """
        given = parts.defaults
        sample_size = parts.unet.config.sample_size
        side = (max(sample_size) if isinstance(sample_size, list | tuple) else sample_size) or 64
        found = cls(
            guidance_scale=given.get("guidance_scale", GUIDANCE_SCALE),
            resolution=given.get("resolution", side * 8),
            teacher_steps=given.get("teacher_steps", TEACHER_STEPS),
            abilities=given.get("abilities"),
        )
        wrong = [
            *(["guidance_scale"] if not _is_number(found.guidance_scale) or found.guidance_scale < 0 else []),
            *(["resolution"] if not isinstance(found.resolution, int) or found.resolution % 8 else []),
            *(["teacher_steps"] if not isinstance(found.teacher_steps, int) or found.teacher_steps < 1 else []),
            *(["abilities"] if found.abilities is not None and found.abilities not in BASES else []),
        ]
        if wrong:
            raise InputError(
                f"base model {name!r}: fewstep.json has {wrong[0]} = {given[wrong[0]]!r}; allowed are a guidance_scale "
                "of 0 or more, a resolution that 8 divides, teacher_steps of 1 or more, and abilities of "
                f"{_names()}; correct it"
            )
        return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _names() -> str:
    return " or ".join(repr(name) for name in BASES)


def _shipped_folder(name: str) -> Path:
    folder = folder_of(name)
    if not (folder / "model_index.json").is_file():
        raise InputError(
            f"base model {name!r} has no weights in this installation ({folder} is missing or empty); "
            "install the package with its data, or rebuild it with `fewstep pretrain`"
        )
    return folder


# ------------------------------------------------------------------------------------------------------------- the Hub

CONFIG_PATTERNS = ("*.json", "unet/*.json", "vae/*.json", "text_encoder/*.json", "scheduler/*.json", "tokenizer/*")
"""A few hundred kilobytes that tell whether the gigabytes are worth fetching."""


def _load_from_hub(name: str, *, revision: str | None, dtype: torch.dtype, allow_pickle: bool, why: str) -> Parts:
    from .folder import COMPONENTS, find_weights, load_folder, read_shapes, weight_patterns

    try:
        folder = hub.snapshot(name, CONFIG_PATTERNS, revision)
        read_shapes(folder, name).check(name)
        for component in COMPONENTS:
            for patterns in weight_patterns(component, allow_pickle):
                if find_weights(folder, component, allow_pickle) is None:
                    folder = hub.snapshot(name, patterns, revision)
            if find_weights(folder, component, allow_pickle) is None:
                raise hub.NotAtHand(f"the copy here lacks the {component}'s weights in safetensors")
    except hub.NotAtHand as reason:
        raise InputError(missing_base(name, str(reason), revision, why)) from None
    return load_folder(folder, name=name, dtype=dtype, allow_pickle=allow_pickle)


def missing_base(name: str, reason: str, revision: str | None, why: str) -> str:
    """The one line for weights that are not at hand: the id, the cache folder, and three ways out."""
    at = f" --revision {revision}" if revision else ""
    return (
        f"base model {name!r}, {why}, is not at hand: {reason}, and it is not complete in the cache "
        f"{hub.cache_folder()}; "
        f'fetch it with `hf download {name}{at} --include "*.json" --include "*.txt" --include '
        '"*/diffusion_pytorch_model.safetensors" --include "text_encoder/model.safetensors"`, or pass a '
        "local copy with --base_model FOLDER|FILE, or use the base that "
        f"comes with fewstep: --base_model {EMBEDDED_BASE}"
    )


# ------------------------------------------------------------------------------------------------ device and precision


def choose_device(device: str) -> torch.device:
    """The device that `device` names; "auto" is CUDA, XPU, MPS or the CPU, the first there is.

    Raises:
        InputError: there is no such device here.
    """
    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if found is None else torch.device(found.type)
    chosen = torch.device(device)
    if chosen.type not in ("cpu", "meta", *_accelerators()):
        raise InputError(
            f"device {device!r} is not available here; allowed is a device that torch sees; "
            "use --device auto, or install a torch build for it"
        )
    if chosen.index is not None and chosen.index >= torch.accelerator.device_count():
        count = torch.accelerator.device_count()
        raise InputError(f"device {device!r} came, but there are {count}; allowed are numbers 0 to {count - 1}")
    return chosen


def _accelerators() -> list[str]:
    """The kinds of device beside the CPU that torch can use here."""
    kinds = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.mps}
    return [name for name, kind in kinds.items() if kind.is_available()]


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The precision of the frozen networks: "no" is fp32; "auto" is bf16 or else fp16 on CUDA, and fp32 elsewhere.

    Raises:
        InputError: an unknown name, or fp16 on a CPU, which computes it slowly and trains it badly.
    """
    if dtype == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        return torch.float32
    precisions = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if dtype not in precisions:
        raise InputError(f"mixed_precision {dtype!r} came; allowed: auto, no, fp16, bf16")
    if dtype == "fp16" and device.type == "cpu":
        raise InputError("mixed_precision fp16 came with the CPU; allowed there: no, bf16; use --mixed_precision no")
    return precisions[dtype]


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON object of the base `name`.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"base model {name!r}: {path} cannot be read ({error}); fetch or copy it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"base model {name!r}: {path} holds no JSON object; fetch or copy it again")
    return content
