"""A whole run: what it says, what it leaves, what a stock pipeline makes of it, and that it can be stopped anywhere."""

from __future__ import annotations

import json
import math
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep import lora
from fewstep.arms import base_arm, student_arm
from fewstep.backbone import Backbone, load_backbone
from fewstep.checkpoint import load, verify
from fewstep.config import GenerateSettings, TrainSettings
from fewstep.errors import CheckpointError, DataError, InputError, Interrupted
from fewstep.methods.kstep import KStep
from fewstep.opening import open_base
from fewstep.pictures import encode_prompts, make_pictures
from fewstep.randomness import generator
from fewstep.train import DistillResult, distill, engine, learning_rate, resuming, start
from fewstep.train.books import MOST_SKIPPED
from fewstep.train.rollouts import Lesson
from fewstep.train.update import MOST_OVERFLOWS, Made, Updater, take_back_overflows
from tests.train.conftest import MEASURED, Heard, without_speed

WEIGHTS = "pytorch_lora_weights.safetensors"
PROMPT = "pattern number 3"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def assert_same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], **({"rtol": 0, "atol": 0} | tolerance), msg=name)


def saved_state(folder: Path, *names: str) -> dict[str, Any]:
    """What a checkpoint holds to resume from, as its objects would take it up; "progress" besides the `names`."""

    class Catches:
        def load_state_dict(self, state: Any) -> None:
            self.state = state

    caught = {name: Catches() for name in (*names, "progress")}
    load(folder, caught)  # type: ignore[arg-type]
    return {name: one.state for name, one in caught.items()}


# ------------------------------------------------------------------------------------------------------ what is left


def test_the_first_line_names_the_base_and_why(whole: DistillResult, heard: Heard, base: Path) -> None:
    assert heard.said[0] == f"base: {base} (asked for with base_model)"


def test_what_matters_is_said_before_work(whole: DistillResult, heard: Heard) -> None:
    trainable = sum(value.numel() for value in weights(whole.adapter).values())
    said = "\n".join(heard.said)
    assert f"alpha 32 (alpha / rank = 8) on to_q to_k to_v to_out.0: {trainable:,} trainable parameters" in said
    assert "loss_weighting x0" in said
    assert "2 DDIM steps from t to x0 with guidance 3; t is one of 999 759 499 259" in said
    assert "10 steps of 4 pictures (2 x 2 micro-batches x 1 processes)" in said
    assert '  mixed_precision = "no"' in heard.said
    assert heard.bars["training"] == (10, 10)
    assert heard.warned == []


def test_settings_are_saved_resolved_and_can_be_passed_back(whole: DistillResult) -> None:
    text = (whole.folder / "settings.toml").read_text()
    saved = tomllib.loads(text)
    assert (saved["guidance_scale"], saved["resolution"], saved["lora_alpha"]) == (3.0, 64, 32)
    assert TrainSettings(**saved) == whole.settings
    assert (whole.adapter / "settings.toml").read_text() == text


def test_checkpoints_are_whole_and_the_final_one_is_the_last(whole: DistillResult) -> None:
    names = sorted(folder.name for folder in (whole.folder / "lora").iterdir())
    assert names == ["checkpoint-10", "checkpoint-4", "checkpoint-8", "final"]
    for name in names:
        verify(whole.folder / "lora" / name)
    assert_same(weights(whole.adapter), weights(whole.folder / "lora" / "checkpoint-10"))
    assert not (whole.adapter / "resume").exists()
    record = verify(whole.adapter)
    assert (record.step, record.step_counts) == (10, (1, 4))
    assert {"fewstep", "python", "torch", "diffusers", "peft"} <= record.more["versions"].keys()
    assert (
        json.loads((whole.adapter / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == "LCMScheduler"
    )


def test_what_is_sampled_with_is_the_average_and_raw_weights_stay_in_resume(whole: DistillResult) -> None:
    folder = whole.folder / "lora" / "checkpoint-10"
    state, published = saved_state(folder, "adapter", "optimizer", "ema"), weights(folder)
    raw, averages = state["adapter"], state["ema"]["averages"]
    assert raw.keys() == published.keys()
    assert any(not torch.equal(raw[name], published[name]) for name in raw)
    for name, average in zip(raw, averages, strict=True):  # the adapter's parameters, in their order
        assert torch.equal(published[name], average)


def test_metrics_have_the_loss_of_every_timestep(whole: DistillResult) -> None:
    rows = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == whole.history
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10]
    seen = {name for row in rows for name in row if name.startswith("loss/")}
    assert seen == {"loss/t999", "loss/t759", "loss/t499", "loss/t259"}
    assert {"loss", "gradient_norm", "learning_rate"} | MEASURED <= rows[0].keys()
    for row in rows:
        assert all(row[name] > 0 for name in MEASURED)
        # A pair a picture, and two guided steps of the teacher.
        assert row["pairs_per_second"] == row["pictures_per_second"]
        assert row["teacher_forwards_per_second"] == pytest.approx(2 * 2 * row["pictures_per_second"])
        assert row["utilisation"] < 1.5 and row["data_wait_seconds"] < 4 / row["pictures_per_second"]
    assert list((whole.folder / "tensorboard").iterdir())


def test_previews_show_each_step_count_beside_the_teacher(whole: DistillResult) -> None:
    assert [file.name for file in (whole.folder / "previews").iterdir()] == ["step-000010.png"]
    with Image.open(whole.folder / "previews" / "step-000010.png") as page:
        assert page.width == 3 * 64
        pixels = np.asarray(page.convert("RGB")).astype(int)
    row = pixels[16:80]
    one, four, teacher = row[:, :64], row[:, 64:128], row[:, 128:]
    assert np.abs(one - four).max() > 0 and np.abs(four - teacher).max() > 0


# ---------------------------------------------------------------------------------------------------- the round trip


def stock_picture(base: Path, adapter: Path | None, steps: int) -> np.ndarray:
    """What a user of diffusers alone gets."""
    from diffusers import LCMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is None:
        pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    else:
        pipeline.load_lora_weights(adapter)
        pipeline.scheduler = LCMScheduler.from_pretrained(adapter / "scheduler")
    noise = generator(5, "picture", 0, 0)
    drawn = pipeline(
        PROMPT, num_inference_steps=steps, guidance_scale=1.0, generator=[noise], height=64, width=64, output_type="np"
    )
    return np.round(drawn.images[0] * 255).astype(int)


def own_picture(base: Path, adapter: Path | None, steps: int) -> np.ndarray:
    backbone = load_backbone(base, device="cpu")
    if adapter is not None:
        lora.load_adapter(backbone, adapter)
    arm = base_arm(steps) if adapter is None else student_arm(steps)
    drawn = make_pictures(backbone, arm, encode_prompts(backbone, [PROMPT]), [(0, 0)], seed=5)
    return drawn.pixels[0].permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_stock_pipeline_draws_the_students_picture_and_not_the_bases(
    whole: DistillResult, base: Path, steps: int
) -> None:
    student = own_picture(base, whole.adapter, steps)
    stock = stock_picture(base, whole.adapter, steps)
    untrained = stock_picture(base, None, steps)
    assert np.abs(stock - student).max() <= 1
    assert np.abs(stock - untrained).mean() > 1
    assert np.abs(untrained - own_picture(base, None, steps)).max() <= 1


def test_an_adapter_tells_what_its_base_was_taken_to_predict(settings: TrainSettings, tmp_path: Path) -> None:
    overruled = settings.replace(
        output_dir=tmp_path, max_steps=1, lr_warmup_steps=0, validate_every=0, checkpoint_every=0,
        prediction_type="v_prediction",
    )  # fmt: skip
    drawing = GenerateSettings(prompt=PROMPT, lora_path=distill(overruled).adapter, device="cpu")

    def opened(base: Backbone | None = None, **changes: Any) -> tuple[str, list[str]]:
        heard = Heard()
        asked = drawing.replace(**changes)
        found = open_base(asked, backbone=base, with_adapter=True, step_counts=(1,), reporter=heard)
        return found.backbone.schedule.prediction_type, [line for line in heard.warned if "to predict" in line]

    assert opened() == ("v_prediction", [])
    heard = Heard()
    second = overruled.replace(run_name="second", prediction_type=None, init_lora=drawing.lora_path)
    assert distill(second, reporter=heard).settings.prediction_type == "v_prediction"
    assert not any("to predict" in line for line in heard.warned)
    for found, warned in (opened(prediction_type="epsilon"), opened(load_backbone(settings.base_model or ""))):
        assert found == "epsilon" and "was trained to predict v_prediction" in warned[0]


def test_v_prediction_trains_and_is_passed_on_to_the_sampler(
    v_base: Path, settings: TrainSettings, tmp_path: Path
) -> None:
    result = distill(
        settings.replace(
            base_model=str(v_base),
            output_dir=tmp_path,
            max_steps=3,
            ema_decay=0.0,
            validate_every=0,
            checkpoint_every=0,
        )
    )
    assert result.settings.prediction_type == "v_prediction"
    scheduler = json.loads((result.adapter / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    student, stock = own_picture(v_base, result.adapter, 4), stock_picture(v_base, result.adapter, 4)
    assert np.abs(stock - student).max() <= 1
    # Without an average, what is sampled with is what was trained.
    raw = saved_state(result.folder / "lora" / "checkpoint-3", "adapter", "optimizer")["adapter"]
    assert_same(raw, weights(result.adapter))
    assert not (result.folder / "previews").exists()


def test_an_adapter_that_does_not_read_back_ends_the_run(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = lora.save_adapter

    def saves_something_else(unet: Any, folder: Path, *how: Any) -> Path:
        path = honest(unet, folder, *how)
        from safetensors import safe_open
        from safetensors.torch import save_file

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file({name: value * 1.001 for name, value in load_file(path).items()}, path, metadata)
        return path

    monkeypatch.setattr(lora, "save_adapter", saves_something_else)
    with pytest.raises(CheckpointError, match="is not the student"):
        distill(settings.replace(output_dir=tmp_path, max_steps=3, validate_every=0, checkpoint_every=0))
    assert list((tmp_path / "whole" / "lora").iterdir()) == []


# ----------------------------------------------------------------------------------------------- stopping, going on


def test_a_run_that_was_stopped_and_resumed_is_the_same_run_bit_for_bit(
    whole: DistillResult, settings: TrainSettings, tmp_path: Path
) -> None:
    stopped = settings.replace(output_dir=tmp_path)
    asked = iter([False, False, False, False, True])
    with pytest.raises(Interrupted, match=r"step 5 of 10.*--resume_from_checkpoint latest"):
        distill(stopped, should_stop=lambda: next(asked))
    heard = Heard()
    resumed = distill(stopped.replace(resume_from_checkpoint="latest"), reporter=heard)
    assert any("checkpoint-5 at step 5" in line for line in heard.said)
    assert_same(weights(resumed.adapter), weights(whole.adapter))
    assert resumed.steps == 10
    for name in ("adapter", "optimizer", "ema", "progress"):
        path = f"lora/checkpoint-10/resume/{name}.safetensors"
        assert (resumed.folder / path).read_bytes() == (whole.folder / path).read_bytes()
    assert [row["step"] for row in resumed.history] == [2, 4, 6, 8, 10]
    for mine, theirs in zip(resumed.history, whole.history, strict=True):
        assert without_speed(mine) == without_speed(theirs), "also of step 6, half of which was made before the stop"


def test_data_that_vanishes_ends_the_run_which_goes_on_once_it_is_back(
    whole: DistillResult, settings: TrainSettings, pictures: Path, tmp_path: Path
) -> None:
    data, away = tmp_path / "data", tmp_path / "away"
    shutil.copytree(pictures, data)
    moved = settings.replace(output_dir=tmp_path, data_dir=data)
    asked = iter(range(1, 11))

    def at_the_fifth_update() -> bool:
        if next(asked) == 5:
            data.rename(away)
        return False

    with pytest.raises(DataError, match=r"\.png was there .* cannot be read now: No such file") as caught:
        distill(moved, should_stop=at_the_fifth_update)
    assert caught.value.exit_code == 3
    away.rename(data)
    resumed = distill(moved.replace(resume_from_checkpoint="latest"))
    assert_same(weights(resumed.adapter), weights(whole.adapter))


def test_a_run_keeps_as_many_checkpoints_as_it_is_told(settings: TrainSettings, tmp_path: Path) -> None:
    few = settings.replace(output_dir=tmp_path, max_steps=4, checkpoint_every=1, keep_last=2, validate_every=0)
    run = distill(few)
    assert sorted(path.name for path in (run.folder / "lora").iterdir()) == ["checkpoint-3", "checkpoint-4", "final"]


def test_a_broken_checkpoint_is_none_of_those_that_are_kept(settings: TrainSettings, tmp_path: Path) -> None:
    """A run that fell back to an older one, and is stopped again before it has passed the broken one."""
    few = settings.replace(output_dir=tmp_path, max_steps=6, checkpoint_every=2, keep_last=2, validate_every=0)
    run = distill(few)
    whole, broken = (run.folder / "lora" / f"checkpoint-{step}" for step in (4, 6))
    (broken / "settings.toml").write_text("")
    heard, asked = Heard(), iter([True])
    again = few.replace(keep_last=1, resume_from_checkpoint="latest")
    with pytest.raises(Interrupted):
        distill(again, reporter=heard, should_stop=lambda: next(asked))
    assert heard.warned[0].startswith(f"passed over: checkpoint '{broken}' is broken")
    assert heard.warned[1] == f"removed: {broken}, which was passed over"
    assert [path.name for path in (run.folder / "lora").glob("checkpoint-*")] == ["checkpoint-5"]
    assert not whole.exists()
    assert_same(weights(distill(again).adapter), weights(run.adapter))


def test_a_bar_that_is_interrupted_stops_the_run_after_the_update(settings: TrainSettings, tmp_path: Path) -> None:
    class Signalled(Heard):
        def progress(self, name: str, total: int) -> Any:
            opened = super().progress(name, total)
            if name != "training":
                return opened

            class Interrupting:
                def __enter__(self) -> Any:
                    bar = opened.__enter__()
                    advance = bar.advance

                    def interrupted(n: int = 1, **values: float) -> None:
                        advance(n, **values)
                        if n:
                            raise KeyboardInterrupt

                    bar.advance = interrupted
                    return bar

                def __exit__(self, *exception: Any) -> Any:
                    return opened.__exit__(*exception)

            return Interrupting()

    with pytest.raises(Interrupted) as stopped:
        distill(settings.replace(output_dir=tmp_path), reporter=Signalled())
    assert stopped.value.exit_code == 75
    assert verify(tmp_path / "whole" / "lora" / "checkpoint-1").step == 1


def test_a_folder_with_a_run_is_refused_and_the_way_on_is_named(whole: DistillResult, settings: TrainSettings) -> None:
    with pytest.raises(InputError, match="--resume_from_checkpoint latest"):
        distill(settings)


def test_resuming_a_finished_run_changes_nothing(
    whole: DistillResult, settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (whole.adapter / WEIGHTS).read_bytes()
    again = distill(settings.replace(resume_from_checkpoint="auto", validate_every=0))
    assert (again.adapter / WEIGHTS).read_bytes() == before
    assert again.history == whole.history


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"learning_rate": 1e-5, "max_grad_norm": 2.0, "checkpoint_every": 3},
            InputError,
            r"^learning_rate 1e-05 \(not 0.003\), max_grad_norm 2 \(not 1\) came, unlike what checkpoint",
        ),
        ({"max_steps": 9}, InputError, "at step 10, max_steps is 9"),
        ({"batch_size": 3}, CheckpointError, "global_batch 4, now it is 6"),
        ({"resume_from_checkpoint": "OLD"}, InputError, "has gone on from checkpoint-4 to checkpoint-10"),
    ],
)
def test_another_run_cannot_pass_for_a_resumed_one(
    whole: DistillResult, settings: TrainSettings, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    if change.get("resume_from_checkpoint") == "OLD":
        change = {"resume_from_checkpoint": str(whole.folder / "lora" / "checkpoint-4")}
    with pytest.raises(error, match=words):
        distill(settings.replace(**{"resume_from_checkpoint": "latest"} | change))


@pytest.mark.parametrize("again", ["the same", "auto"])
def test_a_branch_that_was_stopped_before_its_first_checkpoint_begins_again_where_it_did(
    whole: DistillResult, settings: TrainSettings, tmp_path: Path, again: str
) -> None:
    """`auto` began it from nothing, and the same command was refused."""
    origin = whole.folder / "lora" / "checkpoint-4"
    branch = settings.replace(
        output_dir=tmp_path, run_name="branch", resume_from_checkpoint=str(origin), checkpoint_every=0
    )

    class Falls(Heard):
        def say(self, text: str) -> None:
            super().say(text)
            if text.startswith("adapter: "):
                raise MemoryError

        def progress(self, name: str, total: int) -> Any:
            if name == "training":
                raise MemoryError
            return super().progress(name, total)

    with pytest.raises(MemoryError):
        distill(branch, reporter=Falls())
    assert (tmp_path / "branch" / "settings.toml").exists() and not list((tmp_path / "branch").glob("lora/*"))
    with pytest.raises(InputError, match=r"and '.*checkpoint-8' is of another one"):
        distill(branch.replace(resume_from_checkpoint=str(whole.folder / "lora" / "checkpoint-8")))
    heard = Heard()
    went_on = distill(branch if again == "the same" else branch.replace(resume_from_checkpoint="auto"), reporter=heard)
    assert any(line.startswith("resumed from") and line.endswith("checkpoint-4 at step 4") for line in heard.said)
    assert_same(weights(went_on.adapter), weights(whole.adapter))
    with pytest.raises(InputError, match="holds a run already"):  # it is one of its own now
        distill(branch)


def test_a_checkpoint_of_an_older_release_is_gone_on_with(
    whole: DistillResult, settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A setting that it does not know was at its default, one that has gone decides nothing."""
    honest = resuming.load_toml

    def older(path: Path) -> dict[str, Any]:
        found = honest(path)
        del found["teacher_solver"]
        return found | {"a_setting_of_old": 3}

    monkeypatch.setattr(resuming, "load_toml", older)
    folder, backbone = (
        whole.folder / "lora" / "checkpoint-10",
        load_backbone(whole.settings.base_model or "", device="cpu"),
    )
    resuming.check_resumed(folder, whole.settings, backbone, {})
    with pytest.raises(InputError, match=r"teacher_solver dpmpp \(not ddim\) came"):
        resuming.check_resumed(folder, whole.settings.replace(teacher_solver="dpmpp"), backbone, {})


def test_a_run_that_goes_on_beyond_its_end_has_none_until_it_comes_to_it(
    settings: TrainSettings, tmp_path: Path
) -> None:
    """Whatever waits for `lora/final` would take the old one for the new."""
    few, heard = few_updates(settings, tmp_path).replace(max_steps=1), Heard()
    final = distill(few).adapter
    longer = few.replace(max_steps=3, resume_from_checkpoint="latest")
    with pytest.raises(Interrupted, match="stopped at step 2 of 3"):
        distill(longer, should_stop=lambda: True, reporter=heard)
    assert not final.exists() and f"removed: {final}, for the run goes on beyond it" in heard.said
    assert distill(longer).adapter == final and verify(final).step == 3


def test_a_run_on_another_base_is_not_resumed(whole: DistillResult, settings: TrainSettings, v_base: Path) -> None:
    with pytest.raises(CheckpointError, match=r"was trained on another base \(.*; pass that one as --base_model"):
        distill(settings.replace(resume_from_checkpoint="latest", base_model=str(v_base)))


def test_a_run_that_goes_on_under_other_libraries_says_so(
    whole: DistillResult, settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, honest = Heard(), resuming.versions()
    monkeypatch.setattr(resuming, "versions", lambda: honest | {"torch": "9.9"})
    resuming.warn_of_versions(whole.folder / "lora" / "checkpoint-10", heard)
    (warned,) = heard.warned
    assert warned.startswith(f"torch 9.9 (not {honest['torch']}) now, unlike what")


@pytest.mark.parametrize("which", [None, "auto"])
def test_a_run_that_another_one_overtakes_while_it_gets_ready_overwrites_nothing(
    which: str | None, settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, asked = start.open_base, few_updates(settings, tmp_path).replace(resume_from_checkpoint=which, max_steps=2)

    def is_slow(*inputs: Any) -> Any:
        monkeypatch.setattr(start, "open_base", honest)
        distill(asked)
        return honest(*inputs)

    monkeypatch.setattr(start, "open_base", is_slow)
    with pytest.raises(InputError, match=r"another run was at work in .*; go on with it by --resume_from_checkpoint"):
        distill(asked)
    verify(tmp_path / "whole" / "lora" / "final")
    assert len((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()) == 2


def test_nothing_is_written_for_a_base_without_data(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--data_dir"):
        distill(TrainSettings(base_model=str(base), output_dir=tmp_path / "runs", device="cpu"))
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------------- the updates


@pytest.fixture(scope="module")
def at_once(settings: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> DistillResult:
    """Three updates of four pictures at once."""
    return distill(few_updates(settings, tmp_path_factory.mktemp("at-once")))


def few_updates(settings: TrainSettings, folder: Path) -> TrainSettings:
    return settings.replace(
        output_dir=folder,
        max_steps=3,
        batch_size=4,
        gradient_accumulation_steps=1,
        ema_decay=0.0,
        lr_warmup_steps=0,
        checkpoint_every=0,
        validate_every=0,
        log_every=1,
    )


def test_micro_batches_change_the_order_of_summation_alone(
    at_once: DistillResult, settings: TrainSettings, tmp_path: Path
) -> None:
    split = distill(few_updates(settings, tmp_path).replace(batch_size=1, gradient_accumulation_steps=4))
    assert_same(weights(split.adapter), weights(at_once.adapter), rtol=1e-3, atol=2e-6)
    for mine, theirs in zip(split.history, at_once.history, strict=True):
        assert mine.keys() == theirs.keys()
        for name in without_speed(mine):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_an_update_that_overflows_is_made_again_and_counted_once(
    at_once: DistillResult, settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under fp16: the optimizer skips, the loss scale falls, and the same pictures come again."""
    honest, calls = AcceleratedOptimizer.step, []

    def overflows_at_first(self: AcceleratedOptimizer, closure: Any = None) -> None:
        calls.append(1)
        self._is_overflow = len(calls) in (1, 3)
        if not self._is_overflow:
            honest(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", overflows_at_first)
    result = distill(few_updates(settings, tmp_path))
    assert len(calls) == 5 and result.steps == 3
    assert_same(weights(result.adapter), weights(at_once.adapter))
    assert [row["loss"] for row in result.history] == [row["loss"] for row in at_once.history]


def test_an_update_that_overflows_at_any_scale_is_skipped_and_named(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under fp16 where the loss itself is no number: lowering the scale does not help."""
    honest, calls = AcceleratedOptimizer.step, []

    def overflows_in_the_second(self: AcceleratedOptimizer, closure: Any = None) -> None:
        calls.append(1)
        self._is_overflow = 2 <= len(calls) <= 2 + MOST_OVERFLOWS
        if not self._is_overflow:
            honest(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", overflows_in_the_second)
    heard = Heard()
    result = distill(few_updates(settings, tmp_path), reporter=heard)
    assert len(calls) == 3 + MOST_OVERFLOWS and result.steps == 3
    assert [line.split(":")[0] for line in heard.warned] == ["update 2 is skipped"]
    assert [row["skipped_updates"] for row in result.history] == [0, 1, 0]


def test_the_loss_scale_does_not_pay_for_a_loss_that_is_no_number() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight])
    for _ in range(MOST_OVERFLOWS + 1):
        optimizer.zero_grad()
        scaler.scale(weight.sum() * float("nan")).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 1024.0 / 2 ** (MOST_OVERFLOWS + 1)
    take_back_overflows(scaler, MOST_OVERFLOWS + 1)
    assert scaler.get_scale() == 1024.0 and weight.item() == 1.0
    take_back_overflows(None, 1)


def test_gradients_are_clipped(settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    honest = AcceleratedOptimizer.step

    def listens(self: AcceleratedOptimizer, closure: Any = None) -> None:
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
        honest(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", listens)
    result = distill(few_updates(settings, tmp_path).replace(max_grad_norm=0.01, max_steps=2))
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)
    assert all(row["gradient_norm"] > 0.01 for row in result.history)


def test_the_optimizer_steps_at_the_rate_of_the_schedule(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []
    honest = AcceleratedOptimizer.step

    def listens(self: AcceleratedOptimizer, closure: Any = None) -> None:
        rates.append([group["lr"] for group in self.param_groups])
        honest(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", listens)
    distill(few_updates(settings, tmp_path).replace(max_steps=4, lr_schedule="cosine", lr_warmup_steps=2))
    rate = settings.learning_rate  # a third, two thirds, then half a cosine
    assert rates == [[pytest.approx(share * rate)] for share in (1 / 3, 2 / 3, 1.0, 0.5)]


def test_a_loss_that_is_not_finite_ends_the_run_before_anything_is_saved(
    settings: TrainSettings, tmp_path: Path
) -> None:
    diverging = few_updates(settings, tmp_path).replace(learning_rate=1.0, lora_alpha=10**30, max_steps=50)
    heard = Heard()
    with pytest.raises(InputError, match="not finite at step"):
        distill(diverging, reporter=heard)
    assert len(heard.warned) == MOST_SKIPPED
    assert not (tmp_path / "whole" / "lora").exists()


@pytest.mark.parametrize("fused", [False, True])
def test_an_update_that_is_not_finite_is_skipped_and_named(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    monkeypatch.setattr(engine, "fuses", lambda settings, device: fused)
    honest, calls = KStep.loss, []

    def broken_once(self: KStep, *inputs: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return honest(self, *inputs) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(KStep, "loss", broken_once)
    heard = Heard()
    result = distill(few_updates(settings, tmp_path).replace(log_every=1, checkpoint_every=1), reporter=heard)
    assert result.steps == 3
    (warned,) = [line for line in heard.warned if "skipped" in line]
    assert warned.startswith("update 2 is skipped: its gradient is not finite; 1 in a row, 8 end the run; it was made")
    assert [row["skipped_updates"] for row in result.history] == [0, 1, 0]
    assert ["loss" in row for row in result.history] == [True, False, True]
    assert all(math.isfinite(value) for row in result.history for value in row.values())
    states = [saved_state(result.folder / "lora" / f"checkpoint-{step}", "adapter", "optimizer") for step in (1, 2, 3)]
    first, second, third = (state["adapter"] for state in states)
    kept = [torch.equal(first[name], second[name]) for name in first]
    moved = [torch.equal(third[name], second[name]) for name in first]
    assert all(kept) and not all(moved)
    moments = [list(state["optimizer"]["state"].values()) for state in states]
    for before, after in zip(moments[0], moments[1], strict=True):
        assert all(torch.equal(before[name], after[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    assert {float(moment["step"]) for moment in moments[2]} == {2.0}, "one that is skipped does not count"


@pytest.mark.parametrize(
    ("changes", "idle"),
    [({}, []), ({"start": "teacher"}, ["vae"]), ({"teacher_rollouts": 4}, ["vae", "text_encoder"])],
    ids=["all", "captions", "kept"],
)
def test_a_network_that_only_looks_need_rests_between_them(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], idle: list[str]
) -> None:
    rested: list[str] = []

    def rest(self: Backbone, network: torch.nn.Module) -> None:
        rested.extend(name for name in ("unet", "vae", "text_encoder") if getattr(self, name) is network)

    monkeypatch.setattr(Backbone, "rest", rest)
    distill(few_updates(settings, tmp_path).replace(max_steps=2, validate_every=1, validate_images=0, **changes))
    assert rested == 3 * idle, "before the first update, and after each of two looks"


@pytest.mark.parametrize("fused", [True, False])
def test_no_update_waits_for_what_a_fused_optimizer_finds_out(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    """Reading a scalar is what makes a host wait for its GPU; on a CPU the same operation is called."""
    monkeypatch.setattr(engine, "fuses", lambda settings, device: fused)
    honest, waits = Updater.__call__, []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            waits[-1] += call is torch.ops.aten._local_scalar_dense.default
            return call(*args, **(kwargs or {}))

    def watched(self: Updater, number: int, lessons: Sequence[Lesson]) -> Made:
        waits.append(0)
        with Reads():
            return honest(self, number, lessons)

    monkeypatch.setattr(Updater, "__call__", watched)
    distill(few_updates(settings, tmp_path))
    assert len(waits) == 3 and [count > 0 for count in waits] == [not fused] * 3


def test_half_precision_trains_fp32_weights_on_a_half_base(settings: TrainSettings, tmp_path: Path) -> None:
    result = distill(few_updates(settings, tmp_path).replace(mixed_precision="bf16"))
    assert result.settings.mixed_precision == "bf16"
    trained = saved_state(result.folder / "lora" / "checkpoint-3", "adapter", "optimizer")["adapter"]
    assert all(value.dtype == torch.float32 for value in trained.values())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in trained.values())
    assert_same(trained, weights(result.adapter))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16", "no"])
def test_a_gpu_trains_in_every_precision(settings: TrainSettings, tmp_path: Path, precision: str) -> None:
    asked = few_updates(settings, tmp_path).replace(device="cuda", mixed_precision=precision, max_steps=6)
    result = distill(asked)
    assert result.steps == 6 and [row["step"] for row in result.history] == [1, 2, 3, 4, 5, 6]
    names = ("adapter", "optimizer", *(["scaler"] if precision == "fp16" else []))
    assert all(
        value.isfinite().all()
        for value in saved_state(result.folder / "lora" / "checkpoint-6", *names)["adapter"].values()
    )


def test_learning_rate_rises_and_falls_as_it_should() -> None:
    constant = TrainSettings(max_steps=10, learning_rate=1.0, lr_warmup_steps=3)
    assert [learning_rate(constant, update) for update in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = constant.replace(lr_schedule="cosine", lr_warmup_steps=0)
    rates = [learning_rate(cosine, update) for update in range(10)]
    assert rates[0] == 1.0 and rates[5] == pytest.approx(0.5) and rates == sorted(rates, reverse=True) and rates[-1] > 0
