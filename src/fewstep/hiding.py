"""Secrets taken out of what is printed, logged or written down: the Hub's tokens, and what signs in by an address."""

from __future__ import annotations

import os
import re

HIDDEN = "***"

_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SHORTEST = 8
"""Characters; what is shorter is no token, and may be a part of any word."""

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9_]{16,}")
_PASSWORD = re.compile(r"(?<=://)[^/\s]+(?=@)")  # up to the last @ before the path: a password may have one, too
_QUERY = re.compile(r"""(?<=://)([^?#\s"'<>]+\?)((?:[^#\s"'<>]|'(?=[\w%&=]))+)""")
_VALUE = re.compile(r"(?<![^&])([\w.~%-]+=)?[^&]+")


def without_secrets(text: str) -> str:
    """`text` with every token of the Hub, whoever signs in by an address, and the values of its query, as stars."""
    for name in _VARIABLES:
        token = os.environ.get(name, "").strip()
        if len(token) >= _SHORTEST:
            for spelled in {token, repr(token)[1:-1], repr(token.encode())[2:-1]}:
                text = text.replace(spelled, HIDDEN)
    return _QUERY.sub(_without_values, _PASSWORD.sub(HIDDEN, _TOKEN.sub(HIDDEN, text)))


def without_query(address: str) -> str:
    """An address of the web without what may be secret in it; any other text as it is."""
    if re.match(r"(?i)https?://", address) is None:
        return address
    return re.split(r"[?#]", re.sub(r"(?<=://)[^/]+@", "", address), maxsplit=1)[0]


def _without_values(found: re.Match[str]) -> str:
    return found[1] + _VALUE.sub(lambda part: (part[1] or "") + HIDDEN, found[2])
