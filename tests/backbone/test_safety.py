"""The safety checker opens wherever the base beside it does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewstep.quiet import quiet_libraries
from fewstep.safety import SafetyChecker


def checked(folder: Path, variant: str | None) -> Path:
    """A folder with a tiny safety checker; a variant is in half precision, as published ones are."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessorPil

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = small | {"image_size": 16, "patch_size": 8}
    network = StableDiffusionSafetyChecker(CLIPConfig(text_config=small, vision_config=vision, projection_dim=8))
    with torch.no_grad():
        network.concept_embeds_weights.fill_(2.0)  # no cosine is above it: no objection
        network.special_care_embeds_weights.fill_(2.0)
    with quiet_libraries():
        (network if variant is None else network.half()).save_pretrained(folder / "safety_checker", variant=variant)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(folder / "feature_extractor")
    return folder


PIXELS = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)


def test_a_folder_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    checked(tmp_path / "base", None)
    assert SafetyChecker("~/base").objections(PIXELS) == [False, False]


def test_fp16_in_the_file_name(tmp_path: Path) -> None:
    folder = checked(tmp_path / "base", "fp16")
    assert [path.name for path in (folder / "safety_checker").glob("*.safetensors")] == ["model.fp16.safetensors"]
    assert SafetyChecker(str(folder)).objections(PIXELS) == [False, False]
