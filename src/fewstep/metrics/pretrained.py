"""Models of transformers that judge pictures: opened in fp32, whole, with the Pillow processors of their own."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep import hub
from fewstep.errors import CheckpointError, first_line
from fewstep.quiet import quiet_libraries

PICKLED = "pytorch_model.bin"
"""What transformers calls pickled weights."""

ENDS = 1024
"""Values at the beginning and at the end of every tensor that a fingerprint is taken of."""


class ModelNotAtHand(CheckpointError):
    """A judging model that is neither cached nor to be had; ``reason`` says why in a few words."""

    def __init__(self, name: str, flag: str, reason: str) -> None:
        from huggingface_hub.constants import HF_HUB_CACHE

        kept = os.environ.get("HF_HUB_CACHE", HF_HUB_CACHE)
        self.reason = f"looked in {kept}; {reason}"
        super().__init__(
            f"the model {name!r} of {flag} is not at hand ({self.reason}); run `hf download {name}` and, where its "
            f"weights are pickled (.bin), pass --allow_pickle, or pass {flag} FOLDER"
        )


def load_pretrained(
    name: str, *parts: Any, flag: str, allow_pickle: bool, fetch: bool = True, **options: Any
) -> tuple[Any, ...]:
    """The network and whatever else belongs to it, such as a processor, of a folder or Hub id.

    Args:
        name: folder or Hub id in transformers' layout.
        parts: transformers' classes; the first is the network's.
        flag: that named it.
        allow_pickle: also take weights that are not safetensors.
        fetch: whether a Hub id that is not in the cache is fetched.
        options: for the parts after the first.

    Raises:
        ModelNotAtHand: not cached and not to be had.
        CheckpointError: weights are missing in it.
    """
    network_class, *others = parts
    # Left open, the Auto classes ask whoever sits at the terminal whether to run code that came with the weights.
    own_code = {part: {"trust_remote_code": False} if part.__name__.startswith("Auto") else {} for part in parts}
    try:
        with quiet_libraries():
            network, loading = network_class.from_pretrained(
                name,
                use_safetensors=None if allow_pickle else True,
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=not fetch,
                **own_code[network_class],
            )
            found = [
                part.from_pretrained(name, local_files_only=not fetch, **options, **own_code[part]) for part in others
            ]
    except (OSError, ValueError, KeyError) as error:
        pickled = not allow_pickle and _has_pickled_weights(name)
        reason = "its weights here are pickled, which takes --allow_pickle" if pickled else first_line(error)
        raise ModelNotAtHand(name, flag, reason) from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{name!r} lacks {len(missing)} weights of a {type(network).__name__}, such as {missing[0]}; allowed is a "
            f"complete one in transformers' layout; pass another {flag}"
        )
    return network.eval().requires_grad_(False), *found


def _has_pickled_weights(name: str) -> bool:
    """Whether a folder, or the Hub's cache, has a model's weights as .bin: so has the usual CLIP, and nothing else."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return (Path(name) / PICKLED).is_file()
    return hub.looks_like_id(name) and isinstance(try_to_load_from_cache(name, PICKLED), str)


def fingerprint(network: nn.Module) -> str:
    """32 hexadecimal digits that change with a network's weights; the same on every device.

    Names, shapes and the two ends of every tensor count: training changes every value of those that it touches.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().flatten()
        for end in (flat[:ENDS], flat[-ENDS:]):
            found.update(end.double().cpu().numpy().tobytes())
    return found.hexdigest()[:32]


def as_arrays(pixels: torch.Tensor) -> list[Any]:
    """Pixels [B, 3, H, W], uint8 or floating in 0 ... 1, as the B arrays uint8 [H, W, 3] that processors take."""
    whole = pixels if pixels.dtype == torch.uint8 else (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    return list(whole.permute(0, 2, 3, 1).cpu().numpy())
