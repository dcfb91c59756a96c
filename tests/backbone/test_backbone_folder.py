"""Diffusers folders: what is read, in which precision, and what is refused with one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.backbone import Backbone, load_backbone
from fewstep.errors import CheckpointError, FewstepError, InputError
from fewstep.quiet import quiet_libraries

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


def change(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def to_pickle(folder: Path) -> None:
    """Replace all safetensors by what older repositories hold."""
    for file, name in (
        (UNET, "diffusion_pytorch_model.bin"),
        (VAE, "diffusion_pytorch_model.bin"),
        (TEXT, "pytorch_model.bin"),
    ):
        torch.save(load_file(folder / file), folder / Path(file).parent / name)
        (folder / file).unlink()


def refused(folder: Path, error: type[FewstepError], **options: Any) -> str:
    with pytest.raises(error) as caught:
        load_backbone(folder, device="cpu", **options)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


def test_a_folder_opens_exactly(tiny: Backbone, saved_tiny: Path) -> None:
    loaded = load_backbone(str(saved_tiny), device="cpu", why="a test")
    assert (loaded.name, loaded.why, loaded.revision) == (str(saved_tiny), "a test", None)
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(tiny, part).state_dict(), getattr(loaded, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert torch.equal(loaded.embed(["a red house"]), tiny.embed(["a red house"]))
    assert (loaded.guidance_scale, loaded.resolution, loaded.teacher_steps) == (7.5, 64, 50)
    assert loaded.abilities is None
    assert not any(parameter.requires_grad for parameter in loaded.unet.parameters())


def test_names_as_in_the_published_files(folder: Path, tiny: Backbone) -> None:
    """Stable Diffusion 1.5's own folder: the VAE's attention and the text encoder under their old names."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old: dict[str, torch.Tensor] = {}
    for key, value in load_file(folder / VAE).items():
        for new, name in names.items():
            key = key.replace(f".attentions.0.{new}.", f".attentions.0.{name}.")
        old[key] = value
    assert sum("proj_attn" in key for key in old) == 4
    save_file(old, folder / VAE, {"format": "pt"})
    text = {"text_model." + key.removeprefix("text_model."): value for key, value in load_file(folder / TEXT).items()}
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(text, folder / TEXT, {"format": "pt"})
    loaded = load_backbone(folder, device="cpu")
    assert all(torch.equal(value, loaded.vae.state_dict()[key]) for key, value in tiny.vae.state_dict().items())
    assert torch.equal(loaded.embed(["a red house"]), tiny.embed(["a red house"]))


def test_a_folder_in_half_precision_opens_in_full(folder: Path) -> None:
    """As a base is shipped: fp16 files under their plain names."""
    for file in (UNET, VAE, TEXT):
        save_file(
            {key: value.half() for key, value in load_file(folder / file).items()}, folder / file, {"format": "pt"}
        )
    change(folder, "text_encoder/config.json", dtype="float16")
    loaded = load_backbone(folder, device="cpu")
    for network in (loaded.unet, loaded.vae, loaded.text_encoder):
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert loaded.embed(["a"]).dtype == torch.float32


def test_a_folder_with_fp16_in_its_file_names_opens(folder: Path) -> None:
    for file in (UNET, VAE, TEXT):
        path = folder / file
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    assert load_backbone(folder, device="cpu").dtype == torch.float32


def halved(tiny: Backbone, to: Path, **options: Any) -> Path:
    """The tiny base as diffusers saves it in its variant fp16."""
    with quiet_libraries():
        tiny.pipeline().save_pretrained(to, variant="fp16", **options)
    return to


def test_a_variant_in_shards_opens(
    tiny: Backbone, tmp_path: Path, offline_cache: Callable[[str, Path | None], Path]
) -> None:
    folder = halved(tiny, tmp_path / "base", max_shard_size="100KB")
    assert (folder / "unet/diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    loaded = load_backbone(folder, device="cpu")
    assert all(torch.equal(value, loaded.unet.state_dict()[key]) for key, value in tiny.unet.state_dict().items())
    assert torch.equal(loaded.embed(["a red house"]), tiny.embed(["a red house"]))
    offline_cache("someone/halved", folder)
    assert load_backbone("someone/halved", device="cpu").fingerprint == loaded.fingerprint
    next((folder / "unet").glob("*-00001-of-*")).unlink()
    said = refused(folder, InputError)
    assert "no weights in unet/" in said and "it holds diffusion_pytorch_model.fp16-00002-of-000" in said


def test_a_pickled_variant_opens_with_leave(
    tiny: Backbone, tmp_path: Path, offline_cache: Callable[[str, Path | None], Path]
) -> None:
    folder = halved(tiny, tmp_path / "base", safe_serialization=False)
    assert (folder / "unet/diffusion_pytorch_model.fp16.bin").is_file()
    text = folder / "text_encoder"
    torch.save(load_file(text / "model.fp16.safetensors"), text / "pytorch_model.fp16.bin")  # as older libraries did
    (text / "model.fp16.safetensors").unlink()
    assert "--allow_pickle" in refused(folder, InputError)
    loaded = load_backbone(folder, device="cpu", allow_pickle=True)
    assert all(torch.equal(value, loaded.unet.state_dict()[key]) for key, value in tiny.unet.state_dict().items())
    assert torch.equal(loaded.embed(["a red house"]), tiny.embed(["a red house"]))
    offline_cache("someone/halved", folder)
    assert load_backbone("someone/halved", device="cpu", allow_pickle=True).fingerprint == loaded.fingerprint


@pytest.mark.parametrize("make", [{"max_shard_size": "100KB"}, {}, {"safe_serialization": False}], ids=str)
def test_of_a_repository_that_is_fetched_which_can_be_read(
    tiny: Backbone, tmp_path: Path, make: dict[str, Any]
) -> None:
    """Configurations, and then what the patterns name, until there are weights."""
    from fewstep.backbone.folder import COMPONENTS, find_weights, weight_patterns
    from fewstep.backbone.loading import CONFIG_PATTERNS

    whole, fetched = halved(tiny, tmp_path / "whole", **make), tmp_path / "fetched"

    def fetch(patterns: Sequence[str]) -> None:
        for path in whole.rglob("*"):
            name = path.relative_to(whole)
            if path.is_file() and any(fnmatch(name.as_posix(), pattern) for pattern in patterns):
                (fetched / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, fetched / name)

    fetch(CONFIG_PATTERNS)
    for component in COMPONENTS:
        for patterns in weight_patterns(component, allow_pickle=True):
            if find_weights(fetched, component, allow_pickle=True) is None:
                fetch(patterns)
        assert find_weights(fetched, component, allow_pickle=True) is not None


def test_a_folder_is_recorded_as_one(saved_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From elsewhere, where it is not, models/mine would be taken for a repository of that name on the Hub."""
    shutil.copytree(saved_tiny, tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    assert load_backbone("models/mine", device="cpu").name == "./models/mine"
    monkeypatch.chdir(tmp_path / "models")
    with pytest.raises(InputError, match=r"no base model '\./models/mine'.*there is no such file or folder"):
        load_backbone("./models/mine", device="cpu")


def test_another_memory_order_computes_the_same(tiny: Backbone, saved_tiny: Path) -> None:
    loaded = load_backbone(saved_tiny, device="cpu")
    loaded.use_channels_last()
    assert loaded.is_channels_last and not tiny.is_channels_last
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([500, 20]), torch.randn(2, 77, 32)
    torch.testing.assert_close(loaded.denoiser()(*inputs), tiny.denoiser()(*inputs))
    torch.testing.assert_close(loaded.decode(inputs[0]), tiny.decode(inputs[0]))


def test_a_precision_is_for_the_networks_alone(saved_tiny: Path) -> None:
    loaded = load_backbone(saved_tiny, device="cpu", dtype="bf16")
    for network in (loaded.unet, loaded.vae, loaded.text_encoder):
        assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    assert loaded.schedule.alphas_cumprod.dtype == torch.float32
    with pytest.raises(InputError, match="fp16 came with the CPU"):
        load_backbone(saved_tiny, device="cpu", dtype="fp16")
    with pytest.raises(InputError, match="allowed: auto, no, fp16, bf16"):
        load_backbone(saved_tiny, device="cpu", dtype="fp8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_a_device_that_is_not_there(saved_tiny: Path) -> None:
    with pytest.raises(InputError, match="'cuda' is not available"):
        load_backbone(saved_tiny, device="cuda")
    assert load_backbone(saved_tiny, device="auto").device.type in ("cpu", "mps", "xpu")


def test_pickles_only_with_leave_and_tensors_only(folder: Path, tiny: Backbone, tmp_path: Path) -> None:
    to_pickle(folder)
    assert "--allow_pickle" in refused(folder, InputError)
    loaded = load_backbone(folder, device="cpu", allow_pickle=True)
    assert torch.equal(loaded.unet.conv_in.weight, tiny.unet.conv_in.weight)

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"conv_in.weight": Evil()}, folder / "unet/diffusion_pytorch_model.bin")
    refused(folder, CheckpointError, allow_pickle=True)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("config", "values", "shapes"),
    [
        ("unet", {"in_channels": 9}, "inpainting UNet that takes 9 channels"),
        ("unet", {"in_channels": 5}, "takes 5 channels"),
        ("unet", {"cross_attention_dim": 1024}, "Stable Diffusion 2 (cross-attention of width 1024)"),
        ("unet", {"cross_attention_dim": 2048, "addition_embed_type": "text_time"}, "Stable Diffusion XL"),
        ("unet", {"cross_attention_dim": 768}, "cross-attention of width 768 beside a text encoder of width 32"),
        ("unet", {"time_cond_proj_dim": 256}, "wants more than a prompt (time_cond_proj_dim)"),
        ("vae", {"latent_channels": 16}, "a UNet that gives 4 channels beside a VAE with 16"),
    ],
)
def test_other_architectures_are_refused_by_their_shapes(
    folder: Path, config: str, values: dict[str, Any], shapes: str
) -> None:
    change(folder, f"{config}/config.json", **values)
    message = refused(folder, InputError)
    assert shapes in message and "allowed is" in message


def test_the_checkpoints_scheduler_says_what_is_predicted(folder: Path) -> None:
    change(folder, "scheduler/scheduler_config.json", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    loaded = load_backbone(folder, device="cpu")
    assert loaded.schedule.prediction_type == "v_prediction"
    assert float(loaded.schedule.alphas_cumprod[-1]) == 0
    assert loaded.scheduler_config["rescale_betas_zero_snr"] is True
    with pytest.raises(InputError, match="zero terminal SNR"):
        load_backbone(folder, device="cpu", prediction_type="epsilon")
    change(folder, "scheduler/scheduler_config.json", prediction_type="sample", rescale_betas_zero_snr=False)
    with pytest.raises(InputError, match="'sample'"):
        load_backbone(folder, device="cpu")
    overruled = load_backbone(folder, device="cpu", prediction_type="epsilon")
    assert overruled.schedule.prediction_type == overruled.scheduler_config["prediction_type"] == "epsilon"


def test_trained_betas_are_passed_on(folder: Path) -> None:
    betas = [0.01 + 0.0001 * number for number in range(100)]
    change(folder, "scheduler/scheduler_config.json", trained_betas=betas, num_train_timesteps=100)
    loaded = load_backbone(folder, device="cpu")
    assert loaded.schedule.num_train_timesteps == 100
    torch.testing.assert_close(loaded.schedule.alphas_cumprod, (1 - torch.tensor(betas)).cumprod(0))


def test_a_base_brings_its_own_defaults(folder: Path) -> None:
    path = folder / "fewstep.json"
    path.write_text(json.dumps({"guidance_scale": 4, "resolution": 128, "teacher_steps": 30, "made by": "hand"}))
    loaded = load_backbone(folder, device="cpu")
    assert (loaded.guidance_scale, loaded.resolution, loaded.teacher_steps) == (4, 128, 30)
    assert loaded.latent_shape() == (4, 16, 16)
    for wrong in ({"guidance_scale": "high"}, {"resolution": 100}, {"teacher_steps": 0}, {"abilities": "magic"}):
        path.write_text(json.dumps(wrong))
        assert next(iter(wrong)) in refused(folder, InputError)
    path.write_text("[1]")
    assert "no JSON object" in refused(folder, CheckpointError)


def test_folders_that_are_none(tmp_path: Path, folder: Path) -> None:
    assert "it has no unet/config.json" in refused(tmp_path, InputError)
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    assert "pass it as --lora_path" in refused(tmp_path, InputError)
    (folder / UNET).unlink()
    assert "no weights in unet/" in refused(folder, InputError)


@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
def test_weights_that_are_missing_or_damaged_are_never_made_up(folder: Path, file: str) -> None:
    whole = load_file(folder / file)
    save_file(dict(list(whole.items())[1:]), folder / file, {"format": "pt"})
    assert next(iter(whole)) in refused(folder, CheckpointError)
    (folder / file).write_bytes((folder / file).read_bytes()[:-100])
    assert "cannot be read" in refused(folder, CheckpointError)


def test_a_tokenizer_without_its_vocabulary_is_refused(folder: Path) -> None:
    """The library would make one of three tokens up."""
    place, ids = folder / "tokenizer", load_backbone(folder, device="cpu").tokenizer("a red house").input_ids
    model = json.loads((place / "tokenizer.json").read_text())["model"]
    (place / "tokenizer.json").unlink()
    neither = "tokenizer/ has no tokenizer.json, and no vocab.json or merges.txt;"
    assert neither in refused(folder, CheckpointError)
    (place / "tokenizer_config.json").unlink()
    assert neither in refused(folder, CheckpointError)
    place.rmdir()
    assert neither in refused(folder, CheckpointError)
    place.mkdir()
    (place / "vocab.json").write_text(json.dumps(model["vocab"]))
    assert "tokenizer/ has no tokenizer.json, and no merges.txt;" in refused(folder, CheckpointError)
    (place / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"])]))
    assert load_backbone(folder, device="cpu").tokenizer("a red house").input_ids == ids
    (place / "vocab.json").unlink()
    assert "tokenizer/ has no tokenizer.json, and no vocab.json;" in refused(folder, CheckpointError)


def test_a_damaged_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    assert "tokenizer cannot be read" in refused(folder, CheckpointError)


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "a/b/c", "some/model.safetensors", "-x/y"])
def test_paths_that_are_not_there(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such file or folder") as caught:
        load_backbone(name)
    assert "'scenes'" in str(caught.value) and "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------------- fingerprints


def test_a_fingerprint_is_the_bases_own_wherever_it_lies(saved_tiny: Path, folder: Path) -> None:
    first = load_backbone(saved_tiny, device="cpu").fingerprint
    assert len(first) == 32
    assert load_backbone(folder, device="cpu", dtype="bf16").fingerprint == first
    (folder / "README.md").write_text("not a part of the model")
    assert load_backbone(folder, device="cpu").fingerprint == first


@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
def test_a_fingerprint_changes_with_any_trained_tensor(folder: Path, file: str) -> None:
    from fewstep.backbone.fingerprint import of_files
    from fewstep.backbone.folder import COMPONENTS, CONFIGS, find_weights

    def fingerprint() -> str:
        found = [find_weights(folder, component, allow_pickle=False) for component in COMPONENTS]
        configs = [folder / part / name for part, name in CONFIGS.items()]
        return of_files(folder, configs, [path for part in found if part is not None for path in part.files])

    seen = {fingerprint()}
    original = load_file(folder / file)
    for key in original:
        save_file({**original, key: original[key] * 1.001 + 1e-4}, folder / file, {"format": "pt"})
        seen.add(fingerprint())
    assert len(seen) == len(original) + 1
    save_file(original, folder / file, {"format": "pt"})
    assert fingerprint() in seen
    change(folder, "scheduler/scheduler_config.json", beta_end=0.013)
    assert fingerprint() not in seen


# ----------------------------------------------------------------------------------------------------- registered bases


def test_a_registered_base_is_found_by_name_and_brings_its_abilities(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewstep.backbone import registry

    package = tmp_path / "toyland"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "skills.py").write_text(
        "class Skills:\n    def beside(self, base):\n        return f'those beside {base}'\n\nSKILLS = Skills()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.BASES, "toys", "toyland.skills:SKILLS")
    with pytest.raises(InputError, match="no weights in this installation"):
        load_backbone("toys", device="cpu")
    shutil.copytree(folder, package / "base")
    loaded = load_backbone("toys", device="cpu")
    assert loaded.name == "toys" and type(loaded.abilities).__name__ == "Skills"
    (folder / "fewstep.json").write_text(json.dumps({"abilities": "toys"}))
    assert load_backbone(folder, device="cpu").abilities == f"those beside {folder}"


def test_the_default_base_is_registered() -> None:
    from fewstep.backbone import registry
    from fewstep.config import EMBEDDED_BASE

    assert EMBEDDED_BASE in registry.BASES
    assert registry.folder_of(EMBEDDED_BASE).name == "base"


# ------------------------------------------------------------------------------------------------------------- the Hub


def test_weights_that_are_not_at_hand_name_three_ways_out(offline_cache: Callable[[str, Path | None], Path]) -> None:
    cache = offline_cache("stable-diffusion-v1-5/stable-diffusion-v1-5", None)
    with pytest.raises(InputError) as caught:
        load_backbone("stable-diffusion-v1-5/stable-diffusion-v1-5", device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "'stable-diffusion-v1-5/stable-diffusion-v1-5'",
        "HF_HUB_OFFLINE is set",
        str(cache),
        'hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --include "*.json" --include "*.txt" --include ',
        "--base_model FOLDER|FILE",
        "--base_model scenes",
    ):
        assert part in message
    assert list(cache.iterdir()) == []


def test_a_cached_base_opens_without_a_network(
    offline_cache: Callable[[str, Path | None], Path], saved_tiny: Path, tiny: Backbone
) -> None:
    offline_cache("someone/tiny", saved_tiny)
    loaded = load_backbone("someone/tiny", device="cpu")
    assert loaded.name == "someone/tiny"
    assert torch.equal(loaded.unet.conv_in.weight, tiny.unet.conv_in.weight)
    assert loaded.fingerprint == load_backbone(saved_tiny, device="cpu").fingerprint
    with pytest.raises(InputError, match="--revision other"):
        load_backbone("someone/tiny", device="cpu", revision="other")


def test_a_connection_that_breaks_in_any_way_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy's refusal is passed on by the Hub's library as it is, and is no `OSError`."""
    import httpx2
    import huggingface_hub

    def refused(*_: object, **__: object) -> None:
        raise httpx2.ProxyError("403 Forbidden")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(InputError, match="'someone/tiny', asked for, is not at hand: 403 Forbidden"):
        load_backbone("someone/tiny", device="cpu")


def test_a_base_that_is_cached_in_part_is_not_at_hand(
    offline_cache: Callable[[str, Path | None], Path], folder: Path
) -> None:
    (folder / VAE).unlink()
    offline_cache("someone/tiny", folder)
    with pytest.raises(InputError, match="lacks the vae's weights"):
        load_backbone("someone/tiny", device="cpu")


def test_a_pickled_base_from_the_hub_needs_leave(
    offline_cache: Callable[[str, Path | None], Path], folder: Path, tiny: Backbone
) -> None:
    to_pickle(folder)
    offline_cache("someone/old", folder)
    with pytest.raises(InputError, match="weights in safetensors"):
        load_backbone("someone/old", device="cpu")
    loaded = load_backbone("someone/old", device="cpu", allow_pickle=True)
    assert torch.equal(loaded.unet.conv_in.weight, tiny.unet.conv_in.weight)


def test_an_unsupported_base_is_refused_before_its_weights_are_fetched(
    offline_cache: Callable[[str, Path | None], Path], folder: Path
) -> None:
    change(folder, "unet/config.json", cross_attention_dim=1024)
    for file in (UNET, VAE, TEXT):
        (folder / file).unlink()
    offline_cache("someone/sd2", folder)
    with pytest.raises(InputError, match="Stable Diffusion 2"):
        load_backbone("someone/sd2", device="cpu")


@pytest.mark.parametrize("name", ["scenes", "FOLDER"])
def test_a_revision_of_what_is_not_the_hubs_is_refused(saved_tiny: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"revision 'fp16' came with base model .* leave --revision out"):
        load_backbone(str(saved_tiny) if name == "FOLDER" else name, device="cpu", revision="fp16")
