"""What the stages share, and what they hand to one another through the output folder."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTokenizer

from fewstep.backbone import choose_device
from fewstep.config import PretrainSettings
from fewstep.errors import InputError
from fewstep.files import write_text_atomic
from fewstep.pretrain.sizes import SIZES
from fewstep.reporting import Reporter
from fewstep.scenes.captions import random_caption
from fewstep.scenes.drawings import drawn_pixels, numbered_attributes
from fewstep.scenes.loop import Loss, Make, Plan, run
from fewstep.scenes.text import build_tokenizer


class Workshop:
    """The stages, and what they hand to one another through the output folder."""

    def __init__(self, settings: PretrainSettings, reporter: Reporter) -> None:
        self.settings, self.reporter = settings, reporter
        self.sizes, self.size, self.seed = SIZES[settings.size], settings.size, settings.seed
        self.out, self.work = settings.output_dir, settings.output_dir / "work"
        self.device = choose_device(settings.device)
        self.fast = _uses_bf16(settings, self.device)
        self.card = self.out / "figures.json"
        self.figures: dict[str, Any] = json.loads(self.card.read_text()) if self.card.exists() else {}

    @property
    def train_seed(self) -> int:
        """Of the drawings that are trained on."""
        return self.seed

    @property
    def test_seed(self) -> int:
        """Of those that are tested on, disjoint from the others."""
        return self.seed + 1_000_003

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
        self, module: nn.Module, make: Make, loss: Loss, plan: Plan, name: str, until: int | None = None
    ) -> nn.Module:
        """Train `module` under autocast in the folder `name`, to the end or `until` a step; it stays on the device."""

        def cast(*batch: Any) -> dict[str, Tensor]:
            with self.autocast():
                return loss(*batch)

        return run(module, make, cast, plan, self.work / name, self.reporter, self.device, until)

    def drawings(self) -> np.ndarray:
        self.reporter.say(f"drawing {self.sizes.drawings} pictures")
        return drawn_pixels(self.train_seed, self.sizes.drawings, self.work / "drawings.npy")

    def captions(self, step: int, picked: list[int]) -> list[str]:
        """A caption of each drawing, in a phrasing drawn anew each step."""
        rng = np.random.default_rng((self.seed, step, 2))
        return [random_caption(rng, numbered_attributes(self.train_seed, index)) for index in picked]

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        return build_tokenizer(self.work / "tokenizer")

    def load_vae(self) -> AutoencoderKL:
        """What the first stage left, not to be trained any more, on the device.

        Raises:
            InputError: the first stage has not been run.
        """
        folder = self.work / "vae" / "folded"
        if not folder.exists():
            raise InputError(f"there is no {str(folder)!r}, which the stage vae leaves; run --stage vae first")
        return AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False).to(self.device)


def _uses_bf16(settings: PretrainSettings, device: torch.device) -> bool:
    """Whether to train under bf16 autocast: asked for, or on a GPU or a processor with bf16 matrix units."""
    if settings.mixed_precision == "auto":
        return device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_amx_tile_supported())
    return settings.mixed_precision == "bf16"
