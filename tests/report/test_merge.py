"""Several benchmarks on one page: whose teacher a sentence quotes, what sets runs apart, and that no arm is lost."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from fewstep.arms import solver_arm, teacher_arm
from fewstep.config import ReportSettings
from fewstep.errors import InputError
from fewstep.records import BenchmarkRecord, PictureScore
from fewstep.redraw import report
from fewstep.report import RECORD_FILE, page, side_by_side, verdict
from tests.report.fakes import interval, pictures, record, summary, with_real, without_answers


def apart(**settings: object) -> BenchmarkRecord:
    """A benchmark whose settings draw other pictures: better than the one of `record`, against a better teacher."""
    found = record()
    arms = {
        "teacher-50": replace(found.summary["teacher-50"], all_right=interval(0.9, 0.05), time_per_image_s=1.0),
        "student-4": replace(
            found.summary["student-4"], all_right=interval(0.92, 0.05), delta_all_right=interval(0.02, 0.01),
            speedup_vs_baseline=10.0, saturation=(1.2, 1.0, 1.0, 1.0),
        ),
        "base-4": found.summary["base-4"],
    }  # fmt: skip
    return replace(found, summary=arms, settings={**found.settings, **settings})


def first_without_a_good_student() -> BenchmarkRecord:
    """A benchmark whose own student is shown to be worse, so that the verdict is about the other run's."""
    found = record()
    teacher = replace(found.summary["teacher-50"], all_right=interval(0.99, 0.01))
    student = replace(found.summary["student-4"], delta_all_right=interval(-0.4, 0.05))
    return replace(found, summary={**found.summary, "teacher-50": teacher, "student-4": student})


def test_a_sentence_about_an_arm_quotes_the_teacher_of_its_own_run() -> None:
    both, _ = side_by_side({"a": first_without_a_good_student(), "b": apart(seed=7)})
    assert both.run_of("b-student-4").baseline is not None
    assert both.run_of("b-student-4").baseline.arm.id == "b-teacher-50"  # type: ignore[union-attr]
    assert both.run_of("student-4").baseline == both.baseline == both.summary["teacher-50"]
    told = verdict(both)
    assert told[0] == (
        "b-student-4 gets everything in the caption right in 92.0 % (87.0 to 97.0) of its pictures, b-teacher-50 in "
        "90.0 % (85.0 to 95.0): +2.0 (+1.0 to +3.0) points, a gain beyond the interval."
    )
    assert "10.0 times as fast as b-teacher-50 with 1.00 s (4 network evaluations instead of 100)" in told[1]
    assert "against b-teacher-50's (worse; N = 4)" in told[-2]
    assert "+20.0 % against b-teacher-50's in the worst channel" in told[-1]
    assert not any(re.search(r"(?<!b-)teacher-50|the teacher", sentence) for sentence in told)


def test_by_alignment_too_it_is_its_own_teacher() -> None:
    first = without_answers(first_without_a_good_student())
    worse = replace(first.summary["student-4"], delta_alignment=interval(-9, 1))
    first = replace(first, summary={**first.summary, "student-4": worse})
    other = without_answers(apart(seed=7))
    better = replace(other.summary["student-4"], delta_alignment=interval(1, 0.5))
    both, _ = side_by_side({"a": first, "b": replace(other, summary={**other.summary, "student-4": better})})
    told = verdict(both)[0]
    assert "and b-teacher-50 scores 33.00: +1.00" in told and "of b-teacher-50's lift over its floor it keeps" in told


def test_a_teacher_that_both_share_is_quoted_as_the_students_own_run_timed_it() -> None:
    other = apart()
    teacher = replace(record().summary["teacher-50"], time_per_image_s=1.0)
    machine = {**other.machine, "device": "Another"}
    other = replace(other, summary={**other.summary, "teacher-50": teacher}, machine=machine)
    both, _ = side_by_side({"a": first_without_a_good_student(), "b": other})
    assert list(both.summary) == ["teacher-50", "student-4", "base-4", "b-student-4"]
    told = verdict(both)
    assert "100 ms a picture at batch 1 on Another, 10.0 times as fast as teacher-50 with 1.00 s" in told[1]
    assert "teacher-50 in 56.0 %" in told[0] and "against the teacher's (worse" in told[-2]
    assert "on A CPU of 2 cores, those of b on Another" in page(both, {})


def test_a_solver_of_another_machine_is_no_rival() -> None:
    alpha_bar = [1 - (t + 1) / 1001 for t in range(1000)]
    solver = summary(solver_arm(8, 7.5, alpha_bar, karras=False), 0.05, 0.97, 33.0)
    first = first_without_a_good_student()
    first = replace(first, summary={**first.summary, "dpmpp-8": solver})
    both, _ = side_by_side({"a": first, "b": apart(seed=7)})
    assert "dpmpp-8 needs no training" in verdict(both)[2]
    elsewhere = replace(apart(seed=7), machine={**first.machine, "device": "Another"})
    both, _ = side_by_side({"a": first, "b": elsewhere})
    assert not any("dpmpp-8" in sentence for sentence in verdict(both))


def test_the_page_sets_the_student_against_its_own_teacher(tmp_path: Path) -> None:
    def score(arm: str, prompt: int, right: bool) -> PictureScore:
        return PictureScore(
            arm=arm, prompt_idx=prompt, picture_idx=0, clip_align_x100=30, clip_floor_x100=20, preference=None,
            right={"all_right": right},
        )  # fmt: skip

    # The first run's teacher has prompt 0 right alone, the second one's prompt 1; no student has anything right.
    first = replace(
        first_without_a_good_student(), scores=(score("teacher-50", 0, True), score("teacher-50", 1, False))
    )
    own = [score("teacher-50", 0, False), score("teacher-50", 1, True)]
    own += [score("student-4", prompt, False) for prompt in (0, 1)]
    both, _ = side_by_side({"a": first, "b": replace(apart(seed=7), scores=tuple(own))})
    text = page(both, pictures(tmp_path, both))
    assert re.findall(r'data-number="(\d)" data-loss="([^"]+)"', text) == [("0", "0.0000"), ("1", "1.0000")]
    assert "the figure is b-teacher-50&#39;s" in text or "the figure is b-teacher-50's" in text
    assert "taken against: teacher-50 for those of a, b-teacher-50 for those of b." in text
    assert "from the same noise in every arm of a run." in text


def test_a_record_of_several_reads_back_and_that_of_one_is_as_before() -> None:
    both, _ = side_by_side({"a": record(), "b": apart(seed=7)})
    assert BenchmarkRecord.from_json(both.to_json()) == both
    assert side_by_side({"a": record()})[0] == record()
    assert '"runs"' not in record().to_json()


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("seed", 7, "b drew with seed 7, a with 42: its pictures start from other noise"),
        (
            "prediction_type",
            "v_prediction",
            "b took its base to predict v_prediction, a epsilon: all its arms are shown",
        ),
        ("num_images", 1, "b drew 1 pictures a prompt, a 2: Fréchet distances differ by that"),
        ("resolution", 768, "b drew at a resolution of 768, a of 512: quality and times differ by that"),
        ("frechet_images", 1, "b took 1 references a prompt, a 5: Fréchet distances differ by that"),
    ],
)
def test_settings_that_differ_are_named(setting: str, value: int, told: str) -> None:
    settings = {
        "seed": 42,
        "num_images": 2,
        "resolution": 512,
        "frechet_images": 5,
        "prediction_type": "epsilon",
    }
    first, other = replace(record(), settings=settings), replace(record(), settings={**settings, setting: value})
    assert side_by_side({"a": first, "b": first})[0].warnings == record().warnings
    assert side_by_side({"a": first, "b": other})[0].warnings == (*record().warnings, told)


def test_a_warning_names_the_run_that_it_is_about() -> None:
    first, other = replace(record(), warnings=("one", "both")), replace(record(), warnings=("both", "two"))
    assert side_by_side({"a": first, "b": other})[0].warnings == ("both", "a: one", "b: two")
    assert side_by_side({"a": first})[0].warnings == ("one", "both")


def timed_at(batch_size: int) -> BenchmarkRecord:
    """A benchmark that was timed in batches of that size."""
    found = apart(seed=7)
    arms = {
        name: replace(arm, timings=tuple(replace(timing, batch_size=batch_size) for timing in arm.timings))
        for name, arm in found.summary.items()
    }
    return replace(found, summary=arms)


def test_other_batches_and_another_torch_are_named_and_not_compared() -> None:
    first, other = first_without_a_good_student(), timed_at(8)
    solver = summary(solver_arm(8, 7.5, [0.9**t for t in range(1000)], karras=False), 0.5, 0.99, 34.0)
    first = replace(first, summary={**first.summary, solver.arm.id: solver})
    both, _ = side_by_side({"a": first, "b": other})
    assert both.warnings[1:2] == ("b was timed at batch 8, a at 1: times differ by that",)
    assert not any("needs no training" in sentence for sentence in verdict(both))
    text = page(both, {})
    assert "5 repeats at batch 1 (teacher-50, student-4, base-4, dpmpp-8); 5 repeats at batch 8 (b-teacher-50" in text
    assert "shares of a batch of 1 or 8" in text
    same, _ = side_by_side({"a": first, "b": timed_at(1)})
    assert any("dpmpp-8 needs no training" in sentence for sentence in verdict(same))
    newer, _ = side_by_side({"a": first, "b": replace(timed_at(1), versions={"torch": "9.9"})})
    assert newer.warnings[1] == "b was timed with torch 9.9, a with 2.13.0: times differ by that"
    assert not any("needs no training" in sentence for sentence in verdict(newer))


def test_every_run_says_how_it_was_made() -> None:
    other = replace(apart(seed=7), adapter={"source": "other/final"}, versions={"torch": "9.9"})
    text = page(side_by_side({"a": record(), "b": other})[0], {})
    assert " · a with adapter lora/final · b with adapter other/final</p>" in text
    assert "torch 2.13.0" in text and "torch 9.9" in text and "--seed 7" in text and "--seed 42" not in text


def test_a_teacher_has_no_difference_to_itself_in_company_either() -> None:
    both, _ = side_by_side({"a": record(), "b": apart(seed=7)})
    teacher = both.summary["b-teacher-50"]
    assert teacher.delta_all_right is None and teacher.delta_alignment is None and not teacher.delta_attributes
    assert both.run_of("b-teacher-50").baseline is not None


def test_what_is_ranked_by_other_figures_is_not_set_side_by_side() -> None:
    with pytest.raises(InputError, match=r"the run a has an answer key, b has none.*report them apart"):
        side_by_side({"a": record(), "b": without_answers(record())})
    with pytest.raises(InputError, match="the run b has an answer key, a has none"):
        side_by_side({"a": without_answers(record()), "b": record()})


def test_another_base_and_another_teacher_are_named() -> None:
    other = replace(record(), base={**record().base, "name": "B", "fingerprint": "0123456789abcdef"})
    (warned,) = side_by_side({"a": record(), "b": other})[0].warnings[1:]
    assert warned == "b drew with another base (B, 01234567) than a (a base, 00): all its arms are shown"
    arms = {"teacher-25": summary(teacher_arm(25, 5.0), 1.0, 0.5, 33.0), "student-4": record().summary["student-4"]}
    both, _ = side_by_side({"a": record(), "b": replace(record(), summary=arms)})
    assert both.warnings[1:] == (
        "b's teacher takes 25 steps at guidance 5, a's 50 steps at guidance 7.5: differences and speed-ups are to its "
        "own teacher",
    )
    assert both.run_of("b-student-4").baseline == both.run_of("b-student-4").arms["b-teacher-25"]


def test_frechet_distances_of_several_n_are_not_to_be_compared() -> None:
    alike, _ = side_by_side({"a": record(), "b": apart(seed=7)})
    assert "N = 4 pictures against 10 of the same captions. It grows with small N: compare within" in page(alike, {})
    other = apart(num_images=1)
    arms = {
        name: replace(arm, frechet=replace(arm.frechet, pictures=2)) if arm.frechet else arm
        for name, arm in other.summary.items()
    }
    both, _ = side_by_side({"a": with_real(record()), "b": replace(other, summary=arms)})
    text = page(both, {})
    assert (
        "N = 4 against 10 in teacher-50, student-4, base-4, real; N = 2 against 10 in b-teacher-50, b-student-4, "
        "b-base-4. It grows with small N: distances of different N are not comparable with each other. Real pictures "
        "against real ones at N = 4 against 10: 2.50. Where there are no more pictures than dimensions"
    ) in text
    assert "compare within this table" not in text


# ------------------------------------------------------------------------------------------------- names that coincide


def saved(folder: Path) -> Path:
    """A finished benchmark of fakes."""
    folder.mkdir(parents=True)
    (folder / RECORD_FILE).write_text(record().to_json())
    pictures(folder, record())
    return folder


def shown(tmp_path: Path, *runs: str) -> list[str]:
    """The students on the page of these runs."""
    folders = tuple(saved(tmp_path / run) for run in runs)
    result = report(ReportSettings(runs=folders, outdir=tmp_path / "both"))
    text = result.file.read_text()
    students = [name for name, arm in result.record.summary.items() if arm.arm.role == "student"]
    assert all(f'data-arm="{name}"' in text for name in students)
    return students


@pytest.mark.parametrize(
    ("runs", "students"),
    [
        (["mon/rank4", "tue/rank4"], ["tue-rank4-student-4"]),
        (["mon/rank4/bench", "tue/rank4/bench"], ["tue-rank4-bench-student-4"]),
        (["rank_4", "rank-4"], ["rank-4-2-student-4"]),
        (["other", "rank_4", "rank-4"], ["rank-4-student-4", "rank-4-2-student-4"]),
        (["x/rank_4", "x/rank-4", "y/rank-4"], ["x-rank-4-2-student-4", "y-rank-4-student-4"]),
        (["tue-bench", "mon/bench", "tue/bench"], ["mon-bench-student-4", "tue-bench-2-student-4"]),
    ],
)
def test_no_run_is_lost_where_names_coincide(tmp_path: Path, runs: list[str], students: list[str]) -> None:
    assert shown(tmp_path, *runs) == ["student-4", *students]


def test_a_run_that_comes_twice_is_there_once(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    twice = report(ReportSettings(runs=(run, tmp_path / "both" / ".." / "run"), outdir=tmp_path / "both"))
    assert list(twice.record.summary) == list(record().summary)


def test_an_arm_that_is_called_like_another_is_not_lost() -> None:
    found = record()
    student = found.summary["student-4"]
    lookalike = replace(student, arm=replace(student.arm, id="b-student-4"))
    first = replace(found, summary={**found.summary, "b-student-4": lookalike}, adapters={"b-2": {"source": "an"}})
    both, origins = side_by_side({"a": first, "b": found, "B": found, "_b": found})
    students = [name for name, arm in both.summary.items() if arm.arm.role == "student"]
    assert students == ["student-4", "b-student-4", "b-3-student-4", "b-4-student-4", "b-5-student-4"]
    assert origins["b-student-4"] == ("a", "b-student-4") and origins["b-5-student-4"] == ("_b", "student-4")
    assert list(both.adapters) == ["b-2", "b-3", "b-4", "b-5"]


def test_what_the_second_and_the_third_run_drew_alike_is_there_once() -> None:
    first, other = record(), replace(record(), settings={**record().settings, "seed": 43})
    both, origins = side_by_side({"a": first, "b": other, "c": other})
    own = list(first.summary)
    students = [name for name in own if first.summary[name].arm.adapter]
    assert list(both.summary) == [*own, *(f"b-{name}" for name in own), *(f"c-{name}" for name in students)]
    assert both.summary["c-student-4"].control == "b-base-4" and origins["b-base-4"] == ("b", "base-4")


def test_real_pictures_of_other_data_are_others() -> None:
    first, other = (
        replace(with_real(record()), settings={**record().settings, "data_dir": place}) for place in ("one", "two")
    )
    assert "b-real" not in side_by_side({"a": first, "b": first})[0].summary
    assert "b-real" in side_by_side({"a": first, "b": other})[0].summary
