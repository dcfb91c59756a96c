"""Further adapters of a benchmark: each a table of a TOML file, or one word."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from fewstep.config.base import Checked, forbid_both
from fewstep.config.kinds import Folder, Guidance, Share, Span, StepCounts, Text
from fewstep.config.toml import read_toml
from fewstep.errors import InputError
from fewstep.files import at_home


class AdapterEntry(Checked):
    """One further adapter of a benchmark: an [[adapter]] table of its adapters_file."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=64)] = Field(
        description="Name of its arms: small letters, digits and single hyphens between them."
    )
    lora_path: Folder | None = Field(None, description="Adapter file or folder.")
    lora_id: Text | None = Field(None, description="Adapter on the Hub.")
    sampler: Literal["lcm", "tcd", "ddim"] | None = Field(
        None, description="Its sampler. Unset: of the scheduler saved beside it, else lcm."
    )
    timestep_span: Span | None = Field(
        None,
        description="Of ddim: the share of the schedule in which its timesteps after the first lie. Unset: as the "
        "adapter was trained, else 1.",
    )
    eta: Share = Field(0.0, description="Of tcd: how much of the noise between two steps is drawn anew.")
    guidance: Guidance = Field(1.0, description="Guidance it is sampled with.")
    scale: Annotated[float, Field(gt=0, le=10)] = Field(1.0, description="Strength of the adapter.")
    steps: StepCounts | None = Field(None, description="Step counts. Unset: those of the benchmark that it promises.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        forbid_both(self, "lora_path", "lora_id", "lora_path is an adapter on disk, lora_id one on the Hub")
        if self.lora_path is None and self.lora_id is None:
            raise ValueError(f"adapter {self.id} has neither lora_path nor lora_id; allowed is one of the two; add it")
        if self.timestep_span is not None and self.sampler not in (None, "ddim"):
            raise ValueError(
                f"adapter {self.id} has timestep_span {self.timestep_span:g} for {self.sampler}, which has none; leave "
                "it out"
            )
        if self.eta and self.sampler not in (None, "tcd"):
            raise ValueError(f"adapter {self.id} has eta {self.eta:g} for {self.sampler}, which has none; leave it out")
        return self


def load_adapters(path: Path | str) -> tuple[AdapterEntry, ...]:
    """The further adapters of a benchmark's file, in its order.

    Raises:
        InputError: no TOML, no [[adapter]] table, anything else in it, or an id that comes twice.
    """
    path = at_home(path)
    values = read_toml(path)
    tables = values.get("adapter")
    if set(values) != {"adapter"} or not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise InputError(
            f"{str(path)!r} is no list of adapters; allowed is one [[adapter]] table or more and nothing else, each "
            "with an id and a lora_path or lora_id"
        )
    entries = []
    for number, table in enumerate(tables):
        if "id" not in table:
            raise InputError(f"{str(path)!r}: adapter {number} has no id; allowed is one that names its arms; add it")
        try:
            entries.append(AdapterEntry(**table))
        except InputError as error:
            raise InputError(f"{str(path)!r}: {error}") from None
    distinct_ids(entries, f"{str(path)!r}: ")
    return tuple(entries)


def adapter_of(word: str) -> AdapterEntry:
    """``id=NAME,lora_id=OWNER/NAME,steps=4+8`` as the table of a file would say it."""
    pairs = [part.partition("=") for part in word.split(",")]
    odd = next((name for name, equals, value in pairs if not (equals and value)), None)
    names = [name.strip() for name, _, _ in pairs]
    if odd is not None or len(set(names)) < len(names) or "id" not in names:
        raise InputError(
            f"{word!r} came; allowed is NAME=VALUE with a comma between two, each name once, id among them; for "
            "example id=hyper,lora_id=OWNER/NAME,sampler=tcd,eta=0.3,steps=4+8"
        )
    table: dict[str, Any] = dict(zip(names, (value.strip() for _, _, value in pairs), strict=True))
    if "steps" in table:
        table["steps"] = table["steps"].split("+")
    return AdapterEntry(**table)


def distinct_ids(entries: Iterable[AdapterEntry], where: str = "") -> None:
    """Refuse, by an `InputError`, an id that comes twice."""
    ids = [entry.id for entry in entries]
    repeated = sorted({one for one in ids if ids.count(one) > 1})
    if repeated:
        raise InputError(f"{where}adapter id {repeated[0]} came twice; allowed is each once; rename one")
