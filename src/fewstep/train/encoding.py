"""Latents of pictures and embeddings of captions: computed when they are asked for, or once and then kept on disk.

    CACHE_DIR/cache.json                     what from: base, data, resolution, precision
              latents-DIGEST.safetensors     up to 1,024 of them, fp16, with the numbers of their items
              captions-DIGEST.safetensors    likewise, with a digest of each caption: equal ones are kept once

What is kept is rounded to fp16 and used rounded from the first time on, so that a run that fills the cache and one that
finds it full are the same bit for bit (a cache that other numbers of processes or other batches filled may differ in a
last digit: networks round by the batch); against a run without a cache it is that rounding, 2^-11 of each number, that
differs. A run computes what it needs and lacks, batch by batch; `fewstep cache` does that and nothing else. Shards are
read through memory maps: a data set does not have to fit into memory. Each entry has a checksum, which is looked at
whenever it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save
from torch import Tensor

from fewstep.backbone import Backbone
from fewstep.data import Batch
from fewstep.data.loader import to_pixels
from fewstep.errors import CheckpointError
from fewstep.files import write_bytes_atomic
from fewstep.train.keyed import checksum, claim, damaged, opened, unwritten
from fewstep.transfer import upload

KEY = "cache.json"
QUIET = 50
"""Batches without anything to compute after which a network leaves the device."""
SHARD = 1024
"""Most entries of a file: 34 MB of Stable Diffusion's latents, 121 MB of its embeddings."""


class Encoder(Protocol):
    """What a lesson needs of the VAE and the text encoder."""

    @property
    def device(self) -> torch.device: ...

    def embed(self, captions: Sequence[str]) -> Tensor:
        """Embeddings [B, L, D] fp32."""
        ...

    def encode(self, batch: Batch, rows: Sequence[int]) -> Tensor:
        """Latents [len(rows), C, H, W] fp32 of those pictures of the batch: the means of their posteriors.

        The posterior's own spread is far below the noise of any t trained at.
        """
        ...

    def items(self) -> frozenset[int]:
        """Numbers of the items whose pictures need not be decoded again."""
        ...

    def flush(self) -> None:
        """Put on disk what is new, if anything is kept."""


class Fresh:
    """Everything computed when it is asked for."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self.device = backbone.device

    def embed(self, captions: Sequence[str]) -> Tensor:
        return self._backbone.embed(captions)

    def encode(self, batch: Batch, rows: Sequence[int]) -> Tensor:
        return self._backbone.encode(to_pixels(upload(batch.pictures[list(rows)], self.device)))

    def items(self) -> frozenset[int]:
        return frozenset()

    def flush(self) -> None:
        pass


class Cached:
    """Everything computed once; what is new is on disk after `flush`, at the latest.

    A network that had nothing to do leaves the device until it is asked again. While a cache fills, batches that hold
    nothing new alternate with others: then it takes `QUIET` of them in a row.
    """

    def __init__(self, folder: Path, backbone: Backbone, key: Mapping[str, Any]) -> None:
        """Open the folder, or make it.

        Args:
            key: all that the content depends on: see `cache_key`.

        Raises:
            CheckpointError: the folder holds something else, or a file in it is damaged.
            InputError: it cannot be written to.
        """
        self._backbone, self._fresh = backbone, Fresh(backbone)
        self.device = backbone.device
        try:
            claim(folder / KEY, key, held="cache_dir {} holds encodings", of="base")
        except OSError as error:
            raise unwritten("cache_dir", folder, error) from None
        self._latents, self._captions = Shards(folder, "latents"), Shards(folder, "captions")
        self._quiet = {"vae": QUIET, "text_encoder": QUIET}

    def embed(self, captions: Sequence[str]) -> Tensor:
        digests = [hashlib.blake2b(caption.encode(), digest_size=16).hexdigest() for caption in captions]

        def compute(missing: list[int]) -> Tensor:
            return self._backbone.embed([captions[row] for row in missing])

        self._rest("text_encoder", computed=self._captions.complete(digests, compute))
        return self._captions.get(digests, self.device)

    def encode(self, batch: Batch, rows: Sequence[int]) -> Tensor:
        items = [str(batch.items[row]) for row in rows]

        def compute(missing: list[int]) -> Tensor:
            asked = [rows[number] for number in missing]
            assert not set(asked) & set(batch.spared), "what is spared is held"
            return self._fresh.encode(batch, asked)

        self._rest("vae", computed=self._latents.complete(items, compute))
        return self._latents.get(items, self.device)

    def _rest(self, name: str, *, computed: bool) -> None:
        """Take a network off the device that has had nothing to do for long enough."""
        self._quiet[name] = 0 if computed else self._quiet[name] + 1
        if self._quiet[name] >= QUIET:
            self._backbone.rest(getattr(self._backbone, name))

    def items(self) -> frozenset[int]:
        return frozenset(map(int, self._latents.keys()))

    def sizes(self) -> tuple[int, int]:
        """How many latents and captions are held."""
        return len(self._latents.keys()), len(self._captions.keys())

    def flush(self) -> None:
        """Write what is new.

        Raises:
            InputError: the disk is full, or cannot be written to; nothing is half there.
        """
        self._latents.flush()
        self._captions.flush()


def cache_key(backbone: Backbone, data_fingerprint: str, resolution: int) -> dict[str, str | int]:
    """All that latents and embeddings depend on."""
    return {
        "base_fingerprint": backbone.fingerprint,
        "data_fingerprint": data_fingerprint,
        "resolution": resolution,
        "precision": str(backbone.dtype).removeprefix("torch."),
    }


@dataclass(frozen=True)
class _Entry:
    """Where a tensor is: the file's memory map, the row in it, its checksum, the file's name."""

    values: Any
    row: int
    sum: int
    path: Path


class Shards:
    """Tensors of one shape under names, fp16, in files of up to `SHARD` of them."""

    def __init__(self, folder: Path, kind: str) -> None:
        """Find out what the folder holds.

        Raises:
            CheckpointError: a file cannot be read.
        """
        self._folder, self._kind = folder, kind
        self._where: dict[str, _Entry] = {}
        self._new: dict[str, Tensor] = {}
        self._taken: set[Path] = set()
        self._take_up()

    def _take_up(self) -> None:
        """Take what has been written since, by whichever process."""
        for path in sorted(set(self._folder.glob(f"{self._kind}-*.safetensors")) - self._taken):
            self._take(path)

    def _take(self, path: Path) -> None:
        self._taken.add(path)
        file = opened(path)
        try:
            sums = json.loads(file.metadata()["sums"])
            values = file.get_slice("values")
            entries = {key: _Entry(values, row, sum_, path) for row, (key, sum_) in enumerate(sums.items())}
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{str(path)!r} is no file of a cache ({error!r}); remove it") from None
        self._where |= entries

    def keys(self) -> set[str]:
        """The names of all that is held."""
        return self._where.keys() | self._new.keys()

    def complete(self, keys: Sequence[str], compute: Callable[[list[int]], Tensor]) -> bool:
        """Compute what is missing of `keys`; whether anything was.

        Args:
            compute: told the places in `keys` of what is missing, each name once: their values, in that order.

        Raises:
            CheckpointError: a value is not finite, or does not fit into fp16.
            InputError: the disk is full.
        """
        first = {key: place for place, key in reversed(list(enumerate(keys)))}
        missing = sorted(place for key, place in first.items() if key not in self._where and key not in self._new)
        if not missing:
            return False
        found = compute(missing)
        if not bool(found.isfinite().all()):
            raise CheckpointError(
                f"{self._kind} came that are not finite; allowed are numbers; pass --mixed_precision no, or another "
                "base"
            )
        values = found.to("cpu", torch.float16)
        if not bool(values.isfinite().all()):
            raise CheckpointError(
                f"{self._kind} came that fp16 cannot hold; allowed are numbers to 65,504; leave --cache_dir out"
            )
        self._new |= dict(zip((keys[place] for place in missing), values, strict=True))
        if len(self._new) >= SHARD:
            self.flush()
        return True

    def get(self, keys: Sequence[str], device: torch.device) -> Tensor:
        """The values of `keys`, all of which are held, as fp32 [len(keys), ...] on the device.

        Raises:
            CheckpointError: one is not as it was written.
        """
        values = [self._new[key] if key in self._new else self._read(key) for key in keys]
        return upload(torch.stack(values), device).float()

    def _read(self, key: str) -> Tensor:
        entry = self._where[key]
        value: Tensor = entry.values[entry.row]
        if checksum(key, [value]) != entry.sum:
            raise damaged(entry.path, f"{self._kind} {key}")
        return value

    def flush(self) -> None:
        """Write what is new into a file of its own, named for what is in it, and take up what others have written.

        Raises:
            InputError: the disk is full, or cannot be written to.
        """
        if not self._new:
            return
        sums = {key: checksum(key, [value]) for key, value in self._new.items()}
        # In one entry: the order of several differs from run to run, and the same content is to be the same file.
        content = save({"values": torch.stack(list(self._new.values()))}, {"sums": json.dumps(sums)})
        path = self._folder / f"{self._kind}-{hashlib.blake2b(content, digest_size=8).hexdigest()}.safetensors"
        try:
            write_bytes_atomic(path, content)
        except OSError as error:
            raise unwritten("cache_dir", self._folder, error) from None
        self._new.clear()
        self._take_up()
