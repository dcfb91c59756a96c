"""`fewstep export`: one file that other tools read, with the strength that the adapter was trained with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from safetensors import safe_open
from safetensors.torch import load_file

from fewstep import lora
from fewstep.backbone import Backbone, random_backbone
from fewstep.cli import main
from fewstep.config import ExportSettings
from fewstep.errors import CheckpointError, InputError
from fewstep.export import export
from tests.benchmark.fakes import Notes, make_adapter

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "conv1", "conv_in"]


@pytest.fixture
def base() -> Backbone:
    """With an adapter of alpha 16 at rank 2 attached, on layers of all kinds."""
    base = random_backbone("tiny")
    for parameter in lora.attach(base.unet, 2, 16, TARGETS, seed=1):
        torch.nn.init.normal_(parameter, std=0.05)
    return base


def output(base: Backbone) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    x_t, cond = torch.randn(1, 4, 8, 8, generator=random), torch.randn(1, 77, 32, generator=random)
    with torch.no_grad():
        return base.denoiser()(x_t, torch.tensor([499]), cond)


def test_a_stock_pipeline_draws_the_same_with_it(base: Backbone, tmp_path: Path) -> None:
    student, file = output(base), tmp_path / "new" / "mine.safetensors"
    found = export(ExportSettings(outfile=file, device="cpu"), backbone=base)
    assert found.file == file and found.modules == len(load_file(file)) // 3 > 20
    assert torch.equal(output(base), student)
    lora.detach(base.unet)
    plain = output(base)
    base.pipeline().load_lora_weights(str(file.parent), weight_name=file.name)
    torch.testing.assert_close(output(base), student, rtol=0, atol=1e-5)
    assert (plain - student).abs().max() > 1e-2


def test_every_module_is_where_others_look_for_it_and_as_strong(base: Backbone, tmp_path: Path) -> None:
    """ComfyUI and the web UIs look for a layer under its name with underscores, and multiply by alpha / rank."""
    file = tmp_path / "mine.safetensors"
    export(ExportSettings(outfile=file, device="cpu"), backbone=base)
    tensors, known = load_file(file), 0
    for name, layer in base.unet.named_modules():
        key = "lora_unet_" + name.removesuffix(".base_layer").replace(".", "_")
        if not hasattr(layer, "lora_A"):
            continue
        down, up, alpha = (tensors[f"{key}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        change = alpha.item() / down.shape[0] * (up.flatten(1) @ down.flatten(1))
        torch.testing.assert_close(change, layer.get_delta_weight(lora.ADAPTER).flatten(1), rtol=1e-5, atol=1e-7)
        assert alpha.item() == 16 and alpha.shape == ()
        known += 3
    assert known == len(tensors)
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("2", "16")


def test_it_says_how_it_is_sampled_and_knows_it_itself(tmp_path: Path) -> None:
    base, notes, file = random_backbone("tiny"), Notes(), tmp_path / "mine.safetensors"
    made = make_adapter(tmp_path / "made", base)
    export(ExportSettings(lora_path=made, outfile=file, device="cpu"), backbone=base, reporter=notes)
    told, sigmas = notes.said[-1].split(", as sigmas ")
    assert told == "to be sampled with lcm, guidance (CFG) 1, in 4 steps at timesteps 999 759 499 259"
    # Those of k-diffusion, which other tools sample by: the noise's spread beside a signal of its own size.
    scheduler = EulerDiscreteScheduler.from_config(base.scheduler_config)
    spreads = [((1 - a) / a) ** 0.5 for a in (scheduler.alphas_cumprod[t].item() for t in (999, 759, 499, 259))]
    assert [float(sigma) for sigma in sigmas.split(", ")] == pytest.approx([*spreads, 0.0], rel=1e-3)
    stated = lora.stated_sampling(file)
    assert stated == lora.StatedSampling("lcm", 1.0, (1, 2, 4))


def test_what_nothing_says_is_not_written_as_if_it_were_known(tmp_path: Path) -> None:
    base, notes, file = random_backbone("tiny"), Notes(), tmp_path / "mine.safetensors"
    lora.load_adapter(base, make_adapter(tmp_path / "made", base))
    export(ExportSettings(outfile=file, device="cpu"), backbone=base, reporter=notes)
    assert lora.stated_sampling(file) is None
    assert any("attached to the base is to be sampled: with lcm" in line for line in notes.warned)


@pytest.mark.parametrize("end", [CheckpointError("another"), KeyboardInterrupt(), torch.OutOfMemoryError()])
def test_what_could_not_be_read_back_is_not_kept(
    base: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException
) -> None:
    def broken(*_: object) -> None:
        raise end

    monkeypatch.setattr("fewstep.export._compare", broken)
    with pytest.raises(type(end)):
        export(ExportSettings(outfile=tmp_path / "mine.safetensors", device="cpu"), backbone=base)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_and_nothing_wrong_is_kept(
    base: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.safetensors"
    monkeypatch.setattr("fewstep.lora.load_adapter", lambda *_: lora.set_scale(base.unet, 0.5))
    with pytest.raises(CheckpointError, match="reads back as another adapter than was written; it was not kept"):
        export(ExportSettings(outfile=file, device="cpu"), backbone=base)
    assert not file.exists()
    file.write_bytes(b"mine")
    with pytest.raises(InputError, match=r"is there already; allowed is a new one"):
        export(ExportSettings(outfile=file, device="cpu"), backbone=base)
    assert file.read_bytes() == b"mine"


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--outfile", str(tmp_path / "mine.bin")]) == 2
    assert "allowed is a name that ends in .safetensors" in capsys.readouterr().err
    file = tmp_path / "mine.safetensors"
    assert main(["export", "--outfile", str(file), "--device", "cpu"]) == 0  # the adapter that is shipped
    said = capsys.readouterr()
    assert "in 4 steps at timesteps 999 749 499 249" in said.out + said.err
    assert lora.stated_sampling(file) == lora.StatedSampling("ddim", 1.0, (4,))
