"""The base model: one frozen UNet, VAE and text encoder, whichever way they came."""

from .base import Backbone, adapters_off
from .loading import load_backbone
from .registry import BASES, Abilities
from .untrained import random_backbone

__all__ = ["BASES", "Abilities", "Backbone", "adapters_off", "load_backbone", "random_backbone"]
