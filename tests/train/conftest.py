"""One tiny base, one folder of pictures, and one finished run that the tests look at from all sides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fewstep.config import TrainSettings
from fewstep.train import DistillResult, distill
from tests.train.tiny import make_base, make_pictures

MEASURED = {
    *("pictures_per_second", "pairs_per_second", "teacher_forwards_per_second"),
    *("utilisation", "data_wait_seconds", "peak_memory_bytes"),
}
"""Figures of metrics.jsonl that say how fast a machine was, and are others each time."""


def without_speed(row: Mapping[str, float]) -> dict[str, float]:
    """The figures of a line that are the same in every repetition."""
    return {name: value for name, value in row.items() if name not in MEASURED}


class Heard:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []
        self.bars: dict[str, tuple[int, int]] = {}
        """Name of a bar to (units done, total)."""

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)

    @contextmanager
    def progress(self, name: str, total: int) -> Iterator[Any]:
        heard = self
        self.bars[name] = (0, total)

        class Bar:
            def advance(self, n: int = 1, **values: float) -> None:
                heard.bars[name] = (heard.bars[name][0] + n, total)

        yield Bar()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def v_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny-v", prediction_type="v_prediction")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="session")
def settings(base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    """Ten quick steps with everything on: EMA, warm-up, accumulation, checkpoints, previews."""
    return TrainSettings(
        base_model=str(base),
        data_dir=pictures,
        output_dir=tmp_path_factory.mktemp("runs"),
        run_name="whole",
        max_steps=10,
        batch_size=2,
        gradient_accumulation_steps=2,
        num_ddim_steps=2,
        num_inference_steps=(1, 4),
        learning_rate=3e-3,
        lr_warmup_steps=2,
        ema_decay=0.9,
        checkpoint_every=4,
        validate_every=10,
        log_every=2,
        device="cpu",
    )


@pytest.fixture(scope="session")
def heard() -> Heard:
    """What the finished run said."""
    return Heard()


@pytest.fixture(scope="session")
def whole(settings: TrainSettings, heard: Heard) -> DistillResult:
    """The finished run: nothing interrupted it."""
    return distill(settings, reporter=heard)
