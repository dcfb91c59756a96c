"""Whole benchmarks on a tiny base: files, columns, controls, and what must be refused."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep import lora
from fewstep.arithmetic import flops
from fewstep.arms import Arm, base_arm, solver_arm, student_arm, teacher_arm
from fewstep.backbone import Backbone
from fewstep.benchmark import BenchmarkResult, benchmark, cost
from fewstep.benchmark.real import Ids
from fewstep.config import BenchSettings, load_toml
from fewstep.errors import CheckpointError, InputError
from fewstep.metrics.alignment import CLIPAlignment
from fewstep.metrics.frechet import frechet_distance
from fewstep.metrics.manifold import precision_recall
from fewstep.opening import read_prompts, warn_of_prompts
from fewstep.pictures import Conditioning, draw_latents, encode_prompts
from fewstep.records import BenchmarkRecord, Interval
from fewstep.report import picture_path
from fewstep.solver import Denoiser
from tests.benchmark.fakes import PROMPTS, Notes, make_adapter

CONTRACT = (
    "arm,steps,is_baseline,prompt_idx,avg_clip_align_x100,std_clip_align_x100,time_total_s,time_per_image_s,"
    "speedup_vs_baseline,delta_clip_vs_baseline"
)


ARMS = ["teacher-5", "dpmpp-3", "dpmpp-karras-3", "student-1", "student-2", "base-1", "base-2", "real"]


def prompts_file(folder: Path) -> Path:
    file = folder / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return file


def settings(folder: Path, **changes: object) -> BenchSettings:
    values: dict[str, object] = {
        "prompts_file": prompts_file(folder),
        "outdir": folder / "out",
        "steps": (1, 2),
        "num_images": 2,
        "batch_size": 3,
        "compare_baseline": True,
        "solver_steps": (3,),
        "frechet_images": 5,
        "device": "cpu",
        "batch_sizes": (1,),
        "timing_repeats": 1,
    }
    return BenchSettings(**values | changes)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=np.int16)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(shared_base: Backbone, tmp_path_factory: pytest.TempPathFactory) -> tuple[BenchmarkResult, Notes]:
    notes = Notes()
    folder = tmp_path_factory.mktemp("run")
    result = benchmark(settings(folder, batch_sizes=(1, 2), timing_repeats=5), reporter=notes, backbone=shared_base)
    lora.detach(shared_base.unet)
    return result, notes


def test_leaves_the_files_of_the_contract_and_no_others(run: tuple[BenchmarkResult, Notes]) -> None:
    out = run[0].outdir
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [
            "settings.toml",
            "cells",
            "images",
            "grids",
            "results.csv",
            "timing.csv",
            "clipscore_results.json",
            "report.html",
        ]
    )
    assert sorted(path.name for path in (out / "images").iterdir()) == sorted(ARMS)
    pictures = sorted(str(path.relative_to(out / "images")) for path in (out / "images").rglob("*.png"))
    assert pictures == sorted(
        f"{arm}/{prompt:03d}/{n:03d}.png" for arm in ARMS for prompt in range(4) for n in range(2)
    )
    grids = {path.name for path in (out / "grids").iterdir()}
    assert grids == {f"{prompt:03d}_{name}.png" for prompt in range(4) for name in [*ARMS, "compare"]}


def test_results_csv_starts_with_the_columns_of_the_contract(run: tuple[BenchmarkResult, Notes]) -> None:
    path = run[0].outdir / "results.csv"
    assert path.read_text().splitlines()[0].startswith(CONTRACT + ",")
    rows = table(path)
    assert len(rows) == len(ARMS) * 4
    teacher = [row for row in rows if row["is_baseline"] == "True"]
    assert [row["prompt_idx"] for row in teacher] == ["0", "1", "2", "3"]
    assert all(float(row["delta_clip_vs_baseline"]) == 0 and float(row["speedup_vs_baseline"]) == 1 for row in teacher)
    for row in rows:
        theirs = next(one for one in teacher if one["prompt_idx"] == row["prompt_idx"])
        difference = float(row["avg_clip_align_x100"]) - float(theirs["avg_clip_align_x100"])
        assert float(row["delta_clip_vs_baseline"]) == pytest.approx(difference, abs=1e-3)
        assert row["arm"] == "real" or float(row["time_total_s"]) > 0
    of_arm = {row["time_per_image_s"] for row in rows if row["arm"] == "student-1"}
    timed = next(row for row in table(run[0].outdir / "timing.csv") if row["arm"] == "student-1")
    assert of_arm == {timed["time_per_image_s"]} and timed["batch_size"] == "1"


def test_the_bases_own_judge_is_named_by_its_base(run: tuple[BenchmarkResult, Notes], shared_base: Backbone) -> None:
    """Not by the folder that it lies in: two checkouts' benchmarks are to be set side by side."""
    clip = CLIPAlignment(shared_base.abilities.alignment_model())  # type: ignore[union-attr]
    assert run[0].record.alignment_model == f"the base's own alignment model ({clip.fingerprint[:8]})"


def test_the_untrained_solvers_are_guided_as_the_teacher_is(run: tuple[BenchmarkResult, Notes]) -> None:
    arms = {arm.arm.id: arm.arm for arm in run[0].arms}
    teacher, plain, karras = (arms[name] for name in ARMS[:3])
    assert plain.guidance == karras.guidance == teacher.guidance > 1
    assert plain.timesteps == (999, 666, 332)
    assert karras.timesteps[0] == 999 and karras.timesteps[-1] == 0
    alone = [row for row in table(run[0].outdir / "results.csv") if row["arm"] == "dpmpp-3"]
    assert {row["sampler"] for row in alone} == {"dpmpp"} and {row["adapter"] for row in alone} == {"False"}


def test_two_steps_of_the_same_shape_warm_up_for_any_number(
    shared_base: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[tuple[str, int, int]] = []

    def drawn(painter: Backbone, arm: Arm, conditioning: Conditioning, ids: Ids, **more: Any) -> torch.Tensor:
        timed.append((arm.id, arm.steps, len(ids)))
        return draw_latents(painter, arm, conditioning, ids, **more)

    monkeypatch.setattr(cost, "draw_latents", drawn)
    asked = settings(tmp_path, steps=(1,), batch_sizes=(2,), timing_repeats=2, solver_steps=0, frechet_images=0)
    benchmark(asked, backbone=shared_base)
    lora.detach(shared_base.unet)
    assert timed == [
        *[("teacher-5", 2, 2), ("teacher-5", 5, 2), ("teacher-5", 5, 2)],
        *[("student-1", 1, 2)] * 3,
        *[("base-1", 1, 2)] * 3,
    ]


def test_timing_has_a_row_an_arm_and_batch_size(run: tuple[BenchmarkResult, Notes]) -> None:
    rows = table(run[0].outdir / "timing.csv")
    assert [(row["arm"], row["batch_size"]) for row in rows][:4] == [
        ("teacher-5", "1"), ("teacher-5", "2"), ("dpmpp-3", "1"), ("dpmpp-3", "2")
    ]  # fmt: skip
    for row in rows:
        assert row["repeats"] == "5"
        assert float(row["unet_forward_median_s"]) > 0 and float(row["decode_median_s"]) > 0
        assert float(row["unet_total_s"]) == pytest.approx(
            float(row["unet_forward_median_s"]) * int(row["unet_calls"]), rel=1e-4
        )
    teacher = rows[0]
    assert (teacher["unet_calls"], teacher["network_evaluations_per_image"]) == ("5", "10")


@pytest.mark.parametrize("name", ["teacher-5", "dpmpp-3", "student-1", "student-2", "base-2"])
def test_operations_are_those_of_a_whole_picture(run: tuple[BenchmarkResult, Notes], base: Backbone, name: str) -> None:
    arm = next(one.arm for one in run[0].arms if one.arm.id == name)
    lora.load_adapter(base, lora.locate(base.abilities.adapter()))  # type: ignore[union-attr]

    def draw(pictures: int) -> None:
        """With the negative prompt read once, however many they are."""
        uncond = base.embed([""]) if arm.guided else torch.zeros(1)
        texts, ids = PROMPTS[:pictures], [(number, 0) for number in range(pictures)]
        text = Conditioning(tuple(texts), base.embed(texts), uncond)
        base.decode(draw_latents(base, arm, text, ids, seed=0, resolution=base.resolution))

    one, two = next(found for found in run[0].arms if found.arm.id == name).timings
    assert one.flops == flops(lambda: draw(1)) and two.flops == flops(lambda: draw(2))


def test_the_record_is_the_json_and_agrees_with_the_table(run: tuple[BenchmarkResult, Notes]) -> None:
    result = run[0]
    text = (result.outdir / "clipscore_results.json").read_text()
    assert BenchmarkRecord.from_json(text) == result.record
    plain = json.loads(text)
    for key in ("schema_version", "settings", "versions", "scores", "floor", "summary"):
        assert key in plain
    assert len(result.record.scores) == len(ARMS) * 4 * 2
    student = result.record.summary["student-2"]
    own = [score for score in result.record.scores if score.arm == "student-2"]
    mean = np.mean([score.clip_align_x100 for score in own])
    assert student.alignment is not None and student.alignment.value == pytest.approx(mean)
    assert student.floor is not None and student.floor.low is not None
    assert student.floor.value == pytest.approx(np.mean([score.clip_floor_x100 for score in own]))
    assert student.control == "base-2"
    assert student.delta_all_right is not None and student.gain_all_right is not None
    assert set(student.attributes) == {"red", "green", "intact"}
    assert student.frechet is not None and (student.frechet.pictures, student.frechet.references) == (8, 20)
    assert student.frechet.difference is not None and student.frechet.difference.standard_error is not None
    assert set(student.attributes) == set(student.delta_attributes)
    names = {"kid", "cmmd", "precision", "recall"}
    assert set(student.distances) == names | {f"{name}_teacher" for name in (*names, "frechet")}
    assert all(figure.standard_error is not None for figure in student.distances.values())
    assert student.diversity is not None and student.faithfulness is not None and student.faithfulness.value > 0
    assert student.saturation is not None and len(student.saturation) == 4
    assert student.mean_saturation is not None and student.mean_saturation.low is not None
    assert student.mean_saturation.value == pytest.approx(sum(student.saturation) / 4)
    teacher = result.record.summary["teacher-5"]
    assert set(teacher.distances) == {"kid", "cmmd", "precision", "recall"} and teacher.diversity is None
    assert teacher.saturation == pytest.approx((1.0,) * 4)
    assert teacher.retention_corrected is not None and teacher.retention_corrected.value == pytest.approx(1)


def test_every_figure_is_that_of_its_own_pictures_against_the_right_others(
    run: tuple[BenchmarkResult, Notes], base: Backbone
) -> None:
    """From the scores and the pictures that were saved, by hand: which arm is taken from which, and which way round."""
    record, folders = run[0].record, run[0].folders
    student, ids = record.summary["student-2"], [(prompt, n) for prompt in range(4) for n in range(2)]

    def scores(arm: str, name: str) -> np.ndarray:
        return np.array([getattr(score, name) for score in record.scores if score.arm == arm])

    def right(arm: str, name: str) -> np.ndarray:
        return np.array([score.right[name] for score in record.scores if score.arm == arm and score.right is not None])

    def value(interval: Interval | None) -> float:
        assert interval is not None
        return interval.value

    teacher, control = "teacher-5", "base-2"
    score, floor = scores("student-2", "clip_align_x100"), scores("student-2", "clip_floor_x100")
    its_score, its_floor = scores(teacher, "clip_align_x100"), scores(teacher, "clip_floor_x100")
    for figure, other in ((student.delta_alignment, teacher), (student.gain_alignment, control)):
        difference = (score - scores(other, "clip_align_x100")).mean()
        assert value(figure) == pytest.approx(difference, abs=1e-4) and abs(difference) > 1e-3
    honest = (score - floor).mean() / (its_score - its_floor).mean()
    assert value(student.retention_corrected) == pytest.approx(honest, rel=1e-4) and abs(honest - 1) > 0.01
    assert value(student.retention_raw) == pytest.approx(score.mean() / its_score.mean(), rel=1e-4)
    for figure, other in ((student.delta_all_right, teacher), (student.gain_all_right, control)):
        difference = right("student-2", "all_right").mean() - right(other, "all_right").mean()
        assert value(figure) == difference and difference != 0
    assert {name: value(one) for name, one in student.over_solvers.items()} == {
        name: right("student-2", "all_right").mean() - right(name, "all_right").mean()
        for name in ("dpmpp-3", "dpmpp-karras-3")
    }
    for name in ("red", "green"):
        assert value(student.attributes[name]) == right("student-2", name).mean()
        assert value(student.delta_attributes[name]) == right("student-2", name).mean() - right(teacher, name).mean()

    def features(arm: str) -> torch.Tensor:
        shown = np.stack([pixels(picture_path(folders[arm], *one)) for one in ids])
        return base.abilities.features()(torch.from_numpy(shown).permute(0, 3, 1, 2).float() / 255)  # type: ignore[union-attr]

    drawn, theirs = features("student-2"), features(teacher)
    assert student.frechet is not None and record.summary[teacher].frechet is not None
    difference = student.frechet.through_vae.value - record.summary[teacher].frechet.through_vae.value
    assert value(student.frechet.difference) == pytest.approx(difference)
    references = torch.from_numpy(base.abilities.reference_pictures(PROMPTS, 5, 42)).permute(0, 3, 1, 2)  # type: ignore[union-attr]
    raw = base.abilities.features()(references.float() / 255)  # type: ignore[union-attr]
    assert student.frechet.raw.value == pytest.approx(frechet_distance(drawn, raw), rel=1e-4)
    to_teacher = {name: value(student.distances[f"{name}_teacher"]) for name in ("frechet", "precision", "recall")}
    assert to_teacher["frechet"] == pytest.approx(frechet_distance(drawn, theirs), rel=1e-3, abs=1e-6)
    assert (to_teacher["precision"], to_teacher["recall"]) == precision_recall(drawn, theirs)
    assert value(student.faithfulness) == pytest.approx((drawn - theirs).norm(dim=1).mean().item(), rel=1e-3)

    def among(found: torch.Tensor) -> float:
        return (found[0::2] - found[1::2]).norm(dim=1).mean().item()

    assert value(student.diversity) == pytest.approx(among(drawn) / among(theirs), rel=1e-3)
    # The latents are drawn once more.
    text = Conditioning(tuple(PROMPTS), base.embed(PROMPTS), base.embed([""]))
    lora.load_adapter(base, lora.locate(base.abilities.adapter()))  # type: ignore[union-attr]

    def spread(arm: str) -> torch.Tensor:
        latents = draw_latents(base, record.summary[arm].arm, text, ids, seed=42, resolution=64)
        return latents.std(dim=(0, 2, 3), correction=0)

    assert student.saturation == pytest.approx((spread("student-2") / spread(teacher)).tolist(), rel=1e-4)


def test_one_prompt_has_no_kernel_distances(base: Backbone, tmp_path: Path) -> None:
    """These are means over pairs of prompts; the other distances are there."""
    alone = tmp_path / "prompt.txt"
    alone.write_text(PROMPTS[0] + "\n")
    asked = settings(tmp_path, prompts_file=alone, steps=(1,), num_images=4, solver_steps=0)
    result = benchmark(asked, backbone=base)
    student, real = result.record.summary["student-1"], result.record.real
    names = {"precision", "recall"}
    assert set(student.distances) == names | {f"{name}_teacher" for name in (*names, "frechet")}
    assert real is not None and real.distances == {}
    files = [result.outdir / name for name in ("clipscore_results.json", "results.csv")]
    assert not any("nan" in re.findall(r"\w+", file.read_text().lower()) for file in files)


def test_real_pictures_are_the_ceiling(run: tuple[BenchmarkResult, Notes], base: Backbone) -> None:
    result = run[0]
    real = result.record.real
    assert real is not None and real is result.record.summary["real"] and real.pictures == 8
    # As they are: the answer key's and the alignment model's word on the very pictures that were saved.
    saved = [pixels(picture_path(result.folders["real"], prompt, n)) for prompt in range(4) for n in range(2)]
    drawn = base.abilities.reference_pictures(PROMPTS, 2, 43)  # type: ignore[union-attr]
    assert np.array_equal(np.stack(saved), drawn)
    shown = torch.from_numpy(drawn).permute(0, 3, 1, 2)
    right = base.abilities.answers(shown / 255, [prompt for prompt in PROMPTS for _ in range(2)])["all_right"]  # type: ignore[union-attr]
    assert real.all_right is not None and real.all_right.value == pytest.approx(right.double().mean().item())
    clip = CLIPAlignment(base.abilities.alignment_model())  # type: ignore[union-attr]
    score = 100 * clip.score(shown, [prompt for prompt in PROMPTS for _ in range(2)]).clamp_min(0)
    assert real.alignment is not None and real.alignment.value == pytest.approx(score.mean().item(), abs=1e-4)
    # Real against real at an arm's N, far below what random networks draw.
    assert real.frechet is not None and (real.frechet.pictures, real.frechet.references) == (8, 20)
    for arm in result.arms:
        if arm is not real:
            assert arm.frechet is not None and real.frechet.through_vae.value < arm.frechet.through_vae.value
            assert real.frechet.raw.value < arm.frechet.raw.value
    assert set(real.distances) == {"kid", "cmmd"} and real.faithfulness is None and real.diversity is not None
    # Nothing drew them, and nothing is timed.
    assert real.timings == () and real.time_per_image_s is None and real.speedup_vs_baseline is None
    rows = [row for row in table(result.outdir / "results.csv") if row["arm"] == "real"]
    assert len(rows) == 4
    for row in rows:
        assert (row["steps"], row["sampler"], row["adapter"]) == ("0", "none", "False")
        assert row["time_total_s"] == row["time_per_image_s"] == row["speedup_vs_baseline"] == ""
        assert row["avg_clip_align_x100"] != "" and row["all_right_share"] != ""
    assert "real" not in {row["arm"] for row in table(result.outdir / "timing.csv")}


def test_what_is_said(run: tuple[BenchmarkResult, Notes]) -> None:
    result, notes = run
    assert notes.said[0].startswith("base: ")
    assert any("report.html" in line for line in notes.said)
    assert all(done == total for done, total in notes.advanced.values())
    assert notes.warned == []
    assert result.verdict and all(line in notes.said for line in result.verdict)


def test_settings_can_be_passed_back(run: tuple[BenchmarkResult, Notes]) -> None:
    saved = BenchSettings(**load_toml(run[0].outdir / "settings.toml"))
    assert saved.baseline_guidance == 7.5 and saved.resolution == 64


def test_pictures_depend_neither_on_the_batch_nor_on_the_other_arms(
    run: tuple[BenchmarkResult, Notes], base: Backbone, tmp_path: Path
) -> None:
    alone = benchmark(
        settings(tmp_path, batch_size=1, steps=(2,), compare_baseline=False, clip_model_id="none", frechet_images=0),
        backbone=base,
    )
    for prompt in range(4):
        for picture in range(2):
            mine = pixels(picture_path(alone.folders["student-2"], prompt, picture))
            theirs = pixels(picture_path(run[0].folders["student-2"], prompt, picture))
            assert np.abs(mine - theirs).max() <= 1
    # Nothing to compare with, no alignment asked for: empty cells, no made-up figures.
    row = table(alone.outdir / "results.csv")[0]
    assert row["avg_clip_align_x100"] == row["delta_clip_vs_baseline"] == row["speedup_vs_baseline"] == ""
    assert alone.record.floor is None and alone.record.alignment_model is None


def test_the_adapter_makes_the_difference(run: tuple[BenchmarkResult, Notes]) -> None:
    folders = run[0].folders
    student, control = (pixels(picture_path(folders[arm], 0, 0)) for arm in ("student-2", "base-2"))
    assert np.abs(student - control).max() > 1


def test_one_picture_of_one_prompt_has_no_spread_and_no_floor(base: Backbone, tmp_path: Path) -> None:
    result = benchmark(
        settings(tmp_path, prompts_file=None, prompt="a house", num_images=1, steps=(1,)),
        backbone=base,
    )
    row = table(result.outdir / "results.csv")[0]
    assert row["std_clip_align_x100"] == "" and row["clip_floor_x100"] == "" and row["avg_clip_align_x100"] != ""
    summary = result.record.summary["student-1"]
    assert summary.alignment is not None and summary.alignment.low is None
    assert summary.retention_corrected is None and result.record.floor is None
    assert summary.retention_raw is None, "a ratio of raw cosines never stands alone"


def test_the_base_brings_prompts_where_none_are_given(base: Backbone, tmp_path: Path) -> None:
    result = benchmark(
        settings(tmp_path, prompts_file=None, num_prompts=2, num_images=1, steps=(1,), compare_baseline=False),
        backbone=base,
    )
    assert result.record.prompts == ("caption 42-0", "caption 42-1")


def test_a_base_without_abilities_is_measured_by_alignment_alone(base: Backbone, tmp_path: Path) -> None:
    bare = replace(base, abilities=None)
    adapter = make_adapter(tmp_path / "adapter", base)
    notes = Notes()
    result = benchmark(
        settings(
            tmp_path, lora_path=adapter, clip_model_id=str(base.abilities.alignment_model()), steps=(1,)  # type: ignore[union-attr]
        ),
        reporter=notes,
        backbone=bare,
    )  # fmt: skip
    summary = result.record.summary["student-1"]
    assert summary.all_right is None and summary.frechet is None and summary.alignment is not None
    assert any("Fréchet" in line for line in notes.warned)
    assert "alignment" in result.verdict[0]


def test_the_baseline_may_lie_elsewhere(base: Backbone, tmp_path: Path) -> None:
    result = benchmark(
        settings(tmp_path, baseline_outdir=tmp_path / "apart", steps=(1,), num_images=1, clip_model_id="none"),
        backbone=base,
    )
    assert (tmp_path / "apart" / "images" / "teacher-5" / "000" / "000.png").is_file()
    assert not (result.outdir / "images" / "teacher-5").exists()


def test_own_arms_can_be_measured_without_an_adapter(base: Backbone, tmp_path: Path) -> None:
    result = benchmark(
        settings(tmp_path, clip_model_id="none", num_images=1),
        backbone=base,
        arms=[teacher_arm(3, 7.5), base_arm(2)],
    )
    assert [arm.arm.id for arm in result.arms] == ["teacher-3", "base-2", "real"] and result.record.adapter is None
    assert result.verdict == ["No student was drawn: there is nothing to compare."]


def test_the_solver_can_be_drawn_without_karras_noise_levels(base: Backbone, tmp_path: Path) -> None:
    asked = settings(tmp_path, steps=(1,), num_images=1, clip_model_id="none", frechet_images=0, solver_karras=False)
    drawn = [arm.arm.id for arm in benchmark(asked, backbone=base).arms]
    assert drawn == ["teacher-5", "dpmpp-3", "student-1", "base-1"]


def test_an_earlier_run_is_replaced_where_that_is_asked(base: Backbone, tmp_path: Path) -> None:
    plain = settings(tmp_path, steps=(1,), num_images=1, compare_baseline=False, clip_model_id="none", frechet_images=0)
    benchmark(plain.replace(num_images=2), backbone=base)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"a benchmark that was finished; .*; pass --resume, --overwrite or another"):
        benchmark(plain, backbone=base)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    notes = Notes()
    benchmark(plain.replace(overwrite=True), reporter=notes, backbone=base)
    assert any("earlier benchmark" in line for line in notes.said)
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 4
    assert "overwrite = false" in (tmp_path / "out" / "settings.toml").read_text()


def test_to_go_on_and_to_begin_anew_is_not_to_be_had_together() -> None:
    with pytest.raises(InputError, match="resume and overwrite came together"):
        BenchSettings(resume=True, overwrite=True)


def test_a_step_count_that_is_not_promised_is_named(base: Backbone, tmp_path: Path) -> None:
    notes = Notes()
    benchmark(
        settings(tmp_path, steps=(2, 3), num_images=1, compare_baseline=False, clip_model_id="none"),
        reporter=notes,
        backbone=base,
    )
    assert any("not trained for 3 steps; it promises 1 2 4" in line for line in notes.warned)


# ---------------------------------------------------------------------------------------------------------- refusals


def test_an_adapter_that_changes_nothing_is_an_error_and_leaves_nothing(base: Backbone, tmp_path: Path) -> None:
    zero = make_adapter(tmp_path / "zero", base, scale=0)
    with pytest.raises(CheckpointError, match="changes nothing"):
        benchmark(settings(tmp_path, lora_path=zero), backbone=base)
    assert not (tmp_path / "out").exists()


def test_an_attached_adapter_that_changes_nothing_is_an_error(base: Backbone, tmp_path: Path) -> None:
    lora.attach(base.unet, 2, 16, ["to_q"], seed=1)
    with pytest.raises(CheckpointError, match="changes nothing"):
        benchmark(settings(tmp_path), backbone=base)


def test_nor_does_rounding_count_as_a_change(base: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision on a GPU the student runs under autocast, the teacher does not, and the two round otherwise."""
    honest = Backbone.denoiser

    def denoiser(self: Backbone, adapter: bool = True) -> Denoiser:
        run = honest(self, adapter)
        return run if adapter else lambda x_t, t, cond, /: 1.001 * run(x_t, t, cond)

    monkeypatch.setattr(Backbone, "denoiser", denoiser)
    lora.attach(base.unet, 2, 16, ["to_q"], seed=1)
    with pytest.raises(CheckpointError, match="changes nothing"):
        benchmark(settings(tmp_path), backbone=base)


def test_clip_weights_that_are_not_at_hand(base: Backbone, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"hf download nobody/no-clip.*--clip_model_id none") as caught:
        benchmark(settings(tmp_path, clip_model_id="nobody/no-clip"), backbone=base)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_no_adapter_at_all(base: Backbone, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--lora_path"):
        benchmark(settings(tmp_path), backbone=replace(base, abilities=None))
    assert not (tmp_path / "out").exists()


def test_no_prompt_at_all(base: Backbone, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    with pytest.raises(InputError, match="--prompts_file"):
        benchmark(
            settings(tmp_path, prompts_file=None, lora_path=adapter), backbone=replace(base, abilities=None)
        )  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"\n  \n", b"\xff\xfe\xfa"])
def test_prompt_files_that_hold_nothing(base: Backbone, tmp_path: Path, content: bytes) -> None:
    plain = settings(tmp_path)
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"prompts\.txt"):
        benchmark(plain, backbone=base)
    assert not (tmp_path / "out").exists()


def test_a_line_end_in_a_prompt_stays_out_of_tables() -> None:
    assert read_prompts(BenchSettings(prompt="a red house\r\nat night\r")) == ["a red house at night"]


def test_repeated_and_overlong_prompts_are_named(base: Backbone, tmp_path: Path) -> None:
    file = tmp_path / "odd.txt"
    file.write_text("a house\n\na house\n" + "very " * 75 + "long tail of words\n")
    notes = Notes()
    benchmark(
        settings(
            tmp_path, prompts_file=file, steps=(1,), num_images=1, compare_baseline=False, clip_model_id="none"
        ),
        reporter=notes,
        backbone=base,
    )  # fmt: skip
    assert any("more than once" in line for line in notes.warned)
    (cut,) = [line for line in notes.warned if line.startswith("prompt 2 is")]
    assert "4 tokens longer than the 77" in cut and "what is cut: 'long tail of words'" in cut
    file.write_text("\n".join(f"{number} " + "very " * 80 for number in range(3)))
    many = Notes()
    warn_of_prompts(file.read_text().splitlines(), base, many)
    (cut,) = [line for line in many.warned if "tokens longer" in line]
    assert cut.startswith("prompt 0 is") and ", as 2 others are too long; what is cut" in cut
    unwanted = Notes()
    warn_of_prompts(["a red house"], base, unwanted, "unheard " * 80)
    assert [line.split(" is ")[0] for line in unwanted.warned if "tokens longer" in line] == ["the negative prompt"]
    assert any(line.endswith("what they ask: unheard") for line in unwanted.warned)


@pytest.mark.parametrize("sampler", ["ddim", "lcm", "tcd", "dpmpp", "dpmpp-karras"])
def test_the_recorded_timesteps_are_the_visited_ones(base: Backbone, sampler: str) -> None:
    """And the evaluations that are reported are those that the network was asked for."""
    count, alpha_bar = 1000, base.schedule.alphas_cumprod.tolist()
    arm = {
        "ddim": teacher_arm(5, 3.0, count),
        "dpmpp": solver_arm(5, 3.0, alpha_bar, karras=False),
        "dpmpp-karras": solver_arm(5, 3.0, alpha_bar, karras=True),
    }.get(sampler) or student_arm(4, sampler=sampler, eta=0.3 if sampler == "tcd" else 0.0)  # type: ignore[arg-type]
    visited: list[int] = []
    evaluations = 0

    def asked(x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        nonlocal evaluations
        evaluations += len(x_t)
        visited.append(int(t[0]))
        assert t.unique().numel() == 1
        return x_t

    draw_latents(base, arm, encode_prompts(base, ["a house"]), [(0, 0)], seed=1, denoiser=asked)
    assert tuple(dict.fromkeys(visited)) == arm.timesteps
    assert evaluations == arm.evaluations


def test_two_arms_that_are_the_same_model_do_not_differ(base: Backbone, tmp_path: Path) -> None:
    teacher = teacher_arm(2, 1.0)
    twin = replace(teacher, id="twin", is_baseline=False)
    result = benchmark(
        settings(tmp_path, num_images=1), backbone=base, arms=[teacher, twin]
    )  # fmt: skip
    found = result.record.summary["twin"]
    assert found.delta_alignment is not None and found.delta_alignment.value == 0
    assert found.frechet is not None and found.frechet.difference is not None and found.frechet.difference.value == 0


def test_student_arm_is_the_schedulers_grid() -> None:
    assert student_arm(4).timesteps == (999, 759, 499, 259)
    assert teacher_arm(4, 7.5).timesteps == (999, 749, 499, 249)
