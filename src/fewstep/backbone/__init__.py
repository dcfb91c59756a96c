"""The base model: one frozen UNet, VAE and text encoder, whichever way they came."""

from .base import Backbone, adapters_off
from .loading import choose_device, load_backbone
from .registry import BASES, Abilities
from .steady import steady_vae
from .tiny_vae import TinyVAE, load_tiny_vae
from .untrained import random_backbone

__all__ = [
    "BASES",
    "Abilities",
    "Backbone",
    "TinyVAE",
    "adapters_off",
    "choose_device",
    "load_backbone",
    "load_tiny_vae",
    "random_backbone",
    "steady_vae",
]
