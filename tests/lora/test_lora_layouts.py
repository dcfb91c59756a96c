"""Adapters from elsewhere: read right or refused, never ignored."""

from __future__ import annotations

import fnmatch
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.backbone import Backbone, random_backbone
from fewstep.errors import CheckpointError
from fewstep.lora import load_adapter, locate, trainable_parameters

WEIGHTS = "pytorch_lora_weights.safetensors"
Run = Callable[[Backbone], Tensor]
State = dict[str, Tensor]


@pytest.fixture
def weights(saved: Path) -> State:
    return load_file(saved / WEIGHTS)


def modules(weights: State) -> list[str]:
    return sorted({key.rpartition(".lora_")[0].removeprefix("unet.") for key in weights})


def kohya(weights: State, alpha: float | dict[str, float] | None = 32.0) -> State:
    out: State = {}
    for module in modules(weights):
        name = "lora_unet_" + module.replace(".", "_")
        out[f"{name}.lora_down.weight"] = weights[f"unet.{module}.lora_A.weight"]
        out[f"{name}.lora_up.weight"] = weights[f"unet.{module}.lora_B.weight"]
        if alpha is not None:
            out[f"{name}.alpha"] = torch.tensor(alpha[module] if isinstance(alpha, dict) else alpha)
    return out


def peft(weights: State) -> State:
    return {"base_model.model." + key.removeprefix("unet."): value for key, value in weights.items()}


def old_diffusers(weights: State) -> State:
    out: State = {}
    for key, value in weights.items():
        module, _, matrix = key.removesuffix(".weight").rpartition(".lora_")
        module, _, projection = module.removesuffix(".0").rpartition(".")
        out[f"{module}.processor.{projection}_lora.{'down' if matrix == 'A' else 'up'}.weight"] = value
    return out


def refused(base: Backbone, path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_adapter(base, path, **options)
    assert "\n" not in str(caught.value) and not getattr(base.unet, "peft_config", {})
    return str(caught.value)


def test_our_own_files_load_exactly_and_ready_to_sample(student: Backbone, saved: Path, output: Run) -> None:
    expected = output(student)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        info = load_adapter(student, saved)
    assert torch.equal(output(student), expected)
    assert (info.layout, info.rank, info.alpha, info.modules, info.parameters) == ("diffusers", 4, 32, 32, 5504)
    assert not info.alpha_assumed and info.change > 0 and info.folder == saved
    assert trainable_parameters(student.unet) == 0
    load_adapter(student, saved / WEIGHTS)
    assert torch.equal(output(student), expected)


def test_half_precision_bases_take_adapters_in_fp32(saved: Path) -> None:
    half = random_backbone(seed=5, dtype="bf16")
    load_adapter(half, saved)
    adapter = [parameter for name, parameter in half.unet.named_parameters() if ".lora_" in name]
    assert adapter and {parameter.dtype for parameter in adapter} == {torch.float32}


def test_without_a_header_alpha_is_assumed_and_said(
    student: Backbone, saved: Path, weights: State, output: Run
) -> None:
    right = output(student)
    save_file(weights, saved / WEIGHTS)
    heard: list[str] = []
    info = load_adapter(student, saved, warn=heard.append)
    assert info.alpha_assumed and info.alpha == info.rank == 4
    assert len(heard) == 1 and "alpha = rank assumed" in heard[0]
    weak = output(student)
    assert not torch.allclose(weak, right)
    stock = random_backbone(seed=5)
    stock.pipeline().load_lora_weights(str(saved), weight_name=WEIGHTS)
    assert torch.equal(weak, output(stock))
    with pytest.warns(UserWarning, match="alpha = rank assumed"):
        load_adapter(student, saved)


def test_kohya_is_exact_and_keeps_its_alpha(student: Backbone, saved: Path, weights: State, output: Run) -> None:
    right = output(student)
    path = saved / "kohya.safetensors"
    save_file(kohya(weights), path)
    info = load_adapter(student, path)
    assert (info.layout, info.rank, info.alpha, info.alpha_assumed) == ("kohya", 4, 32, False)
    assert torch.equal(output(student), right)
    stock = random_backbone(seed=5)
    stock.pipeline().load_lora_weights(str(saved), weight_name="kohya.safetensors")
    assert torch.equal(output(stock), right)


def test_kohya_with_an_alpha_for_each_layer(student: Backbone, saved: Path, weights: State, output: Run) -> None:
    """Equal products of alpha and B have equal outputs; a reader that takes one alpha for all is caught."""
    right = output(student)
    alphas = {module: (32.0, 16.0, 8.0)[place % 3] for place, module in enumerate(modules(weights))}
    other = dict(weights)
    for module, alpha in alphas.items():
        other[f"unet.{module}.lora_B.weight"] = weights[f"unet.{module}.lora_B.weight"] * (32 / alpha)
    save_file(kohya(other, alphas), saved / "kohya.safetensors")
    load_adapter(student, saved / "kohya.safetensors")
    assert torch.equal(output(student), right)


def test_kohya_with_ranks_of_their_own(student: Backbone, saved: Path, weights: State, output: Run) -> None:
    right = output(student)
    other, alphas = dict(weights), dict.fromkeys(modules(weights), 32.0)
    for module in modules(weights)[::3]:  # rank 8, its second half idle
        down, up = weights[f"unet.{module}.lora_A.weight"], weights[f"unet.{module}.lora_B.weight"]
        other[f"unet.{module}.lora_A.weight"] = torch.cat([down, torch.ones_like(down)])
        other[f"unet.{module}.lora_B.weight"] = torch.cat([up, torch.zeros_like(up)], dim=1)
        alphas[module] = 64.0
    save_file(kohya(other, alphas), saved / "kohya.safetensors")
    info = load_adapter(student, saved / "kohya.safetensors")
    torch.testing.assert_close(output(student), right, rtol=1e-5, atol=1e-6)
    assert (info.rank, info.alpha) == (4, 32)


def test_kohya_without_alpha_is_said(student: Backbone, saved: Path, weights: State) -> None:
    save_file(kohya(weights, None), saved / "kohya.safetensors")
    with pytest.warns(UserWarning, match="alpha = rank assumed"):
        assert load_adapter(student, saved / "kohya.safetensors").alpha_assumed


def test_layers_other_than_attention_load_too(base: Backbone, tmp_path: Path, output: Run) -> None:
    """As in LCM-LoRA: convolutions, projections and time embeddings, in kohya layout with fp16 weights."""
    before, random = output(base), torch.Generator().manual_seed(0)
    layers = {
        "lora_unet_conv_in": (16, 4, 3),
        "lora_unet_down_blocks_0_resnets_0_conv1": (16, 16, 3),
        "lora_unet_down_blocks_0_attentions_0_proj_in": (16, 16, 1),
        "lora_unet_time_embedding_linear_1": (64, 16, 0),
    }
    weights: State = {}
    for name, (out, size, kernel) in layers.items():
        window = (kernel, kernel) if kernel else ()
        weights[f"{name}.lora_down.weight"] = torch.randn(8, size, *window, generator=random).half()
        weights[f"{name}.lora_up.weight"] = torch.randn(out, 8, *([1, 1] if kernel else []), generator=random).half()
        weights[f"{name}.alpha"] = torch.tensor(8.0)
    path = tmp_path / "lcm.safetensors"
    save_file(weights, path)
    info = load_adapter(base, path)
    assert (info.modules, info.rank) == (4, 8)
    mine = output(base)
    assert not torch.allclose(mine, before)
    stock = random_backbone(seed=5)
    stock.pipeline().load_lora_weights(str(tmp_path), weight_name="lcm.safetensors")
    torch.testing.assert_close(output(stock), mine, rtol=1e-5, atol=1e-5)


def test_old_diffusers_keys(student: Backbone, saved: Path, weights: State, output: Run) -> None:
    save_file(weights, saved / WEIGHTS)
    with pytest.warns(UserWarning, match="alpha = rank assumed"):
        load_adapter(student, saved)
    expected = output(student)
    save_file(old_diffusers(weights), saved / WEIGHTS)
    with pytest.warns(UserWarning, match="alpha = rank assumed"):
        load_adapter(student, saved)
    assert torch.equal(output(student), expected)


def test_linear_layers_of_old_diffusers(student: Backbone, saved: Path, weights: State, output: Run) -> None:
    right = output(student)
    ends = {"lora_A": "lora_linear_layer.down", "lora_B": "lora_linear_layer.up"}
    save_file(
        {
            key.replace(end, name): value * 8 if end == "lora_B" else value
            for key, value in weights.items()
            for end, name in ends.items()
            if end in key
        },
        saved / "old.safetensors",
    )
    with pytest.warns(UserWarning, match="alpha = rank assumed"):
        load_adapter(student, saved / "old.safetensors")
    assert torch.equal(output(student), right)


def test_alphas_beside_the_pairs_of_diffusers(student: Backbone, saved: Path, weights: State, output: Run) -> None:
    """Each is its module's own, as kohya's are: equal products of alpha and B have equal outputs."""
    right = output(student)
    tensors = dict(weights)
    for place, module in enumerate(modules(weights)):
        alpha = (32.0, 16.0, 8.0)[place % 3]
        tensors[f"unet.{module}.lora_B.weight"] = weights[f"unet.{module}.lora_B.weight"] * (32 / alpha)
        tensors[f"unet.{module}.alpha"] = torch.tensor(alpha)
    path = saved / "alphas.safetensors"
    save_file(tensors, path)
    info = load_adapter(student, path)
    assert (info.layout, info.rank, info.alpha_assumed) == ("diffusers", 4, False)
    assert torch.equal(output(student), right)
    header = {"unet.r": 4, "unet.lora_alpha": 32}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(header)})
    student.unet.unload_lora()
    assert "states two alphas" in refused(student, path)
    same = weights | {f"unet.{module}.alpha": torch.tensor(32.0) for module in modules(weights)}
    save_file(same, path, {"lora_adapter_metadata": json.dumps(header)})
    load_adapter(student, path)
    assert torch.equal(output(student), right)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_adapters_of_a_base_that_their_start_changed_are_refused(
    base: Backbone, saved: Path, weights: State, init: str
) -> None:
    path = saved / "init.safetensors"
    header = {"unet.r": 4, "unet.lora_alpha": 32, "unet.init_lora_weights": init}
    save_file(weights, path, {"lora_adapter_metadata": json.dumps(header)})
    base.unet.unload_lora()
    assert f"init_lora_weights {init!r}, which changes the base" in refused(base, path)
    save_file(peft(weights), saved / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 32, "init_lora_weights": init}
    (saved / "adapter_config.json").write_text(json.dumps(config))
    assert f"init_lora_weights {init!r}, which changes the base" in refused(base, saved / "adapter_model.safetensors")


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_adapters_of_other_starts_load(
    student: Backbone, saved: Path, weights: State, output: Run, init: str | bool
) -> None:
    right = output(student)
    header = {"unet.r": 4, "unet.lora_alpha": 32, "unet.init_lora_weights": init}
    save_file(weights, saved / "init.safetensors", {"lora_adapter_metadata": json.dumps(header)})
    load_adapter(student, saved / "init.safetensors")
    assert torch.equal(output(student), right)


def test_a_file_saved_by_the_unet_itself(student: Backbone, tmp_path: Path, output: Run) -> None:
    right = output(student)
    student.unet.save_lora_adapter(str(tmp_path), adapter_name="student")
    info = load_adapter(student, tmp_path)
    assert (info.alpha, info.alpha_assumed) == (32, False)
    assert torch.equal(output(student), right)


def test_peft_layout_is_read_right(student: Backbone, saved: Path, weights: State, output: Run) -> None:
    right = output(student)
    folder = saved / "peft"
    folder.mkdir()
    save_file(peft(weights), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 32}))
    info = load_adapter(student, folder)
    assert (info.layout, info.alpha, info.alpha_assumed) == ("peft", 32, False)
    assert torch.equal(output(student), right)
    named = {key.replace(".weight", ".default.weight"): value for key, value in peft(weights).items()}
    save_file(named, folder / "adapter_model.safetensors")
    load_adapter(student, folder)
    assert torch.equal(output(student), right)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 16, "use_rslora": True}))
    assert load_adapter(student, folder).alpha == 32  # 16 / sqrt(4) is the scale 8
    assert torch.equal(output(student), right)
    pattern = {"lora_alpha": 4, "alpha_pattern": {r".*\.attn[12]\.to_.*": 32}}
    (folder / "adapter_config.json").write_text(json.dumps(pattern))
    load_adapter(student, folder)
    assert torch.equal(output(student), right)


def test_peft_layout_of_an_independent_writer(base: Backbone, tmp_path: Path, output: Run) -> None:
    """PEFT's own wrapper and its own save_pretrained: the way by which a stock pipeline ends up with nothing."""
    from peft import LoraConfig, get_peft_model

    other = random_backbone(seed=5)
    wrapped = get_peft_model(other.unet, LoraConfig(r=4, lora_alpha=32, target_modules=["to_q", "to_v"]))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.05
    wrapped.save_pretrained(str(tmp_path))
    assert load_adapter(base, tmp_path).layout == "peft"
    assert torch.equal(output(base), output(other))


def test_peft_layout_without_its_config_is_refused(base: Backbone, saved: Path, weights: State) -> None:
    path = saved.parent / "alone" / "adapter_model.safetensors"
    path.parent.mkdir()
    save_file(peft(weights), path)
    assert "has no adapter_config.json beside it" in refused(base, path)
    (path.parent / "adapter_config.json").write_text("{}")
    assert "does not state lora_alpha" in refused(base, path)
    for config, kind in (({"use_dora": True}, "DoRA"), ({"modules_to_save": ["conv_in"]}, "whole modules")):
        (path.parent / "adapter_config.json").write_text(json.dumps({"lora_alpha": 32} | config))
        assert kind in refused(base, path)


def zeros(weights: State) -> State:
    return {key: torch.zeros_like(value) if "lora_B" in key else value for key, value in weights.items()}


def half_a_pair(weights: State) -> State:
    lost = next(key for key in weights if "lora_B" in key)
    return {key: value for key, value in weights.items() if key != lost}


def wider(weights: State) -> State:
    return {k: torch.zeros(4, 320) if "attn2.to_k.lora_A" in k else v for k, v in weights.items()}


def from_elsewhere(weights: State) -> State:
    return {key.replace("down_blocks.0", "down_blocks.7"): value for key, value in weights.items()}


def of_rank_0(weights: State) -> State:
    return {key: value[:0] if "lora_A" in key else value[:, :0] for key, value in weights.items()}


def renamed(weights: State, old: str, new: str) -> State:
    return {key.replace(old, new): value for key, value in weights.items()}


def extra(name: str) -> Callable[[State], State]:
    return lambda weights: weights | {name: torch.zeros(1)}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (zeros, "changes nothing"),
        (half_a_pair, "half a LoRA"),
        (wider, "made for another architecture: at "),
        (of_rank_0, "has rank 0"),
        (lambda weights: {key: value + 0j for key, value in weights.items()}, "torch.complex64; allowed are real"),
        (from_elsewhere, "belong to no layer of this base"),
        (lambda weights: {"conv_in.weight": torch.zeros(1)}, "is not an adapter: it holds conv_in.weight"),
        (lambda weights: {}, "is not an adapter"),
        (lambda weights: {key: value * float("nan") for key, value in weights.items()}, "not a number"),
        (extra("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"), "also changes the text encoder"),
        (extra("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"), "also changes the text encoder"),
        (extra("unet.mid_block.attentions.0.proj_in.lora_magnitude_vector"), "DoRA"),
        (extra("lora_unet_conv_in.hada_w1_a"), "LoHa"),
        (extra("lora_unet_conv_in.on_input"), "is an IA3; allowed is plain LoRA"),
        (extra("lora_unet_conv_in.oft_blocks"), "is an OFT; allowed is plain LoRA"),
        (extra("lora_unet_conv_in.diff"), "is a LyCORIS of whole weights; allowed is plain LoRA"),
        (extra("lora_unet_conv_in.diff_b"), "is a LyCORIS of whole weights; allowed is plain LoRA"),
        (extra("lora_unet_conv_norm_out.w_norm"), "is a LyCORIS of norms; allowed is plain LoRA"),
        (extra("lora_unet_conv_norm_out.b_norm"), "is a LyCORIS of norms; allowed is plain LoRA"),
        (
            lambda weights: renamed(kohya(weights), "lora_unet_", "lycoris_"),
            "names its layers as LyCORIS does (lycoris_",
        ),
        (
            lambda weights: renamed(weights, "unet.", "diffusion_model."),
            "names its layers as ComfyUI does (diffusion_model.",
        ),
        (extra("diffusion_model.input_blocks.0.0.weight"), "names its layers as ComfyUI does (diffusion_model.input"),
        (
            lambda weights: {"diffusion_model.input_blocks.0.0.weight": torch.zeros(1)},
            "is not an adapter: it holds diffusion_model.input_blocks.0.0.weight",
        ),
        (extra("unet.conv_in.alpha"), "is incomplete: conv_in has half a LoRA"),
        (extra("unet.nowhere.alpha"), "belong to no layer of this base, first unet.nowhere.alpha"),
        (extra("unet.conv_in.bias"), "belong to no layer of this base, first unet.conv_in.bias"),
    ],
)
def test_what_is_not_a_whole_adapter_for_this_base_is_refused(
    base: Backbone, saved: Path, weights: State, spoil: Callable[[State], State], said: str
) -> None:
    path = saved / "spoiled.safetensors"
    save_file(spoil(weights), path, {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 32})})
    base.unet.unload_lora()
    assert said in refused(base, path)


def test_files_that_cannot_be_read(base: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"nonsense")
    assert "cannot be read" in refused(base, path)
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(4, 4)}, path, {"lora_adapter_metadata": "{}"})
    assert "does not state lora_alpha" in refused(base, path)


@pytest.mark.parametrize(
    "stated",
    [{"lora_alpha": 10**400}, {"alpha_pattern": {"(": 4}}, {"alpha_pattern": {".*": "x"}}, {"alpha_pattern": 4}],
)
def test_an_alpha_that_cannot_be_used_is_refused(
    base: Backbone, saved: Path, weights: State, stated: dict[str, object]
) -> None:
    path = saved / "stated.safetensors"
    header = {f"unet.{key}": value for key, value in ({"lora_alpha": 4} | stated).items()}
    save_file(weights, path, {"lora_adapter_metadata": json.dumps(header)})
    base.unet.unload_lora()
    assert "states no alpha for " in refused(base, path)


def test_pickled_adapters_need_leave(student: Backbone, saved: Path, weights: State, output: Run) -> None:
    path = saved.parent / "old" / "adapter.bin"
    path.parent.mkdir()
    torch.save(kohya(weights), path)
    right = output(student)
    load_adapter(student, path, allow_pickle=True)
    assert torch.equal(output(student), right)
    student.unet.unload_lora()
    assert "--allow_pickle" in refused(student, path)
    assert "with --allow_pickle" in refused(student, path.parent)


# ---------------------------------------------------------------------------------------------------------- where it is


def test_where_an_adapter_is(saved: Path, tmp_path: Path) -> None:
    found = locate(saved)
    assert (found.weights, found.folder, found.name) == (saved / WEIGHTS, saved, str(saved))
    with pytest.raises(CheckpointError, match="pass the folder inside, for example"):
        locate(saved.parent)
    (tmp_path / "peft" / "unet").mkdir(parents=True)
    (tmp_path / "peft" / "unet" / "adapter_model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"holds no adapter_model\.safetensors itself.*the folder inside.*/unet"):
        locate(tmp_path / "peft")
    for name in ("a", "b"):
        (tmp_path / "two").mkdir(exist_ok=True)
        (tmp_path / "two" / f"{name}.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"holds 2 \.safetensors files"):
        locate(tmp_path / "two")
    (tmp_path / "two" / "b.safetensors").unlink()
    assert locate(tmp_path / "two").weights.name == "a.safetensors"
    (tmp_path / "none").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file"):
        locate(tmp_path / "none")
    with pytest.raises(CheckpointError, match="there is no such file or folder"):
        locate(tmp_path / "nowhere")


def test_adapters_on_the_hub(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    with pytest.raises(CheckpointError) as caught:
        locate(hub_id="someone/flash")
    for part in ("'someone/flash'", "HF_HUB_OFFLINE is set", str(cache), "hf download someone/flash", "--lora_path"):
        assert part in str(caught.value)
    snapshot = cache / "models--someone--flash" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (cache / "models--someone--flash" / "refs").mkdir()
    (cache / "models--someone--flash" / "refs" / "main").write_text(snapshot.name)
    (snapshot / "flash_lora.safetensors").write_bytes((saved / WEIGHTS).read_bytes())
    with pytest.raises(CheckpointError, match="name its file as someone/flash/FILE"):
        locate(hub_id="someone/flash")
    assert locate(hub_id="someone/flash/flash_lora.safetensors").weights == snapshot / "flash_lora.safetensors"
    asked: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("fewstep.hub.snapshot", lambda _, patterns: asked.extend(patterns) or snapshot)
        with pytest.raises(CheckpointError, match=r"it has no file lora\[v1\]\.safetensors"):
            locate(hub_id="someone/flash/lora[v1].safetensors")
    assert fnmatch.fnmatchcase("lora[v1].safetensors", asked[-1])
    inside = snapshot / "lora" / "final"
    shutil.copytree(saved, inside)
    found = locate(hub_id=f"someone/flash/lora/final/{WEIGHTS}")
    assert (found.weights, found.folder) == (inside / WEIGHTS, inside), "with what lies beside it"
    (snapshot / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes())
    found = locate(hub_id="someone/flash")
    assert (found.weights, found.folder) == (snapshot / WEIGHTS, snapshot)
    with pytest.raises(CheckpointError, match="no OWNER/NAME"):
        locate(hub_id="flash")
