"""Checkpoints: an adapter with all that is needed to go on from it, whole or not there at all, and without pickle.

    lora/checkpoint-N/   pytorch_lora_weights.safetensors  scheduler/  settings.toml  manifest.json
                         resume/{NAME.safetensors, state.json}
    lora/final/          the same without resume/
    lora/best/           as final: the one that validation liked best

A checkpoint is written beside its place under another name, synchronised to disk, and renamed; before that, the disk is
asked for room. `manifest.json` lists every other file with its SHA-256, and has one of its own; a folder whose files do
not fit it is broken and is not loaded.

What can be resumed is a dictionary of named objects with `state_dict()` and `load_state_dict()`, the contract of
torch's optimizers and schedulers. Tensors go to safetensors and all else to JSON, both exactly, so that a resumed run
is the run, bit for bit. An object that is asked for and missing raises, and so does one that is there and not asked
for.
"""

from .finding import checkpoints, drop_newer, prune, resolve
from .manifest import MANIFEST, Record, verify
from .names import BEST, FINAL, SETTINGS
from .recorded import (
    Origin,
    recorded,
    recorded_base,
    recorded_origin,
    recorded_prediction_type,
    recorded_span,
    recorded_steps,
)
from .resuming import load
from .saving import save
from .state import Stateful

__all__ = [
    "BEST",
    "FINAL",
    "MANIFEST",
    "SETTINGS",
    "Origin",
    "Record",
    "Stateful",
    "checkpoints",
    "drop_newer",
    "load",
    "prune",
    "recorded",
    "recorded_base",
    "recorded_origin",
    "recorded_prediction_type",
    "recorded_span",
    "recorded_steps",
    "resolve",
    "save",
    "verify",
]
