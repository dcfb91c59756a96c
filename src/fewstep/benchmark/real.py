"""Real pictures of the same captions: what the arms are measured against, and the ceiling beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from fewstep.backbone import Abilities, Backbone
from fewstep.config import BenchSettings
from fewstep.data import PictureData, StreamedPictures, open_data
from fewstep.data.loader import refuse_too_many
from fewstep.data.pictures import PictureError
from fewstep.errors import InputError
from fewstep.pictures import as_bytes
from fewstep.randomness import generator
from fewstep.reporting import Reporter

Ids = Sequence[tuple[int, int]]
"""(prompt number, picture number) of B pictures."""


class RealPictures(Protocol):
    """Real pictures of a benchmark's prompts, each method's uint8 [B, 3, H, W]."""

    @property
    def key(self) -> str | None:
        """What tells them from others of the same prompts and the same seed."""
        ...

    @property
    def references(self) -> int:
        """Reference pictures a prompt."""
        ...

    def shown(self, ids: Ids) -> Tensor:
        """Those that stand beside the arms."""
        ...

    def reference(self, ids: Ids) -> Tensor:
        """Those that distances are taken to."""
        ...

    def others(self, ids: Ids) -> Tensor:
        """None of the references, as many as an arm draws: their distance is what it is when nothing is wrong."""
        ...


class OwnPictures:
    """Pictures that the base makes itself, as many of a caption as are wanted."""

    key = None

    def __init__(self, abilities: Abilities, prompts: Sequence[str], settings: BenchSettings) -> None:
        self._abilities, self._prompts, self._settings = abilities, list(prompts), settings
        self.references = settings.frechet_images or 0

    def _made(self, each: int, seed: int) -> Tensor:
        """`each` of every prompt, prompt by prompt."""
        made = self._abilities.reference_pictures(self._prompts, each, seed)
        return torch.from_numpy(made).permute(0, 3, 1, 2).contiguous()

    @cached_property
    def _shown(self) -> Tensor:
        return self._made(self._settings.num_images, self._settings.seed + 1)  # not the references

    @cached_property
    def _reference(self) -> Tensor:
        return self._made(self.references, self._settings.seed)

    def shown(self, ids: Ids) -> Tensor:
        return self._shown[[prompt * self._settings.num_images + picture for prompt, picture in ids]]

    def reference(self, ids: Ids) -> Tensor:
        return self._reference[[prompt * self.references + picture for prompt, picture in ids]]

    def others(self, ids: Ids) -> Tensor:
        return self.shown(ids)


class DataPictures:
    """The pictures of a data set, one a caption; the others are as many of its further pictures.

    Args:
        data: the pictures.
        fingerprint: of their content.
        settings: how many are wanted, and the seed that picks them.
        allowance: how many pictures may turn out to be no good.

    Raises:
        InputError: more prompts than the data has pictures for, or several pictures or references a caption.
        DataError: more pictures than allowed cannot be read.
    """

    references = 1

    def __init__(
        self, data: PictureData, fingerprint: str, settings: BenchSettings, allowance: int, reporter: Reporter
    ) -> None:
        wanted = settings.frechet_images != 0  # else the data gives captions alone
        for name in ("num_images", "frechet_images") if wanted else ():
            if (getattr(settings, name) or 0) > 1:
                raise InputError(
                    f"{name} {getattr(settings, name)} came with data, which has one real picture a caption; allowed "
                    "is 1; raise --num_prompts instead"
                )
        needed = (2 if wanted else 1) * settings.num_prompts
        if len(data) < needed:
            allowed = (
                "at most half as many prompts, for real pictures are compared with as many other ones"
                if wanted
                else "at most as many prompts"
            )
            raise InputError(
                f"num_prompts {settings.num_prompts} came, the data has {len(data)} pictures; allowed are {allowed}; "
                "lower --num_prompts"
            )
        self._data, self.key = data, fingerprint
        order = torch.randperm(len(data), generator=generator(settings.seed, "real pictures")).tolist()
        picked = _whole(data, order, needed, allowance, reporter) if wanted else order[:needed]
        self._own, self._others = picked[: settings.num_prompts], picked[settings.num_prompts :]
        self.prompts = [data.captions(index)[0] for index in self._own]

    def shown(self, ids: Ids) -> Tensor:
        return self._read(self._own[prompt] for prompt, _ in ids)

    def reference(self, ids: Ids) -> Tensor:
        return self.shown(ids)

    def others(self, ids: Ids) -> Tensor:
        return self._read(self._others[prompt] for prompt, _ in ids)

    def _read(self, indices: Iterable[int]) -> Tensor:
        pictures = [torch.from_numpy(self._data.item(index)[0]) for index in indices]
        return torch.stack(pictures).permute(0, 3, 1, 2).contiguous()


def _whole(data: PictureData, order: Sequence[int], count: int, allowance: int, reporter: Reporter) -> list[int]:
    """The first `count` of `order` that can be decoded: one that cannot would end the benchmark when all is drawn."""
    found: list[int] = []
    bad: dict[str, str] = {}
    with reporter.progress("real pictures", count) as bar:
        for index in order:
            if len(found) == count:
                break
            try:
                data.item(index)
            except PictureError as error:
                bad[data.name(index)] = str(error)
                refuse_too_many(bad, allowance)
                reporter.warn(f"{data.name(index)} is no good and left out: {error}")
                continue
            found.append(index)
            bar.advance()
    if len(found) < count:
        raise InputError(
            f"num_prompts {count // 2} came, {len(found)} pictures of the data are good; allowed are at most half as "
            "many prompts; lower --num_prompts"
        )
    return found


def pictures_of_data(settings: BenchSettings, backbone: Backbone, reporter: Reporter) -> DataPictures | None:
    """The pictures and captions of the data set that the settings name; None where they name none."""
    if settings.data_dir is None and settings.dataset_name is None:
        return None
    opened = open_data(settings, backbone, reporter=reporter)
    if isinstance(opened.data, StreamedPictures):
        raise InputError(
            f"dataset_name {settings.dataset_name!r} came by URL, of which a part at a time is here; allowed for a "
            "benchmark is data that is here as a whole; download the shards, and pass their folder as --data_dir"
        )
    return DataPictures(opened.data, opened.fingerprint, settings, opened.allowance, reporter)


def latents_of(backbone: Backbone, pixels: Tensor) -> Tensor:
    """The VAE's latents fp32 on the CPU of pixels uint8 [B, 3, H, W]."""
    return backbone.encode((pixels.float() / 127.5 - 1).to(backbone.device)).cpu()


def through_vae(backbone: Backbone, pixels: Tensor, latents: Tensor | None = None) -> Tensor:
    """Pixels uint8 [B, 3, H, W] after the VAE, as an arm's pictures are: what it loses is held against nobody.

    Args:
        latents: theirs, where they are known already.
    """
    return as_bytes(backbone.decode(latents_of(backbone, pixels) if latents is None else latents))
