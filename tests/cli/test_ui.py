"""What the reporter prints: lines where there is no terminal, bars where there is one."""

from __future__ import annotations

import re

import pytest

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
