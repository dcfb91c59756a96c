"""`generate`: files, the same pictures as a benchmark's, the shipped adapter, the safety checker."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep import opening
from fewstep.arms import base_arm, student_arm
from fewstep.backbone import Backbone, load_backbone
from fewstep.benchmark import benchmark
from fewstep.config import BenchSettings, GenerateSettings, load_toml
from fewstep.errors import CheckpointError, InputError, Interrupted
from fewstep.generate import generate
from fewstep.opening import trained_for
from fewstep.pictures import draw_latents, encode_prompts, evaluate, make_pictures, picture_ids
from fewstep.report import free_prompts, picture_path
from fewstep.safety import SafetyChecker
from fewstep.sampling import PictureNoise, lcm_sample
from fewstep.timesteps import student_grid
from tests.benchmark.fakes import Notes, make_adapter


def test_pictures_where_the_contract_says(base: Backbone, tmp_path: Path, notes: Notes) -> None:
    settings = GenerateSettings(prompt="a red house", steps=(1, 2), num_images=2, outdir=tmp_path, device="cpu")
    result = generate(settings, reporter=notes, backbone=base)
    names = [str(path.relative_to(tmp_path)) for path in result.images]
    assert names == [f"images/student-{steps}/000/{n:03d}.png" for steps in (1, 2) for n in range(2)]
    assert all(path.is_file() for path in result.images) and (tmp_path / "settings.toml").is_file()
    assert notes.said[0].startswith("base: ") and "alpha / rank 8" in notes.said[1]
    assert all(done == total for done, total in notes.advanced.values())


def test_earlier_pictures_stay_and_further_prompts_are_numbered_on(
    base: Backbone, tmp_path: Path, notes: Notes
) -> None:
    settings = GenerateSettings(prompt="a red house", steps=(1,), num_images=2, outdir=tmp_path, device="cpu")
    (first, _) = generate(settings, backbone=base).images
    before = first.read_bytes()
    assert "first in" not in "".join(notes.said)
    (again,) = generate(settings.replace(num_images=1, steps=(2,)), reporter=notes, backbone=base).images
    assert again == tmp_path / "images" / "student-2" / "001" / "000.png"
    assert notes.said[-1].endswith("the first in images/student-2/001")
    generate(settings.replace(prompt="a blue house"), backbone=base)
    assert first.read_bytes() == before
    names = sorted(str(path.relative_to(tmp_path / "images")) for path in (tmp_path / "images").rglob("*.png"))
    assert names == [
        *(f"student-1/{prompt}/{picture}.png" for prompt in ("000", "002") for picture in ("000", "001")),
        "student-2/001/000.png",
    ]
    # Each call's settings stay with its pictures.
    kept = {path.name: load_toml(path)["prompt"] for path in tmp_path.glob("settings*.toml")}
    assert kept == {
        "settings.toml": "a red house",
        "settings-001.toml": "a red house",
        "settings-002.toml": "a blue house",
    }


def test_calls_at_one_time_take_numbers_of_their_own(tmp_path: Path) -> None:
    everybody = Barrier(8)

    def call(count: int) -> set[int]:
        everybody.wait()
        with free_prompts(tmp_path, ["student-1", "student-2"], count) as first:
            everybody.wait()  # all have theirs, and nobody has drawn yet
            folder = tmp_path / "images" / "student-2" / f"{first:03d}"
            (folder / "000.png").touch()
        return set(range(first, first + count))

    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(call, [1, 2, 3, 4, 1, 2, 3, 4]))
    assert len(set.union(*taken)) == 20
    left = {path.name for path in (tmp_path / "images").glob("*/*")}
    assert left == {f"{min(one):03d}" for one in taken}, "what stayed empty is gone"


def test_words_that_a_base_was_never_taught_are_named(base: Backbone, tmp_path: Path, notes: Notes) -> None:
    settings = GenerateSettings(prompt="an unheard house", steps=(1,), outdir=tmp_path, device="cpu")
    generate(settings, reporter=notes, backbone=base)
    (line,) = [line for line in notes.warned if "never taught" in line]
    assert line.endswith("does not draw what they ask: unheard")


def test_a_program_that_gives_no_reporter_hears_warnings(
    base: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    generate(GenerateSettings(prompt="an unheard house", steps=(1,), outdir=tmp_path, device="cpu"), backbone=base)
    heard = [record.message for record in caplog.records if record.name == "fewstep"]
    assert len(heard) == 1 and heard[0].endswith("does not draw what they ask: unheard")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a CPU alone is to be had")
def test_a_large_base_that_nobody_sent_to_the_cpu_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "is_small", lambda network: False)
    settings = GenerateSettings(prompt="a red house")
    for asked, warnings in (("auto", 1), ("cpu", 0)):
        notes = Notes()
        opening.load_chosen(settings.replace(device=asked), "cpu", None, notes)
        assert len([line for line in notes.warned if "very slow on the CPU" in line]) == warnings


def test_a_base_of_other_weights_has_no_shipped_adapter(tmp_path: Path) -> None:
    """Such as one that `fewstep pretrain` made, opened where its judges do not lie beside it."""
    rebuilt = replace(load_backbone("scenes", device="cpu"), fingerprint="0" * 32)
    with pytest.raises(InputError, match="no adapter came and the base scenes ships none"):
        generate(GenerateSettings(prompt="a red house", outdir=tmp_path, device="cpu"), backbone=rebuilt)
    assert list(tmp_path.iterdir()) == []


def test_what_was_stopped_before_its_first_picture_can_be_asked_for_again(base: Backbone, tmp_path: Path) -> None:
    class Interrupting(Notes):
        def progress(self, name: str, total: int) -> Any:
            raise KeyboardInterrupt

    settings = GenerateSettings(prompt="a red house", steps=(1,), outdir=tmp_path, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        generate(settings, backbone=base, reporter=Interrupting())
    assert (tmp_path / "settings.toml").exists()
    assert len(generate(settings, backbone=base).images) == 1


def test_a_picture_is_the_same_one_in_every_command(base: Backbone, tmp_path: Path) -> None:
    settings = GenerateSettings(prompt="a red house", steps=(2,), num_images=2, outdir=tmp_path, seed=7, device="cpu")
    first = generate(settings, backbone=base).images
    whole = make_pictures(base, student_arm(2), encode_prompts(base, ["a red house"]), picture_ids(1, 2), seed=7)
    for path, expected in zip(first, whole.pixels, strict=True):
        saved = np.asarray(Image.open(path), dtype=np.int16)
        assert np.abs(saved - expected.permute(1, 2, 0).numpy().astype(np.int16)).max() <= 1


def test_guidance_and_the_negative_prompt_are_what_is_drawn_with(base: Backbone, tmp_path: Path) -> None:
    plain = GenerateSettings(
        prompt="a red house", steps=(2,), outdir=tmp_path / "g", seed=7, device="cpu", flash_guidance=3.0
    )
    asked = plain.replace(negative_prompt="fog")

    def drawn(settings: GenerateSettings) -> np.ndarray:
        return np.asarray(Image.open(generate(settings, backbone=base).images[0]), dtype=np.int16)

    mine = drawn(asked)
    text, noise = base.embed(["a red house"]), PictureNoise([(0, 0)], 7)
    with torch.no_grad():
        latents = lcm_sample(
            *(base.denoiser(), base.schedule, noise, base.latent_shape(64), student_grid(2), text),
            base.embed(["fog"]),
            3.0,
        )
    expected = (255 * base.decode(latents)[0]).round().permute(1, 2, 0).numpy().astype(np.int16)
    assert np.abs(mine - expected).max() <= 1
    unlike = drawn(plain), drawn(plain.replace(flash_guidance=1.0))
    assert all(np.abs(mine - other).max() > 3 for other in unlike)
    measured = benchmark(
        BenchSettings(
            prompt="a red house", steps=(2,), outdir=tmp_path / "b", seed=7, device="cpu", flash_guidance=3.0,
            negative_prompt="fog", clip_model_id="none", frechet_images=0, timing_repeats=1, batch_sizes=(1,),
        ),
        backbone=base,
    )  # fmt: skip
    shown = np.asarray(Image.open(picture_path(measured.folders["student-2"], 0, 0)), dtype=np.int16)
    assert np.abs(shown - mine).max() <= 1


@pytest.mark.parametrize("file", ["clipscore_results.json", "cells/key.json"])
def test_a_benchmarks_pictures_are_not_drawn_over(base: Backbone, tmp_path: Path, file: str) -> None:
    kept = [tmp_path / name for name in (file, "settings.toml", "images/student-1/000/000.png")]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("kept")
    with pytest.raises(InputError, match=r"holds a benchmark.* choose another --outdir"):
        generate(GenerateSettings(prompt="x", steps=(1,), outdir=tmp_path, device="cpu"), backbone=base)
    assert {path.read_text() for path in kept} == {"kept"}


def test_nor_is_a_trainings_folder_taken(base: Backbone, tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text("max_steps = 10\n")
    with pytest.raises(InputError, match="holds a run that is no drawing"):
        generate(GenerateSettings(prompt="x", steps=(1,), outdir=tmp_path, device="cpu"), backbone=base)
    assert (tmp_path / "settings.toml").read_text() == "max_steps = 10\n"


def test_without_adapter_on_a_base_that_ships_none(base: Backbone, tmp_path: Path) -> None:
    settings = GenerateSettings(prompt="a red house", outdir=tmp_path / "out", device="cpu")
    with pytest.raises(InputError, match=r"--lora_path FOLDER\|FILE or --lora_id"):
        generate(settings, backbone=replace(base, abilities=None))
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_named(base: Backbone, tmp_path: Path, notes: Notes) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    manifest = {"schema_version": 1, "step": 10, "base_model": "another", "base_fingerprint": "f" * 32, "files": {}}
    (adapter / "manifest.json").write_text(json.dumps(manifest | {"step_counts": [8]}))
    settings = GenerateSettings(prompt="x", steps=(1,), lora_path=adapter, outdir=tmp_path / "out", device="cpu")
    generate(settings, reporter=notes, backbone=base)
    assert any("trained on another (ffffffff)" in line for line in notes.warned)
    assert any("not trained for 1 steps; it promises 8" in line for line in notes.warned)


def test_more_steps_than_promised_are_shorter_jumps_for_ddim_alone() -> None:
    assert trained_for(8, (2, 4), "ddim") and trained_for(3, (2, 4), "ddim") and trained_for(4, (2, 4), "lcm")
    assert not trained_for(1, (2, 4), "ddim")
    assert not trained_for(8, (2, 4), "lcm") and not trained_for(3, (2, 4), "tcd")


def test_latents_that_are_no_numbers_are_an_error(base: Backbone) -> None:
    def broken(x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, /) -> torch.Tensor:
        return torch.full_like(x_t, float("nan"))

    with pytest.raises(CheckpointError, match="student-1 draws latents that are not finite"):
        evaluate(base, ["a"], student_arm(1), seed=1, denoiser=broken)


def test_embeddings_of_many_prompts_wait_in_main_memory(base: Backbone) -> None:
    """A device holds those of one batch: here one that computes nothing."""
    seen = list[torch.Tensor]()

    def watched(x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, /) -> torch.Tensor:
        seen.append(cond)
        raise Interrupted("seen enough")

    known = encode_prompts(base, ["a", "b"])
    with pytest.raises(Interrupted):
        draw_latents(
            replace(base, device=torch.device("meta")), student_arm(1), known, [(1, 0)], seed=1, denoiser=watched
        )
    assert known.cond.device.type == "cpu" and known.cond.shape[0] == 2
    assert seen[0].device.type == "meta" and seen[0].shape == known.cond[:1].shape


def test_so_are_pictures_that_are_none(base: Backbone) -> None:
    vae = copy.deepcopy(base.vae)
    torch.nn.init.constant_(vae.decoder.conv_out.weight, float("nan"))
    with pytest.raises(CheckpointError, match=r"student-1 draws pictures that are not finite.*the decoder overflows"):
        evaluate(replace(base, vae=vae), ["a"], student_arm(1), seed=1, denoiser=lambda x_t, _t, _cond: x_t)


def test_a_safety_checker_that_is_not_there(base: Backbone, tmp_path: Path) -> None:
    settings = GenerateSettings(prompt="a red house", outdir=tmp_path / "out", safety_checker=True, device="cpu")
    with pytest.raises(InputError, match="--safety_checker"):
        generate(settings, backbone=replace(base, name=str(tmp_path)))
    assert not (tmp_path / "out").exists()


def test_what_the_safety_checker_objects_to_is_black(
    base: Backbone, tmp_path: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessorPil

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=small, vision_config=small | {"image_size": 16, "patch_size": 8}, projection_dim=8
    )  # fmt: skip
    network = StableDiffusionSafetyChecker(config)
    network.concept_embeds_weights.fill_(-2.0)  # every cosine is above -2: it objects to everything
    network.save_pretrained(tmp_path / "base" / "safety_checker")
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        tmp_path / "base" / "feature_extractor"
    )
    assert SafetyChecker(str(tmp_path / "base")).objections(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)) == [True] * 2
    settings = GenerateSettings(prompt="x", steps=(1,), outdir=tmp_path / "out", safety_checker=True, device="cpu")
    result = generate(settings, reporter=notes, backbone=replace(base, name=str(tmp_path / "base")))
    assert result.blackened == result.images and np.asarray(Image.open(result.images[0])).max() == 0
    assert any("safety checker objected to 1 of 1" in line for line in notes.warned)


def test_evaluate_answers_for_another_network(base: Backbone) -> None:
    """What the oracle needs: the arm's sampler over a denoiser that is handed in, judged by the base's answer key."""
    seen: list[tuple[int, ...]] = []

    def denoiser(x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, /) -> torch.Tensor:
        seen.append(tuple(x_t.shape))
        return x_t

    found = evaluate(base, ["a", "b", "c"], base_arm(2), seed=1, batch_size=2, denoiser=denoiser)
    assert seen == [(2, 4, 8, 8)] * 2 + [(1, 4, 8, 8)] * 2
    assert found.answers is not None and found.answers["red"].shape == (3,)
    assert found.all_right is not None and 0 <= found.all_right <= 1
    assert found.prompt_numbers == [0, 1, 2] and len(found.seconds) == 3
