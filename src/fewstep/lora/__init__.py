"""The student: a LoRA on the base's UNet. Made, saved and read back through the stock loader; and foreign layouts."""

from .adapter import ADAPTER, AdapterWeights, attach, detach, digest, set_scale, trainable_parameters
from .kohya import kohya_tensors, save_kohya
from .loading import AdapterInfo, attach_trained, load_adapter, prove_round_trip, save_adapter
from .sampler import STATED, StatedSampling, stated_sampling
from .source import WEIGHTS_NAME, AdapterSource, locate

__all__ = [
    "ADAPTER",
    "STATED",
    "WEIGHTS_NAME",
    "AdapterInfo",
    "AdapterSource",
    "AdapterWeights",
    "StatedSampling",
    "attach",
    "attach_trained",
    "detach",
    "digest",
    "kohya_tensors",
    "load_adapter",
    "locate",
    "prove_round_trip",
    "save_adapter",
    "save_kohya",
    "set_scale",
    "stated_sampling",
    "trainable_parameters",
]
