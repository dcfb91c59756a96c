"""The doctor: a line a check, the fix in it, and the exit code that the training would have ended with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep import cli, doctor
from fewstep.backbone import Backbone
from fewstep.checkpoint import Origin
from fewstep.config import TrainSettings
from fewstep.errors import FewstepError, InputError
from fewstep.train import DistillResult, rehearse, start
from tests.train.conftest import Heard


@pytest.fixture
def asked(settings: TrainSettings, tmp_path: Path) -> TrainSettings:
    return settings.replace(output_dir=tmp_path / "runs")


def verdicts(settings: TrainSettings) -> tuple[dict[str, str], dict[str, str], FewstepError | None]:
    """State by check, text by check, and the error at the end."""
    heard, error = Heard(), None
    try:
        doctor.doctor(settings, reporter=heard)
    except FewstepError as raised:
        error = raised
    lines = [line.split(maxsplit=2) for line in heard.said if line.split()[0] in ("ok", "FAIL", "skip")]
    assert [name for _, name, _ in lines] == list(doctor.CHECKS)
    return {name: state for state, name, _ in lines}, {name: text for _, name, text in lines}, error


def test_a_healthy_one_is_told_so_and_nothing_is_written(asked: TrainSettings) -> None:
    states, texts, error = verdicts(asked)
    assert set(states.values()) == {"ok"} and error is None
    assert "12 pictures, 12 captions; the first 4 can be read" in texts["data"]
    assert "t is one of 999 759 499 259" in texts["settings"]
    assert "torch " + torch.__version__ in texts["versions"]
    assert not asked.output_dir.exists()


@pytest.mark.parametrize(
    ("change", "failed", "code", "words"),
    [
        ({"base_model": "nowhere/at-all"}, "model", 2, "is not at hand"),
        ({"data_dir": "nowhere"}, "data", 3, "data_dir nowhere does not exist"),
        ({"lora_targets": ["to_x"]}, "settings", 2, "'to_x' names no layer"),
        ({"num_inference_steps": [50], "num_ddim_steps": 50}, "settings", 2, "cannot take 50 DDIM steps"),
        ({"mixed_precision": "fp16"}, "device", 2, "fp16 came with the CPU"),
        ({"resume_from_checkpoint": "latest"}, "folder", 4, "no checkpoint in"),
    ],
)
def test_what_is_wrong_is_named_with_its_exit_code(
    asked: TrainSettings, change: dict[str, Any], failed: str, code: int, words: str
) -> None:
    states, texts, error = verdicts(asked.replace(**change))
    assert [name for name, state in states.items() if state == "FAIL"] == [failed]
    assert words in texts[failed]
    assert error is not None and error.exit_code == code and f"{failed} failed" in str(error)
    assert states["versions"] == "ok"
    for name, needed in doctor.CHECKS.items():
        if failed in needed:
            assert (states[name], texts[name]) == ("skip", f"needs {failed}")


def test_a_network_of_nans_is_no_model(asked: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backbone, "denoiser", lambda self, adapter: lambda x_t, t, cond: x_t * float("nan"))
    states, texts, _ = verdicts(asked)
    assert states["forward"] == "FAIL" and "the UNet says nan" in texts["forward"]


def test_a_library_that_is_old_or_missing(asked: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = doctor.version

    def version(name: str) -> str:
        if name == "peft":
            raise PackageNotFoundError(name)
        return "0.1" if name == "diffusers" else honest(name)

    monkeypatch.setattr(doctor, "version", version)
    states, texts, error = verdicts(asked)
    assert states["versions"] == "FAIL" and isinstance(error, InputError)
    assert "diffusers is 0.1, allowed is <1,>=0.42; peft is missing" in texts["versions"]


def test_a_disk_that_is_full_and_a_folder_that_is_no_place_to_write(
    asked: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "free_disk", lambda folder: 5)

    def refused(**_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    states, texts, _ = verdicts(asked)
    assert states["disk"] == states["folder"] == "FAIL"
    assert "5 bytes are free; make room" in texts["disk"]
    assert "cannot be written to: Permission denied; choose another --output_dir" in texts["folder"]


def test_pictures_for_a_base_that_nobody_named_are_told(asked: TrainSettings) -> None:
    told = "data_dir came and no base_model: it would teach scenes"
    assert told in verdicts(asked.replace(base_model=None, resolution=128))[1]["model"]
    assert told not in verdicts(asked)[1]["model"]
    assert start.stray_data(asked.replace(base_model=None, default_base="someone/else"), None) is None
    assert start.stray_data(asked.replace(base_model=None), Origin("recorded")) is None
    heard = Heard()
    start.open_base(asked.replace(base_model=None), "cpu", None, heard)
    assert any(told in line for line in heard.warned)


def test_a_run_that_is_there_is_not_written_over(whole: DistillResult, settings: TrainSettings) -> None:
    assert "holds a run already" in verdicts(settings)[1]["folder"]
    # Without --base_model: the checkpoint names it.
    states, texts, _ = verdicts(settings.replace(resume_from_checkpoint="latest", base_model=None))
    assert set(states.values()) == {"ok"}
    assert texts["folder"].endswith("goes on from checkpoint-10")
    assert f"{settings.base_model} (recorded in the adapter)" in texts["model"]


def test_a_run_that_would_not_be_gone_on_with_is_told(whole: DistillResult, settings: TrainSettings) -> None:
    goes_on = settings.replace(resume_from_checkpoint="latest")
    states, texts, _ = verdicts(goes_on)
    assert set(states.values()) == {"ok"} and "goes on from checkpoint-10" in texts["folder"]
    states, texts, error = verdicts(goes_on.replace(learning_rate=1e-5))
    assert states["data"] == "FAIL" and "a resumed run keeps its settings" in texts["data"]
    assert isinstance(error, InputError)
    with pytest.raises(InputError, match="a resumed run keeps its settings"):
        rehearse(goes_on.replace(learning_rate=1e-5))


def test_a_compiler_that_is_missing_is_told(asked: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise InputError("no compiler")

    monkeypatch.setattr("fewstep.train.engine.check_compiler", missing)
    states, texts, _ = verdicts(asked.replace(compile=True))
    assert states["settings"] == "FAIL" and "no compiler" in texts["settings"]


def test_the_command_takes_the_flags_of_train(
    base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--base_model", str(base), "--output_dir", str(tmp_path / "runs"), "--device", "cpu", "--lora_rank", "2"]
    assert cli.main(["doctor", *flags, "--data_dir", str(pictures)]) == 0
    assert capsys.readouterr().out.endswith("ready to train\n")
    assert cli.main(["doctor", *flags, "--data_dir", str(tmp_path / "none")]) == 3
    captured = capsys.readouterr()
    assert "\nFAIL data " in captured.out
    assert captured.err.startswith("error: not ready to train: data failed")
