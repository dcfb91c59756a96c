"""What the stages share, and what they hand to one another through the output folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTokenizer

from fewstep.backbone import choose_device
from fewstep.config import PretrainSettings
from fewstep.errors import InputError
from fewstep.files import read_whole, replace_folder_atomic, sha256, write_text_atomic
from fewstep.pretrain.sizes import SIZES
from fewstep.reporting import Reporter
from fewstep.scenes.captions import random_caption
from fewstep.scenes.drawings import drawn_pixels, numbered_attributes, numbered_drawing
from fewstep.scenes.loop import Loss, Make, Plan, run, steps_done
from fewstep.scenes.text import build_tokenizer

HASHED = 200
"""Drawings by which work that was begun with other drawings is told: enough for every colour, shape and weather."""


class Workshop:
    """The stages, and what they hand to one another through the output folder."""

    def __init__(self, settings: PretrainSettings, reporter: Reporter) -> None:
        self.settings, self.reporter = settings, reporter
        self.sizes, self.size, self.seed = SIZES[settings.size], settings.size, settings.seed
        self.out, self.work = settings.output_dir, settings.output_dir / "work"
        self.device = choose_device(settings.device)
        self.fast = _uses_bf16(settings, self.device)
        self.card = self.out / "figures.json"
        self.figures: dict[str, Any] = {}
        if self.card.exists():
            with read_whole(self.card, "remove it; a stage that is run again measures its figures anew"):
                self.figures = json.loads(self.card.read_text())

    @property
    def train_seed(self) -> int:
        """Of the drawings that are trained on."""
        return self.seed

    @property
    def test_seed(self) -> int:
        """Of those that are tested on, disjoint from the others."""
        return self.seed + 1_000_003

    @property
    def folded(self) -> Path:
        """Where the VAE's stages leave it."""
        return self.work / "vae-refine" / "folded"

    def begin(self) -> None:
        """Note beside the work what it is made from; work from before such notes is taken for what came.

        Raises:
            InputError: the work was begun with something else.
        """
        file = self.work / "made_from.json"
        drawings = hashlib.sha256()
        for index in range(HASHED):
            drawings.update(numbered_drawing(self.train_seed, index).pixels.tobytes())
        made_from = {"size": self.size, "seed": self.seed, "drawings_sha256": drawings.hexdigest()}
        if not file.exists():
            write_text_atomic(file, json.dumps(made_from, indent=1) + "\n")
            return
        with read_whole(file, "remove it, if the work is of the same size and seed, or choose another --output_dir"):
            begun = json.loads(file.read_text())
        differing = [name for name in made_from if begun.get(name) != made_from[name]]
        if differing:
            if len(differing) > 1:
                differing.remove("drawings_sha256")  # another seed's are others
            came = " and ".join(f"{name} {made_from[name]}" for name in differing)
            was = " and ".join(str(begun.get(name)) for name in differing)
            raise InputError(
                f"{came} came, the work in {str(self.work)!r} was begun with {was}; allowed is the same; choose "
                "another --output_dir"
            )

    def leave(self, folder: Path, save: Callable[[Path], object]) -> None:
        """Let `save` write `folder`, which appears whole or not at all."""
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        try:
            save(partial)
            for file in (path for path in partial.rglob("*") if path.is_file()):
                file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors lets nobody but the user read its own
            replace_folder_atomic(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def record(self, stage: str, figures: dict[str, Any]) -> None:
        """Keep what a stage measured beside the weights, with the command that made it, and say it."""
        command = f"fewstep pretrain --size {self.size} --stage {stage} --seed {self.seed}"
        self.figures[stage] = {"command": command, "device": self.device.type, "bf16": self.fast} | figures
        write_text_atomic(self.card, json.dumps(self.figures, indent=1) + "\n")
        for name, value in self.figures[stage].items():
            self.reporter.say(f"{stage}: {name} = {value}")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, self.fast)

    def plan(self, stage: str) -> Plan:
        """How a stage, or a model of it, is trained on the device at hand."""
        plan: Plan = getattr(self.sizes, stage)
        if self.device.type == "cpu":
            return plan
        return replace(plan, batch_size=plan.batch_size * self.sizes.larger_on_gpu, parts=1)

    def run(
        self,
        module: nn.Module,
        make: Make,
        loss: Loss,
        plan: Plan,
        name: str,
        until: int | None = None,
        after: Sequence[str] = (),
    ) -> nn.Module:
        """Train `module` under autocast in the folder `name`, to the end or `until` a step; it stays on the device.

        Args:
            after: the folders in which was trained what this training builds on.

        Raises:
            InputError: it was begun on one of them before that was trained anew.
        """
        begun = self._note_begun_on(name, after)
        goes_on = 0 < steps_done(self.work / name) < (plan.steps if until is None else until)
        if goes_on and begun.get("bf16", self.fast) != self.fast:
            before, now = ("bf16", "no") if begun["bf16"] else ("no", "bf16")
            self.reporter.warn(
                f"{name} was begun with --mixed_precision {before} and goes on with {now}: what comes of it is of "
                "neither"
            )

        def cast(*batch: Any) -> dict[str, Tensor]:
            with self.autocast():
                return loss(*batch)

        return run(module, make, cast, plan, self.work / name, self.reporter, self.device, until)

    def _note_begun_on(self, name: str, after: Sequence[str]) -> dict[str, Any]:
        """Keep, beside what is trained in `name`, the hashes of what it builds on, and in which precision it is."""
        trained, note = self.work / name / "state.safetensors", self.work / name / "begun_on.json"
        for one in after:
            _need(self.work / one / "state.safetensors", one)
        came = {one: sha256(self.work / one / "state.safetensors") for one in after}
        if trained.exists():
            begun = {}  # work from before such notes was begun on nobody knows what
            if note.exists():
                with read_whole(note, f"remove its folder, and the stage trains {name} from its start"):
                    begun = json.loads(note.read_text())
            for one in after:
                if begun.get(one) != came[one]:
                    raise InputError(
                        f"{str(trained)!r} was not begun on the {one} that is there now; allowed is the one that it "
                        f"was begun on; remove {str(trained.parent)!r}, and the stage trains {name} from its start"
                    )
        else:
            begun = came | {"bf16": self.fast}
            write_text_atomic(note, json.dumps(begun, indent=1) + "\n")
        return begun

    def drawings(self) -> np.ndarray:
        cache = self.work / "drawings.npy"
        if not cache.exists():
            self.reporter.say(f"drawing {self.sizes.drawings} pictures")
            return drawn_pixels(self.train_seed, self.sizes.drawings, cache)
        with read_whole(cache, "remove it, and they are drawn again"):
            return drawn_pixels(self.train_seed, self.sizes.drawings, cache)

    def captions(self, step: int, picked: list[int]) -> list[str]:
        """A caption of each drawing, in a phrasing drawn anew each step."""
        rng = np.random.default_rng((self.seed, step, 2))
        return [random_caption(rng, numbered_attributes(self.train_seed, index)) for index in picked]

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """What the first stage that needed one left: trained once, so that its ids are the same for all."""
        folder = self.work / "tokenizer"
        if not folder.exists():
            self.leave(folder, build_tokenizer)
        with read_whole(folder, "remove the whole work folder: what is trained reads by its ids"):
            tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
        for where_from in ("is_local", "local_files_only"):  # nobody's business: it would be saved with the base
            tokenizer.init_kwargs.pop(where_from, None)
        return tokenizer

    def load_vae(self) -> AutoencoderKL:
        """The VAE as its stages left it, not to be trained any more, on the device.

        Raises:
            InputError: they have not been run.
        """
        _need(self.folded, "vae-refine")
        with read_whole(self.folded, "run --stage vae-refine again, which trains no more and writes it anew"):
            vae = AutoencoderKL.from_pretrained(self.folded)
        return vae.eval().requires_grad_(False).to(self.device)

    def need_judges(self) -> None:
        """Miss the judges before anything long.

        Raises:
            InputError: their stage has not been run.
        """
        for name in ("judge", "alignment"):
            _need(self.out / name, "judges")


def _need(folder: Path, stage: str) -> None:
    if not folder.exists():
        raise InputError(f"there is no {str(folder)!r}, which the stage {stage} leaves; run --stage {stage} first")


def _uses_bf16(settings: PretrainSettings, device: torch.device) -> bool:
    """Whether to train under bf16 autocast: asked for, or on a GPU or a processor with bf16 matrix units."""
    if settings.mixed_precision == "fp16":
        raise InputError("mixed_precision fp16 came; allowed is auto, no or bf16; pass --mixed_precision auto")
    if settings.mixed_precision == "auto":
        return device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_amx_tile_supported())
    return settings.mixed_precision == "bf16"
