"""DINOv2 through transformers, with a tiny network of random weights; and weights that are not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.errors import CheckpointError
from fewstep.metrics.features import DINOFeatures
from fewstep.metrics.pretrained import ModelNotAtHand
from tests.benchmark.fakes import make_clip, make_dino


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dino(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 48, 40), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def test_the_features_are_the_models_own(folder: Path, pixels: torch.Tensor) -> None:
    from transformers import BitImageProcessorPil, Dinov2Model

    inputs = BitImageProcessorPil.from_pretrained(folder)(
        images=[picture.permute(1, 2, 0).numpy() for picture in pixels], return_tensors="pt"
    )
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(folder)(**inputs).last_hidden_state[:, 0]
    features = DINOFeatures(str(folder))
    assert features.name == str(folder)
    torch.testing.assert_close(features(pixels), expected, atol=1e-5, rtol=0)
    one_by_one = torch.cat([features(pixels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(features(pixels), one_by_one, atol=1e-5, rtol=0)


def test_weights_that_are_not_at_hand(tmp_path: Path) -> None:
    for name in ("nobody/no-dino", str(tmp_path)):
        with pytest.raises(ModelNotAtHand, match=r"of --feature_model is not at hand \(looked in") as caught:
            DINOFeatures(name)
        assert "\n" not in str(caught.value) and f"hf download {name}" in str(caught.value)


def test_code_that_came_with_the_weights_is_never_run_whoever_is_asked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    own = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel", "AutoImageProcessor": "own.OwnProcessor"}
    for name in ("config.json", "preprocessor_config.json"):
        content = json.loads((tmp_path / name).read_text())
        content |= {"auto_map": own} | ({"model_type": "own"} if name == "config.json" else {})
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(CheckpointError):
        DINOFeatures(str(tmp_path))
    assert not (tmp_path / "executed").exists()


def test_another_model_and_half_a_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a clip model; allowed is a DINOv2"):
        DINOFeatures(str(make_clip(tmp_path / "clip")))
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights of a Dinov2Model, such as layernorm\.weight"):
        DINOFeatures(str(tmp_path))
