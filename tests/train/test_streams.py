"""A training on shards that are fetched as they are needed: stopped and resumed, it is the one that was not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fewstep.config import TrainSettings
from fewstep.data import remote
from fewstep.data.pairs import LocalPictures
from fewstep.errors import CheckpointError, DataError, Interrupted
from fewstep.train import distill
from fewstep.train.encoding import Shards
from fewstep.train.fill import fill
from tests.data.test_shards import shard
from tests.data.test_stream import Server
from tests.train.conftest import Heard
from tests.train.test_cache import for_fill
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


def replace_shard(server: Server, number: int, pictures: Path) -> None:
    """By another one of the same length, whose two pictures have each other's caption."""
    file = server.folder / f"{number}.tar"
    before = file.stat()
    stems = [f"{2 * number + i:03d}" for i in range(2)]
    members = [
        (f"{stem}{suffix}", (pictures / f"{of}{suffix}").read_bytes())
        for stem, other in zip(stems, reversed(stems), strict=True)
        for suffix, of in ((".png", stem), (".txt", other))
    ]
    shard(file, members)
    os.utime(file, (before.st_atime, before.st_mtime + 10))
    assert file.stat().st_size == before.st_size


@pytest.mark.slow
def test_a_shard_replaced_by_one_of_the_same_length_ends_resume_cache_and_kept_rollouts(
    settings: TrainSettings, server: Server, pictures: Path, tmp_path: Path
) -> None:
    asked = settings.replace(
        dataset_name=f"{server.address}/{{0..5}}.tar", output_dir=tmp_path / "runs", max_dropped=0.5, oracle_images=0,
        **SHORT,
    )  # fmt: skip
    encoded = asked.replace(run_name="encoded", cache_dir=tmp_path / "encodings")
    fill(for_fill(encoded))
    kept = asked.replace(run_name="kept", teacher_cache=tmp_path / "rollouts", teacher_rollouts=4)
    distill(kept)
    calls = iter([False, True])
    with pytest.raises(Interrupted):
        distill(asked, should_stop=lambda: next(calls))
    replace_shard(server, 4, pictures)
    for refused, words in (
        (encoded, "cache_dir .* holds encodings with data_fingerprint"),
        (kept.replace(run_name="kept 2"), "teacher_cache .* holds rollouts with data_fingerprint"),
        (asked.replace(resume_from_checkpoint="latest"), "was trained with data_fingerprint"),
    ):
        with pytest.raises(CheckpointError, match=words):
            distill(refused)


def test_where_no_server_says_so_the_encodings_of_a_replaced_shard_are_made_anew(
    settings: TrainSettings, server: Server, pictures: Path, tmp_path: Path
) -> None:
    server.versions = False
    asked = settings.replace(
        dataset_name=f"{server.address}/{{0..5}}.tar", max_dropped=0.5, cache_dir=tmp_path / "encodings", **SHORT
    )
    before = fill(for_fill(asked)).latents
    held = Shards(tmp_path / "encodings", "latents").keys()
    assert fill(for_fill(asked)).latents == before
    replace_shard(server, 4, pictures)
    shutil.rmtree(tmp_path / "cache")
    fill(for_fill(asked))
    new = Shards(tmp_path / "encodings", "latents").keys() - held
    assert new and {int(item) % 6 for item in new} == {4}


def test_where_no_picture_is_noised_none_of_a_stream_is_decoded(
    settings: TrainSettings, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoded(*_: object) -> None:
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr(LocalPictures, "item", decoded)
    asked = settings.replace(
        dataset_name=f"{server.address}/{{0..5}}.tar", max_dropped=0.5, cache_dir=tmp_path / "encodings",
        start="teacher", **SHORT,
    )  # fmt: skip
    assert fill(for_fill(asked)).latents == 0


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
