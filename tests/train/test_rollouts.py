"""Rollouts that are kept: the same training while none is used twice, one set for several runs, and exact resume."""

from __future__ import annotations

import errno
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.config import TrainSettings
from fewstep.data import Slices
from fewstep.errors import CheckpointError, InputError, Interrupted
from fewstep.methods.kstep import Pairs
from fewstep.train import DistillResult, distill, rollouts, start
from fewstep.train.rollouts import KEPT, RolloutStore, numbers_of, turns_of
from tests.train.conftest import Heard


def weights(result: DistillResult) -> dict[str, torch.Tensor]:
    return load_file(result.adapter / "pytorch_lora_weights.safetensors")


def same(mine: DistillResult, theirs: DistillResult) -> bool:
    a, b = weights(mine), weights(theirs)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_kept_rollouts_that_are_used_once_train_the_very_same_student(
    whole: DistillResult, settings: TrainSettings, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    kept = distill(settings.replace(output_dir=tmp_path, teacher_cache=cache))
    assert same(kept, whole)
    assert len(list(cache.glob("*.safetensors"))) == 20  # 10 updates of 2 micro-batches


def test_several_pairs_a_rollout_are_kept_too(settings: TrainSettings, tmp_path: Path) -> None:
    several = settings.replace(output_dir=tmp_path, pairs_per_rollout=3, num_ddim_steps=4, oracle_images=0)
    fresh = distill(several.replace(run_name="fresh"))
    kept = distill(several.replace(run_name="kept", teacher_cache=tmp_path / "cache"))
    for name, value in weights(fresh).items():  # samples stand in another order in the sum
        torch.testing.assert_close(weights(kept)[name], value, rtol=1e-3, atol=1e-5)


def test_a_second_run_asks_the_teacher_nothing(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = settings.replace(output_dir=tmp_path, teacher_cache=tmp_path / "cache", teacher_rollouts=12)
    heard = Heard()
    first = distill(few.replace(run_name="first"), reporter=heard)
    assert heard.bars["teacher"] == (6, 6)
    assert f"rollouts: 12, kept in {tmp_path / 'cache'}, gone through 3.33 times" in heard.said

    def asked(*_: object) -> None:
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr("fewstep.train.rollouts.Teacher.__call__", asked)
    again = Heard()
    assert same(distill(few.replace(run_name="again"), reporter=again), first)
    assert again.bars["teacher"] == (0, 0)
    assert [row["teacher_forwards_per_second"] for row in first.history] == [0.0] * 5
    other = distill(few.replace(run_name="other", lora_rank=2, loss="huber"))
    assert {value.shape[0] for name, value in weights(other).items() if "lora.down" in name or "lora_A" in name} == {2}


def test_a_full_disk_ends_the_keeping_in_one_line_and_what_is_kept_is_gone_on_from(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = settings.replace(output_dir=tmp_path, teacher_cache=tmp_path / "cache", teacher_rollouts=12)
    files, honest = [], rollouts.write_tensors_atomic

    def full_after_two(path: Path, *content: Any) -> Path:
        if len(files) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        files.append(path)
        return honest(path, *content)

    monkeypatch.setattr(rollouts, "write_tensors_atomic", full_after_two)
    with pytest.raises(InputError, match=r"teacher_cache '.*cache' cannot be written to: No space left on device; "):
        distill(few.replace(run_name="full"))
    assert sorted((tmp_path / "cache").glob("*.safetensors")) == sorted(files)
    monkeypatch.setattr(rollouts, "write_tensors_atomic", honest)
    heard = Heard()
    distill(few.replace(run_name="full", resume_from_checkpoint="auto"), reporter=heard)
    assert heard.bars["teacher"] == (4, 4)


def test_a_run_on_kept_rollouts_resumes_bit_for_bit(settings: TrainSettings, tmp_path: Path) -> None:
    few = settings.replace(output_dir=tmp_path, teacher_cache=tmp_path / "cache", teacher_rollouts=8)
    whole = distill(few.replace(run_name="whole"))
    calls = Counter[str]()

    def in_the_middle() -> bool:
        calls["asked"] += 1
        return calls["asked"] == 6

    with pytest.raises(Interrupted, match="stopped at step 6"):
        distill(few.replace(run_name="cut"), should_stop=in_the_middle)
    assert same(distill(few.replace(run_name="cut", resume_from_checkpoint="latest")), whole)


def pairs_of(counts: list[int]) -> Pairs:
    """So many pairs of each rollout, told apart by their numbers."""
    rows = torch.cat([torch.full((count,), row) for row, count in enumerate(counts)])
    number = torch.arange(len(rows))
    x_t = number.float()[:, None, None, None].expand(-1, 1, 2, 2)
    return Pairs(x_t=x_t, t=number, rows=rows, weight=1 + number.float(), target=-x_t)


def test_in_its_turns_every_pair_is_learnt_from_and_weighs_what_it_weighed() -> None:
    pairs, numbers = pairs_of([8, 3, 1]), [20, 4, 7]
    for round_ in (0, 12, 24):  # 12 visits are whole rounds of 4, 2 and 1 turns
        weight = torch.zeros(12)
        for visit in range(round_, round_ + 12):
            some = turns_of(pairs, numbers, [visit] * 3, 2, seed=7)
            assert [int((some.rows == row).sum()) for row in (0, 2)] == [2, 1]
            assert 1 <= int((some.rows == 1).sum()) <= 2
            assert torch.equal(some.x_t[:, 0, 0, 0], some.t.float()) and torch.equal(some.target, -some.x_t)
            assert torch.equal(pairs.rows[some.t], some.rows)
            weight.index_add_(0, some.t, some.weight)
        torch.testing.assert_close(weight, 12 * pairs.weight)


def test_turns_depend_on_the_rollout_its_visit_and_the_seed_alone() -> None:
    pairs = pairs_of([8, 8])
    order = [turns_of(pairs, [5, 5], [visit, visit], 1, seed=7).t.tolist() for visit in range(16)]
    assert all(second == first + 8 for first, second in order)  # in another place of the batch: the same
    first, second = ([t for t, _ in order[start : start + 8]] for start in (0, 8))
    assert sorted(first) == sorted(second) == list(range(8)) and first != second
    assert [turns_of(pairs, [6, 6], [visit, visit], 1, seed=7).t.tolist() for visit in range(16)] != order
    assert [turns_of(pairs, [5, 5], [visit, visit], 1, seed=8).t.tolist() for visit in range(16)] != order
    assert turns_of(pairs, [5, 6], [0, 3], 8, seed=7).t.sort().values.tolist() == list(range(16))  # all, where all may


def test_a_run_that_takes_turns_resumes_bit_for_bit(settings: TrainSettings, tmp_path: Path) -> None:
    few = settings.replace(
        output_dir=tmp_path,
        teacher_cache=tmp_path / "cache",
        teacher_rollouts=8,
        pairs_per_rollout=3,
        num_ddim_steps=4,
        oracle_images=0,
    )
    heard = Heard()
    whole = distill(few.replace(run_name="whole", pairs_per_visit=1), reporter=heard)
    assert any("gone through 5 times, 1 of their pairs each time" in line for line in heard.said)
    asked = iter([False] * 5 + [True])
    with pytest.raises(Interrupted, match="stopped at step 6"):
        distill(few.replace(run_name="cut", pairs_per_visit=1), should_stop=lambda: next(asked))
    again = few.replace(run_name="cut", pairs_per_visit=1, resume_from_checkpoint="latest")
    assert same(distill(again), whole)
    assert not same(distill(few.replace(run_name="all")), whole)
    assert same(distill(few.replace(run_name="three", pairs_per_visit=3)), distill(few.replace(run_name="all2")))


def test_turns_are_taken_among_kept_rollouts_alone(settings: TrainSettings) -> None:
    with pytest.raises(InputError, match="pairs_per_visit 1 came without kept rollouts"):
        settings.replace(pairs_per_visit=1)


def test_a_teacher_that_was_stopped_goes_on(settings: TrainSettings, tmp_path: Path) -> None:
    few = settings.replace(output_dir=tmp_path, teacher_rollouts=12, resume_from_checkpoint="auto")
    whole = distill(few.replace(run_name="whole"))
    calls = Counter[str]()

    def after_two() -> bool:
        calls["asked"] += 1
        return calls["asked"] == 2

    with pytest.raises(Interrupted, match="stopped while the teacher made its rollouts"):
        distill(few.replace(run_name="cut"), should_stop=after_two)
    heard = Heard()
    assert same(distill(few.replace(run_name="cut"), reporter=heard), whole)
    assert heard.bars["teacher"] == (4, 4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_ddim_steps": 3}, "num_ddim_steps 2"),
        ({"teacher_solver": "dpmpp"}, "teacher_solver ddim"),
        ({"seed": 5}, "seed 42"),
        ({"batch_size": 4}, "global_batch 4"),
    ],
)
def test_rollouts_of_another_teacher_are_refused(
    settings: TrainSettings, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    few = settings.replace(output_dir=tmp_path, teacher_cache=tmp_path / "cache", teacher_rollouts=4, max_steps=3)
    distill(few.replace(run_name="first"))
    with pytest.raises(CheckpointError, match=f"holds rollouts with {named}, this run has"):
        distill(few.replace(run_name="second", **change))
    assert not (tmp_path / "second").exists(), "refused before the run begins, so that its folder is free"


def test_a_resumed_run_asks_for_nothing_that_lies_behind_it(settings: TrainSettings, tmp_path: Path) -> None:
    cache, heard = tmp_path / "cache", Heard()
    few = settings.replace(output_dir=tmp_path, teacher_cache=cache, max_steps=4, validate_every=0)
    done = iter([False, True])
    with pytest.raises(Interrupted, match="stopped at step 2"):
        distill(few, should_stop=lambda: heard.bars.get("training", (0, 0))[0] > 0 and next(done), reporter=heard)
    assert heard.bars["teacher"] == (8, 8)
    whole = distill(few.replace(run_name="again"))
    shutil.rmtree(cache)
    resumed = distill(few.replace(resume_from_checkpoint="latest"), reporter=heard)
    assert heard.bars["teacher"] == (4, 4)
    assert same(resumed, whole)


def test_rollouts_of_which_nothing_says_whose_they_are_are_refused(settings: TrainSettings, tmp_path: Path) -> None:
    few = settings.replace(output_dir=tmp_path, teacher_cache=tmp_path / "cache", teacher_rollouts=4, max_steps=3)
    distill(few.replace(run_name="first"))
    (tmp_path / "cache" / "rollouts.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"cache' holds rollouts, but no rollouts\.json .*; choose another folder"
    ):
        distill(few.replace(run_name="second", num_ddim_steps=3))


@pytest.mark.parametrize("metadata", [None, {}, {"captions": "5"}, {"captions": "{"}, {"captions": '["a"]'}])
@pytest.mark.parametrize("name", ["00000000", "notes"])
def test_a_file_of_something_else_is_named(name: str, metadata: dict[str, str] | None, tmp_path: Path) -> None:
    (tmp_path / "rollouts.json").write_text("{}")
    save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors", metadata)
    with pytest.raises(CheckpointError, match=rf"{name}\.safetensors' is no file of rollouts; remove it"):
        RolloutStore(tmp_path, {})


def _lesson(first: int, count: int) -> rollouts.Lesson:
    """`count` rollouts of one pair each, whose latents say their numbers."""
    numbers = torch.arange(first, first + count)
    latents = numbers.float().view(-1, 1, 1, 1)
    pairs = Pairs(x_t=latents, target=latents.clone(), t=numbers, rows=numbers - first, weight=torch.ones(count))
    captions = tuple(f"caption {number}" for number in numbers)
    return rollouts.Lesson(
        pairs=pairs, cond=latents.flatten(1)[:, None].clone(), captions=captions, items=tuple(numbers)
    )


def test_two_cuts_of_one_global_batch_share_a_folder(tmp_path: Path) -> None:
    """Of runs at once: neither overwrites what the other has found there."""
    one, other = RolloutStore(tmp_path, {}), RolloutStore(tmp_path, {})
    one.put(0, _lesson(0, 4))
    one.refresh()
    for first in (0, 2):
        other.put(first, _lesson(first, 2))
    assert one.get([3, 0]).pairs.x_t.flatten().tolist() == [3, 0]
    one.refresh()
    assert len(one) == 4 and one.get([3, 1]).captions == ("caption 3", "caption 1")


class _Making:
    """A teacher that writes down what it is asked; while it makes its first lesson another run puts the third."""

    def __init__(self, store: RolloutStore) -> None:
        self.store, self.asked, self.encoder = store, list[int](), self

    def __call__(self, batch: SimpleNamespace) -> rollouts.Lesson:
        if not self.asked:
            self.store.put(4, _lesson(4, 2))
        self.asked.append(batch.update)
        return _lesson(2 * batch.update, 2)

    def flush(self) -> None: ...


@pytest.mark.parametrize("stops_after", [1, 2, 9])
def test_what_another_run_has_put_there_since_is_not_made_again(tmp_path: Path, stops_after: int) -> None:
    store, heard, slices = RolloutStore(tmp_path, {}), Heard(), Slices(batch_size=2)
    teacher, unusable = _Making(store), SimpleNamespace(meet=lambda _: None, share=lambda: None)
    batches = [SimpleNamespace(update=n, micro=0, items=(2 * n, 2 * n + 1), replaced=()) for n in range(4)]
    seen = iter(range(9))

    def should_stop() -> bool:
        return next(seen) + 1 >= stops_after

    try:
        start.keep_rollouts(store, teacher, batches, slices, unusable, heard, should_stop)  # type: ignore[arg-type]
    except Interrupted:
        assert stops_after < 4
    made = {"00000004-2", *(f"0000000{2 * n}-2" for n in range(min(stops_after, 4)))}
    assert {path.stem for path in tmp_path.glob("*.safetensors")} == made
    assert teacher.asked == [n for n in range(min(stops_after, 4)) if n != 2]


def test_a_damaged_rollout_is_named(settings: TrainSettings, tmp_path: Path) -> None:
    few = settings.replace(output_dir=tmp_path, teacher_cache=tmp_path / "cache", teacher_rollouts=4, max_steps=3)
    distill(few.replace(run_name="first"))
    damaged = tmp_path / "cache" / "00000002-2.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"00000002-2\.safetensors' cannot be read"):
        distill(few.replace(run_name="second"))


@pytest.mark.parametrize("change", ["bit", "caption", "name"])
def test_a_rollout_that_is_not_as_it_was_written_is_named(settings: TrainSettings, tmp_path: Path, change: str) -> None:
    few = settings.replace(output_dir=tmp_path, teacher_cache=tmp_path / "cache", teacher_rollouts=4, max_steps=3)
    distill(few.replace(run_name="first"))
    first, second = (tmp_path / "cache" / f"0000000{number}-2.safetensors" for number in (0, 2))
    content = bytearray(second.read_bytes())
    if change == "bit":
        content[-9] ^= 1
    elif change == "caption":
        content[content.index(b"pattern")] ^= 1
    else:
        content = bytearray(first.read_bytes())
    second.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"00000002-2\.safetensors' is damaged at rollout [23]: .*; remove the file"
    ):
        distill(few.replace(run_name="second"))
    second.unlink()
    distill(few.replace(run_name="third"))


@pytest.mark.parametrize("sums", [None, "[1]", "7", "["])
def test_a_file_without_a_sum_a_rollout_is_named(tmp_path: Path, sums: str | None) -> None:
    tensors = {name: torch.zeros(2, 1) for name in KEPT}
    about = {"captions": '["a", "b"]'} | ({} if sums is None else {"sums": sums})
    (tmp_path / "rollouts.json").write_text("{}")
    save_file(tensors, tmp_path / "00000000.safetensors", about)
    with pytest.raises(CheckpointError, match=r"00000000\.safetensors' is no file of rollouts; remove it"):
        RolloutStore(tmp_path, {})


@pytest.mark.parametrize("count", [8, 24, 64])
def test_every_epoch_goes_through_all_of_them_in_another_order(count: int) -> None:
    slices = (
        Slices(batch_size=2, accumulation=2, processes=2, rank=0),
        Slices(batch_size=2, accumulation=2, processes=2, rank=1),
    )
    seen = [
        number
        for update in range(3 * count // 8)
        for micro in range(2)
        for part in slices
        for number in numbers_of(part, update, micro, count, 7)
    ]
    epochs = [seen[first : first + count] for first in range(0, 3 * count, count)]
    assert epochs[0] == list(range(count))
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert epochs[1] != epochs[0] != epochs[2] != epochs[1]
