"""The student: a LoRA on the base's UNet. Made, saved and read back through the stock loader; and foreign layouts."""

from .adapter import ADAPTER, AdapterWeights, attach, detach, digest, set_scale, trainable_parameters
from .loading import AdapterInfo, attach_trained, load_adapter, prove_round_trip, save_adapter
from .sampler import StatedSampling, stated_sampling
from .source import WEIGHTS_NAME, AdapterSource, locate

__all__ = [
    "ADAPTER",
    "WEIGHTS_NAME",
    "AdapterInfo",
    "AdapterSource",
    "AdapterWeights",
    "StatedSampling",
    "attach",
    "attach_trained",
    "detach",
    "digest",
    "load_adapter",
    "locate",
    "prove_round_trip",
    "save_adapter",
    "set_scale",
    "stated_sampling",
    "trainable_parameters",
]
