"""Secrets taken out of what is printed, logged or written down: the Hub's tokens, and passwords in addresses."""

from __future__ import annotations

import os
import re

HIDDEN = "***"

_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SHORTEST = 8
"""Characters; what is shorter is no token, and may be a part of any word."""

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9_]{16,}")
_PASSWORD = re.compile(r"(?<=://)[^/\s@]+(?=@)")


def without_secrets(text: str) -> str:
    """`text` with every token of the Hub, and whoever signs in by an address, replaced by stars."""
    for name in _VARIABLES:
        token = os.environ.get(name, "").strip()
        if len(token) >= _SHORTEST:
            for spelled in {token, repr(token)[1:-1], repr(token.encode())[2:-1]}:
                text = text.replace(spelled, HIDDEN)
    return _PASSWORD.sub(HIDDEN, _TOKEN.sub(HIDDEN, text))
