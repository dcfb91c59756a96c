"""Secrets do not get out: not on the terminal, not in a log, not in a report, not with a trace."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fewstep import cli, hub
from fewstep.benchmark.run import _Listening
from fewstep.errors import InputError
from fewstep.hiding import without_secrets
from fewstep.reporting import SILENT
from fewstep.telemetry import LoggedReporter

TOKEN = "hf_" + "Quite4Secret" * 3


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (f"Illegal header value b'Bearer {TOKEN}'", "Illegal header value b'Bearer ***'"),
        ("https://me:word@mirror.org/x and http://proxy:3128", "https://***@mirror.org/x and http://proxy:3128"),
        ("a red house by the sea, hf_short", "a red house by the sea, hf_short"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(said: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert without_secrets(said) == shown


@pytest.mark.parametrize("token", ["my own words", "with\x01control", "pässword!"])
def test_the_token_that_is_set_is_hidden_whatever_it_looks_like(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token + "\n")
    for said in (f"got {token}!", f"got {token!r}!", f"got {token.encode()!r}!"):
        hidden = without_secrets(said)
        assert "***" in hidden and "own words" not in hidden and "control" not in hidden and "ssword" not in hidden
    monkeypatch.setenv("HF_TOKEN", "a")
    assert without_secrets("a day") == "a day"


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("error", [InputError, RuntimeError])
def test_no_token_comes_out_of_a_command(
    error: type[Exception],
    trace: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever a library puts into its errors, or a procedure says."""
    log = tmp_path / "log.txt"

    def procedure(settings: Any, *, reporter: Any) -> None:
        with LoggedReporter(reporter, log) as logged:
            logged.say(f"said {TOKEN}")
            logged.warn(f"warned of {TOKEN}")
            try:
                raise ValueError(f"Bearer {TOKEN}")
            except ValueError:
                raise error(f"refused {TOKEN}") from None

    module = ModuleType("fewstep.train")
    module.train = procedure  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fewstep.train", module)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv(cli.TRACEBACK, raising=False)
    if trace:
        monkeypatch.setenv(cli.TRACEBACK, "1")
    assert cli.main(["train"]) == (2 if error is InputError else 1)
    shown, logged = capsys.readouterr(), log.read_text()
    for text in (shown.out, shown.err, logged):
        assert "***" in text and "Secret" not in text
    assert re.findall(r"(said|warned of|refused) \*\*\*", logged) == ["said", "warned of", "refused"]
    assert ("Traceback" in shown.err) is trace


def test_no_token_comes_into_a_report() -> None:
    listening = _Listening(SILENT)
    listening.warn(f"not at hand: Bearer {TOKEN}")
    assert listening.warnings == ["not at hand: Bearer ***"]


def test_a_token_that_cannot_be_one_is_a_line_and_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP allows ASCII in its headers: a letter with an accent is an error deep in a library."""

    def fetch(*_: object, **__: object) -> str:
        return TOKEN.replace("Quite", "Qüite").encode("ascii").decode()

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(hub.NotAtHand, match="HF_TOKEN holds characters that no token has"):
        hub.snapshot("someone/private", ["*.json"])
