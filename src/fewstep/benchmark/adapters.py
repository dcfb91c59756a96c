"""Further adapters to compare with: each is located, proven on this base, and attached when its arms are drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from fewstep import lora
from fewstep.arms import Arm, base_arm, sampler_timesteps, student_arm
from fewstep.backbone import Backbone, adapters_off
from fewstep.checkpoint import Origin, recorded_origin
from fewstep.config import AdapterEntry, BenchSettings, adapter_entries
from fewstep.errors import CheckpointError, InputError
from fewstep.files import sha256
from fewstep.opening import (
    Sampling,
    describe_adapter,
    promised_steps,
    recorded_sampling,
    trained_for,
    warn_of_another_base,
)
from fewstep.reporting import SILENT, Reporter
from fewstep.timesteps import promised_points


@dataclass(frozen=True)
class Further:
    """One adapter of the file, and what is known of it."""

    entry: AdapterEntry
    source: lora.AdapterSource
    sampling: Sampling
    steps: tuple[int, ...]
    facts: Mapping[str, str]


def origin_of(settings: BenchSettings) -> Origin | None:
    """The base that the first further adapter which names one was trained on."""
    sources = (lora.locate(entry.lora_path, entry.lora_id) for entry in adapter_entries(settings))
    return next(filter(None, (recorded_origin(source.folder) for source in sources)), None)


class Adapters:
    """Every adapter of a benchmark. One at a time is attached; the first is the one that lora_path or lora_id names.

    Args:
        main: where the settings' own adapter is; None where there is none, or where it is attached already.

    Raises:
        InputError: the file of adapters is not one, an id came twice, or adapters came for a base that has one
            attached already.
        CheckpointError: an adapter that is not at hand, not for this base, or without effect.
    """

    def __init__(
        self, settings: BenchSettings, backbone: Backbone, main: lora.AdapterSource | None, reporter: Reporter
    ) -> None:
        self._backbone, self._settings = backbone, settings
        self._sources: dict[str | None, tuple[lora.AdapterSource, float, str]] = {}
        if main is not None:
            self._sources[None] = (main, 1.0, sha256(main.weights))
        self._attached: str | None = None
        self.further: list[Further] = []
        entries = adapter_entries(settings)
        if not entries:
            return
        if main is None and getattr(backbone.unet, "peft_config", {}):
            raise InputError(
                "further adapters came for a base that has an adapter attached already; allowed is a base without "
                "one; name that adapter among them instead"
            )
        for entry in entries:
            self.further.append(self._proven(entry, reporter))
        self._back_to_main()

    def _proven(self, entry: AdapterEntry, reporter: Reporter) -> Further:
        source = lora.locate(entry.lora_path, entry.lora_id)
        facts = self._attach(entry.id, source, entry.scale, reporter)
        warn_of_another_base(source, self._backbone, reporter.warn)
        steps = entry.steps or tuple(n for n in self._settings.steps if n in (promised_steps(source) or (n,)))
        if not steps:
            raise InputError(
                f"adapter {entry.id} promises other step counts than {' '.join(map(str, self._settings.steps))}; "
                "allowed is at least one that is drawn; give it steps of its own"
            )
        return Further(entry, source, _sampling(entry, source, reporter), steps, facts)

    def _attach(self, name: str | None, source: lora.AdapterSource, scale: float, reporter: Reporter) -> dict[str, str]:
        info = lora.load_adapter(self._backbone, source, allow_pickle=self._settings.allow_pickle, warn=reporter.warn)
        lora.set_scale(self._backbone.unet, scale)
        self._sources[name] = (source, scale, sha256(source.weights))
        self._attached = name
        reporter.say(f"adapter {name}: {describe_adapter(source, info)}, scale {scale:g}")
        return {"source": source.name, "layout": info.layout, "rank": str(info.rank), "alpha": f"{info.alpha:g}",
                "parameters": str(info.parameters), "scale": f"{scale:g}"}  # fmt: skip

    def _back_to_main(self) -> None:
        if None in self._sources:
            self._switch(None)
        else:
            lora.detach(self._backbone.unet)
            self._attached = None

    def _switch(self, name: str | None) -> None:
        if name == self._attached or name not in self._sources:
            return
        source, scale, digest = self._sources[name]
        if sha256(source.weights) != digest:
            raise CheckpointError(
                f"the adapter {source.name} has changed since the benchmark began; allowed is one that stays as it is; "
                "measure a copy, or start again when its training has ended"
            )
        lora.load_adapter(self._backbone, source, allow_pickle=self._settings.allow_pickle, warn=lambda _: None)
        lora.set_scale(self._backbone.unet, scale)
        self._attached = name

    @contextmanager
    def on(self, arm: Arm) -> Iterator[None]:
        """What `arm` draws with is attached inside; without adapter all are off, so that switching costs it no time."""
        if arm.adapter:
            self._switch(arm.source)
            if not getattr(self._backbone.unet, "peft_config", {}):  # its pictures would be the base's, under its name
                raise ValueError(f"arm {arm.id} draws with an adapter, and none is attached")
            yield
        else:
            with adapters_off(self._backbone.unet):
                yield

    def warn_of_timesteps(self, arms: Sequence[Arm], reporter: Reporter) -> None:
        """Name each arm of a further adapter that samples where, by its own record, it was never trained."""
        for arm in arms:
            promised = promised_steps(self._sources[arm.source][0]) if arm.source in self._sources else None
            # The run's own adapter is compared with its record elsewhere; an option samples where the plain arm does.
            if promised is None or arm.source is None or arm.option is not None:
                continue
            saved = recorded_sampling(self._sources[arm.source][0], SILENT)
            if (
                arm.sampler == saved.sampler
                and arm.span == saved.span
                and trained_for(arm.steps, promised, saved.sampler)
            ):
                continue
            grid = partial(sampler_timesteps, saved.sampler, span=saved.span)
            trained = promised_points(promised, self._backbone.schedule.num_train_timesteps, grid)
            strange = [t for t in arm.timesteps if t not in trained]
            if strange:
                reporter.warn(
                    f"arm {arm.id} samples at timesteps {' '.join(map(str, strange))}, where its adapter was not "
                    f"trained ({' '.join(map(str, trained))}): expect worse pictures; sample with "
                    f"{saved.sampler} at {' '.join(map(str, promised))} steps"
                )

    def arms(self) -> list[Arm]:
        """The arms of the further adapters, in the order of the file."""
        count = self._backbone.schedule.num_train_timesteps
        return [
            student_arm(
                steps,
                one.entry.guidance,
                count,
                name=one.entry.id,
                source=one.entry.id,
                sampler=one.sampling.sampler,
                span=one.sampling.span,
                eta=one.entry.eta,
                scale=one.entry.scale,
            )
            for one in self.further
            for steps in one.steps
        ]


def _sampling(entry: AdapterEntry, source: lora.AdapterSource, reporter: Reporter) -> Sampling:
    """What the entry says, else what was saved beside the adapter.

    Raises:
        InputError: the entry sets what its sampler, known only now, has no use for.
    """
    recorded = recorded_sampling(source, SILENT if entry.sampler else reporter)
    sampler = entry.sampler or recorded.sampler
    for name, value, only in (("eta", entry.eta, "tcd"), ("timestep_span", entry.timestep_span, "ddim")):
        if value and sampler != only:
            raise InputError(
                f"adapter {entry.id} has {name} {value:g}, and is sampled with {sampler}, which has none; allowed is "
                f"{name} with {only}; add sampler={only}, or leave it out"
            )
    span = entry.timestep_span or (recorded.span if sampler == "ddim" else 1.0)
    return Sampling(sampler, span)


def controls(students: Sequence[Arm], num_train_timesteps: int) -> list[Arm]:
    """The base without adapter for every way in which a student samples, each once."""
    found: dict[str, Arm] = {}
    for student in students:
        control = base_arm(
            student.steps,
            student.guidance,
            num_train_timesteps,
            sampler=student.sampler,
            eta=student.eta,
            span=student.span,
        )
        found.setdefault(control.id, control)
    return list(found.values())
