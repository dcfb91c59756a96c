"""A student that learns the teacher's path and is sampled by DDIM: trained, saved, drawn with, gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fewstep import lora
from fewstep.arms import Sampler, student_arm
from fewstep.backbone import load_backbone
from fewstep.config import GenerateSettings, TrainSettings
from fewstep.errors import InputError, Interrupted
from fewstep.generate import generate
from fewstep.methods.trajectory import Trajectory
from fewstep.pictures import encode_prompts, make_pictures
from fewstep.randomness import generator
from fewstep.train import DistillResult, distill
from fewstep.train.encoding import Fresh
from fewstep.train.rollouts import Teacher
from tests.train.conftest import Heard
from tests.train.test_rollouts import same, weights
from tests.train.test_starts import SHAPE, batch_of

PROMPT = "pattern number 3"


@pytest.fixture(scope="module")
def short(settings: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    """Captions alone are enough: every rollout starts from noise."""
    folder = tmp_path_factory.mktemp("ddim")
    file = folder / "prompts.txt"
    file.write_text("".join(f"pattern number {number}\n" for number in range(7)))
    return settings.replace(
        sampler="ddim",
        num_ddim_steps=None,
        data_dir=None,
        prompts_file=file,
        output_dir=folder / "runs",
        run_name="whole",
        max_steps=4,
        validate_every=0,
        checkpoint_every=0,
    )


@pytest.fixture(scope="module")
def student(short: TrainSettings) -> tuple[DistillResult, Heard]:
    heard = Heard()
    return distill(short, reporter=heard), heard


def test_what_was_left_open_is_what_a_path_needs(student: tuple[DistillResult, Heard]) -> None:
    result, heard = student
    assert (result.settings.start, result.settings.num_ddim_steps) == ("noise", 16)
    assert result.settings.pairs_per_rollout == 4  # at 999, 749, 499, 249
    assert any("from noise to x0" in line and "999 749 499 249" in line for line in heard.said)
    last = result.history[-1]
    assert {key for key in last if key.startswith("loss/")} == {f"loss/t{t}" for t in (999, 749, 499, 249)}


def stock_picture(base: Path, adapter: Path, scheduler: Any, **steps: Any) -> np.ndarray:
    """What diffusers alone draws with the scheduler that was saved beside the adapter, 0 to 255."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(adapter)
    pipeline.scheduler = scheduler.from_pretrained(adapter / "scheduler")
    noise = [generator(5, "picture", 0, 0)]
    drawn = pipeline(PROMPT, guidance_scale=1.0, generator=noise, height=64, width=64, output_type="np", **steps)
    return np.round(drawn.images[0] * 255).astype(int)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_stock_pipeline_with_the_saved_scheduler_draws_the_students_picture(
    student: tuple[DistillResult, Heard], base: Path, tmp_path: Path, steps: int
) -> None:
    from diffusers import DDIMScheduler

    adapter = student[0].adapter
    config = json.loads((adapter / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "DDIMScheduler"
    stock = stock_picture(base, adapter, DDIMScheduler, num_inference_steps=steps)
    backbone = load_backbone(base, device="cpu")
    lora.load_adapter(backbone, adapter)
    prompt = encode_prompts(backbone, [PROMPT])

    def own(sampler: Sampler) -> np.ndarray:
        drawn = make_pictures(backbone, student_arm(steps, sampler=sampler), prompt, [(0, 0)], seed=5)
        return drawn.pixels[0].permute(1, 2, 0).numpy().astype(int)

    assert np.abs(stock - own("ddim")).max() <= 1
    settings = GenerateSettings(
        base_model=str(base), lora_path=adapter, prompt=PROMPT, steps=(steps,), seed=5, outdir=tmp_path, device="cpu"
    )
    with Image.open(generate(settings).images[0]) as picture:  # with the sampler that was saved beside the adapter
        assert np.abs(stock - np.asarray(picture).astype(int)).max() <= 1
    assert steps == 1 or np.abs(stock - own("lcm")).mean() > 1


def test_a_stock_pipeline_draws_with_the_timesteps_of_a_span(short: TrainSettings, base: Path, tmp_path: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler

    heard = Heard()
    adapter = distill(short.replace(run_name="span", timestep_span=0.6), reporter=heard).adapter
    assert any("timesteps=[999, 449, 299, 149]" in line for line in heard.said)
    stock = stock_picture(base, adapter, DPMSolverMultistepScheduler, timesteps=[999, 449, 299, 149])

    def own(**changes: Any) -> np.ndarray:
        settings = GenerateSettings(
            base_model=str(base), lora_path=adapter, prompt=PROMPT, steps=(4,), seed=5, outdir=tmp_path, device="cpu"
        )
        with Image.open(generate(settings.replace(**changes)).images[0]) as picture:
            return np.asarray(picture).astype(int)

    assert np.abs(stock - own()).max() <= 1
    (adapter / "settings.toml").unlink()  # as where weights and scheduler are passed on: the weights' header says it
    (adapter / "manifest.json").unlink()
    assert np.abs(stock - own(outdir=tmp_path / "header")).max() <= 1
    save_file(
        load_file(adapter / lora.WEIGHTS_NAME), adapter / lora.WEIGHTS_NAME
    )  # nothing says any more what was meant
    assert np.abs(stock - own(outdir=tmp_path / "without")).mean() > 1


def test_it_resumes_bit_for_bit(short: TrainSettings, student: tuple[DistillResult, Heard]) -> None:
    cut = short.replace(run_name="cut")
    asked = iter([False, True])
    with pytest.raises(Interrupted, match="step 2 of 4"):
        distill(cut, should_stop=lambda: next(asked))
    assert same(distill(cut.replace(resume_from_checkpoint="latest")), student[0])


def test_kept_paths_are_the_fresh_ones(short: TrainSettings, student: tuple[DistillResult, Heard]) -> None:
    """Read back, the pairs of a batch come in another order: the same up to the order of summation."""
    kept = weights(distill(short.replace(run_name="kept", teacher_rollouts=4 * 4)))
    fresh, untrained = (
        weights(student[0]),
        weights(distill(short.replace(run_name="one", max_steps=1, lr_warmup_steps=0))),
    )
    for name, value in fresh.items():
        torch.testing.assert_close(kept[name], value, rtol=1e-3, atol=1e-5)
    assert any((untrained[name] - value).abs().max() > 1e-3 for name, value in fresh.items())


def test_a_students_own_way_is_learnt_from_too(short: TrainSettings) -> None:
    own = short.replace(run_name="own", start="student", pairs_per_rollout=1)
    heard = Heard()
    whole = distill(own, reporter=heard)
    assert "starts: pure noise at t = 999, else where the student stands on its own way to t" in heard.said
    asked = iter([False, True])
    with pytest.raises(Interrupted):
        distill(own.replace(run_name="own-cut"), should_stop=lambda: next(asked))
    assert same(distill(own.replace(run_name="own-cut", resume_from_checkpoint="latest")), whole)


def test_a_lesson_is_a_path_from_each_positions_noise(base: Path) -> None:
    backbone = load_backbone(base, device="cpu")
    method = Trajectory(
        schedule=backbone.schedule,
        step_counts=(1, 4),
        num_ddim_steps=8,
        guidance=3.0,
        pairs_per_rollout=4,
        from_noise=True,
    )
    teacher = Teacher(backbone, Fresh(backbone), method, 5, SHAPE, "noise")
    whole, alone = teacher(batch_of(tuple(range(6)))), teacher(batch_of((2, 4)))
    assert whole.forwards == 6 * 8 * 2 and len(whole.pairs.t) == 6 * 4
    for place, position in enumerate((2, 4)):
        mine, theirs = whole.pairs.rows == position, alone.pairs.rows == place
        torch.testing.assert_close(whole.pairs.x_t[mine], alone.pairs.x_t[theirs], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(whole.pairs.target[mine], alone.pairs.target[theirs], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pure_noise_share": 0.5}, "pure_noise_share 0.5 came with start noise"),
        ({"start": "student", "teacher_rollouts": 8}, "allowed there are data, teacher and noise"),
    ],
)
def test_settings_that_contradict_each_other(short: TrainSettings, changes: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        short.replace(**changes)


def test_too_short_a_path_is_refused_before_anything_is_written(short: TrainSettings, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has to pass all 4 timesteps"):
        distill(short.replace(num_ddim_steps=3, output_dir=tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()
