"""Secrets do not get out: not on the terminal, not in a log, not in a report, not with a trace."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest

from fewstep import cli, hub
from fewstep.benchmark.run import _Listening
from fewstep.config import TrainSettings, settings_toml
from fewstep.data import Slices
from fewstep.errors import InputError
from fewstep.hiding import without_secrets
from fewstep.reporting import SILENT
from fewstep.telemetry import LoggedReporter
from fewstep.train import announcing, keeping

TOKEN = "hf_" + "Quite4Secret" * 3


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (f"Illegal header value b'Bearer {TOKEN}'", "Illegal header value b'Bearer ***'"),
        ("https://me:word@mirror.org/x and http://proxy:3128", "https://***@mirror.org/x and http://proxy:3128"),
        ("https://me:w@rd:1@mirror.org/x@y, mail me@home.org", "https://***@mirror.org/x@y, mail me@home.org"),
        ("https://me:w?rd#1@mirror.org/x?y=1", "https://***@mirror.org/x?y=***"),
        (
            "dataset_name = \"https://host/{0..9}.tar?sv=2024-01&sig=Ab%2Bc/d'e=&se\" and 'http://b/?k=v', then?",
            "dataset_name = \"https://host/{0..9}.tar?sv=***&sig=***&***\" and 'http://b/?k=***', then?",
        ),
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


def test_a_signed_address_is_neither_said_nor_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays in the run's own settings, from which the run can be repeated."""
    asked = TrainSettings(dataset_name="https://me:word@host/{00..12}.tar?sv=1&sig=Secret#part", output_dir=tmp_path)
    assert TrainSettings(**tomllib.loads(settings_toml(asked))) == asked
    shared = tomllib.loads(settings_toml(asked, public=True))
    assert shared == tomllib.loads(settings_toml(asked)) | {"dataset_name": "https://host/{00..12}.tar"}
    texts: list[str] = []
    monkeypatch.setattr(keeping.checkpoint, "save", lambda *_, settings, **__: texts.append(settings))
    keeper = keeping.Keeper(
        asked, MagicMock(), MagicMock(), [], MagicMock(), MagicMock(), MagicMock(), identity={}, main=True
    )
    keeper.save("final", 1)
    assert [tomllib.loads(text) for text in texts] == [shared]
    monkeypatch.setattr(announcing.lora, "trainable_parameters", lambda _: 1)
    method = MagicMock(num_ddim_steps=50, guidance=7.5, points=(999,), solver="ddim", sampler="ddim")
    plan = "\n".join(announcing.plan(asked, method, Slices(batch_size=1), MagicMock()))
    assert "/{00..12}.tar?sv=***&sig=***" in plan and "Secret" not in plan and "word" not in plan
    of_the_hub = TrainSettings(dataset_name="owner/set:all?:train#1")
    assert settings_toml(of_the_hub, public=True) == settings_toml(of_the_hub)


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
