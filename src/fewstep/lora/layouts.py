"""The layouts in which adapters are passed around, brought into one form: for each module A, B and alpha.

| layout | a key | where alpha is |
|---|---|---|
| diffusers | `unet.….to_q.lora_A.weight` | `lora_adapter_metadata` in the header, or `unet.….to_q.alpha`, or nowhere |
| old diffusers | `unet.….attn1.processor.to_q_lora.down.weight` | nowhere |
| kohya | `lora_unet_…_to_q.lora_down.weight` | `lora_unet_…_to_q.alpha` |
| PEFT | `base_model.model.….to_q.lora_A.weight` | `adapter_config.json` beside the file |

Module names are looked up in the UNet itself, so that nothing is guessed from underscores. What is not understood is
refused: an adapter that is attached in part is as wrong as one that is ignored.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..pickles import is_bomb
from .source import PEFT_CONFIG_NAME, AdapterSource

Layout = Literal["diffusers", "kohya", "peft"]

HEADER_KEY = "lora_adapter_metadata"
"""Where in a safetensors header diffusers keeps the adapter's configuration."""

KOHYA = "lora_unet_"
PEFT = "base_model.model."

# Ends of the names of A and B in all layouts; `_lora` in front of `.down` is how old diffusers named a projection.
ENDS = re.compile(
    r"(?P<old>_lora)?\.(?:lora_|lora\.|lora_linear_layer\.)?(?P<matrix>A|B|down|up)(?:\.(?!weight$)[\w-]+)?\.weight$"
)
DOWN = ("A", "down")

OTHER_KINDS = {
    r"dora_scale|lora_magnitude_vector": "a DoRA",
    r"\.hada_": "a LoHa",
    r"\.lokr_": "a LoKr",
    r"\.lora_mid": "a Tucker-decomposed LoRA",
    r"\.lora_B\.bias": "a LoRA with biases",
    r"\.on_input$": "an IA3",
    r"\.oft_": "an OFT",
    r"\.diff(_b)?$": "a LyCORIS of whole weights",
    r"\.[wb]_norm$": "a LyCORIS of norms",
}
"""What is in a key, as a pattern -> the kind of adapter that has such keys, beside LoRA's or instead of them."""

FOREIGN = {"lycoris_": "LyCORIS", "diffusion_model.": "ComfyUI"}
"""How keys begin in layouts that are not read -> whose they are."""

CHANGES_THE_BASE = re.compile(r"pissa|corda|olora$|loftq$|lora_ga$", re.IGNORECASE)
"""PEFT's `init_lora_weights` by which training begins with other weights of the base, which no adapter holds."""


@dataclass(frozen=True)
class LoraPair:
    """The update (alpha / rank) B A of one module."""

    down: Tensor
    """A: [rank, in] or, of a convolution, [rank, in, kh, kw]; fp32."""
    up: Tensor
    """B: [out, rank] or [out, rank, 1, 1]; fp32."""
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class ParsedAdapter:
    """An adapter read, whatever its layout."""

    layout: Layout
    pairs: dict[str, LoraPair]
    """Module name in the UNet -> its update."""
    alpha_assumed: bool
    """Nothing said what alpha is, so that it was taken to be the rank."""


def read(source: AdapterSource, modules: Iterable[str], *, allow_pickle: bool) -> ParsedAdapter:
    """Read the adapter of `source` for a UNet with these `modules`.

    Raises:
        CheckpointError: unreadable, not an adapter, of a kind that is not LoRA on a UNet, of another architecture, or
            of a strength that nothing states.
    """
    tensors, header = _open(source, allow_pickle)
    tensors = {
        key: value for key, value in tensors.items() if not key.endswith((".position_ids", ".num_batches_tracked"))
    }
    _refuse_other_kinds(tensors, source)
    layout = _layout(tensors, source)
    config = _config(source, header, layout)
    matrices, alphas = _sort(tensors, _names(modules, layout), source, layout)
    pairs: dict[str, LoraPair] = {}
    assumed = False
    for module, (down, up) in sorted(matrices.items()):
        rank = down.shape[0]
        if rank == 0 or down.is_complex() or up.is_complex():
            raise CheckpointError(
                f"adapter {source.name!r}: {module} has rank {rank} and is {down.dtype}; allowed are real numbers and "
                "a rank of at least 1; save or fetch it again"
            )
        stated = alphas.get(module)
        if config is not None:
            beside, stated = stated, _alpha(config, module, rank, source)
            if beside is not None and not math.isclose(beside, stated, rel_tol=1e-3):  # it may be in half precision
                raise CheckpointError(
                    f"adapter {source.name!r} states two alphas for {module}, {stated:g} and {beside:g} beside its "
                    "weights; allowed is one; save or fetch it again"
                )
        assumed |= stated is None
        pairs[module] = LoraPair(down.float(), up.float(), float(rank) if stated is None else stated)
    return ParsedAdapter(layout, pairs, assumed)


def _open(source: AdapterSource, allow_pickle: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    path = source.weights
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"adapter {source.name!r} cannot be read ({error}); fetch or copy {path.name} again"
            ) from None
    if not allow_pickle:
        raise CheckpointError(
            f"adapter {source.name!r} is pickled; allowed are .safetensors files, or pickles that you trust, of which "
            "only tensors are read; add --allow_pickle"
        )
    if is_bomb(path):
        raise CheckpointError(
            f"adapter {source.name!r} is compressed, and unpacks to more than it is; allowed are files as torch saves "
            "them; fetch it from whoever made it"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"adapter {source.name!r} holds more than tensors, or is damaged ({reason})") from None
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}, {}


def _refuse_other_kinds(tensors: Mapping[str, Tensor], source: AdapterSource) -> None:
    for pattern, kind in OTHER_KINDS.items():
        if any(re.search(pattern, key) for key in tensors):
            raise CheckpointError(
                f"adapter {source.name!r} is {kind}; allowed is plain LoRA; merge or convert it first"
            )
    text = [
        key
        for key in tensors
        if re.match(r"lora_te\d?_|text_encoder(_2)?\.|base_model\.model\.text_(model|encoder)", key)
    ]
    if text:
        raise CheckpointError(
            f"adapter {source.name!r} also changes the text encoder ({len(text)} tensors, first {text[0]}); allowed "
            "are adapters of the UNet alone; without that part its pictures would not be its own"
        )


def _layout(tensors: Mapping[str, Tensor], source: AdapterSource) -> Layout:
    if not any(ENDS.search(key) for key in tensors):
        first = next(iter(tensors), "nothing at all")
        raise CheckpointError(
            f"{source.name!r} is not an adapter: it holds {first}; allowed is a LoRA for the UNet in diffusers, "
            "kohya or PEFT layout; a full model goes to --base_model"
        )
    for key in tensors:
        for start, whose in FOREIGN.items():
            if key.startswith(start):
                raise CheckpointError(
                    f"adapter {source.name!r} names its layers as {whose} does ({key}); allowed are the layouts of "
                    "diffusers, kohya and PEFT; convert it first"
                )
    if any(key.startswith(KOHYA) for key in tensors):
        return "kohya"
    return "peft" if any(key.startswith(PEFT) for key in tensors) else "diffusers"


def _config(source: AdapterSource, header: Mapping[str, str], layout: Layout) -> dict[str, Any] | None:
    """What is stated about rank and alpha; None for a diffusers file without a header."""
    if layout == "kohya":
        return None
    try:
        if layout == "peft":
            path = source.folder / PEFT_CONFIG_NAME
            if not path.is_file():
                raise CheckpointError(
                    f"adapter {source.name!r} is in PEFT layout and has no {PEFT_CONFIG_NAME} beside it, so that its "
                    "alpha is unknown; a stock pipeline would load nothing from it and say so in one warning; add that "
                    "file, or save the adapter with StableDiffusionPipeline.save_lora_weights"
                )
            config = json.loads(path.read_text(encoding="utf-8"))
        elif HEADER_KEY not in header:
            return None
        else:
            stated = json.loads(header[HEADER_KEY])
            # UNet2DConditionModel.save_lora_adapter leaves the prefix out.
            own = {key.removeprefix("unet."): value for key, value in stated.items() if key.startswith("unet.")}
            config = own or stated
        if not isinstance(config["lora_alpha"], int | float):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        where = PEFT_CONFIG_NAME if layout == "peft" else "its header"
        raise CheckpointError(
            f"adapter {source.name!r}: {where} does not state lora_alpha; save or fetch it again"
        ) from None
    for option, meaning in (("use_dora", "DoRA"), ("modules_to_save", "whole modules beside LoRA")):
        if config.get(option):
            raise CheckpointError(
                f"adapter {source.name!r} is {meaning} ({option}); allowed is plain LoRA; merge it first"
            )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and CHANGES_THE_BASE.match(init):
        raise CheckpointError(
            f"adapter {source.name!r} was begun with init_lora_weights {init!r}, which changes the base's weights: it "
            "fits no base as published; allowed is plain LoRA; convert it first, where PEFT's save_pretrained can, by "
            "path_initial_model_for_weight_conversion"
        )
    return dict(config)


def _alpha(config: Mapping[str, Any], module: str, rank: int, source: AdapterSource) -> float:
    """The alpha that PEFT would take for `module`, as the scale alpha / rank times the rank."""
    try:
        alpha = float(config["lora_alpha"])
        for pattern, own in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = float(own)
                break
    except (ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
        raise CheckpointError(
            f"adapter {source.name!r} states no alpha for {module} that can be used ({error}); save or fetch it again"
        ) from None
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _names(modules: Iterable[str], layout: Layout) -> dict[str, str]:
    """What a layout calls a module -> the module's name."""
    return {(KOHYA + name.replace(".", "_") if layout == "kohya" else name): name for name in modules}


def _sort(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], source: AdapterSource, layout: Layout
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    """The pairs (A, B) by module, and the alphas that are beside them."""
    halves: dict[str, dict[bool, Tensor]] = {}
    alphas: dict[str, float] = {}
    strangers: list[str] = []
    for key, tensor in tensors.items():
        if key.endswith(".alpha"):
            owner = names.get(_module(key.removesuffix(".alpha"), old=False))
            if owner is None or tensor.numel() != 1:
                strangers.append(key)
            else:
                alphas[owner] = float(tensor)
            continue
        end = ENDS.search(key)
        module = None if end is None else names.get(_module(key[: end.start()], bool(end["old"])))
        if end is None or module is None or tensor.ndim < 2:
            strangers.append(key)
        else:
            halves.setdefault(module, {})[end["matrix"] in DOWN] = tensor
    lonely = [module for module, pair in halves.items() if len(pair) < 2]
    lonely += [module for module in alphas if module not in halves]
    if strangers:
        raise CheckpointError(
            f"adapter {source.name!r} was made for another architecture: {len(strangers)} of its {len(tensors)} "
            f"tensors belong to no layer of this base, first {strangers[0]}; pass the base it was made for with "
            "--base_model"
        )
    if lonely:
        raise CheckpointError(
            f"adapter {source.name!r} is incomplete: {lonely[0]} has half a LoRA; fetch or copy it again"
        )
    return {module: (pair[True], pair[False]) for module, pair in halves.items()}, alphas


def _module(stem: str, old: bool) -> str:
    """The module of a key without its end; old diffusers put projections in a processor, `to_out.0` as `to_out`."""
    for prefix in (PEFT, "unet."):
        stem = stem.removeprefix(prefix)
    if old:
        stem = stem.replace(".processor.", ".")
        stem = stem + ".0" if stem.endswith(".to_out") else stem
    return stem
