"""`fewstep report`: one benchmark's page again from its data, and several on one page."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from fewstep.cli import main
from fewstep.config import BenchSettings, ReportSettings, command_line, merged
from fewstep.errors import InputError
from fewstep.records import BenchmarkRecord
from fewstep.redraw import report
from fewstep.report import RECORD_FILE, page, side_by_side
from tests.benchmark.fakes import Notes
from tests.report.fakes import pictures, record


def saved(folder: Path, **changes: object) -> Path:
    """A finished benchmark of fakes."""
    found = replace(record(), **changes)
    folder.mkdir(parents=True)
    (folder / RECORD_FILE).write_text(found.to_json())
    pictures(folder, found)
    return folder


def test_one_runs_page_is_drawn_again_to_the_letter(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    result = report(ReportSettings(runs=(run,)))
    folders = {arm: run / "images" / arm for arm in result.record.summary}
    assert result.file == run / "report.html"
    assert result.file.read_text() == page(record(), folders)


def test_two_runs_stand_side_by_side(tmp_path: Path) -> None:
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two", machine={**record().machine, "device": "another"})
    result = report(ReportSettings(runs=(one, two), outdir=tmp_path / "both"))
    own = record().summary
    students = [name for name, arm in own.items() if arm.arm.adapter]
    # What needs no adapter is the same pictures in both, and is there once.
    assert list(result.record.summary) == [*own, *(f"two-{name}" for name in students)]
    assert [arm.arm.id for arm in result.record.summary.values() if arm.arm.is_baseline] == ["teacher-50"]
    for name in students:
        assert result.record.summary[f"two-{name}"].all_right == own[name].all_right
        assert result.record.summary[f"two-{name}"].control == own[name].control
    assert any("two was timed on another machine" in warning for warning in result.record.warnings)
    text = result.file.read_text()
    assert all(f"two-{name}" in text for name in students)
    assert [score.arm for score in result.record.scores] == ["student-4", "two-student-4"]


def test_a_run_in_another_precision_keeps_its_own_teacher(tmp_path: Path) -> None:
    half = {"machine": {**record().machine, "precision": "bfloat16"}}
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two", **half)
    result = report(ReportSettings(runs=(one, two), outdir=tmp_path / "both"))
    own = list(record().summary)
    assert list(result.record.summary) == [*own, *(f"two-{name}" for name in own)]
    assert [arm.arm.id for arm in result.record.summary.values() if arm.arm.is_baseline] == ["teacher-50"]
    assert result.record.summary["two-student-4"].control == "two-base-4"
    (warned,) = [warning for warning in result.record.warnings if warning.startswith("two ")]
    assert warned.startswith("two drew in bfloat16, one in float32") and "its own teacher in bfloat16" in warned
    assert warned in result.file.read_text()


def test_other_prompts_cannot_be_compared() -> None:
    changed = replace(record(), prompts=("something else",))
    with pytest.raises(InputError, match="have different prompts"):
        side_by_side({"a": record(), "b": changed})


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert main(["report", str(one), str(two), "--outdir", str(tmp_path / "both")]) == 0
    assert (tmp_path / "both" / "report.html").exists()
    assert main(["report", str(one)]) == 0
    capsys.readouterr()
    assert main(["report", str(one), str(two)]) == 2
    assert "2 runs came without outdir" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert capsys.readouterr().err == "error: runs: nothing came; allowed: one or several, each a path\n"
    assert main(["report", str(tmp_path / "nothing")]) == 2
    error = capsys.readouterr().err
    assert "cannot be read" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"steps": [1, 2], "prompt": "a 'red' house", "compare_baseline": True, "flash_guidance": 1.5},
        {"outdir": "some where", "solver_steps": [0], "resume": True},
    ],
)
def test_the_command_gives_the_settings_back(values: dict[str, object]) -> None:
    settings = BenchSettings(**values)
    line = shlex.split(command_line("bench", BenchSettings, settings.model_dump(mode="json")))
    assert line[:2] == ["fewstep", "bench"]
    given: dict[str, object] = {}
    for word in line[2:]:
        if word.startswith("--"):
            name = word.removeprefix("--")
            given[name] = []
        else:
            given[name].append(word)  # type: ignore[attr-defined]
    given = {name: found[0] if len(found) == 1 else found or True for name, found in given.items()}  # type: ignore
    assert merged(BenchSettings, given) == settings


def test_a_picture_that_is_gone_is_told_and_left_out(tmp_path: Path) -> None:
    run, notes = saved(tmp_path / "run"), Notes()
    before = report(ReportSettings(runs=(run,))).file.read_text()
    gone = run / "images" / "student-4" / "001" / "000.png"
    gone.unlink()
    after = report(ReportSettings(runs=(run,)), reporter=notes).file.read_text()
    assert notes.warned == [
        f"1 of the pictures of student-4, such as {gone}, are not there: the gallery goes without them"
    ]
    assert before.count("data:image") == after.count("data:image") + 1


def test_a_picture_that_is_not_whole_is_told_and_left_out(tmp_path: Path) -> None:
    run, notes = saved(tmp_path / "run"), Notes()
    before = report(ReportSettings(runs=(run,))).file.read_text()
    for number, content in ((0, b""), (1, (run / "images" / "student-4" / "001" / "000.png").read_bytes()[:60])):
        (run / "images" / "student-4" / f"00{number}" / "000.png").write_bytes(content)
    after = report(ReportSettings(runs=(run,)), reporter=notes).file.read_text()
    assert [text.split(" cannot be read (")[0].rpartition("student-4/")[2] for text in notes.warned] == [
        "000/000.png",
        "001/000.png",
    ]
    assert before.count("data:image") == after.count("data:image") + 2


def test_the_teachers_pictures_are_where_the_run_put_them(tmp_path: Path) -> None:
    """Not those of an earlier run in the same folder."""
    apart = tmp_path / "apart"
    run = saved(tmp_path / "run", settings={**record().settings, "baseline_outdir": str(apart)})
    pictures(apart, record(), side=16)
    shown = report(ReportSettings(runs=(run,))).file.read_text()
    folders = {arm: run / "images" / arm for arm in record().summary}
    folders["teacher-50"] = apart / "images" / "teacher-50"
    found = BenchmarkRecord.from_json((run / RECORD_FILE).read_text())
    assert shown == page(found, folders) != page(found, {**folders, "teacher-50": run / "images" / "teacher-50"})


def test_a_file_that_is_no_record_is_named(tmp_path: Path) -> None:
    good, bad = saved(tmp_path / "good"), saved(tmp_path / "bad")
    (bad / RECORD_FILE).write_text("{}")
    with pytest.raises(InputError, match=r"bad/clipscore_results\.json': this is no benchmark record"):
        report(ReportSettings(runs=(good, bad), outdir=tmp_path / "both"))
