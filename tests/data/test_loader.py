"""Batches: the same samples however they are cut, loaded and resumed; and what happens when pictures go bad."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.data import Batch, Batches, PictureData, Slices, open_data
from fewstep.data.loader import to_pixels
from fewstep.data.order import sample_index
from fewstep.data.pictures import PictureError
from fewstep.errors import DataError

from .makers import Base, Settings, encoded, noise, write, write_numbered


class Numbers:
    """Item i is a picture of the colour i with three captions; items in `bad` cannot be decoded."""

    def __init__(self, count: int, bad: tuple[int, ...] = ()) -> None:
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"item {index}"

    def item(self, index: int) -> tuple[np.ndarray, tuple[str, ...]]:
        if index in self.bad:
            raise PictureError("damaged", f"at {index}")
        return np.full((8, 8, 3), index, dtype=np.uint8), self.captions(index)

    def captions(self, index: int) -> tuple[str, ...]:
        return tuple(f"{kind} {index}" for kind in "abc")


def batches(data: PictureData, slices: Slices, start: int = 0, end: int = 4, **options: Any) -> Batches:
    return Batches(data, slices, seed=5, start=start, end=end, **options)


def samples(loaded: Batches) -> Iterator[tuple[tuple[int, int], tuple[int, str]]]:
    """((update, position in the global batch), (item, caption)) of all samples, checked against the pixels."""
    for batch in loaded:
        for position, item, pixels, caption in zip(
            batch.positions, batch.items, batch.pictures, batch.captions, strict=True
        ):
            assert (pixels == item).all()
            assert caption.split()[1] == str(item)
            yield (batch.update, position), (item, caption)


def all_samples(data: PictureData, slices: Slices, **options: Any) -> dict[tuple[int, int], tuple[int, str]]:
    found: dict[tuple[int, int], tuple[int, str]] = {}
    for rank in range(slices.processes):
        for key, value in samples(batches(data, replace(slices, rank=rank), **options)):
            assert key not in found
            found[key] = value
    return found


CUTS = [
    Slices(batch_size=8),
    Slices(batch_size=1, accumulation=8),
    Slices(batch_size=4, processes=2),
    Slices(batch_size=2, accumulation=2, processes=2),
    Slices(batch_size=1, processes=8),
]


@pytest.mark.parametrize("slices", CUTS, ids=str)
def test_how_the_batch_is_cut_changes_nothing(slices: Slices) -> None:
    found = all_samples(Numbers(11), slices)
    assert found == all_samples(Numbers(11), CUTS[0])
    assert set(found) == {(update, position) for update in range(4) for position in range(8)}
    assert [item for _, (item, _) in sorted(found.items())] == [sample_index(5, place, 11) for place in range(32)]


@pytest.mark.parametrize("slices", CUTS[:4], ids=str)
def test_a_resumed_run_goes_on_where_it_was(slices: Slices) -> None:
    data = Numbers(7, bad=(3,))
    whole = all_samples(data, slices, allowance=1)
    parts = all_samples(data, slices, end=2, allowance=1) | all_samples(data, slices, start=2, allowance=1)
    assert whole == parts


def test_workers_change_nothing() -> None:
    data = Numbers(9, bad=(4,))
    slices = Slices(batch_size=3, accumulation=2)
    alone = list(batches(data, slices, end=3, allowance=1))
    helped = list(batches(data, slices, end=3, allowance=1, workers=2))
    assert len(alone) == len(helped) == 6
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one.pictures, other.pictures)
        assert (one.update, one.micro, one.positions, one.captions) == (
            other.update, other.micro, other.positions, other.captions,
        )  # fmt: skip
        assert one.replaced == other.replaced


def test_every_epoch_shows_everything_once_and_captions_are_drawn() -> None:
    found = all_samples(Numbers(6), Slices(batch_size=6), end=40)
    captions: Counter[str] = Counter()
    for update in range(40):
        assert sorted(found[update, position][0] for position in range(6)) == list(range(6))
        captions.update(found[update, position][1] for position in range(6))
    assert len(captions) == 18
    assert min(captions.values()) >= 4  # 13 expected


def test_the_seed_decides() -> None:
    one, other = (
        [batch.captions for batch in Batches(Numbers(50), Slices(batch_size=8), seed=seed, start=0, end=2)]
        for seed in (1, 2)
    )
    assert one != other


def test_torchs_global_randomness_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    list(batches(Numbers(5), Slices(batch_size=2)))
    assert torch.equal(before, torch.random.get_rng_state())


def test_pixels_run_from_minus_one_to_one() -> None:
    pictures = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(2, 4, 5, 3)
    pixels = to_pixels(pictures)
    assert pixels.shape == (2, 3, 4, 5)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    torch.testing.assert_close(pixels[1, :, 2, 2], torch.tensor([-1.0, -0.6, 1.0]))
    (batch,) = batches(Numbers(3), Slices(batch_size=2), end=1)
    assert torch.equal(batch.pixels(), to_pixels(batch.pictures))


# --------------------------------------------------------------------------------------------------- pictures gone bad


def test_a_bad_picture_gives_way_to_another_always_the_same(tmp_path: Path) -> None:
    slices = Slices(batch_size=4)
    loaded = batches(Numbers(8, bad=(2,)), slices, end=6, allowance=1)
    found = list(loaded)
    assert all(2 not in batch.items for batch in found)
    assert [batch.items for batch in found] == [
        batch.items for batch in batches(Numbers(8, bad=(2,)), slices, end=6, allowance=1)
    ]
    assert loaded.replaced == {"item 2": "damaged (at 2)"}
    told = [replaced for batch in found for replaced in batch.replaced]
    assert [str(replaced) for replaced in told] == ["item 2: damaged (at 2); another picture took its place"]
    sound = list(batches(Numbers(8), slices, end=6))
    for batch, other in zip(found, sound, strict=True):  # nothing else moves
        changed = [new for new, old in zip(batch.items, other.items, strict=True) if old != 2 and new != old]
        assert not changed


def test_more_bad_pictures_than_allowed_end_the_run() -> None:
    with pytest.raises(DataError, match=r"2 pictures turned out .*item \d: damaged \(at \d\).* allowed is 1 "):
        list(batches(Numbers(8, bad=(2, 5)), Slices(batch_size=4), allowance=1))


def test_nothing_but_bad_pictures_is_an_error_and_no_endless_loop() -> None:
    with pytest.raises(DataError, match="in a row"):
        list(batches(Numbers(3, bad=(0, 1, 2)), Slices(batch_size=1), allowance=3))


def test_a_signal_to_every_process_of_a_job_is_the_main_ones_affair() -> None:
    whole = list(batches(Numbers(30), Slices(batch_size=2), end=20))
    before = set(multiprocessing.active_children())
    stream = iter(batches(Numbers(30), Slices(batch_size=2), end=20, workers=2))
    loaded = [next(stream), next(stream)]  # one of each: both are at work
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for number in (signal.SIGINT, signal.SIGTERM):
        for worker in workers:
            assert worker.pid is not None
            os.kill(worker.pid, number)
    time.sleep(0.2)
    loaded += stream
    assert [batch.captions for batch in loaded] == [batch.captions for batch in whole]


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_vanishes_ends_the_run_in_one_line(tmp_path: Path, workers: int) -> None:
    opened = open_data(Settings(data_dir=write_numbered(tmp_path / "set", 12)), Base())
    stream = iter(batches(opened.data, Slices(batch_size=2), end=500, workers=workers))
    assert isinstance(next(stream), Batch)
    shutil.rmtree(tmp_path / "set")
    with pytest.raises(DataError, match=r"\d\.png was there .* cannot be read now") as caught:
        list(stream)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, PictureError)


def test_real_damage_found_in_training_is_replaced_and_named(tmp_path: Path) -> None:
    write_numbered(tmp_path, 6)
    raw = bytearray(encoded(noise()))
    raw[len(raw) // 2 : len(raw) // 2 + 40] = b"\0" * 40
    write(tmp_path, {"0003.png": bytes(raw)})
    opened = open_data(Settings(data_dir=tmp_path, max_dropped=0.2), Base())
    assert opened.allowance == 1
    loaded = batches(opened.data, Slices(batch_size=3), allowance=opened.allowance)
    for batch in loaded:
        for picture, caption in zip(batch.pictures, batch.captions, strict=True):
            assert caption == f"number {int(picture[8, 8, 0])}"
    assert list(loaded.replaced) == ["0003.png"]
    strict = open_data(Settings(data_dir=tmp_path), Base())
    with pytest.raises(DataError, match=r"0003\.png"):
        list(batches(strict.data, Slices(batch_size=3), allowance=strict.allowance))


def test_errors_survive_the_way_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(PictureError("reason", "detail")))  # noqa: S301
    assert (error.reason, error.detail, str(error)) == ("reason", "detail", "reason (detail)")


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"batch_size": 1, "rank": 1}, {"batch_size": 1, "accumulation": 0}]
)
def test_impossible_slices_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        Slices(**wrong)


@pytest.mark.parametrize("spared", [{2, 3, 5}, set(range(8))])
def test_pictures_that_are_spared_are_black_and_all_else_is_as_it_was(spared: set[int]) -> None:
    data, slices = Numbers(8), Slices(batch_size=4)
    for whole, part in zip(batches(data, slices), batches(data, slices, spared=spared), strict=True):
        assert (part.items, part.captions) == (whole.items, whole.captions)
        assert part.spared == tuple(row for row, item in enumerate(part.items) if item in spared)
        assert whole.spared == ()
        for row, item in enumerate(part.items):
            assert part.pictures[row].numel() == 0 or (part.pictures[row] == (0 if item in spared else item)).all()
