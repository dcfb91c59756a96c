"""CLIP alignment through a tiny CLIPModel: embeddings, floor, and weights that are missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.errors import CheckpointError
from fewstep.metrics.alignment import CLIPAlignment, align_x100, alignment_and_floor
from tests.benchmark.fakes import make_clip

PROMPTS = ["a red house", "two birds", "a tower at night"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder: Path) -> CLIPAlignment:
    return CLIPAlignment(folder)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    drawn = torch.randint(0, 256, (3, 3, 48, 48), generator=torch.Generator().manual_seed(1))
    return drawn.to(torch.uint8)


def test_the_score_is_clips_own(clip: CLIPAlignment, folder: Path, pixels: torch.Tensor) -> None:
    """Against `CLIPModel.forward`, whose logits are the cosines times exp(logit_scale)."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder)
    tokens = CLIPTokenizer.from_pretrained(folder)(PROMPTS, padding="max_length", max_length=77, return_tensors="pt")
    images = CLIPImageProcessorPil.from_pretrained(folder)(
        images=[picture.permute(1, 2, 0).numpy() for picture in pixels], return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**tokens, **images).logits_per_image / model.logit_scale.exp()
    torch.testing.assert_close(clip.score(pixels, PROMPTS), logits.diagonal(), atol=1e-5, rtol=0)


def test_bytes_and_unit_pixels_score_the_same(clip: CLIPAlignment, pixels: torch.Tensor) -> None:
    assert torch.equal(clip.images(pixels), clip.images(pixels.float() / 255))


def test_a_score_does_not_depend_on_the_batch(clip: CLIPAlignment, pixels: torch.Tensor) -> None:
    one_by_one = torch.cat([clip.score(pixels[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(clip.score(pixels, PROMPTS), one_by_one, atol=1e-6, rtol=0)


def test_negative_cosines_count_as_nothing() -> None:
    assert align_x100(torch.tensor([-0.2, 0.3])).tolist() == pytest.approx([0.0, 30.0])


def test_the_floor_is_everyone_elses_captions() -> None:
    images, texts = torch.eye(3), torch.tensor([[0.8, 0.6, 0.0], [0.0, 1.0, 0.0], [-0.6, 0.0, 0.8]])
    found = alignment_and_floor(images, texts, [0, 1, 2], ["a", "b", "c"])
    assert found["score"].tolist() == pytest.approx([80, 100, 80])
    assert found["floor"].tolist() == pytest.approx([0, 30, 0])


def test_a_caption_that_reads_the_same_is_nobody_elses() -> None:
    found = alignment_and_floor(torch.eye(2), torch.eye(2)[[0, 0, 1]], [0, 1], ["a", "a", "b"])
    assert found["floor"].tolist() == pytest.approx([0, 100])
    assert "floor" not in alignment_and_floor(torch.eye(2), torch.eye(2), [0, 1], ["a", "a"])


def test_swapped_captions_are_at_the_floor() -> None:
    """Pictures of other prompts: the score is what the floor is on average."""
    directions = torch.nn.functional.normalize(torch.randn(40, 16, generator=torch.Generator().manual_seed(3)), dim=1)
    names = [str(i) for i in range(40)]
    right = alignment_and_floor(directions, directions, range(40), names)
    swapped = alignment_and_floor(directions.roll(1, 0), directions, range(40), names)
    assert right["score"].mean() > 99
    assert abs(float(swapped["score"].mean() - right["floor"].mean())) < 5


def test_prompts_that_are_too_long_are_counted(clip: CLIPAlignment) -> None:
    assert clip.overlong(["short", "very " * 100]) == [1]
    assert clip.texts(["very " * 100]).shape == (1, 8)


def test_weights_that_are_not_at_hand(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not at hand") as caught:
        CLIPAlignment("nobody/no-clip")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 4
    with pytest.raises(CheckpointError, match="not at hand"):
        CLIPAlignment(tmp_path)


def test_weights_that_are_incomplete_are_never_made_up(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"visual_projection\.weight"):
        CLIPAlignment(tmp_path)
