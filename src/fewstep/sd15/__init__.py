"""Stable Diffusion 1.5's configurations and tokenizer as package data: a single file with weights needs no network.

See NOTICE in this folder for where the vocabulary comes from.
"""

from __future__ import annotations

import gzip
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

FOLDER = Path(__file__).parent
"""A diffusers folder without weights: `unet/`, `vae/`, `text_encoder/` and `scheduler/` with their configurations."""

CONTEXT_LENGTH = 77
"""Tokens of a prompt, the two special ones included."""


def config(component: str) -> dict[str, Any]:
    """The configuration of `unet`, `vae`, `text_encoder` or `scheduler`, a new dictionary each time."""
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    return dict(json.loads((FOLDER / component / name).read_text(encoding="utf-8")))


def tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer, built from its merges: `<|startoftext|>` is 49406, `<|endoftext|>` 49407."""
    from transformers import CLIPTokenizer

    vocabulary, merges = _vocabulary()
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), model_max_length=CONTEXT_LENGTH)


@lru_cache(maxsize=1)
def _vocabulary() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """Token -> id, and the merges, as CLIP numbers them: bytes, bytes that end a word, merges, specials."""
    text = gzip.decompress((FOLDER / "tokenizer" / "merges.txt.gz").read_bytes()).decode("utf-8")
    pairs = (line.split(" ") for line in text.splitlines())
    merges = tuple((first, second) for first, second in pairs)
    letters = _byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(first + second for first, second in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}, merges


def _byte_letters() -> list[str]:
    """A printable letter for each of the 256 bytes: itself where it is printable, else the next one from U+0100 on.

    The printable ones come first: that is their order in CLIP's vocabulary (and GPT-2's, where the idea is from).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + extra) for extra in range(256 - len(printable))]
