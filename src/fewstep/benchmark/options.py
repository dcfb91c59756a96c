"""What may make few-step sampling faster: each option on a copy of the base, which is thrown away afterwards.

The base itself is never touched, so that no option reaches another arm. One that does not work here is an error that
names it, never an arm that is quietly like the plain one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace

import torch

from fewstep.arms import Arm, faster_arm
from fewstep.backbone import Backbone, compiled, load_tiny_vae, steady_vae
from fewstep.config import BenchSettings
from fewstep.errors import InputError, first_line, is_out_of_memory
from fewstep.quiet import quiet_libraries
from fewstep.reporting import SILENT, Reporter

TINY_VAE = "tiny-vae"
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Options:
    """The options of a benchmark's arms, proven to work here.

    Args:
        settings: which are asked for.
        backbone: the base.
        reporter: told what an option cannot have.

    Raises:
        InputError: an option that this machine or this base cannot have.
        CheckpointError: a tiny VAE that is not at hand or not one for this base.
    """

    def __init__(self, settings: BenchSettings, backbone: Backbone, reporter: Reporter = SILENT) -> None:
        self._reporter, self._warned = reporter, set[str]()
        self._names = [*(settings.fast_options or ()), *([TINY_VAE] if settings.tiny_vae else [])]
        parts = [part for name in self._names for part in name.split("+")]
        for name in PRECISIONS:
            if name in parts:
                _check_precision(name, backbone)
        if "compile" in parts:
            compiled.check_compiler(backbone.device, "fast_options compile")
        self._tiny = load_tiny_vae(settings.tiny_vae, backbone) if settings.tiny_vae else None

    def beside(self, arms: Sequence[Arm]) -> tuple[Arm, ...]:
        """The arms, and after each one of the first adapter the same with each option.

        Raises:
            InputError: options, and no adapter to draw with.
        """
        students = [arm for arm in arms if arm.role == "student" and arm.option is None]
        if self._names and not students:
            raise InputError(
                f"{self._names[0]} came, but no student is drawn that it could make faster; allowed is an option where "
                "an adapter is drawn; pass --lora_path, or leave --fast_options and --tiny_vae out"
            )
        found: list[Arm] = []
        for arm in arms:
            found.append(arm)
            if arm in students and arm.source == students[0].source:
                found += [faster_arm(arm, name) for name in self._names]
        return tuple(found)

    def key_of(self, arm: Arm) -> dict[str, str | None]:
        """The weights that an option brings to `arm`: their SHA-256."""
        return {"decoder": self._tiny.digest if self._tiny and TINY_VAE in _parts(arm) else None}

    @contextmanager
    def on(self, backbone: Backbone, arm: Arm) -> Iterator[Backbone]:
        """The base with the option of `arm`: itself where there is none, else a copy of it and of what is attached.

        Raises:
            InputError: the option fails inside.
        """
        if arm.option is None:
            yield backbone
            return
        copies = {part: deepcopy(getattr(backbone, part)) for part in ("unet", "vae", "text_encoder")}
        try:
            painter = replace(backbone, **copies)
            for option in _parts(arm):
                painter = self._applied(painter, option)
            if TINY_VAE not in _parts(arm) and not PRECISIONS.keys().isdisjoint(_parts(arm)):
                steady_vae(painter, self._warn_once)
            yield painter
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise InputError(
                f"arm {arm.id} failed by its option {arm.option} ({first_line(error)}); allowed are options that work "
                "on this machine; leave it out"
            ) from error
        finally:
            if "compile" in _parts(arm):
                torch.compiler.reset()  # what was compiled for the copy would count against the next one's limit

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._reporter.warn(text)

    def _applied(self, copy: Backbone, option: str) -> Backbone:
        match option:
            case "fused":
                copy.unet.fuse_lora()
                copy.unet.unload_lora()
            case "channels-last":
                copy.use_channels_last()
            case "compile":
                # Whole and for each shape anew: where that is not to be had, an error instead of slow code.
                copy.unet.compile(fullgraph=True, dynamic=False, backend=compiled.BACKEND)
            case "tiny-vae" if self._tiny is not None:
                return replace(copy, vae=deepcopy(self._tiny.network))
            case "bf16" | "fp16":
                # The adapter too: under autocast its fp32 weights would be rounded alike, at every call.
                with quiet_libraries():
                    for network in (copy.unet, copy.vae, copy.text_encoder):
                        network.to(PRECISIONS[option])
                return replace(copy, dtype=PRECISIONS[option])
            case _:
                raise ValueError(f"option {option!r} came; allowed are those of BenchSettings")
        return copy


def _parts(arm: Arm) -> list[str]:
    """The options of an arm, in the order in which they are applied."""
    return arm.option.split("+") if arm.option else []


def _check_precision(name: str, backbone: Backbone) -> None:
    if PRECISIONS[name] == backbone.dtype:
        raise InputError(
            f"fast_options {name} came, but the base runs in {name} already; allowed is another precision; leave it "
            "out, or add --mixed_precision no"
        )
    if name == "fp16" and backbone.device.type == "cpu":
        raise InputError("fast_options fp16 came with the CPU; allowed there: bf16; leave fp16 out")
