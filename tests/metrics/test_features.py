"""DINOv2 with a tiny network of random weights, Inception with stand-ins for its libraries; and what is not there."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.errors import CheckpointError
from fewstep.metrics.features import DINOFeatures, InceptionFeatures, InceptionNotAtHand
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


def test_pickled_weights_are_named_as_what_is_in_the_way(folder: Path, tmp_path: Path) -> None:
    """As of the usual CLIP, which `hf download` fetches in no other form."""
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    from transformers import Dinov2Model

    torch.save(Dinov2Model.from_pretrained(folder).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelNotAtHand, match="its weights here are pickled, which takes --allow_pickle"):
        DINOFeatures(str(tmp_path))
    pixels = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8)
    torch.testing.assert_close(
        DINOFeatures(str(tmp_path), allow_pickle=True)(pixels), DINOFeatures(str(folder))(pixels)
    )


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


# --------------------------------------------------------------------------------------------------------- Inception


def libraries(monkeypatch: pytest.MonkeyPatch, network: object) -> None:
    """torch-fidelity and torchmetrics as they are where the former is installed."""
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", SimpleNamespace(NoTrainInceptionV3=network))


def test_inception_is_the_ports_2048_features_and_runs_no_code(
    monkeypatch: pytest.MonkeyPatch, pixels: torch.Tensor
) -> None:
    asked: list[object] = []

    class Network(torch.nn.Linear):
        def __init__(self, *given: object) -> None:
            super().__init__(3, 2048)
            asked.extend([*given, os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")])

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            assert pixels.dtype == torch.uint8
            return super().forward(pixels.float().mean(dim=(2, 3)))

    libraries(monkeypatch, Network)
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    features = InceptionFeatures(allow_pickle=True)
    assert asked == ["inception-v3-compat", ["2048"], "1"] and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    found = features(pixels)
    assert found.shape == (3, 2048) and found.dtype == torch.float32 and not found.requires_grad


def test_inception_that_is_not_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("\x1b[1mno route to host\x1b[0m\nmore")

    libraries(monkeypatch, fails)
    with pytest.raises(InceptionNotAtHand, match="pickled file; add --allow_pickle"):
        InceptionFeatures()
    with pytest.raises(InceptionNotAtHand, match=r"cannot be had in .*: no route to host\)") as caught:
        InceptionFeatures(allow_pickle=True)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 4
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(InceptionNotAtHand, match=r"run `pip install 'fewstep\[fid\]'`"):
        InceptionFeatures(allow_pickle=True)
