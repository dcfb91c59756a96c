"""A VAE that overflows in half precision runs in fp32, and one that gives no numbers at all is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewstep.backbone import Backbone, random_backbone, steady_vae
from fewstep.cli import main
from fewstep.config import GenerateSettings
from fewstep.opening import load_chosen
from fewstep.reporting import SILENT


def too_large_for_half(base: Backbone) -> None:
    """As fine-tuned VAEs overflow: inside, by weights that are finite themselves, what comes out being ordinary."""
    with torch.no_grad():
        base.vae.post_quant_conv.weight.mul_(1e5)
        base.vae.decoder.conv_in.weight.div_(1e5)


def test_it_runs_in_fp32_and_the_rest_does_not(tiny: Backbone) -> None:
    base, warned, latents = random_backbone("tiny", seed=3), list[str](), torch.randn(2, *tiny.latent_shape(64))
    too_large_for_half(base)
    expected = base.decode(latents)
    half = random_backbone("tiny", seed=3, dtype="bf16")
    object.__setattr__(half, "dtype", torch.float16)  # which is refused on a CPU: here it is what is tested
    half.vae.float()
    too_large_for_half(half)
    half.vae.half()
    assert not half.decode(latents).isfinite().all()
    too_large = half.vae.state_dict()
    assert all(value.isfinite().all() for value in too_large.values())
    steady_vae(half, warned.append)
    assert warned == [f"the VAE of {half.name} overflows in float16: it runs in float32, the rest in float16"]
    assert next(half.vae.parameters()).dtype == torch.float32
    torch.testing.assert_close(half.decode(latents), expected, rtol=0, atol=0.1)
    assert half.encode(torch.zeros(1, 3, 64, 64)).isfinite().all()


def test_one_that_does_not_is_left_alone() -> None:
    for dtype in ("no", "bf16"):
        base, warned = random_backbone("tiny", dtype=dtype), list[str]()
        steady_vae(base, warned.append)
        assert not warned and next(base.vae.parameters()).dtype == base.dtype


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    base = random_backbone("tiny")
    torch.nn.init.constant_(base.vae.encoder.conv_in.weight, float("inf"))
    base.pipeline().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("command", ["generate --prompt house --outdir {out}", "doctor --data_dir {out}"])
def test_one_without_numbers_is_refused(
    broken: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*command.format(out=out).split(), "--base_model", str(broken), "--device", "cpu"]) != 0
    told = capsys.readouterr()
    assert "gives numbers that are not finite, in float32 too; allowed is a whole one" in told.out + told.err
    assert not out.exists()


def test_large_ones_take_picture_after_picture(
    saved_tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = GenerateSettings(prompt="house", base_model=str(saved_tiny), outdir=tmp_path)
    assert not load_chosen(settings, "cpu", None, SILENT).vae.use_slicing
    monkeypatch.setattr("fewstep.opening.is_small", lambda _: False)
    assert load_chosen(settings, "cpu", None, SILENT).vae.use_slicing
