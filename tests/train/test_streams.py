"""A training on shards that are fetched as they are needed: stopped and resumed, it is the one that was not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fewstep.config import TrainSettings
from fewstep.data import remote
from fewstep.errors import DataError, Interrupted
from fewstep.train import distill
from tests.data.test_shards import shard
from tests.data.test_stream import Server
from tests.train.conftest import Heard
from tests.train.test_rollouts import same

SHORT: dict[str, Any] = {"max_steps": 4, "validate_every": 0, "checkpoint_every": 2, "data_dir": None}


@pytest.fixture
def server(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The twelve pictures in six shards, one of which has a damaged one besides."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    for number in range(6):
        stems = [f"{2 * number + i:03d}" for i in range(2)]
        files = [pictures / f"{stem}{suffix}" for stem in stems for suffix in (".png", ".txt")]
        more = [("bad.png", b"junk"), ("bad.txt", b"junk")] if number == 3 else []
        shard(tmp_path / "www" / f"{number}.tar", [*((file.name, file.read_bytes()) for file in files), *more])
    found = Server(tmp_path / "www")
    yield found
    found.stop()


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_a_server_that_is_gone_costs_no_checkpoint(
    settings: TrainSettings, server: Server, tmp_path: Path
) -> None:
    asked = settings.replace(
        dataset_name=f"{server.address}/{{0..5}}.tar", output_dir=tmp_path / "runs", max_dropped=0.5, **SHORT
    )
    heard = Heard()
    whole = distill(asked, reporter=heard)
    assert any(line.startswith("data: 6 shards, fetched as they are needed; if all are like") for line in heard.said)
    assert len([line for line in heard.warned if "3.tar: dropped 1 picture: not a picture" in line]) == 1
    cut, calls = asked.replace(run_name="cut"), iter([False, True])
    with pytest.raises(Interrupted):
        distill(cut, should_stop=lambda: next(calls))
    on = cut.replace(resume_from_checkpoint="latest")
    server.refusals = [404] * 100
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    with pytest.raises(DataError, match="the server says 404"):
        distill(on)
    assert (cut.run_dir / "lora" / "checkpoint-2").is_dir()
    server.refusals.clear()
    assert same(distill(on), whole)
