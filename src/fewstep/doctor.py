"""`fewstep doctor`: whether a training would start, one line a check, each failure with its fix."""

from __future__ import annotations

import platform
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from math import isfinite
from pathlib import Path

import torch
from packaging.requirements import Requirement

from fewstep.arithmetic import room
from fewstep.backbone import Backbone
from fewstep.backbone.loading import choose_device, choose_dtype
from fewstep.config import TrainSettings, spell
from fewstep.data import Batches, DataReport, Slices, open_data
from fewstep.errors import FewstepError, InputError
from fewstep.lora import trainable_parameters
from fewstep.reporting import LOG, SILENT, Reporter, in_bytes
from fewstep.timing import machine
from fewstep.train import engine, resuming, start
from fewstep.train.needs import disk_of_run, existing, free_disk

CHECKS: dict[str, tuple[str, ...]] = {
    "versions": (),
    "folder": (),
    "device": (),
    "model": ("device",),
    "settings": ("model",),
    "forward": ("model",),
    "data": ("model",),
    "disk": ("settings", "data"),
}
"""The checks in their order, and what each needs to have passed."""

SHOWN = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")
"""Libraries whose versions are said."""

FIRST_PICTURES = 4
"""How many pictures are read."""

REFUSALS = (FewstepError, OSError, RuntimeError, ImportError)
"""What a check may fail with: our own errors, and those of the machine and of torch."""


@dataclass(frozen=True)
class Check:
    """A check that was made.

    Attributes:
        name: one of `CHECKS`.
        passed: None where it was left out, for it needs one that failed.
        text: what was found, or what is wrong and the fix.
    """

    name: str
    passed: bool | None
    text: str

    def __str__(self) -> str:
        state = {True: "ok", False: "FAIL", None: "skip"}[self.passed]
        return f"{state:4} {self.name:8} {self.text}"


def doctor(settings: TrainSettings, *, reporter: Reporter = LOG) -> list[Check]:
    """Make every check that can be made and say what it found. Nothing is written.

    Args:
        settings: as a training would have them.

    Raises:
        FewstepError: checks failed; of the kind, and so with the exit code, that the training would have ended with.
    """
    examination = _Examination(settings)
    checks: list[Check] = []
    first: Exception | None = None
    for name, needed in CHECKS.items():
        missing = [check.name for check in checks if check.name in needed and not check.passed]
        try:
            text = f"needs {spell(missing)}" if missing else getattr(examination, name)()
            checks.append(Check(name, None if missing else True, text))
        except REFUSALS as error:
            first = first or error
            checks.append(Check(name, False, " ".join(str(error).split())))
        reporter.say(str(checks[-1]))
    if first is not None:
        failed = spell([check.name for check in checks if check.passed is False])
        kind = type(first) if isinstance(first, FewstepError) else InputError
        raise kind(f"not ready to train: {failed} failed; see the lines above for what is wrong and how to mend it")
    reporter.say("ready to train")
    return checks


class _Examination:
    """The checks: each returns what it found in a few words, or raises."""

    def __init__(self, settings: TrainSettings) -> None:
        self._settings = settings
        self._resumed: Path | None = None
        self._backbone: Backbone | None = None
        self._data: DataReport | None = None

    @property
    def _base(self) -> Backbone:
        assert self._backbone is not None, "the model is checked first"
        return self._backbone

    def versions(self) -> str:
        try:
            needed = [Requirement(line) for line in requires("fewstep") or ()]
        except PackageNotFoundError:
            raise InputError("fewstep itself is not installed; run `pip install -e .` in its folder") from None
        wrong = []
        for requirement in needed:
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            try:
                found = version(requirement.name)
            except PackageNotFoundError:
                found = "missing"
            if found == "missing" or not requirement.specifier.contains(found, prereleases=True):
                wrong.append(f"{requirement.name} is {found}, allowed is {requirement.specifier}")
        if wrong:
            raise InputError(f"{'; '.join(wrong)}; run `pip install -e .` again, or `make install`")
        return f"Python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in SHOWN)}"

    def folder(self) -> str:
        resumed = resuming.checkpoint_to_resume(self._settings, SILENT)
        place = existing(self._settings.run_dir)
        try:
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            raise InputError(
                f"{str(place)!r} cannot be written to: {error.strerror}; choose another --output_dir"
            ) from None
        self._resumed = resumed
        if resumed is None:
            return f"{self._settings.run_dir} can be written to"
        return f"{self._settings.run_dir} can be written to, and goes on from {resumed.name}"

    def device(self) -> str:
        device = choose_device(self._settings.device)
        dtype = choose_dtype(self._settings.mixed_precision, device)
        torch.zeros(1, device=device)  # a device that is there may still be out of order
        free = room(device)
        name = machine(device, "")["device"]
        memory = "" if free is None else f", {in_bytes(free)} of memory free"
        return f"{device} ({name}), {str(dtype).removeprefix('torch.')}{memory}"

    def model(self) -> str:
        origin = start.origin_of(self._settings, self._resumed)
        stray = start.stray_data(self._settings, origin)
        self._backbone, self._settings = start.open_base(self._settings, self._settings.device, origin, SILENT)
        networks = (self._base.unet, self._base.vae, self._base.text_encoder)
        count = sum(parameter.numel() for network in networks for parameter in network.parameters())
        told = f"{self._base.name} ({self._base.why}), {count / 1e6:,.1f} M parameters"
        narrow = next(self._base.vae.parameters()).dtype != self._base.dtype
        also = ["its VAE overflows in half precision and runs in float32"] if narrow else []
        return "; ".join([told, *also, *([stray] if stray else [])])

    def settings(self) -> str:
        method = start.method_of(self._settings, self._base)
        engine.quickened(self._base, self._settings, self._settings.batch_size)
        start.student_of(self._settings, self._base, resumed=self._resumed is not None)
        return (
            f"{trainable_parameters(self._base.unet):,} trainable parameters, resolution {self._settings.resolution}, "
            f"t is one of {spell(method.points)}"
        )

    @torch.no_grad()
    def forward(self) -> str:
        base, device = self._base, self._base.device
        latents = torch.zeros(1, *base.latent_shape(self._settings.resolution), device=device)
        output = base.denoiser(adapter=False)(latents, torch.tensor([999], device=device), base.embed([""]))
        if not isfinite(float(output.abs().sum())):
            raise InputError(
                f"the UNet says {float(output.abs().sum())} in {base.dtype}; allowed are finite numbers; pass "
                "--mixed_precision bf16 or no, or fetch the weights again"
            )
        return "the text encoder and the UNet give finite numbers"

    def data(self) -> str:
        opened = open_data(self._settings, self._base, streaming=self._settings.streaming)
        self._data = opened.report
        if self._resumed is not None:  # how many processes there will be, and so the global batch, is not known here
            resuming.check_resumed(self._resumed, self._settings, self._base, {"data_fingerprint": opened.fingerprint})
        few = Slices(batch_size=min(FIRST_PICTURES, len(opened.data)))
        batch = next(
            iter(Batches(opened.data, few, seed=self._settings.seed, start=0, end=1, allowance=opened.allowance))
        )
        if batch.pictures.numel():
            self._base.encode(batch.pixels(self._base.device)[:1])
        counted = "; ".join(opened.report.lines())
        return f"{counted}; the first {len(batch.captions)} can be read, such as {batch.captions[0]!r}"

    def disk(self) -> str:
        assert self._data is not None, "the data is checked first"
        settings, trainable = self._settings, trainable_parameters(self._base.unet)
        slices = Slices(batch_size=settings.batch_size, accumulation=settings.gradient_accumulation_steps)
        needed = sum(disk_of_run(settings, self._base, self._data, slices, trainable).values())
        free = free_disk(self._settings.run_dir)
        if needed > free:
            raise InputError(
                f"the run takes up to {in_bytes(needed)}, {in_bytes(free)} are free; make room, choose another "
                "--output_dir, or keep less with --keep_last"
            )
        return f"the run takes up to {in_bytes(needed)}, {in_bytes(free)} are free"
