"""Options that may make a student faster: each an arm beside the plain one, none of which reaches another arm."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep import lora
from fewstep.arms import base_arm, student_arm
from fewstep.backbone import Backbone, compiled, random_backbone, untrained
from fewstep.benchmark import BenchmarkResult, benchmark, options
from fewstep.config import BenchSettings
from fewstep.errors import CheckpointError, InputError
from fewstep.report import picture_path
from tests.backbone.test_steady import too_large_for_half
from tests.benchmark.fakes import Notes, make_base
from tests.benchmark.test_benchmark import pixels, settings, table
from tests.benchmark.test_resume import stopping

FAST = ("fused", "channels-last", "compile", "bf16", "channels-last+fused", "bf16+tiny-vae")
NAMES = ("fused", "channels-last", "compile", "bf16", "fused+channels-last", "tiny-vae+bf16", "tiny-vae")
"""As they are named in the end: in the order in which they are applied."""
ARMS = ["student-2", *(f"student-{name.replace('+', '-')}-2" for name in NAMES)]


def make_tiny_vae(folder: Path, *, latent_channels: int = 4, blocks: int = 4) -> Path:
    """An AutoencoderTiny of random weights."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(5)
    widths, ones = (8,) * blocks, (1,) * blocks
    AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=ones,
        num_decoder_blocks=ones,
        latent_channels=latent_channels,
    ).save_pretrained(folder)
    return folder


def asked(folder: Path, **changes: object) -> BenchSettings:
    plain: dict[str, object] = {"steps": (2,), "baseline_steps": 2, "solver_steps": 0, "frechet_images": 0}
    return settings(folder, **(plain | {"timing_repeats": 1, "batch_size": 8} | changes))


def pictures(result: BenchmarkResult, arm: str) -> np.ndarray:
    return np.stack([pixels(picture_path(result.folders[arm], prompt, n)) for prompt in range(4) for n in range(2)])


def state(base: Backbone) -> dict[str, torch.Tensor]:
    networks = {"unet": base.unet, "vae": base.vae, "text_encoder": base.text_encoder}
    return {f"{part}.{name}": value for part, one in networks.items() for name, value in one.state_dict().items()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vae(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def attached(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A base with an adapter on it, which is the student; one attention block: every layer more takes long to trace."""
    smaller = {"block_out_channels": [16], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(untrained.TINY, "unet", untrained.TINY["unet"] | smaller)
        base = make_base(tmp_path_factory.mktemp("smaller"))
    lora.load_adapter(base, lora.locate(base.abilities.adapter()))  # type: ignore[union-attr]
    return base


@pytest.fixture(scope="module")
def before(attached: Backbone) -> Mapping[str, torch.Tensor]:
    return {name: value.clone() for name, value in state(attached).items()}


@pytest.fixture(scope="module")
def run(
    attached: Backbone, before: object, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BenchmarkResult]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "BACKEND", "eager")  # the compiler itself takes minutes
        folder = tmp_path_factory.mktemp("run")
        yield benchmark(asked(folder, fast_options=FAST, tiny_vae=str(tiny)), backbone=attached)


@pytest.fixture(scope="module")
def plain(run: BenchmarkResult, attached: Backbone, tmp_path_factory: pytest.TempPathFactory) -> BenchmarkResult:
    """The same without options, afterwards."""
    return benchmark(asked(tmp_path_factory.mktemp("plain")), backbone=attached)


@pytest.mark.slow
def test_each_is_an_arm_of_its_own_with_time_quality_and_difference(run: BenchmarkResult) -> None:
    assert [arm.arm.id for arm in run.arms if arm.arm.role == "student"] == ARMS
    rows, timed = table(run.outdir / "results.csv"), table(run.outdir / "timing.csv")
    theirs = {row["prompt_idx"]: row for row in rows if row["arm"] == "student-2"}
    for name, option in zip(ARMS[1:], NAMES, strict=True):
        found = run.record.summary[name]
        assert (found.plain, found.arm.option, found.control) == ("student-2", option, "base-2")
        assert found.alignment is not None and found.change_alignment is not None and found.change_all_right is not None
        mine = [row for row in rows if row["arm"] == name]
        assert len(mine) == 4 and {row["option"] for row in mine} == {option}
        for row in mine:
            difference = float(row["avg_clip_align_x100"]) - float(theirs[row["prompt_idx"]]["avg_clip_align_x100"])
            assert float(row["delta_clip_vs_plain"]) == pytest.approx(difference, abs=1e-3)
            assert row["delta_all_right_vs_plain"] != ""
        (own,) = [row for row in timed if row["arm"] == name]
        (other,) = [row for row in timed if row["arm"] == "student-2"]
        ratio = float(other["time_per_image_s"]) / float(own["time_per_image_s"])
        assert float(mine[0]["speedup_vs_plain"]) == pytest.approx(ratio, rel=1e-3)
        assert own["precision"] == ("bfloat16" if "bf16" in option else "float32")
        # Another decoder is other arithmetic, everything else the same, counted as it is written.
        assert (own["gflop"] == other["gflop"]) == ("tiny-vae" not in option and "fused" not in option)
        assert (own["decode_gflop"] == other["decode_gflop"]) == ("tiny-vae" not in option)
    assert all(row["option"] == row["speedup_vs_plain"] == "" for row in rows if row["arm"] not in ARMS[1:])
    assert "What may make it faster" in (run.outdir / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("option", ["fused", "channels-last", "compile", "fused-channels-last"])
def test_what_is_the_same_arithmetic_draws_the_same_pictures(run: BenchmarkResult, option: str) -> None:
    assert np.abs(pictures(run, f"student-{option}-2") - pictures(run, "student-2")).max() <= 1
    assert np.abs(pictures(run, "base-2") - pictures(run, "student-2")).max() > 1


@pytest.mark.slow
def test_half_precision_is_near_and_another_decoder_is_another_picture(run: BenchmarkResult) -> None:
    student = pictures(run, "student-2")
    assert 0 < np.abs(pictures(run, "student-bf16-2") - student).mean() < 4
    decoded = pictures(run, "student-tiny-vae-2")
    assert np.abs(decoded - student).mean() > 10
    assert 0 < np.abs(pictures(run, "student-tiny-vae-bf16-2") - decoded).mean() < 4


@pytest.mark.slow
def test_no_option_reaches_another_arm_or_stays(
    run: BenchmarkResult, plain: BenchmarkResult, attached: Backbone, before: Mapping[str, torch.Tensor]
) -> None:
    for name in ("teacher-2", "student-2", "base-2"):
        assert np.array_equal(pictures(run, name), pictures(plain, name))
    after = state(attached)
    assert after.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in after.items())
    assert all(value.is_contiguous() for value in after.values())
    assert attached.unet._compiled_call_impl is None and attached.dtype == torch.float32


def test_options_may_come_to_a_finished_benchmark(base: Backbone, tmp_path: Path) -> None:
    first = benchmark(asked(tmp_path), backbone=base)
    more = asked(tmp_path, resume=True, fast_options="fused", steps=(1, 2))
    grown = benchmark(more, backbone=stopping(base, 4))  # both step counts fused, one more plain, its control
    assert [arm.arm.id for arm in grown.arms if arm.plain] == ["student-fused-1", "student-fused-2"]
    assert grown.record.summary["student-2"] == first.record.summary["student-2"]


def test_another_decoder_is_not_taken_for_the_first_one(base: Backbone, tiny: Path, tmp_path: Path) -> None:
    benchmark(asked(tmp_path, tiny_vae=str(tiny)), backbone=base)
    torch.manual_seed(6)
    other = make_tiny_vae(tmp_path / "other")
    weights = other / "diffusion_pytorch_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(InputError, match="arm student-tiny-vae-2 came with decoder"):
        benchmark(asked(tmp_path, tiny_vae=str(other), resume=True), backbone=base)


# ---------------------------------------------------------------------------------------------------------- refusals


def refused(base: Backbone, asked: BenchSettings, error: type[Exception], words: str, **more: object) -> None:
    with pytest.raises(error, match=words) as caught:
        benchmark(asked, backbone=base, **more)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not asked.outdir.exists()


def test_half_precision_that_cannot_be_had(base: Backbone, tmp_path: Path) -> None:
    refused(base, asked(tmp_path, fast_options="fp16"), InputError, "fp16 came with the CPU; allowed there: bf16")
    half = replace(base, unet=deepcopy(base.unet).bfloat16(), dtype=torch.bfloat16)
    refused(half, asked(tmp_path, fast_options="bf16"), InputError, "the base runs in bf16 already")


def test_a_machine_without_a_compiler(base: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(graph: object, inputs: object) -> object:
        raise FileNotFoundError("g++ is not there\nand more lines")

    monkeypatch.setattr(compiled, "BACKEND", no_compiler)
    words = (
        r"compile came, but torch\.compile does not work here \(.*a C\+\+ compiler; install it, or leave compile out"
    )
    refused(base, asked(tmp_path, fast_options=["compile"]), InputError, words)


def test_an_option_that_fails_is_named(base: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Backbone:
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setattr(options.Options, "_applied", fails)
    words = r"arm student-fused-2 failed by its option fused \(no such kernel\)"
    with pytest.raises(InputError, match=words):
        benchmark(asked(tmp_path, fast_options="fused"), backbone=base)
    assert not (tmp_path / "out" / "results.csv").exists()


def test_an_option_needs_a_student(base: Backbone, tmp_path: Path) -> None:
    wanted = asked(tmp_path, fast_options="fused")
    refused(base, wanted, InputError, "fused came, but no student is drawn", arms=[base_arm(2)])


def test_a_decoder_that_is_none_or_not_for_this_base(base: Backbone, tmp_path: Path) -> None:
    def tiny_vae(name: object) -> BenchSettings:
        return asked(tmp_path, tiny_vae=str(name))

    refused(base, tiny_vae(tmp_path / "nothing"), CheckpointError, "is not at hand: there is no such folder")
    refused(base, tiny_vae("nobody/no-vae"), CheckpointError, r"hf download nobody/no-vae")
    base.vae.save_pretrained(tmp_path / "whole")
    refused(base, tiny_vae(tmp_path / "whole"), CheckpointError, "holds AutoencoderKL; allowed is an AutoencoderTiny")
    wide = make_tiny_vae(tmp_path / "wide", latent_channels=8)
    refused(base, tiny_vae(wide), CheckpointError, "latents of 8 channels to 8 times .* has 4 channels and 8 times")
    short = make_tiny_vae(tmp_path / "short", blocks=3)
    refused(base, tiny_vae(short), CheckpointError, "latents of 4 channels to 4 times")
    (short / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    refused(base, tiny_vae(short), CheckpointError, "short")
    (short / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    refused(base, tiny_vae(short), CheckpointError, "cannot be read")
    (short / "diffusion_pytorch_model.safetensors").unlink()
    refused(base, tiny_vae(short), CheckpointError, "diffusion_pytorch_model.safetensors is not in it")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("faster", "'faster' came; allowed: fused, tiny-vae, bf16, fp16, channels-last, compile"),
        ("fused+faster", r"'fused\+faster' came; allowed: fused"),
        ("bf16+fp16", r"'bf16\+fp16' came; .* one of the precisions"),
        ("fused+fused", r"'fused\+fused' came; .* each once"),
        ("tiny-vae", "'tiny-vae' came; .* tiny-vae beside others"),
        ("tiny-vae+bf16", r"fast_options tiny-vae\+bf16 came without tiny_vae; .* --tiny_vae FOLDER"),
        (("fused", "fused"), "fused came twice"),
        (("compile+fused", "fused+compile"), r"fused\+compile came twice"),
    ],
)
def test_unknown_repeated_and_impossible_options(tmp_path: Path, options: object, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        asked(tmp_path, fast_options=options)
    assert "\n" not in str(caught.value)


def test_a_vae_that_half_precision_is_too_narrow_for_runs_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(options.PRECISIONS, "bf16", torch.float16)  # which a CPU is not asked for: what is tested here
    base, notes = random_backbone("tiny"), Notes()
    arms = [replace(student_arm(steps), option="bf16") for steps in (1, 2)]
    chosen = options.Options(BenchSettings(fast_options="bf16"), base, notes)
    with chosen.on(base, arms[0]) as painter:
        assert next(painter.vae.parameters()).dtype == torch.float16
    too_large_for_half(base)
    for arm in arms:
        with chosen.on(base, arm) as painter:
            assert next(painter.vae.parameters()).dtype == torch.float32
            assert next(painter.unet.parameters()).dtype == torch.float16
            assert painter.decode(torch.randn(1, *base.latent_shape(64))).isfinite().all()
    (warned,) = notes.warned  # once, however many arms it concerns
    assert "overflows in float16: it runs in float32" in warned
