"""The demo: what it asks of training and of the benchmark, and that it goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fewstep.config import BenchSettings, DemoSettings, TrainSettings
from fewstep.errors import InputError, Interrupted
from fewstep.walkthrough import walkthrough
from tests.train.conftest import Heard


class Parts:
    """Stand-ins for training and benchmark that remember what they were asked for."""

    def __init__(self) -> None:
        self.trained: list[TrainSettings] = []
        self.measured: list[BenchSettings] = []
        self.stops = False

    def distill(self, settings: TrainSettings, **_: Any) -> Any:
        self.trained.append(settings)
        settings.run_dir.mkdir(parents=True, exist_ok=True)
        if self.stops:
            raise Interrupted("stopped at step 7 of 9, saved in x; go on with --resume_from_checkpoint latest")
        return SimpleNamespace(adapter=settings.run_dir / "lora" / "final")

    def benchmark(self, settings: BenchSettings, **_: Any) -> Any:
        self.measured.append(settings)
        return SimpleNamespace(outdir=settings.outdir)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    parts = Parts()
    monkeypatch.setattr("fewstep.walkthrough.distill", parts.distill)
    monkeypatch.setattr("fewstep.walkthrough.benchmark", parts.benchmark)
    return parts


def test_the_demo_measures_what_it_trained(parts: Parts, tmp_path: Path) -> None:
    heard = Heard()
    settings = DemoSettings(outdir=tmp_path, max_steps=9, seed=7, device="cpu")
    walkthrough(settings, reporter=heard)
    (training,), (measuring,) = parts.trained, parts.measured
    assert training.max_steps == 9
    assert (training.learning_rate, training.lora_rank) == (settings.learning_rate, settings.lora_rank)
    assert training.num_inference_steps == settings.num_inference_steps == (4,)
    assert training.timestep_span == settings.timestep_span == 0.85
    assert (training.teacher_solver, training.num_ddim_steps, training.pairs_per_visit) == ("dpmpp", 8, 1)
    assert measuring.steps == settings.steps == (1, 2, 4, 8)
    assert training.seed == measuring.seed == 7
    assert measuring.lora_path == tmp_path / "training" / "lora" / "final"
    assert (measuring.num_prompts, measuring.num_images, measuring.baseline_steps) == (20, 10, 50)
    assert measuring.compare_baseline and measuring.solver_steps == (0,)
    said = "\n".join(heard.said)
    assert str(tmp_path / "benchmark" / "report.html") in said and str(tmp_path / "benchmark" / "images") in said


def test_the_untrained_solver_is_drawn_where_it_is_asked_for(parts: Parts, tmp_path: Path) -> None:
    walkthrough(DemoSettings(outdir=tmp_path, max_steps=9, solver_steps=(8,)))
    assert parts.measured[0].solver_steps == (8,)


def test_a_stopped_demo_goes_on_with_the_same_command_and_no_other(parts: Parts, tmp_path: Path) -> None:
    settings = DemoSettings(outdir=tmp_path, max_steps=9)
    parts.stops = True
    with pytest.raises(Interrupted, match="step 7 of 9, saved in x; go on with the same command"):
        walkthrough(settings)
    with pytest.raises(InputError, match="choose another --outdir"):
        walkthrough(settings.replace(max_steps=10))
    parts.stops = False
    walkthrough(settings)
    assert [training.resume_from_checkpoint for training in parts.trained] == ["auto", "auto"]
    assert len(parts.measured) == 1
