"""What cannot be benchmarked, from the command line: one line, an exit code of its own, and nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewstep import lora
from fewstep.backbone import random_backbone
from fewstep.cli import main
from fewstep.config import TrainSettings, settings_toml


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base on disk, and beside it what is no adapter for it."""
    from diffusers import UNet2DConditionModel

    root = tmp_path_factory.mktemp("bad")
    base = random_backbone("tiny")
    base.pipeline().save_pretrained(root / "base")
    narrow = UNet2DConditionModel.from_config(dict(base.unet.config) | {"block_out_channels": [8, 16]})
    lora.attach(narrow, 2, 16, ["to_q"], seed=1)
    lora.save_adapter(narrow, root / "narrow", base.scheduler_config)
    (root / "text.safetensors").write_text("no tensors at all")
    save_file({"weight": torch.zeros(3)}, root / "tensors.safetensors")
    (root / "empty.txt").write_text("\n  \n")
    return root


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--prompts_file {root}/empty.txt", 2, "holds no prompt; allowed is a prompt a line; add one"),
        ("--prompts_file {root}/missing.txt", 2, "cannot be read"),
        ("--prompt house --steps 0", 2, "steps: 0 came; allowed: one or several, each a whole number, at least 1"),
        ("--prompt house --lora_path {root}/narrow", 4, "was made for another architecture"),
        ("--prompt house --lora_path {root}/text.safetensors", 4, "text.safetensors"),
        ("--prompt house --lora_path {root}/tensors.safetensors", 4, "is not an adapter: it holds weight; allowed is"),
        ("--prompt house --lora_path {root}/nothing", 4, "nothing"),
        ("--prompt house --adapters_file {root}/empty.txt", 2, "is no list of adapters"),
        ("--prompt house --fast_options quick", 2, "fast_options: 'quick' came; allowed: fused, tiny-vae, bf16,"),
    ],
)
def test_one_line_a_code_and_nothing_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, code: int, words: str
) -> None:
    out = tmp_path / "out"
    plain = f"bench --base_model {folder}/base --clip_model_id none --device cpu --outdir {out} "
    assert main((plain + flags.format(root=folder)).split()) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not out.exists()


def test_a_training_runs_folder_keeps_its_settings(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `train` writes them; without them it could not be resumed."""
    saved = settings_toml(TrainSettings(output_dir=tmp_path, run_name="run"))
    (tmp_path / "settings.toml").write_text(saved)
    assert main(f"bench --base_model {folder}/base --prompt house --outdir {tmp_path}".split()) == 2
    error = capsys.readouterr().err
    assert "holds a run that is no benchmark" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["settings.toml"]
    assert (tmp_path / "settings.toml").read_text() == saved


def test_a_base_that_judges_is_not_drawn_at_another_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(f"bench --base_model scenes --resolution 64 --device cpu --outdir {out}".split()) == 2
    error = capsys.readouterr().err
    assert "resolution 64 came; allowed is the 128 at which the base scenes is judged; leave --resolution out" in error
    assert not out.exists()
