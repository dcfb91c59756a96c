"""Rollouts that start from the teacher's own pictures, and training on captions alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewstep import lora
from fewstep.backbone import Backbone, adapters_off, load_backbone
from fewstep.config import TrainSettings
from fewstep.data import Batch
from fewstep.data.pairs import LocalPictures
from fewstep.errors import CheckpointError, DataError, InputError, Interrupted
from fewstep.methods.kstep import KStep
from fewstep.train import distill
from fewstep.train.encoding import Fresh
from fewstep.train.rollouts import Teacher
from tests.train.conftest import Heard
from tests.train.test_rollouts import same

SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def backbone(base: Path) -> Backbone:
    return load_backbone(base, device="cpu")


@pytest.fixture(scope="module")
def method(backbone: Backbone) -> KStep:
    return KStep(schedule=backbone.schedule, step_counts=(1, 4), num_ddim_steps=2, guidance=3.0)


@pytest.fixture
def prompts(settings: TrainSettings, tmp_path: Path) -> TrainSettings:
    """The quick run of the other tests, on captions alone."""
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"pattern number {number}\n" for number in range(7)))
    return settings.replace(data_dir=None, prompts_file=file, output_dir=tmp_path / "runs", validate_every=0)


def batch_of(positions: tuple[int, ...]) -> Batch:
    captions = tuple(f"pattern number {position}" for position in positions)
    return Batch(
        update=3, micro=0, positions=positions, items=positions, pictures=torch.empty(len(positions), 0, 0, 3),
        captions=captions, replaced=(),
    )  # fmt: skip


def test_the_teachers_picture_is_noised_and_the_teacher_starts_again_from_there(
    backbone: Backbone, method: KStep
) -> None:
    positions = tuple(range(12))
    draws = method.draw(5, 3, positions, SHAPE)
    lesson = Teacher(backbone, Fresh(backbone), method, 5, SHAPE, "teacher")(batch_of(positions))
    with torch.no_grad(), adapters_off(backbone.unet):
        teacher, uncond = backbone.denoiser(adapter=False), backbone.embed([""])
        origins = method.draw_origins(5, 3, positions, SHAPE)
        own = method.own_pictures(teacher, origins, lesson.cond, uncond)
        again = method.target(teacher, lesson.pairs.x_t, draws.t, lesson.cond, uncond)
    noised = backbone.schedule.add_noise(own, draws.noise, draws.t)
    assert draws.pure.any() and not draws.pure.all()
    assert torch.equal(lesson.pairs.x_t[draws.pure], draws.noise[draws.pure])
    torch.testing.assert_close(lesson.pairs.x_t[~draws.pure], noised[~draws.pure], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lesson.pairs.target, again, rtol=1e-3, atol=1e-3)
    # What was noised is not what is aimed at.
    assert (lesson.pairs.target - own)[~draws.pure].abs().amax((1, 2, 3)).min() > 0.01


def test_a_start_belongs_to_its_position(backbone: Backbone, method: KStep) -> None:
    teacher = Teacher(backbone, Fresh(backbone), method, 5, SHAPE, "teacher")
    whole, alone = teacher(batch_of(tuple(range(8)))), teacher(batch_of((2, 6)))
    torch.testing.assert_close(whole.pairs.x_t[[2, 6]], alone.pairs.x_t, rtol=1e-4, atol=1e-4)


def test_the_students_guess_is_the_students_and_the_teacher_starts_from_there(base: Path) -> None:
    backbone = load_backbone(base, device="cpu")
    parameters = lora.attach(backbone.unet, 4, 32, ("to_q", "to_v"), 0)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter)))
    method = KStep(schedule=backbone.schedule, step_counts=(1, 4), num_ddim_steps=2, guidance=3.0)
    positions = tuple(range(12))
    draws = method.draw(5, 3, positions, SHAPE)
    lesson = Teacher(backbone, Fresh(backbone), method, 5, SHAPE, "student")(batch_of(positions))
    late = ~draws.pure
    assert late.any() and draws.pure.any()

    def states(adapter: bool) -> torch.Tensor:
        return method.own_states(backbone.denoiser(adapter), draws, lesson.cond, 5, 3, positions)

    torch.testing.assert_close(lesson.pairs.x_t, states(True), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(lesson.pairs.x_t[late], states(False)[late], rtol=1e-2, atol=1e-2)
    assert torch.equal(lesson.pairs.x_t[draws.pure], states(False)[draws.pure])  # noise, before any jump
    with torch.no_grad():
        teacher, uncond = backbone.denoiser(adapter=False), backbone.embed([""])
        again = method.target(teacher, lesson.pairs.x_t, draws.t, lesson.cond, uncond)
    torch.testing.assert_close(lesson.pairs.target, again, rtol=1e-3, atol=1e-3)
    assert all(parameter.requires_grad for parameter in parameters)


def test_a_run_on_the_students_guesses_resumes_bit_for_bit(prompts: TrainSettings) -> None:
    own, heard = prompts.replace(start="student", max_steps=4), Heard()
    whole = distill(own, reporter=heard)
    assert any(line.endswith("else, noised to t, the student's guesses on its own way to t") for line in heard.said)
    asked = iter([False, True])
    cut = own.replace(run_name="cut")
    with pytest.raises(Interrupted, match="step 2 of 4"):
        distill(cut, should_stop=lambda: next(asked))
    assert same(distill(cut.replace(resume_from_checkpoint="latest")), whole)


def test_guidance_in_an_interval_trains_another_student_and_keeps_other_rollouts(
    prompts: TrainSettings, tmp_path: Path
) -> None:
    heard = Heard()
    short = prompts.replace(max_steps=3, teacher_rollouts=4, teacher_cache=tmp_path / "cache")
    everywhere = distill(short)
    narrow = short.replace(run_name="narrow", guidance_interval=(0, 700))
    with pytest.raises(CheckpointError, match="guidance_interval None, this run has"):
        distill(narrow)
    other = distill(narrow.replace(run_name="other", teacher_cache=tmp_path / "other"), reporter=heard)
    assert any("with guidance 3 at timesteps 0 to 700 alone; t is one of" in line for line in heard.said)
    assert not same(other, everywhere)


def test_captions_alone_train_a_student_and_resume_bit_for_bit(prompts: TrainSettings) -> None:
    heard = Heard()
    whole = distill(prompts, reporter=heard)
    assert whole.settings.start == "teacher"
    assert f"data: captions in {prompts.prompts_file}: 7" in heard.said
    assert any(
        line.endswith("noised to t, the teacher's own pictures, made by a rollout more each") for line in heard.said
    )
    assert whole.history[-1]["loss"] > 0
    asked = iter([False] * 4 + [True])
    cut = prompts.replace(run_name="cut")
    with pytest.raises(Interrupted, match="step 5 of 10"):
        distill(cut, should_stop=lambda: next(asked))
    assert same(distill(cut.replace(resume_from_checkpoint="latest")), whole)


def test_captions_alone_are_kept_as_rollouts(prompts: TrainSettings, tmp_path: Path) -> None:
    kept = distill(prompts.replace(teacher_cache=tmp_path / "cache", max_steps=4))
    assert same(kept, distill(prompts.replace(run_name="fresh", max_steps=4)))


def test_pictures_can_be_left_aside_and_the_rollouts_kept_are_others(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encoded(*_: object) -> None:
        raise AssertionError("a picture was encoded")

    monkeypatch.setattr(Backbone, "encode", encoded)
    monkeypatch.setattr("fewstep.opening.steady_vae", lambda *_: None)  # it tries the VAE, of noise
    few = settings.replace(output_dir=tmp_path, max_steps=3, validate_every=0, teacher_cache=tmp_path / "cache")
    distill(few.replace(start="teacher"))
    with pytest.raises(CheckpointError, match="holds rollouts with start teacher, this run has data"):
        distill(few.replace(run_name="data"))
    with pytest.raises(AssertionError, match="encoded"):
        distill(few.replace(run_name="uncached", teacher_cache=None))


def test_other_captions_are_another_run(prompts: TrainSettings) -> None:
    few = prompts.replace(max_steps=3)
    distill(few)
    assert few.prompts_file is not None
    few.prompts_file.write_text("something else\n")
    with pytest.raises(CheckpointError, match="data_fingerprint"):
        distill(few.replace(resume_from_checkpoint="latest"))


def test_contradictions_are_refused(prompts: TrainSettings, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"start data came with prompts_file .*, which has no pictures; allowed are teacher"
    ):
        prompts.replace(start="data")
    with pytest.raises(InputError, match=r"start student came with teacher_rollouts; .* cannot be kept"):
        prompts.replace(start="student", teacher_rollouts=8)
    with pytest.raises(InputError, match="start student came with teacher_cache"):
        prompts.replace(start="student", teacher_cache=tmp_path)
    with pytest.raises(InputError, match=r"pure_noise_share 0\.5 came with start student; allowed is 1"):
        prompts.replace(start="student", pure_noise_share=0.5)
    with pytest.raises(InputError, match="data_dir and prompts_file came together"):
        prompts.replace(data_dir=pictures)
    with pytest.raises(DataError, match="cannot be read"):
        distill(prompts.replace(prompts_file=tmp_path / "missing.txt"))
    assert not prompts.output_dir.exists()


@pytest.mark.parametrize("start", ["teacher", "student", "noise"])
def test_where_no_picture_is_noised_none_is_decoded(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    def decoded(*_: object) -> None:
        raise AssertionError("a picture was decoded")

    asked = settings.replace(
        start=start, sampler="ddim" if start == "noise" else "lcm", num_ddim_steps=8, max_steps=2, lr_warmup_steps=0,
        validate_every=0, checkpoint_every=0, oracle_images=0, output_dir=tmp_path,
    )  # fmt: skip
    monkeypatch.setattr(LocalPictures, "item", decoded)
    assert distill(asked).steps == 2
    with pytest.raises(AssertionError, match="a picture was decoded"):
        distill(asked.replace(start="data", sampler="lcm", run_name="data"))
