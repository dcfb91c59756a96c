"""What the embedded base can do besides drawing: its own data, prompts, answer key, features, alignment model.

Everyone else asks a base for these abilities; nobody asks which base it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.scenes.attributes import Split
from fewstep.scenes.captions import random_caption, read_caption, unknown_words
from fewstep.scenes.drawings import numbered_attributes, numbered_drawing
from fewstep.scenes.judge import Features, Glance, answers, load_judge, read

FOLDER = Path(__file__).parent
PROMPT_STREAM, TRAINING_STREAM, REFERENCE_STREAM = 7_000_001, 8_000_009, 9_000_011
"""Offsets that keep evaluation prompts, training pictures and reference pictures apart, whatever the seed."""


@dataclass
class SceneAbilities:
    """The abilities of a folder that `fewstep pretrain` wrote."""

    folder: Path = field(default=FOLDER)

    def prompts(self, count: int, seed: int, split: Split = "unseen") -> list[str]:
        """`count` distinct captions of combinations that no training picture shows, whatever the seed."""
        found: dict[str, None] = {}
        index = 0
        while len(found) < count:
            attributes = numbered_attributes(seed + PROMPT_STREAM, index, split)
            found[random_caption(np.random.default_rng((seed, index, 3)), attributes)] = None
            index += 1
        return list(found)

    def training_item(self, seed: int, index: int) -> tuple[np.ndarray, str]:
        """Drawing `index` of a training stream: uint8 [128, 128, 3] and its caption."""
        return numbered_drawing(seed + TRAINING_STREAM, index).pixels, self.training_caption(seed, index)

    def training_caption(self, seed: int, index: int) -> str:
        """The caption of that drawing, which need not be drawn for it."""
        attributes = numbered_attributes(seed + TRAINING_STREAM, index)
        return random_caption(np.random.default_rng((seed, index, 4)), attributes)

    def reference_pictures(self, prompts: list[str], per_prompt: int, seed: int) -> np.ndarray:
        """Drawings of the same captions, prompt by prompt: uint8 [len(prompts) · per_prompt, 128, 128, 3].

        Attributes that a prompt leaves open are drawn at random.
        """
        pictures = []
        for position, prompt in enumerate(prompts):
            named = read_caption(prompt)
            for copy in range(per_prompt):
                index = position * per_prompt + copy
                drawn = numbered_attributes(seed + REFERENCE_STREAM, index)
                attributes = type(drawn)(**{**drawn.__dict__, **named})
                pictures.append(numbered_drawing(seed + REFERENCE_STREAM, index, attributes=attributes).pixels)
        return np.stack(pictures)

    @cached_property
    def _judge(self) -> Glance:
        return Glance(load_judge(self.folder / "judge"))

    def unknown_words(self, prompts: list[str]) -> list[str]:
        """The words of the prompts that stand in no caption, each once."""
        return list(dict.fromkeys(word for prompt in prompts for word in unknown_words(prompt)))

    @torch.no_grad()
    def answers(self, pixels: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """What is right about pictures [B, 3, 128, 128] in 0…1: booleans [B] by attribute, "intact", "all_right"."""
        return answers(read(self._judge(pixels.float().cpu())[0]), [read_caption(prompt) for prompt in prompts])

    def features(self) -> nn.Module:
        """The 64-dimensional feature extractor: pixels [B, 3, 128, 128] in 0…1 to [B, 64]."""
        return Features(self._judge)

    def alignment_model(self) -> Path:
        """The folder of the base's own `CLIPModel`."""
        return self.folder / "alignment"

    def adapter(self) -> Path | None:
        """The folder of the shipped few-step adapter, which a rebuilt base has not."""
        folder = self.folder / "adapter"
        return folder if folder.is_dir() else None

    def beside(self, base: Path) -> SceneAbilities:
        """Those of the folder in which `fewstep pretrain` wrote `base`; a base moved alone has the shipped judges."""
        folder = base.resolve().parent
        own = (folder / "judge").is_dir() and (folder / "alignment").is_dir()
        return SceneAbilities(folder if own else self.folder)


SCENES = SceneAbilities()
