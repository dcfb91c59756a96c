"""In which order the data is seen: a permutation of all items an epoch, computed from the seed and the position alone.

A position counts samples over the whole run, across updates, micro-batches and processes. Nothing is stored and nothing
runs on from sample to sample, so any process can ask for any position, and a resumed run goes on exactly where it was.
"""

from __future__ import annotations

import hashlib
from math import isqrt

_ROUNDS = 12  # even; 4 do for large n (Luby and Rackoff, 1988), 12 make all orders of five items equally frequent


def sample_index(seed: int, position: int, n: int) -> int:
    """Which of `n` items stands at `position` of the endless sequence that `seed` defines.

    Positions [0, n) visit every item once, [n, 2n) again in another order, and so on. Takes constant time and memory,
    whatever `n`.

    Raises:
        ValueError: `n` is not positive or `position` is negative.
    """
    if n < 1 or position < 0:
        raise ValueError(f"position {position} of {n} items came; allowed are positions from 0 and at least one item")
    epoch, place = divmod(position, n)
    key = hashlib.blake2b(f"data order {seed} {epoch}".encode(), digest_size=32).digest()
    return _permute(place, n, key)


def _permute(place: int, n: int, key: bytes) -> int:
    """Pseudo-random permutation of [0, n): a Feistel network on a rectangle, walked until it lands inside.

    Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002), generalized Feistel with cycle walking. The
    rectangle a x b holds fewer than n + sqrt(n) places, so that hardly any place needs a second walk.
    """
    a = isqrt(n - 1) + 1  # ceil(sqrt(n))
    b = -(-n // a)  # ceil(n / a)
    while True:
        left, right = divmod(place, b)
        for turn in range(0, _ROUNDS, 2):
            left = (left + _mix(key, turn, right)) % a
            right = (right + _mix(key, turn + 1, left)) % b
        place = left * b + right
        if place < n:
            return place


def _mix(key: bytes, turn: int, value: int) -> int:
    """A random function of (turn, value): 64 bits, so that taking it modulo a side is even to one part in 2^32."""
    message = turn.to_bytes(1, "little") + value.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(message, key=key, digest_size=8).digest(), "little")
