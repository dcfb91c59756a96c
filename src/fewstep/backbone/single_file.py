"""Open a single file in LDM layout, as Stable Diffusion 1.5's relatives are passed around; nothing touches a network.

The configurations and the tokenizer, which such a file does not hold, are package data.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import sd15
from ..errors import CheckpointError, InputError
from ..pickles import is_bomb
from ..quiet import quiet_libraries
from . import fingerprint
from .loading import Parts, read_json
from .shapes import ALLOWED, CHANNELS, Shapes

if TYPE_CHECKING:
    from transformers import CLIPTextModel

UNET = "model.diffusion_model."
TEXT_ENCODER = "cond_stage_model.transformer."
AVERAGED = "model_ema."
"""Before the names of the UNet's averaged weights, which are UNET's without `model.` and their other dots."""

CONV_IN = UNET + "input_blocks.0.0.weight"
CONV_OUT = UNET + "out.2.weight"
LATENTS = "first_stage_model.post_quant_conv.weight"
ATTENTION = UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
EMBEDDING = "text_model.embeddings.token_embedding.weight"
OLD_EMBEDDING = "embeddings.token_embedding.weight"
TWO_ENCODERS = "conditioner.embedders.1."
V_PREDICTION = "v_pred"
ZERO_SNR = "ztsnr"

LIGHTNINGS_CALLBACK = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
"""The class by which Lightning's checkpoints, as the original releases are, name an entry of theirs."""


class _Callback:
    """Stands for LIGHTNINGS_CALLBACK: a name, nothing that runs."""


def load_single_file(path: Path, *, dtype: torch.dtype, allow_pickle: bool, configs: Path = sd15.FOLDER) -> Parts:
    """Read the file `path`, of its UNet the weights that other tools draw with: those under `model.diffusion_model.`.

    Averaged weights (`model_ema.`) that differ from them are left aside with a `UserWarning`: in merges and fine-tunes
    they are often those of another model.

    Whether the network predicts v, and whether its schedule ends at zero SNR, is taken from the marks that such files
    carry (keys `v_pred` and `ztsnr`, or `modelspec.prediction_type` in the header); without a mark it is epsilon.

    Args:
        path: .safetensors, or with `allow_pickle` a pickled file, of which only tensors are read.
        configs: a diffusers folder with the configurations that the weights fit.

    Raises:
        InputError: pickled without leave, not an LDM-layout checkpoint, or not a supported architecture.
        CheckpointError: damaged or incomplete.
    """
    weights, header = _read(path, allow_pickle)
    left_aside = _differ(_take_averages(weights), weights)
    with quiet_libraries():
        from diffusers import AutoencoderKL, UNet2DConditionModel

        networks: dict[str, Any] = {}
        for part, cls in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
            try:
                networks[part] = cls.from_single_file(
                    weights, config=str(configs), subfolder=part, dtype=dtype, local_files_only=True
                )
            except (RuntimeError, ValueError, KeyError, AttributeError) as error:
                raise CheckpointError(_unfit(path, part, " ".join(str(error).split())[:200])) from error
            empty = [name for name, weight in networks[part].named_parameters() if weight.is_meta]
            if empty:
                raise CheckpointError(_unfit(path, part, f"it lacks {empty[0]}"))
        text_encoder = _text_encoder(weights, path, configs, dtype)
    if left_aside:
        warnings.warn(
            f"base model {str(path)!r} holds two UNets: {UNET}*, which is taken, as other tools do, and averaged "
            f"weights, {AVERAGED}*, which differ and are left aside; for those pass a file that holds them alone, as "
            "the original releases named emaonly do",
            stacklevel=3,
        )
    scheduler_config = read_json(configs / "scheduler" / "scheduler_config.json", str(path))
    if V_PREDICTION in weights or header.get("modelspec.prediction_type") == "v":
        scheduler_config["prediction_type"] = "v_prediction"
    if ZERO_SNR in weights:
        scheduler_config["rescale_betas_zero_snr"] = True
    return Parts(
        unet=networks["unet"],
        vae=networks["vae"],
        text_encoder=text_encoder,
        tokenizer=sd15.tokenizer(),
        scheduler_config=scheduler_config,
        fingerprint=fingerprint.of_files(path, [], [path], note="LDM layout"),
        defaults={},
    )


def _read(path: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, and the text in its header; its shapes are checked first, where they lie apart."""
    from safetensors import SafetensorError, safe_open

    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                keys = list(file.keys())
                _check({key: tuple(file.get_slice(key).get_shape()) for key in keys}, path)
                return _current_names({key: file.get_tensor(key) for key in keys}), dict(file.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"base model {str(path)!r} cannot be read ({error}); fetch or copy it again"
            ) from None
    if not allow_pickle:
        raise InputError(
            f"base model {str(path)!r} is pickled; allowed are .safetensors files, or pickles that you trust, of which "
            "only tensors are read; add --allow_pickle"
        )
    if is_bomb(path):
        raise CheckpointError(
            f"base model {str(path)!r} is compressed, and unpacks to more than it is; allowed are files as torch saves "
            "them; fetch it from whoever made it"
        )
    try:
        with torch.serialization.safe_globals([(_Callback, LIGHTNINGS_CALLBACK)]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"base model {str(path)!r} holds more than tensors, or is damaged ({reason}); "
            "allowed are checkpoints of tensors; convert it to .safetensors on a machine that you do not mind"
        ) from None
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    weights = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    _check({key: tuple(value.shape) for key, value in weights.items()}, path)
    return _current_names(weights), {}


def _take_averages(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the averaged weights out of those of a file."""
    return {key: weights.pop(key) for key in list(weights) if key.startswith(AVERAGED)}


def _differ(averages: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> bool:
    """Whether averaged weights are others than those that they are averages of; in the precision of these."""
    pairs = ((averages.get(_averaged(key)), value) for key, value in weights.items() if key.startswith(UNET))
    return any(one is not None and not torch.equal(one.to(value.dtype), value) for one, value in pairs)


def _averaged(key: str) -> str:
    return AVERAGED + key.removeprefix("model.").replace(".", "")


def _current_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Older merges leave a level of names out in the text encoder: put it in."""
    if TEXT_ENCODER + OLD_EMBEDDING not in weights:
        return weights
    new = TEXT_ENCODER + "text_model."
    return {
        new + key.removeprefix(TEXT_ENCODER) if key.startswith(TEXT_ENCODER) else key: value
        for key, value in weights.items()
    }


def _check(shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Refuse what is not a whole checkpoint of a supported architecture, by the names and shapes of its tensors."""
    if CONV_IN not in shapes:
        if any("lora" in key for key in shapes):
            raise InputError(
                f"base model {str(path)!r} is an adapter; pass it as --lora_path, and its base as --base_model"
            )
        raise InputError(
            f"base model {str(path)!r} is not a checkpoint in LDM layout: it has no {CONV_IN}; {ALLOWED}, with UNet, "
            "VAE and text encoder in the file; pass such a file, or a diffusers folder"
        )
    context = shapes[ATTENTION][1] if ATTENTION in shapes else 0
    embedding = shapes.get(TEXT_ENCODER + EMBEDDING, shapes.get(TEXT_ENCODER + OLD_EMBEDDING))
    Shapes(
        channels_in=shapes[CONV_IN][1],
        channels_out=shapes[CONV_OUT][0] if CONV_OUT in shapes else 0,
        latent_channels=shapes[LATENTS][0] if LATENTS in shapes else CHANNELS,
        context_width=2048 if any(key.startswith(TWO_ENCODERS) for key in shapes) else context,
        text_width=context if embedding is None else embedding[1],
    ).check(str(path))
    for part, there in (("VAE", LATENTS in shapes), ("text encoder", embedding is not None)):
        if not there:
            raise InputError(
                f"base model {str(path)!r} holds no {part}; allowed is a checkpoint with UNet, VAE and text encoder in "
                "one file; pass the full file, or a diffusers folder"
            )


def _text_encoder(weights: dict[str, Tensor], path: Path, configs: Path, dtype: torch.dtype) -> CLIPTextModel:
    from accelerate import init_empty_weights
    from transformers import CLIPTextConfig, CLIPTextModel

    with init_empty_weights():
        model = CLIPTextModel(CLIPTextConfig(**read_json(configs / "text_encoder" / "config.json", str(path))))
    # Some releases of transformers keep the network one level down, under `text_model`.
    wrapper = "text_model." if hasattr(model, "text_model") else ""
    start = TEXT_ENCODER + "text_model."
    own = {
        wrapper + key.removeprefix(start): value.to(dtype)
        for key, value in weights.items()
        if key.startswith(start) and not key.endswith("position_ids")
    }
    try:
        model.load_state_dict(own, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(_unfit(path, "text encoder", " ".join(str(error).split())[:200])) from None
    return model


def _unfit(path: Path, part: str, reason: str) -> str:
    return (
        f"base model {str(path)!r}: its {part} is not Stable Diffusion 1.5's or is incomplete ({reason}); "
        "fetch or copy it again"
    )
