"""Single files in LDM layout, offline: a tiny one with its own configurations, and Stable Diffusion 1.5's real size."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep import cli
from fewstep.backbone import Backbone, load_backbone, random_backbone
from fewstep.backbone.loading import Parts
from fewstep.backbone.single_file import load_single_file
from fewstep.backbone.untrained import configs
from fewstep.errors import CheckpointError, FewstepError, InputError
from tests.backbone.ldm_layout import to_ldm


@pytest.fixture(scope="session")
def tiny_configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    for part, config in configs("tiny").items():
        (folder / part).mkdir()
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / name).write_text(json.dumps(config))
    return folder


@pytest.fixture
def weights(tiny: Backbone) -> dict[str, Tensor]:
    return to_ldm(tiny)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def read(path: Path, tiny_configs: Path, **options: Any) -> Parts:
    return load_single_file(path, dtype=torch.float32, configs=tiny_configs, **({"allow_pickle": False} | options))


def refused(path: Path, tiny_configs: Path, error: type[FewstepError], **options: Any) -> str:
    with pytest.raises(error) as caught:
        read(path, tiny_configs, **options)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def same(parts: Parts, backbone: Backbone) -> bool:
    return all(
        torch.equal(value, getattr(parts, part).state_dict()[key])
        for part in ("unet", "vae", "text_encoder")
        for key, value in getattr(backbone, part).state_dict().items()
    )


def test_a_single_file_opens_exactly(
    tiny: Backbone, weights: dict[str, Tensor], file: Path, tiny_configs: Path
) -> None:
    save_file(weights, file)
    parts = read(file, tiny_configs)
    assert same(parts, tiny)
    assert parts.scheduler_config["prediction_type"] == "epsilon" and parts.defaults == {}
    assert parts.tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    half = load_single_file(file, dtype=torch.bfloat16, allow_pickle=False, configs=tiny_configs)
    for network in (half.unet, half.vae, half.text_encoder):
        assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    assert half.fingerprint == parts.fingerprint
    renamed = file.rename(file.with_name("other.safetensors"))
    assert read(renamed, tiny_configs).fingerprint == parts.fingerprint
    key = "model.diffusion_model.middle_block.1.proj_in.weight"
    save_file(weights | {key: weights[key] + 0.01}, renamed)
    assert read(renamed, tiny_configs).fingerprint != parts.fingerprint


def test_a_pickled_single_file_needs_leave(
    tiny: Backbone, weights: dict[str, Tensor], tmp_path: Path, tiny_configs: Path
) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": weights, "global_step": 3}, path)
    assert "--allow_pickle" in refused(path, tiny_configs, InputError)
    parts = read(path, tiny_configs, allow_pickle=True)
    assert same(parts, tiny)
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    assert same(read(path, tiny_configs, allow_pickle=True), tiny)

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"state_dict": weights, "callback": Evil()}, path)
    assert "more than tensors" in refused(path, tiny_configs, CheckpointError, allow_pickle=True)
    assert not (tmp_path / "executed").exists()


def test_marks_of_v_prediction_and_zero_snr(weights: dict[str, Tensor], file: Path, tiny_configs: Path) -> None:
    save_file(weights | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, file)
    config = read(file, tiny_configs).scheduler_config
    assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == ("v_prediction", True)
    save_file(weights, file, {"modelspec.prediction_type": "v"})
    assert read(file, tiny_configs).scheduler_config["prediction_type"] == "v_prediction"


def averages_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The UNet's weights again, under the names that a training gives its running averages."""
    return {
        "model_ema." + key.removeprefix("model.").replace(".", ""): value.clone()
        for key, value in weights.items()
        if key.startswith("model.diffusion_model.")
    }


@pytest.mark.parametrize("lost", [0, 1, 150])
def test_the_base_is_what_other_tools_draw_with_and_other_averages_are_left_aside(
    tiny: Backbone, weights: dict[str, Tensor], file: Path, tiny_configs: Path, lost: int
) -> None:
    """Merges and fine-tunes keep averages that nobody updated, whole or in part."""
    stale = {key: value + 1 for key, value in averages_of(weights).items()}
    for key in list(stale)[:lost]:
        del stale[key]
    save_file(weights | stale, file)
    with pytest.warns(UserWarning, match=r"model\.diffusion_model\.\*, which is taken.* left aside") as heard:
        parts = read(file, tiny_configs)
    assert same(parts, tiny)
    assert len(heard) == 1 and str(file) in str(heard[0].message) and "\n" not in str(heard[0].message)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_averages_that_are_the_same_are_not_spoken_of(
    weights: dict[str, Tensor], file: Path, tiny_configs: Path, dtype: torch.dtype
) -> None:
    """In the precision of the weights that are taken."""
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(470_000)}
    halves = {key: value.to(dtype) if key.startswith("model.") else value for key, value in weights.items()}
    save_file(halves | averages_of(weights) | counters, file)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        read(file, tiny_configs)


def test_the_command_says_in_one_line_that_averages_are_left_aside(
    weights: dict[str, Tensor], file: Path, tiny_configs: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("fewstep.backbone.single_file.load_single_file.__kwdefaults__", {"configs": tiny_configs})
    save_file(weights | {key: value + 1 for key, value in averages_of(weights).items()}, file)
    words = ["--prompt", "a cat", "--steps", "1", "--num_images", "1", "--device", "cpu"]
    with warnings.catch_warnings(action="default"):
        cli.main(["generate", "--base_model", str(file), *words, "--outdir", str(file.parent / "out")])
    said = [line for line in capsys.readouterr().err.splitlines() if "averaged" in line]
    assert len(said) == 1 and said[0].startswith(f"warning: base model {str(file)!r} holds two UNets")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_lightning_wrote_opens(
    tiny: Backbone,
    weights: dict[str, Tensor],
    tmp_path: Path,
    tiny_configs: Path,
    monkeypatch: pytest.MonkeyPatch,
    zipped: bool,
) -> None:
    """As the original releases are: an entry is named by a class of Lightning's, which need not be installed."""
    place = "pytorch_lightning.callbacks.model_checkpoint"
    theirs = type("ModelCheckpoint", (), {"__module__": place})
    path = tmp_path / "model.ckpt"
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", place):
            patch.setitem(sys.modules, name, ModuleType(name))
        patch.setattr(sys.modules[place], "ModelCheckpoint", theirs, raising=False)
        entries = {"epoch": 3, "callbacks": {theirs: {"best_model_path": ""}}, "lr_schedulers": []}
        torch.save(entries | {"state_dict": weights}, path, _use_new_zipfile_serialization=zipped)
    assert same(read(path, tiny_configs, allow_pickle=True), tiny)
    assert not any(isinstance(one, tuple) for one in torch.serialization.get_safe_globals()), "for that file alone"


def test_older_names_of_the_text_encoder(
    tiny: Backbone, weights: dict[str, Tensor], file: Path, tiny_configs: Path
) -> None:
    start = "cond_stage_model.transformer."
    older = {key.replace(start + "text_model.", start): value for key, value in weights.items()}
    older[start + "embeddings.position_ids"] = torch.arange(77)[None]
    save_file(older, file)
    assert same(read(file, tiny_configs), tiny)


def test_files_that_are_no_full_checkpoint(weights: dict[str, Tensor], file: Path, tiny_configs: Path) -> None:
    for part, name in (("first_stage_model.", "VAE"), ("cond_stage_model.", "text encoder")):
        save_file({key: value for key, value in weights.items() if not key.startswith(part)}, file)
        assert f"holds no {name}" in refused(file, tiny_configs, InputError)
    save_file({"unet.down_blocks.0.to_q.lora_A.weight": torch.zeros(4, 8)}, file)
    assert "pass it as --lora_path" in refused(file, tiny_configs, InputError)
    save_file({"conv_in.weight": torch.zeros(4, 8)}, file)
    assert "not a checkpoint in LDM layout" in refused(file, tiny_configs, InputError)
    file.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00nonsense")
    assert "cannot be read" in refused(file, tiny_configs, CheckpointError)


@pytest.mark.parametrize(
    "lost",
    [
        "model.diffusion_model.input_blocks.1.0.in_layers.2.weight",
        "first_stage_model.decoder.up.0.block.0.conv1.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc2.bias",
    ],
)
def test_weights_that_are_missing_are_never_made_up(
    weights: dict[str, Tensor], file: Path, tiny_configs: Path, lost: str
) -> None:
    del weights[lost]
    save_file(weights, file)
    assert "incomplete" in refused(file, tiny_configs, CheckpointError)


@pytest.mark.parametrize(
    ("changes", "shapes"),
    [
        ({"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)}, "takes 9 channels"),
        (
            {"model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 1024)},
            "Stable Diffusion 2",
        ),
        ({"conditioner.embedders.1.model.ln_final.weight": (1280,)}, "Stable Diffusion XL"),
    ],
)
def test_other_architectures_are_refused_by_their_shapes(
    weights: dict[str, Tensor], file: Path, tiny_configs: Path, changes: dict[str, tuple[int, ...]], shapes: str
) -> None:
    save_file(weights | {key: torch.zeros(shape) for key, shape in changes.items()}, file)
    assert shapes in refused(file, tiny_configs, InputError)


def test_a_single_file_of_another_size_is_refused(weights: dict[str, Tensor], file: Path) -> None:
    """The tiny one does not fit Stable Diffusion 1.5's configurations, which are what the command takes."""
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=r"not Stable Diffusion 1\.5's"):
        load_backbone(file, device="cpu")


def test_the_layout_is_the_published_one() -> None:
    """Names and shapes of well-known tensors of v1-5-pruned-emaonly.safetensors: the writer of these tests is right."""
    backbone = random_backbone("sd15", device="meta")
    written = to_ldm(backbone)
    known = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.11.0.out_layers.3.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.11.1.proj_out.weight": (320, 320, 1, 1),
        "model.diffusion_model.time_embed.0.weight": (1280, 320),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.encoder.down.3.block.1.conv2.weight": (512, 512, 3, 3),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.weight": (768, 3072),
    }
    assert {key: tuple(written[key].shape) for key in known} == known
    assert sum(key.startswith("model.diffusion_model.") for key in written) == 686
    assert sum(key.startswith("first_stage_model.") for key in written) == 248


@pytest.mark.slow
def test_the_real_size_opens_with_the_hub_switched_off(tmp_path: Path) -> None:
    """2 GB of fp16 in Stable Diffusion 1.5's own shapes, through the public function, in a process of its own."""
    if sys.platform == "linux" and _free_memory() < 8 * 2**30:
        pytest.skip("needs 8 GB of free memory")
    shapes = {key: tuple(value.shape) for key, value in to_ldm(random_backbone("sd15", device="meta")).items()}
    path = tmp_path / "v1-5.safetensors"
    write_sparse(path, shapes)
    script = f"""
import socket
def refuse(*_, **__): raise SystemExit("reached for the network")
socket.getaddrinfo = refuse
import torch
from fewstep.backbone import load_backbone
base = load_backbone({str(path)!r}, device="cpu", dtype="bf16")
print(sum(p.numel() for p in base.unet.parameters()), sum(p.numel() for p in base.vae.parameters()))
print(float(base.unet.conv_in.weight.flatten()[0]), float(base.vae.decoder.conv_out.weight.flatten()[0]))
print(base.resolution, base.schedule.prediction_type)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    counts, values, defaults = done.stdout.splitlines()
    assert counts == "859520964 83653863"
    places = list(shapes)
    expected = [
        torch.tensor(places.index(key) / 1024).half().bfloat16().item()
        for key in ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_out.weight")
    ]
    assert [float(value) for value in values.split()] == expected
    assert defaults == "512 epsilon"


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of fp16 zeros that takes no room on the disk; each tensor starts with its own number."""
    header: dict[str, Any] = {}
    end = 0
    for key, shape in shapes.items():
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end := end + 2 * math.prod(shape)]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        for place, entry in enumerate(header.values()):
            file.seek(start + entry["data_offsets"][0])
            file.write(np.float16(place / 1024).tobytes())
        file.truncate(start + end)


def _free_memory() -> int:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
