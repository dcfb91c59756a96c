"""The parts of training that can be looked at by themselves: average, telemetry, previews, oracle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.arms import Arm, teacher_arm
from fewstep.backbone import Backbone, load_backbone
from fewstep.ema import EMA
from fewstep.errors import CheckpointError, InputError
from fewstep.methods.kstep import KStep, Pairs
from fewstep.oracle import describe, measure_oracle
from fewstep.pictures import PictureBatch, draw_latents, encode_prompts, make_pictures
from fewstep.previews import LABEL_HEIGHT, Previews, labelled_grid
from fewstep.sampling import PictureNoise, lcm_sample
from fewstep.solver import Denoiser
from fewstep.telemetry import LoggedReporter, LossByTimestep, Telemetry, Throughput, read_metrics
from fewstep.train.answers import AnyProcess
from fewstep.train.progress import Progress
from fewstep.train.rollouts import Lesson
from tests.train.conftest import Heard

# ---------------------------------------------------------------------------------------------------------- the average


def test_ema_is_the_running_average_it_says() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    ema = EMA([parameter], decay=0.5)
    expected = torch.zeros(3)
    for step in range(1, 8):
        parameter.data.fill_(float(step))
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter.detach()
    torch.testing.assert_close(ema.averages[0], expected)


def test_ema_puts_the_weights_back_bit_for_bit_even_after_an_error() -> None:
    parameter = nn.Parameter(torch.randn(5))
    before, same = parameter.detach().clone(), parameter
    ema = EMA([parameter], decay=0.9)
    parameter.data += 1
    trained = parameter.detach().clone()
    with pytest.raises(KeyError), ema.applied():  # noqa: PT012
        assert torch.equal(parameter, before)
        raise KeyError
    assert torch.equal(parameter, trained) and parameter is same and parameter.requires_grad


def test_ema_that_is_off_is_the_weights_themselves() -> None:
    parameter = nn.Parameter(torch.randn(5))
    ema = EMA([parameter], decay=0.0)
    parameter.data += 1
    ema.update(1)
    now = parameter.detach().clone()
    with ema.applied():
        assert torch.equal(parameter, now)
    assert ema.averages == [] and ema.state_dict() == {"averages": []}


def test_ema_resumes() -> None:
    parameter = nn.Parameter(torch.randn(5))
    one = EMA([parameter], decay=0.9)
    parameter.data += 1
    one.update(1)
    other = EMA([parameter], decay=0.9)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.averages[0], other.averages[0])


# ------------------------------------------------------------------------------------------------------------ telemetry


def test_a_resumed_history_forgets_what_is_made_again(tmp_path: Path) -> None:
    with Telemetry(tmp_path) as telemetry:
        for step in (1, 2, 3):
            telemetry.record(step, {"loss": step / 10})
    with Telemetry(tmp_path, resumed_at=2) as telemetry:
        telemetry.record(3, {"loss": 0.5})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert (
        rows
        == telemetry.history
        == [
            {"step": 1, "loss": 0.1},
            {"step": 2, "loss": 0.2},
            {"step": 3, "loss": 0.5},
        ]
    )
    with Telemetry(tmp_path) as telemetry:
        assert telemetry.history == [], "a new run does not take over an old one's figures"


def test_tensorboard_shows_the_history_as_it_is(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def shown() -> list[tuple[int, float]]:
        board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        return [(point.step, round(point.value, 6)) for point in board.Scalars("loss")]

    with Telemetry(tmp_path) as telemetry:
        for step in (1, 2, 3):
            telemetry.record(step, {"loss": step / 10})
        assert shown() == [(1, 0.1), (2, 0.2), (3, 0.3)], "what is recorded can be seen at once"
    with Telemetry(tmp_path, resumed_at=2) as telemetry:
        telemetry.record(3, {"loss": 0.5})
    assert shown() == [(1, 0.1), (2, 0.2), (3, 0.5)]


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    with Telemetry(tmp_path / "run", active=False) as telemetry:
        telemetry.record(1, {"loss": 0.1})
    assert telemetry.history == [{"step": 1, "loss": 0.1}]
    assert not (tmp_path / "run").exists()


def test_a_line_cut_short_is_left_out_and_a_broken_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(file) == [{"step": 1}]
    for broken in (b'{"step": 1, "lo', b"\xff\0\0", b"[1]", b'{"loss": 1}', b'{"step": "1"}', b"[" * 5_000):
        file.write_bytes(broken + b'\n{"step": 2}\n')
        with pytest.raises(CheckpointError, match="line 1 is no JSON object with a step"):
            read_metrics(file)
        file.write_bytes(b'{"step": 2}\n' + broken)  # what a power cut may leave
        assert read_metrics(file) == [{"step": 2}]


NOTHING = [0.0, 0.0]


@pytest.mark.parametrize(
    "sums", [[[3.0, 4.0], [5.0, 6.0]], [[8.0, 10.0]], [[8.0, 10.0], NOTHING, NOTHING]], ids=["same", "fewer", "more"]
)
def test_each_process_goes_on_with_its_own_losses(sums: list[list[float]]) -> None:
    two = torch.tensor([[[3.0, 4.0]], [[5.0, 6.0]]])
    saved = {"losses": two, "skipped_in_a_row": 2, "skipped_since_logged": 5}
    for rank, mine in enumerate(sums):
        among: Any = SimpleNamespace(num_processes=len(sums), process_index=rank, is_main_process=rank == 0)
        losses = LossByTimestep([999], torch.device("cpu"))
        progress = Progress(losses, among)
        progress.load_state_dict(saved)
        assert losses.sums().tolist() == [mine]
        assert (progress.skipped_in_a_row, progress.skipped_since_logged) == (2, 5)


def test_processes_stop_together_and_nobody_waits_for_the_others() -> None:
    elsewhere = iter([0.0, 1.0, 0.0])
    among: Any = SimpleNamespace(
        num_processes=2, device=torch.device("cpu"), reduce=lambda mine: mine + next(elsewhere)
    )  # fmt: skip
    in_any = AnyProcess(among)
    assert [in_any(False), in_any(False), in_any(False)] == [False, False, True]
    elsewhere = iter([0.0, 0.0])
    in_any = AnyProcess(among)
    assert [in_any(True), in_any(False)] == [False, True]
    among.num_processes = 1
    alone = AnyProcess(among)
    assert [alone(True), alone(False)] == [True, False]


def test_loss_by_timestep_is_the_mean_over_all_samples_of_it() -> None:
    losses = LossByTimestep([999, 499, 259], torch.device("cpu"))
    losses.add(torch.tensor([999, 499, 999]), torch.tensor([1.0, 5.0, 2.0], requires_grad=True))
    losses.add(torch.tensor([999]), torch.tensor([6.0]))
    assert losses.means(lambda sums: sums) == {"loss": 3.5, "loss/t999": 3.0, "loss/t499": 5.0}
    losses.add(torch.tensor([259]), torch.tensor([1.0]))
    assert losses.means(lambda sums: 2 * sums) == {"loss": 1.0, "loss/t259": 1.0}


def test_throughput_leaves_out_what_is_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 100.0}
    monkeypatch.setattr("time.perf_counter", lambda: clock["now"])
    speed = Throughput(processes=3, forward=10.0, rate=200.0)

    def slow() -> Iterator[str]:
        for item in "ab":
            clock["now"] += 0.5
            yield item

    loaded = speed.waiting(slow())
    assert next(loaded) == "a" and next(loaded) == "b"
    speed.add(pictures=3, pairs=6, forwards=40)
    speed.add(pictures=5, pairs=10, forwards=48)
    clock["now"] += 1
    with speed.paused():
        clock["now"] += 50
    assert speed.read() == {
        "pictures_per_second": 3 * 8 / 2,
        "pairs_per_second": 3 * 16 / 2,
        "teacher_forwards_per_second": 3 * 88 / 2,
        "utilisation": (88 + 2 * 16) * 10 / 2 / 200,
        "data_wait_seconds": 1 / 2,
    }
    assert list(loaded) == []
    speed.add(pictures=3, pairs=3, forwards=0)
    clock["now"] += 1
    again = speed.read()
    assert (again["pictures_per_second"], again["data_wait_seconds"]) == (9.0, 0.0)


def test_what_is_said_goes_to_the_log_file_too(tmp_path: Path) -> None:
    heard, file = Heard(), tmp_path / "logs" / "run.log"
    with pytest.raises(InputError), LoggedReporter(heard, file) as reporter:  # noqa: PT012
        reporter.say("hello")
        reporter.warn("careful")
        raise InputError("no more")
    lines = [line.partition(" ")[2] for line in file.read_text().splitlines()]
    assert lines == ["hello", "warning: careful", "ended: no more"]
    assert (heard.said, heard.warned) == (["hello"], ["careful"])
    with pytest.raises(InputError, match="log_file"):
        LoggedReporter(heard, tmp_path)


# ------------------------------------------------------------------------------------------------------------- previews


def test_a_grid_of_previews_has_a_row_a_prompt_and_a_column_an_arm() -> None:
    columns = {"a": torch.full((3, 3, 32, 32), 10, dtype=torch.uint8), "b": torch.full((3, 3, 32, 32), 200).byte()}
    page = labelled_grid(columns, ["one", "two", "three"])
    assert page.size == (64, LABEL_HEIGHT + 3 * (32 + LABEL_HEIGHT))
    assert page.getpixel((5, LABEL_HEIGHT + 5)) == (10, 10, 10)
    assert page.getpixel((40, page.height - LABEL_HEIGHT - 5)) == (200, 200, 200)


# --------------------------------------------------------------------------------------------------------------- oracle


def test_the_teachers_pictures_of_the_oracle_are_not_drawn_again_for_previews(
    backbone: Backbone, method: KStep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = {"resolution": 64, "seed": 1}
    expected = Previews(backbone, method, ["a", "b"], **same).save(tmp_path / "expected.png").read_bytes()
    taught, other = (Previews(backbone, method, prompts, **same) for prompts in (["a", "b"], ["a", "z"]))

    def take_up(batch: PictureBatch) -> None:
        taught.take_up(batch)
        other.take_up(batch)

    measure_oracle(backbone, method, ["a", "b", "c"], batch_size=2, on_teachers=take_up, **same)
    drawn: list[str] = []

    def counted(*arguments: Any, **more: Any) -> PictureBatch:
        drawn.append(arguments[1].role)
        return make_pictures(*arguments, **more)

    monkeypatch.setattr("fewstep.previews.make_pictures", counted)
    assert taught.save(tmp_path / "taught.png").read_bytes() == expected
    assert drawn == ["student", "student"]
    other.save(tmp_path / "other.png")  # of which one picture is missing
    assert sorted(drawn[2:]) == ["student", "student", "teacher"]


@pytest.fixture(scope="module")
def backbone(base: Path) -> Backbone:
    return load_backbone(base, device="cpu")


@pytest.fixture(scope="module")
def method(backbone: Backbone) -> KStep:
    return KStep(schedule=backbone.schedule, step_counts=(1, 4), num_ddim_steps=2, guidance=3.0)


def test_a_lessons_loss_is_weighted_pair_by_pair_and_a_mean_over_its_samples(method: KStep) -> None:
    """Three pairs of two samples, by hand: each reads its own sample's caption and counts by its weight."""
    states, target = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    t, rows, weight = torch.tensor([999, 499, 499]), torch.tensor([0, 1, 0]), torch.tensor([0.5, 2.0, 3.0])
    cond = torch.randn(2, 5, 6)
    lesson = Lesson(
        pairs=Pairs(x_t=states, t=t, rows=rows, weight=weight, target=target),
        cond=cond,
        captions=("a", "b"),
        items=(0, 1),
    )

    def student(x_t: Tensor, at: Tensor, read: Tensor) -> Tensor:
        return x_t * read.mean(dim=(1, 2))[:, None, None, None]

    mean, each = lesson.loss(method, student)
    by_hand = [
        method.loss(student, states[n : n + 1], t[n : n + 1], cond[rows[n] : rows[n] + 1], target[n : n + 1])[0]
        for n in range(3)
    ]
    torch.testing.assert_close(each, torch.stack(by_hand))
    torch.testing.assert_close(mean, (0.5 * by_hand[0] + 2.0 * by_hand[1] + 3.0 * by_hand[2]) / 2)


def test_the_perfect_student_draws_the_teachers_rollout_in_one_step(backbone: Backbone, method: KStep) -> None:
    teacher, cond, uncond = backbone.denoiser(adapter=False), backbone.embed(["a", "b"]), backbone.embed([""])
    shape = backbone.latent_shape(64)
    ids = [(0, 0), (1, 0)]
    drawn = lcm_sample(method.oracle(teacher, uncond), backbone.schedule, PictureNoise(ids, 1), shape, [999], cond)
    expected = method.target(teacher, PictureNoise(ids, 1).draw(shape), torch.tensor([999, 999]), cond, uncond)
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)


def test_the_oracle_without_an_answer_key_measures_the_spread_of_latents(backbone: Backbone, method: KStep) -> None:
    oracle = measure_oracle(backbone, method, ["a", "b", "c"], resolution=64, seed=1, batch_size=2)
    assert list(oracle) == ["teacher", "1", "4"]
    assert oracle["teacher"] == {"saturation": 1.0}
    teacher, text = backbone.denoiser(adapter=False), encode_prompts(backbone, ["a", "b", "c"])
    ids, denoiser = [(n, 0) for n in range(3)], method.oracle(teacher, text.uncond)

    def spread(arm: Arm, student: Denoiser | None) -> Tensor:
        latents = draw_latents(backbone, arm, text, ids, seed=1, resolution=64, denoiser=student)
        return latents.double().std(dim=(0, 2, 3), correction=0)

    whole = spread(teacher_arm(backbone.teacher_steps, 3.0), None)
    for steps in (1, 4):
        expected = (spread(method.arm(steps), denoiser) / whole).mean().item()
        assert oracle[str(steps)]["saturation"] == pytest.approx(expected, rel=1e-4) and abs(expected - 1) > 1e-3
    assert "spread of the latents" in describe(oracle, 3) and "3 pictures" in describe(oracle, 3)


class KnowsTheAnswers:
    """Abilities of a base that finds every second prompt's picture right."""

    def answers(self, pixels: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        assert pixels.shape == (len(prompts), 3, 64, 64)
        return {"all_right": torch.tensor([prompt in ("a", "c") for prompt in prompts])}


def test_the_oracle_asks_the_answer_key(backbone: Backbone, method: KStep) -> None:
    knowing: Any = KnowsTheAnswers()
    heard = Heard()
    oracle = measure_oracle(
        replace(backbone, abilities=knowing), method, ["a", "b", "c", "d"],
        resolution=64, seed=1, batch_size=3, reporter=heard,
    )  # fmt: skip
    assert {arm: figures["all_right"] for arm, figures in oracle.items()} == {"teacher": 0.5, "1": 0.5, "4": 0.5}
    assert "every attribute right, 4 pictures): 50.0% at 1, 50.0% at 4 steps; teacher 50.0%" in describe(oracle, 4)
    assert all(done == total for done, total in heard.bars.values())
    assert json.loads(json.dumps(oracle)) == oracle
