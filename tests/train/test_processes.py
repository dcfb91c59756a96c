"""Several processes on the CPU, and Stable Diffusion 1.5's own architecture: what takes longer than a moment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.backbone import Backbone, random_backbone
from fewstep.config import TrainSettings, settings_toml
from fewstep.train import DistillResult, distill
from tests.train.conftest import Heard
from tests.train.test_distill import assert_same, at_once, few_updates, weights

__all__ = ["at_once"]  # a fixture

SCRIPT = Path(__file__).parent / "one_of_several.py"


@pytest.mark.slow
def test_two_processes_do_what_one_does(at_once: DistillResult, settings: TrainSettings, tmp_path: Path) -> None:
    asked = few_updates(settings, tmp_path / "runs").replace(batch_size=2)
    (tmp_path / "settings.toml").write_text(settings_toml(asked))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(SCRIPT), str(tmp_path / "settings.toml"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = {file.name: file.read_text() for file in tmp_path.glob("rank-*.txt")}
    assert said == {f"rank-{rank}.txt": "world size 2, 3 steps" for rank in (0, 1)}
    run = tmp_path / "runs" / "whole"
    assert_same(weights(run / "lora" / "final"), weights(at_once.adapter), rtol=1e-3, atol=2e-6)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3, "only the first process writes"


@pytest.mark.slow
def test_sd15s_own_architecture_takes_a_step(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def instead_of_weights(*args: object, **kwargs: object) -> Backbone:
        return random_backbone("sd15")

    monkeypatch.setattr("fewstep.train.start.load_backbone", instead_of_weights)
    heard = Heard()
    result = distill(
        TrainSettings(
            base_model="random",
            data_dir=pictures,
            output_dir=tmp_path,
            max_steps=1,
            batch_size=1,
            num_ddim_steps=1,
            resolution=64,
            validate_every=0,
            checkpoint_every=0,
            device="cpu",
        ),
        reporter=heard,
    )
    assert any("797,184 trainable parameters" in line for line in heard.said)
    assert sum(value.numel() for value in weights(result.adapter).values()) == 797_184
