"""A benchmark that was stopped goes on where it was, takes up new arms, mixes nothing, and is shared by processes."""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import CLIPModel

from fewstep import lora
from fewstep.backbone import Backbone
from fewstep.benchmark import BenchmarkResult, benchmark, cells
from fewstep.config import BenchSettings
from fewstep.errors import InputError, Interrupted, StopAsked
from fewstep.locks import alone_in
from fewstep.reporting import Bar
from fewstep.schedule import NoiseSchedule
from tests.benchmark.fakes import Notes, make_adapter
from tests.benchmark.test_benchmark import settings

TIMES = ("time_total_s", "time_per_image_s", "speedup_vs_baseline")
pytestmark = pytest.mark.slow  # together they are: none of them should be what the last worker still has to do
SCRIPT = Path(__file__).parent / "one_of_several.py"


def small(folder: Path, **changes: object) -> BenchSettings:
    return settings(folder, baseline_steps=3, frechet_images=2, **changes)


def without_times(path: Path) -> str:
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    kept = [name for name in rows[0] if name not in TIMES]
    text = io.StringIO()
    writer = csv.DictWriter(text, kept, extrasaction="ignore")
    writer.writerows(rows)
    return text.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


@pytest.fixture(scope="module")
def places(shared_base: Backbone, tmp_path_factory: pytest.TempPathFactory) -> tuple[BenchmarkResult, int]:
    """Seven arms and the real pictures, three batches each, never stopped; and how many stops there might have been."""
    counting = Stumbling()
    result = benchmark(small(tmp_path_factory.mktemp("whole")), backbone=shared_base, reporter=counting)
    lora.detach(shared_base.unet)
    return result, counting.passed


@pytest.fixture(scope="module")
def whole(places: tuple[BenchmarkResult, int]) -> BenchmarkResult:
    return places[0]


@pytest.fixture
def finished(whole: BenchmarkResult, tmp_path: Path) -> Path:
    """A copy of it in `tmp_path`, to go on with or to damage."""
    shutil.copytree(whole.outdir, tmp_path / "out")
    return tmp_path / "out"


def stopping(base: Backbone, after: int, error: type[BaseException] = StopAsked) -> Backbone:
    """A base whose answer key raises when it is asked once more than `after` times."""
    own, asked = base.abilities, []
    assert own is not None

    def answers(pixels: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
        asked.append(len(prompts))
        if len(asked) > after:
            raise error
        return own.answers(pixels, prompts)

    class Stopping(type(own)):  # type: ignore[misc]
        def answers(self, pixels: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
            return answers(pixels, prompts)

    return replace(base, abilities=Stopping(own.clip, own.shipped))  # type: ignore[attr-defined]


@pytest.mark.parametrize("batches", [(0, 5, 9), (1, 2, 3), (11, 13, 22)])
def test_stopped_at_three_places_and_resumed_it_is_the_same_benchmark(
    base: Backbone, whole: BenchmarkResult, tmp_path: Path, batches: tuple[int, ...]
) -> None:
    done = 0
    for place in batches:
        with pytest.raises(Interrupted, match="go on with --resume"):
            benchmark(
                small(tmp_path, resume=True), backbone=stopping(base, place - done)
            )  # fmt: skip
        lora.detach(base.unet)
        done = place
        assert len(list((tmp_path / "out" / "cells").rglob("*.safetensors"))) == done
        assert not (tmp_path / "out" / "results.csv").exists()
    result = benchmark(small(tmp_path, resume=True), backbone=stopping(base, 24 - done))
    assert without_times(result.outdir / "results.csv") == without_times(whole.outdir / "results.csv")
    assert contents(result.outdir) == contents(whole.outdir)


def test_what_is_to_stop_at_once_is_not_told_as_a_stop_between_two_pieces(base: Backbone, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        benchmark(small(tmp_path), backbone=stopping(base, 1, KeyboardInterrupt))


class Stumbling:
    """A reporter that stops the run at one of the places where it may be stopped, wherever that is."""

    def __init__(self, place: int | None = None) -> None:
        self.passed, self._place = 0, place

    def say(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    @contextmanager
    def progress(self, name: str, total: int) -> Iterator[Bar]:
        stumbling = self

        class _Bar:
            def advance(self, n: int = 1, **values: float) -> None:
                stumbling.passed += 1
                if stumbling.passed == stumbling._place:
                    raise StopAsked

        yield _Bar()


def test_stopped_anywhere_it_goes_on(base: Backbone, places: tuple[BenchmarkResult, int], tmp_path: Path) -> None:
    """In three random places out of all, whether it draws, times, measures or writes; none is ever lost."""
    whole, count = places
    stops = sorted(Random(time.time_ns()).sample(range(1, count + 1), 3))
    for place in stops:
        # Later ones come sooner, for what was done is not done again: any of them is as good.
        with suppress(Interrupted):
            benchmark(small(tmp_path, resume=True), backbone=base, reporter=Stumbling(place))
        lora.detach(base.unet)
    result = benchmark(small(tmp_path, resume=True), backbone=base)
    assert without_times(result.outdir / "results.csv") == without_times(whole.outdir / "results.csv"), stops
    assert contents(result.outdir) == contents(whole.outdir), stops


@pytest.mark.parametrize("phase", ["timing student-2", "distances", "grids"])
def test_stopped_after_the_drawing_it_is_resumable_too(base: Backbone, tmp_path: Path, phase: str) -> None:
    class At(Stumbling):
        @contextmanager
        def progress(self, name: str, total: int) -> Iterator[Bar]:
            self._place = self.passed + 1 if name == phase else None
            with super().progress(name, total) as bar:
                yield bar

    with pytest.raises(Interrupted, match="go on with --resume"):
        benchmark(small(tmp_path), backbone=base, reporter=At())
    lora.detach(base.unet)
    assert not (tmp_path / "out" / "results.csv").exists()
    with pytest.raises(InputError, match="--resume"):
        benchmark(small(tmp_path), backbone=base)
    benchmark(small(tmp_path, resume=True), backbone=stopping(base, 0))


def test_a_finished_one_is_drawn_no_more_and_may_grow(
    base: Backbone, whole: BenchmarkResult, finished: Path, tmp_path: Path
) -> None:
    first = whole
    again = benchmark(small(tmp_path, resume=True), backbone=stopping(base, 0))
    assert again.rows == first.rows and again.outdir == finished
    more = small(tmp_path, resume=True, steps=(1, 2, 4))
    grown = benchmark(more, backbone=stopping(base, 6))  # student-4 and base-4
    assert {arm.arm.id for arm in grown.arms} == {arm.arm.id for arm in first.arms} | {"student-4", "base-4"}
    for name, arm in first.record.summary.items():
        assert grown.record.summary[name] == arm


def test_times_of_two_machines_are_not_set_side_by_side(
    base: Backbone, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timings() -> dict[str, str]:
        return {path.parent.name: path.read_text() for path in sorted(finished.glob("cells/*/timing.json"))}

    before = timings()
    benchmark(small(tmp_path, resume=True), backbone=base, reporter=(notes := Notes()))
    assert timings() == before, "on the same machine nothing is timed again"
    assert not [line for line in notes.warned if "were drawn with" in line]
    lora.detach(base.unet)
    monkeypatch.setattr("fewstep.timing._processor", lambda: "another processor")
    notes = Notes()
    found = benchmark(small(tmp_path, resume=True), backbone=base, reporter=notes)
    (told,) = [line for line in notes.warned if "were drawn with device" in line]
    assert "and another processor: arms differ by that" in told and told in found.record.warnings
    after = timings()
    assert after.keys() == before.keys() and all(after[arm] != before[arm] for arm in after)
    assert all("another processor" in text for text in after.values())


def test_a_cell_that_is_not_whole_is_drawn_again(
    base: Backbone, whole: BenchmarkResult, finished: Path, tmp_path: Path
) -> None:
    broken = finished / "cells" / "student-2" / "000001.safetensors"
    broken.write_bytes(broken.read_bytes()[:100])
    result = benchmark(small(tmp_path, resume=True), backbone=stopping(base, 1))
    assert without_times(result.outdir / "results.csv") == without_times(whole.outdir / "results.csv")


@pytest.mark.parametrize("moved", [False, True])
def test_pictures_that_are_not_there_are_drawn_again(
    base: Backbone, whole: BenchmarkResult, finished: Path, tmp_path: Path, moved: bool
) -> None:
    """Removed, or asked for in another folder than they were drawn to."""
    asked = small(tmp_path, resume=True)
    if moved:
        asked = asked.replace(baseline_outdir=tmp_path / "apart")
    else:
        (finished / "images" / "teacher-3" / "000" / "001.png").unlink()
    again = benchmark(asked, backbone=base)
    table = "results.csv"
    assert without_times(again.outdir / table) == without_times(whole.outdir / table)
    file = again.folders["teacher-3"] / "000" / "001.png"
    assert file.read_bytes() == (whole.folders["teacher-3"] / "000" / "001.png").read_bytes()
    assert file.is_relative_to(tmp_path / "apart") == moved


def test_what_was_stopped_is_not_thrown_away_unasked(base: Backbone, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        benchmark(small(tmp_path), backbone=stopping(base, 4))
    with pytest.raises(InputError, match=r"holds a benchmark that was stopped.*--resume"):
        benchmark(small(tmp_path), backbone=base)
    assert len(list((tmp_path / "out" / "cells").rglob("*.safetensors"))) == 4


def test_a_crash_keeps_what_was_drawn(base: Backbone, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        benchmark(small(tmp_path), backbone=stopping(base, 4, ZeroDivisionError))
    lora.detach(base.unet)
    benchmark(small(tmp_path, resume=True), backbone=stopping(base, 20))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 3}, "seed 3 came"),
        ({"batch_size": 2}, "batch_size 2 came"),
        ({"num_images": 1}, "num_images 1 came"),
        ({"clip_model_id": "none"}, "alignment_model None came"),
        ({"baseline_guidance": 3.0}, r"arm teacher-3 came with guidance 3\.0"),
    ],
)
def test_settings_are_not_mixed(
    base: Backbone, whole: BenchmarkResult, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    before = {path: path.read_bytes() for path in whole.outdir.iterdir() if path.is_file()}
    asked = small(tmp_path, resume=True, **change).replace(outdir=whole.outdir)
    with pytest.raises(InputError, match=words) as caught:
        benchmark(asked, backbone=base)
    assert "\n" not in str(caught.value) and "--outdir" in str(caught.value)
    assert {path: path.read_bytes() for path in whole.outdir.iterdir() if path.is_file()} == before


def test_of_long_lists_that_differ_the_first_difference_is_told() -> None:
    before = [f"prompt {number}" for number in range(2000)]
    differing = [*before[:7], "another", *before[8:]]
    assert cells._told(before, differing) == (
        "(a list of 2000, number 7 of them 'prompt 7')",
        "(a list of 2000, number 7 of them 'another')",
    )
    assert cells._told(before[:5], before[:3]) == ("(a list of 5, number 3 of them 'prompt 3')", "(a list of 3)")
    assert cells._told("a", 3) == ("'a'", "3")


def test_a_new_benchmark_takes_all_of_the_earlier_ones_arms_away(base: Backbone, tmp_path: Path) -> None:
    few = small(tmp_path, solver_steps=0, num_images=1)
    first = benchmark(few, backbone=base)
    lora.detach(base.unet)
    assert (first.outdir / "images" / "student-2").is_dir()
    (first.outdir / "images" / "mine").mkdir()
    again = benchmark(few.replace(steps=(1,), overwrite=True, baseline_outdir=tmp_path / "apart"), backbone=base)
    left = {folder.name for folder in (again.outdir / "images").iterdir()}
    assert left == {"student-1", "base-1", "real", "mine"}


def test_nor_is_what_the_base_is_taken_to_predict(base: Backbone, whole: BenchmarkResult, tmp_path: Path) -> None:
    other = replace(base, schedule=NoiseSchedule.from_config(base.scheduler_config, "v_prediction"))
    with pytest.raises(InputError, match="prediction_type 'v_prediction' came"):
        benchmark(small(tmp_path, resume=True).replace(outdir=whole.outdir), backbone=other)


@pytest.mark.parametrize("change", [{"scale": 0.02}, {"alpha": 2}])
def test_another_adapter_is_not_taken_for_the_first_one(
    base: Backbone, whole: BenchmarkResult, tmp_path: Path, change: dict[str, float]
) -> None:
    other = make_adapter(tmp_path / "other", base, **change)
    asked = small(tmp_path, resume=True, lora_path=other).replace(outdir=whole.outdir)
    with pytest.raises(InputError, match="arm student-1 came with weights"):
        benchmark(asked, backbone=base)


def test_nor_are_another_runs_pictures_in_a_shared_folder(base: Backbone, tmp_path: Path) -> None:
    apart, notes = tmp_path / "apart", Notes()
    asked = small(tmp_path, baseline_outdir=apart, steps=(1,), num_images=1, solver_steps=0)
    benchmark(asked, backbone=base)
    own = contents(apart)
    lora.detach(base.unet)
    benchmark(asked.replace(outdir=tmp_path / "second", seed=7), backbone=base, reporter=notes)
    assert contents(apart).keys() == own.keys() and contents(apart) != own
    assert [text for text in notes.said if "earlier" in text] == [
        f"{apart} holds an earlier benchmark, or pictures: tables and pictures are replaced"
    ]
    lora.detach(base.unet)
    benchmark(asked.replace(resume=True), backbone=base)
    assert contents(apart) == own


def test_nor_is_another_judge_of_the_same_name(base: Backbone, tmp_path: Path) -> None:
    clip = tmp_path / "clip"
    shutil.copytree(base.abilities.alignment_model(), clip)  # type: ignore[union-attr]
    asked = small(tmp_path, clip_model_id=str(clip), steps=(1,), compare_baseline=False)
    benchmark(asked, backbone=base)
    network = CLIPModel.from_pretrained(clip)
    torch.nn.init.normal_(network.visual_projection.weight)
    network.save_pretrained(clip)
    lora.detach(base.unet)
    with pytest.raises(InputError, match=r"^alignment_weights '[0-9a-f]{32}' came, the benchmark in"):
        benchmark(asked.replace(resume=True, steps=(1, 2)), backbone=base)


def test_a_folder_that_is_being_written_to_is_left_alone(base: Backbone, tmp_path: Path) -> None:
    with alone_in(tmp_path / "out"):
        before = sorted(path.name for path in (tmp_path / "out").rglob("*"))
        with pytest.raises(InputError, match=f"is being written to by process {os.getpid()} on "):
            benchmark(small(tmp_path), backbone=base)
        assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == before


def test_so_is_one_for_the_baseline(base: Backbone, tmp_path: Path) -> None:
    apart = tmp_path / "apart"
    with alone_in(apart), pytest.raises(InputError, match="apart' is being written to by process"):
        benchmark(small(tmp_path, baseline_outdir=apart), backbone=base)
    assert not (apart / "images").exists()


@pytest.mark.slow
def test_two_processes_share_the_work(shared_base: Backbone, whole: BenchmarkResult, tmp_path: Path) -> None:
    own: Any = shared_base.abilities
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(SCRIPT), str(tmp_path), str(own.clip), str(own.shipped)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ
        | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        | {"PYTHONPATH": os.pathsep.join(str(SCRIPT.parents[2] / part) for part in ("", "src"))},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert {file.name: file.read_text() for file in tmp_path.glob("rank-*.txt")} == {
        "rank-0.txt": "world size 2, 14 of 21 batches, 32 rows",
        "rank-1.txt": "world size 2, 7 of 21 batches, 0 rows",
    }
    assert without_times(tmp_path / "out" / "results.csv") == without_times(whole.outdir / "results.csv")
    assert contents(tmp_path / "out") == contents(whole.outdir)
