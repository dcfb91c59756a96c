"""What the reporter prints: lines where there is no terminal, bars where there is one."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from fewstep import ui
from fewstep.ui import ConsoleReporter, duration, error


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ConsoleReporter(seconds_between_lines=0)
    reporter.say("base: [scenes] " + "x" * 200)
    reporter.warn("alpha = rank assumed")
    with reporter.progress("distil", 3) as bar:
        bar.advance(loss=0.123456)
        bar.advance(2)
    captured = capsys.readouterr()
    assert captured.err == "warning: alpha = rank assumed\n"
    first, *lines = captured.out.splitlines()
    assert first == "base: [scenes] " + "x" * 200
    assert re.fullmatch(r"distil 1/3, 33 %, \d\.\d s left, loss 0\.1235", lines[0])
    assert re.fullmatch(r"distil 3/3, done in \d\.\d s, loss 0\.1235", lines[1])


def test_lines_of_a_log_are_rare(capsys: pytest.CaptureFixture[str]) -> None:
    with ConsoleReporter().progress("distil", 1000) as bar:
        for _ in range(1000):
            bar.advance()
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_bar_that_failed_does_not_say_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), ConsoleReporter().progress("distil", 3):
        raise RuntimeError
    assert "done" not in capsys.readouterr().out


def test_bars_in_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    reporter = ConsoleReporter()
    with reporter.progress("benchmark", 2) as outer:
        for _ in range(2):
            with reporter.progress("[4 steps]", 5) as inner:
                inner.advance(5, loss=0.5)
                reporter.say("between")
            outer.advance()
    with reporter.progress("again", 1) as bar:
        bar.advance()
    shown = capsys.readouterr().out
    for words in ("benchmark", "2/2", "between", "again", "1/1"):
        assert words in shown


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ConsoleReporter(quiet=True)
    reporter.say("a")
    reporter.warn("b")
    with reporter.progress("c", 1) as bar:
        bar.advance()
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    error("[draft] " + "x" * 300)
    assert capsys.readouterr().err == "error: [draft] " + "x" * 300 + "\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.5, "9.5 s"), (59.6, "1:00"), (125, "2:05"), (3725, "1:02:05")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_warnings_of_ours_are_lines_and_those_of_others_are_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True, action="always") as as_ever:
        with ConsoleReporter().hearing_warnings():
            for file in (ui.__file__, __file__):
                warnings.warn_explicit("odd", UserWarning, file, 1)
            warnings.warn_explicit("old", FutureWarning, ui.__file__, 1)
        warnings.warn_explicit("after", UserWarning, ui.__file__, 1)
    assert capsys.readouterr().err == "warning: odd\n"
    assert [(str(one.message), one.filename) for one in as_ever] == [
        ("odd", __file__),
        ("old", ui.__file__),
        ("after", ui.__file__),
    ]


# ---------------------------------------------------------------------------------------------- a reader that goes away

LONG = """
import os, sys, types
from pathlib import Path
from fewstep import cli
from fewstep.errors import InputError

def train(settings, *, reporter):
    reporter.say("started")
    sys.stdin.readline()
    for number in range(3):
        reporter.say("more")
        reporter.warn("more")
    with reporter.progress("distil", 2) as bar:
        bar.advance()
        bar.advance()
    print("by the way")
    Path(settings.output_dir, "saved").touch()
    if settings.seed:
        raise InputError("seed")

module = types.ModuleType("fewstep.train")
module.train = train
sys.modules["fewstep.train"] = module
sys.exit(cli.main())
"""


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize(("seed", "code"), [(0, 0), (1, 2)])
def test_a_run_whose_reader_goes_away_goes_on(tmp_path: Path, both: bool, seed: int, code: int) -> None:
    """As in `| head`, with stderr to itself and with `2>&1`."""
    with subprocess.Popen(
        [sys.executable, "-c", LONG, "train", "--output_dir", str(tmp_path), "--seed", str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if both else subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        said = "" if process.stderr is None else process.stderr.read()
        assert process.wait(60) == code
    assert (tmp_path / "saved").exists()
    if not both:
        assert said == "warning: more\n" * 3 + ("error: seed\n" if seed else "")


def test_help_whose_reader_has_gone_ends_without_a_word() -> None:
    waiting = "import sys; from fewstep.cli import main; sys.stdin.readline(); sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", waiting, "train", "--help"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stderr.read() == ""
        assert process.wait(60) in (0, 1)


def test_without_a_stdout() -> None:
    command = f'"{sys.executable}" -m fewstep --version >&-'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
