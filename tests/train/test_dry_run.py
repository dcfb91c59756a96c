"""The rehearsal: what it counts is what a run takes, and it leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fewstep.arithmetic import kept_for_backward, room
from fewstep.backbone import load_backbone
from fewstep.config import TrainCommand, TrainSettings
from fewstep.data import DataReport, Slices
from fewstep.errors import InputError
from fewstep.lora import trainable_parameters
from fewstep.reporting import in_bytes
from fewstep.train import DistillResult, DryRun, dry_run, rehearse, start, train
from fewstep.train.dry_run import Trial
from fewstep.train.needs import disk_of_run
from fewstep.train.rollouts import Lesson, Teacher
from tests.train.conftest import Heard


@pytest.fixture(scope="module")
def asked(settings: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    folder = tmp_path_factory.mktemp("dry") / "runs"
    return settings.replace(output_dir=folder, log_file=folder / "log.txt")


@pytest.fixture(scope="module")
def said() -> Heard:
    return Heard()


@pytest.fixture(scope="module")
def found(asked: TrainSettings, said: Heard) -> DryRun:
    result = train(TrainCommand(**dict(asked), dry_run=True), reporter=said)
    assert isinstance(result, DryRun)
    return result


def test_nothing_is_written(found: DryRun, asked: TrainSettings, said: Heard) -> None:
    assert not asked.output_dir.exists()
    assert said.said[0].startswith("base: ") and said.said[-1] == "dry run: nothing was written"


def test_the_parts_of_memory_are_counted(found: DryRun, whole: DistillResult, said: Heard) -> None:
    adapter = (whole.adapter / "pytorch_lora_weights.safetensors").stat().st_size
    held = found.held
    assert held["adapter"] == held["gradients"] == pytest.approx(adapter, rel=0.5)  # the file has a long header
    layers = held["adapter"] // 4
    assert held["optimizer"] == pytest.approx(3 * held["adapter"], rel=0.05), f"two moments and the average of {layers}"
    # What folded layers keep of their weights does not grow with the batch.
    assert found.two is not None
    assert 1.95 * found.one.activations < found.two.activations <= 2 * found.one.activations
    assert found.one.activations > held["adapter"]
    assert any(line.startswith("memory, counted: base ") and "at batch 2" in line for line in said.said)


def test_without_folded_layers_all_that_is_kept_grows_with_the_batch(
    asked: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.lora.folding.folding_pays", lambda *_: False)
    plain = rehearse(asked)
    assert plain.two is not None
    assert plain.two.activations == pytest.approx(2 * plain.one.activations, rel=0.01)


def test_times_are_those_of_the_settings_batch(found: DryRun, asked: TrainSettings) -> None:
    assert found.one.teacher_seconds > 0 and found.one.student_seconds > 0
    one = Trial(teacher_seconds=2.0, student_seconds=1.0, activations=10, peak=None)
    two = Trial(teacher_seconds=3.0, student_seconds=1.5, activations=16, peak=None)
    slices = Slices(batch_size=4, accumulation=2, processes=2)
    fresh = asked.replace(max_steps=10)
    assert dry_run._durations(one, two, fresh, slices) == (2 * (5.0 + 2.5), 150.0)
    kept = asked.replace(max_steps=10, teacher_rollouts=20)  # two updates of 16: four batches of 4 a process
    assert dry_run._durations(one, two, kept, slices) == (2 * 2.5, 4 * 5.0 + 50.0)
    faster = Trial(teacher_seconds=1.9, student_seconds=0.9, activations=16, peak=None)
    assert dry_run._durations(one, faster, fresh, Slices(batch_size=4)) == (3.0, 30.0), "noise is no gain"


def test_a_visits_share_of_the_pairs_is_what_is_tried(asked: TrainSettings, tmp_path: Path) -> None:
    path = asked.replace(
        sampler="ddim", start="noise", num_ddim_steps=None, oracle_images=0, teacher_cache=tmp_path / "cache"
    )
    whole, turns = rehearse(path), rehearse(path.replace(pairs_per_visit=1))
    assert turns.one.activations < 0.6 * whole.one.activations


def test_the_largest_batch_is_where_the_line_meets_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def trial(activations: int) -> Trial:
        return Trial(teacher_seconds=1.0, student_seconds=1.0, activations=activations, peak=None)

    cpu = torch.device("cpu")
    monkeypatch.setattr(dry_run, "room", lambda device: 1000)
    assert dry_run._largest_batch(trial(100), trial(150), cpu) == 18  # 100 + 17 · 50 = 950
    assert dry_run._largest_batch(trial(100), trial(100), cpu) is None
    monkeypatch.setattr(dry_run, "room", lambda device: None)
    assert dry_run._largest_batch(trial(100), trial(150), cpu) is None


@pytest.mark.parametrize(
    ("checkpointing", "fix"),
    [(False, "pass --gradient_checkpointing, or --batch_size 1 with more"), (True, "pass --batch_size 1 with more")],
)
def test_a_run_that_will_not_fit_is_warned_of(
    asked: TrainSettings, monkeypatch: pytest.MonkeyPatch, checkpointing: bool, fix: str
) -> None:
    monkeypatch.setattr(dry_run, "_largest_batch", lambda *_: 1)
    heard = Heard()
    rehearse(asked.replace(batch_size=2, gradient_checkpointing=checkpointing, oracle_images=0), reporter=heard)
    (told,) = [line for line in heard.warned if "does not fit" in line]
    assert told.startswith("batch_size 2 does not fit") and fix in told


def test_a_batch_that_does_not_fit_is_said_in_one_line(asked: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Teacher.__call__

    def full(self: Teacher, batch: Any) -> Any:
        if len(batch.captions) == 2:
            raise torch.OutOfMemoryError
        return honest(self, batch)

    monkeypatch.setattr(Teacher, "__call__", full)
    with pytest.raises(InputError, match="batch 2 does not fit into the memory of cpu; allowed is what fits, batch 1"):
        rehearse(asked)
    # Nobody asked for it where the run's batch is 1.
    heard = Heard()
    found = rehearse(asked.replace(batch_size=1, oracle_images=0), reporter=heard)
    assert found.two is None and found.largest_batch == 1 and not heard.warned
    assert "largest batch: 1, for 2 does not fit" in heard.said
    assert found.seconds_per_step == 2 * (found.one.teacher_seconds + found.one.student_seconds)


def test_a_loss_that_is_no_number_is_told(asked: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Lesson.loss

    def lost(self: Lesson, *networks: Any) -> Any:
        mean, values = honest(self, *networks)
        return mean * float("nan"), values

    monkeypatch.setattr(Lesson, "loss", lost)
    with pytest.raises(InputError, match=r"the loss is nan in torch\.float32; allowed are finite numbers"):
        rehearse(asked)


@pytest.mark.gpu
def test_a_gpu_tells_its_peak(asked: TrainSettings) -> None:
    found = rehearse(asked.replace(device="cuda"))
    assert found.two is not None and found.one.peak is not None and found.two.peak is not None
    assert found.two.peak > found.one.peak > found.held["base"]
    assert found.largest_batch is not None and found.largest_batch > 2


def test_a_full_disk_is_warned_of(asked: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "free_disk", lambda folder: 10)
    heard = Heard()
    rehearse(asked, reporter=heard)
    assert [line for line in heard.warned if "10 bytes free: too little" in line]


def test_the_disk_it_takes_is_what_a_run_leaves(whole: DistillResult, base: Path) -> None:
    backbone = load_backbone(base, device="cpu")
    settings = whole.settings
    start.student_of(settings, backbone)
    slices = Slices(batch_size=settings.batch_size, accumulation=settings.gradient_accumulation_steps)
    data = DataReport(source="", pictures=12, captions=60, dropped=())

    def needed(**changes: Any) -> dict[str, int]:
        return disk_of_run(settings.replace(**changes), backbone, data, slices, trainable_parameters(backbone.unet))

    tensors = sum(file.stat().st_size for file in (whole.folder / "lora").rglob("*.safetensors"))
    assert needed()["checkpoints"] == pytest.approx(tensors, rel=0.5)  # headers weigh as much in so small an adapter
    pages = sum(file.stat().st_size for file in (whole.folder / "previews").iterdir())
    assert pages < needed()["previews"] == 4 * 3 * 3 * 64**2
    assert "rollouts" not in needed()
    pair, caption = 2 * 4 * 4 * 8 * 8, 4 * 77 * 32
    assert needed(teacher_rollouts=5)["rollouts"] == 8 * (pair + caption)
    most = settings.num_ddim_steps * pair + caption
    assert needed(teacher_rollouts=8, pairs_per_rollout=9)["rollouts"] == 8 * most
    latent, embedding = 2 * 4 * 8 * 8, 2 * 77 * 32
    assert needed(cache_dir="c")["cache"] == 12 * latent + 40 * embedding, "40 samples, 12 pictures, 60 captions"
    final = 4 * trainable_parameters(backbone.unet)
    assert needed()["checkpoints"] - needed(validate_images=0)["checkpoints"] == final, "the best one"
    assert needed(keep_last=1)["checkpoints"] == 2 * final + (needed()["checkpoints"] - 2 * final) // 3
    assert needed(keep_last=1, keep_every=5)["checkpoints"] == needed()["checkpoints"]
    assert needed(validate_every=0, checkpoint_every=0) == {"checkpoints": 6 * final, "previews": 0}


def test_what_autograd_keeps_is_counted_once() -> None:
    layer, x = nn.Linear(8, 8, bias=False), torch.randn(5, 8)

    def work() -> object:
        return layer(x) + layer(x)

    assert kept_for_backward(work, [layer.weight]) == x.nbytes
    assert kept_for_backward(work, [layer.weight, x]) == 0
    assert (room(torch.device("cpu")) or 10**9) > 10**6


def test_bytes_in_words() -> None:
    assert [in_bytes(count) for count in (0, 999, 1000, 3_188_736, 999_600, 5.2e10, 7e15)] == [
        "0 bytes", "999 bytes", "1 kB", "3.19 MB", "1 MB", "52 GB", "7e+03 TB",
    ]  # fmt: skip
