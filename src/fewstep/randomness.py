"""Random numbers by name: a generator depends on a seed and on what it is for, never on what was drawn before."""

from __future__ import annotations

import json
from hashlib import blake2b

import torch


def generator(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator for the purpose `key` under `seed`, the same on every machine, process and Python version.

    Example: `generator(42, "noise", update, position)`. Different keys give unrelated streams: `1` and `"1"` differ,
    and so do `("ab",)` and `("a", "b")`. Torch uses 32 bits of a CPU seed: of 4 billion pairs
    of keys one shares a stream.

    Args:
        seed: the run's seed, any integer.
        key: what the numbers are for, from the general to the particular.

    Returns:
        A new `torch.Generator` on the CPU.
    """
    # JSON is unambiguous and ASCII; int() makes numpy's integers read as Python's do.
    name = json.dumps([part if isinstance(part, str) else int(part) for part in (seed, *key)])
    digest = blake2b(name.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
