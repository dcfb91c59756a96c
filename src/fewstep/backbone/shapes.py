"""Which architectures can be worked on; the others are refused by their shapes, before their weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError

CHANNELS = 4
"""Latent channels of the family."""

UNSUPPORTED_WIDTHS = {1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL", 1280: "an SDXL refiner"}
"""Width of the cross-attention -> whose it is."""

ALLOWED = "allowed is a text-to-image base of Stable Diffusion 1.5's make: 4 channels in and out, one CLIP text encoder"


@dataclass(frozen=True)
class Shapes:
    """The numbers that tell the architectures apart.

    Attributes:
        channels_in: what `unet.conv_in` takes: 4, or 9 for inpainting, 8 for editing, 5 for depth.
        channels_out: what the UNet predicts.
        latent_channels: what the VAE gives.
        context_width: what the UNet's cross-attention takes.
        text_width: what the text encoder gives.
        extra_conditions: names of conditions other than the prompt that the UNet wants.
    """

    channels_in: int
    channels_out: int
    latent_channels: int
    context_width: int
    text_width: int
    extra_conditions: tuple[str, ...] = ()

    @classmethod
    def from_configs(cls, unet: Mapping[str, Any], vae: Mapping[str, Any], text_encoder: Mapping[str, Any]) -> Shapes:
        """The shapes that three diffusers and transformers configurations describe."""
        extra = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
        width = unet.get("cross_attention_dim", 1280)
        return cls(
            channels_in=int(unet.get("in_channels", CHANNELS)),
            channels_out=int(unet.get("out_channels", CHANNELS)),
            latent_channels=int(vae.get("latent_channels", CHANNELS)),
            context_width=int(max(width) if isinstance(width, list | tuple) else width),
            text_width=int(text_encoder.get("hidden_size", 512)),
            extra_conditions=tuple(name for name in extra if unet.get(name) is not None),
        )

    def check(self, name: str) -> None:
        """Refuse what is not supported.

        Raises:
            InputError: one line with `name`, the shapes that came, and what is allowed.
        """
        if self.channels_in != CHANNELS:
            kind = {9: "an inpainting UNet", 8: "an editing UNet", 5: "a depth UNet"}.get(self.channels_in, "a UNet")
            came = f"{kind} that takes {self.channels_in} channels"
        elif self.channels_out != CHANNELS or self.latent_channels != CHANNELS:
            came = f"a UNet that gives {self.channels_out} channels beside a VAE with {self.latent_channels}"
        elif self.context_width in UNSUPPORTED_WIDTHS:
            came = f"{UNSUPPORTED_WIDTHS[self.context_width]} (cross-attention of width {self.context_width})"
        elif self.extra_conditions:
            came = f"a UNet that wants more than a prompt ({', '.join(self.extra_conditions)})"
        elif self.context_width != self.text_width:
            came = f"cross-attention of width {self.context_width} beside a text encoder of width {self.text_width}"
        else:
            return
        raise InputError(f"base model {name!r} has {came}; {ALLOWED}; pass such a base with --base_model")
