"""AutoencoderTiny: a small decoder in the place of the VAE's, for arms that ask for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from .. import hub
from ..errors import CheckpointError
from ..files import at_home, sha256
from ..quiet import quiet_libraries
from .base import Backbone
from .loading import read_json

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class TinyVAE:
    """A decoder on a base's device, in its precision, and the SHA-256 of its weights."""

    network: AutoencoderTiny
    digest: str


def load_tiny_vae(name: str, backbone: Backbone) -> TinyVAE:
    """Open the AutoencoderTiny `name`, a folder or a Hub id, to decode the latents of `backbone`.

    Raises:
        CheckpointError: not at hand, not an AutoencoderTiny, or made for other latents.
    """
    with quiet_libraries():
        from diffusers import AutoencoderTiny

    folder = _folder(name)
    kind = read_json(folder / CONFIG, name).get("_class_name")
    if kind != "AutoencoderTiny":
        raise CheckpointError(
            f"tiny_vae {name!r} holds {kind or 'no autoencoder'}; allowed is an AutoencoderTiny in diffusers' layout; "
            "pass another one"
        )
    try:
        with quiet_libraries():
            network, loading = AutoencoderTiny.from_pretrained(
                str(folder), use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"tiny_vae {name!r} cannot be read ({' '.join(str(error).split())[:200]}); fetch or copy it again"
        ) from error
    if loading["missing_keys"]:
        raise CheckpointError(
            f"tiny_vae {name!r} lacks {len(loading['missing_keys'])} weights, such as {loading['missing_keys'][0]}; "
            "allowed is a whole AutoencoderTiny; fetch or copy it again"
        )
    channels, downscale = int(network.config.latent_channels), 2 ** (len(network.config.block_out_channels) - 1)
    wanted = int(backbone.unet.config.in_channels)
    if (channels, downscale) != (wanted, backbone.downscale):
        raise CheckpointError(
            f"tiny_vae {name!r} decodes latents of {channels} channels to {downscale} times their side; base "
            f"{backbone.name} has {wanted} channels and {backbone.downscale} times; pass one that was made for it"
        )
    network.to(backbone.device, backbone.dtype).eval().requires_grad_(False)
    return TinyVAE(network, sha256(folder / WEIGHTS))


def _folder(name: str) -> Path:
    folder, reason = at_home(name), "there is no such folder"
    if not folder.is_dir() and hub.looks_like_id(name):
        try:
            folder = hub.snapshot(name, (CONFIG, WEIGHTS))
        except hub.NotAtHand as error:
            reason = str(error)
    missing = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
    if missing:
        reason = f"{missing[0]} is not in it" if folder.is_dir() else reason
        raise CheckpointError(
            f"tiny_vae {name!r} is not at hand: {reason}; allowed is a folder or a Hub id with {CONFIG} and {WEIGHTS}; "
            f"fetch it with `hf download {name}`, or leave --tiny_vae out"
        )
    return folder
