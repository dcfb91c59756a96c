"""A base so small that a whole benchmark takes a second: random networks, an answer key, a judge, an adapter."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fewstep import lora
from fewstep.backbone import Backbone, random_backbone
from fewstep.randomness import generator
from fewstep.scenes.abilities import FOLDER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fewstep.reporting import Bar

PROMPTS = ["a red house", "two birds over the sea", "a tower at night", "snow and <b>three</b> windows"]


def make_clip(folder: Path) -> Path:
    """A CLIPModel of a few thousand random weights, with processor and tokenizer, in transformers' layout."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "base" / "tokenizer")  # CLIP's own takes half a second to read
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(3)  # its scores lie above their floor
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"max_position_embeddings": 77, "vocab_size": len(tokenizer)} | special
    vision = small | {"image_size": 32, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 32}
    CLIPImageProcessorPil(size=size, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def make_dino(folder: Path) -> Path:
    """A DINOv2 of a few thousand random weights with 16 features, in transformers' layout."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    torch.manual_seed(12)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
    )  # fmt: skip
    Dinov2Model(config).save_pretrained(folder)
    size = {"shortest_edge": 32}
    BitImageProcessorPil(size=size, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def make_adapter(folder: Path, backbone: Backbone, *, scale: float = 0.05, alpha: float = 16) -> Path:
    """Save an adapter of random weights for this base, and leave the base without one.

    Strong weights make a random network chaotic: rounding then grows into visible differences.
    """
    lora.attach(backbone.unet, 2, alpha, ["to_q", "to_k", "to_v", "to_out.0"], seed=1)
    for number, parameter in enumerate(lora.AdapterWeights(backbone.unet).parameters().values()):
        drawn = torch.randn(parameter.shape, generator=generator(0, "adapter", number))
        parameter.data.copy_(scale * drawn if scale else torch.zeros_like(drawn))
    lora.save_adapter(backbone.unet, folder, backbone.scheduler_config)
    (folder / "settings.toml").write_text("num_inference_steps = [1, 2, 4]\n")
    lora.detach(backbone.unet)
    return folder


class Trunk(nn.Module):
    """Mean and spread of each colour: 6 features."""

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.cat([pixels.mean(dim=(2, 3)), pixels.std(dim=(2, 3))], dim=1)


@dataclass(frozen=True)
class FakeAbilities:
    """What a base may bring along; a picture is right where its left is redder and its upper half greener."""

    clip: Path
    shipped: Path
    side: int = 64

    def prompts(self, count: int, seed: int) -> list[str]:
        return [f"caption {seed}-{number}" for number in range(count)]

    def unknown_words(self, prompts: list[str]) -> list[str]:
        return sorted({word for prompt in prompts for word in prompt.split() if word == "unheard"})

    def reference_pictures(self, prompts: list[str], per_prompt: int, seed: int) -> np.ndarray:
        random = np.random.default_rng(seed)
        return random.integers(0, 256, (len(prompts) * per_prompt, self.side, self.side, 3), dtype=np.uint8)

    def answers(self, pixels: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        assert len(pixels) == len(prompts)
        half = self.side // 2  # true of some random pictures and false of others, far from where rounding matters
        red = pixels[:, 0, :, :half].mean(dim=(1, 2)) > pixels[:, 0, :, half:].mean(dim=(1, 2))
        green = pixels[:, 1, :half].mean(dim=(1, 2)) > pixels[:, 1, half:].mean(dim=(1, 2))
        return {"red": red, "green": green, "intact": torch.ones_like(red), "all_right": red & green}

    def features(self) -> nn.Module:
        return Trunk()

    def alignment_model(self) -> Path:
        return self.clip

    def adapter(self) -> Path:
        return self.shipped


def make_base(folder: Path) -> Backbone:
    """A tiny base with abilities; its judge and its shipped adapter lie in `folder`."""
    backbone = random_backbone("tiny")
    abilities = FakeAbilities(make_clip(folder / "clip"), make_adapter(folder / "adapter", backbone))
    return replace(backbone, abilities=abilities, teacher_steps=5)  # type: ignore[arg-type]


@dataclass
class Notes:
    """A reporter that remembers."""

    said: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    advanced: dict[str, tuple[int, int]] = field(default_factory=dict)

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)

    @contextmanager
    def progress(self, name: str, total: int) -> Iterator[Bar]:
        notes = self

        class _Bar:
            done = 0

            def advance(self, n: int = 1, **values: float) -> None:
                self.done += n
                notes.advanced[name] = (self.done, total)

        yield _Bar()
