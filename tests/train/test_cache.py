"""Latents and embeddings that are computed once: the same student, nothing stale, nothing half there."""

from __future__ import annotations

import errno
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep import cli
from fewstep.backbone import Backbone, load_backbone
from fewstep.config import CacheSettings, TrainSettings
from fewstep.errors import CheckpointError, DataError, FewstepError, InputError, Interrupted
from fewstep.train import distill, encoding
from fewstep.train.encoding import Cached, Shards
from fewstep.train.fill import fill
from fewstep.train.keyed import claim
from fewstep.train.rollouts import Teacher
from tests.train.conftest import Heard
from tests.train.test_rollouts import same, weights

SHORT: dict[str, Any] = {"max_steps": 4, "validate_every": 0, "checkpoint_every": 0}
"""Four updates of four pictures: a second epoch over the twelve that there are."""


def cached(settings: TrainSettings, folder: Path, **changes: Any) -> TrainSettings:
    return settings.replace(output_dir=folder / "runs", cache_dir=folder / "cache", **SHORT | changes)


def for_fill(settings: TrainSettings) -> CacheSettings:
    return CacheSettings(**dict(settings))


class Work:
    """Counts what the networks are asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done = Counter[str]()
        encode, embed = Backbone.encode, Backbone.embed

        def encoded(backbone: Backbone, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
            self.done["pictures"] += len(pixels)
            return encode(backbone, pixels, noise)

        def embedded(backbone: Backbone, prompts: Any) -> Tensor:
            self.done["captions"] += len(prompts)
            return embed(backbone, prompts)

        monkeypatch.setattr(Backbone, "encode", encoded)
        monkeypatch.setattr("fewstep.opening.steady_vae", lambda *_: None)  # it tries the VAE, of noise
        monkeypatch.setattr(Backbone, "embed", embedded)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    return Work(monkeypatch)


def test_a_full_cache_trains_the_student_that_an_empty_one_does_and_computes_nothing(
    settings: TrainSettings, tmp_path: Path, work: Work
) -> None:
    filling = distill(cached(settings, tmp_path / "filling"))
    assert 0 < work.done["pictures"] <= 12
    full = cached(settings, tmp_path / "full")
    fill(for_fill(full))
    before = work.done["pictures"]
    trained = distill(full)
    assert same(trained, filling) and work.done["pictures"] == before
    without = weights(distill(cached(settings, tmp_path / "without").replace(cache_dir=None)))
    for name, value in weights(trained).items():  # rounded to fp16
        torch.testing.assert_close(value, without[name], rtol=0.02, atol=2e-4)


def test_cache_fills_it_with_what_the_run_will_ask_for(settings: TrainSettings, tmp_path: Path, work: Work) -> None:
    heard = Heard()
    asked = cached(settings, tmp_path)
    result = fill(for_fill(asked), reporter=heard)
    assert 0 < result.latents <= 12
    assert work.done == {"pictures": result.latents, "captions": 13}, "each once, and the empty caption"
    assert heard.said[-1] == f"cache: {result.latents} latents and 13 captions in {tmp_path / 'cache'}"
    assert heard.bars["cache"] == (8, 8)
    assert not asked.output_dir.exists()
    before = work.done.copy()
    assert fill(for_fill(asked)) == result and work.done == before, "the second time there is nothing to do"


def test_one_that_was_stopped_goes_on(settings: TrainSettings, tmp_path: Path, work: Work) -> None:
    asked, calls = for_fill(cached(settings, tmp_path)), iter([False, False, True])
    with pytest.raises(Interrupted, match="what was computed is kept in"):
        fill(asked, should_stop=lambda: next(calls))
    kept = work.done["captions"]
    assert 0 < kept < 13
    assert fill(asked).captions == 13 == work.done["captions"]


@pytest.mark.parametrize(
    ("lost", "became", "end"),
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Killed.",
            DataError,
            "make room in it, then run the same again",
        ),
        (
            "[gloo/transport/tcp/pair.cc:553] Connection closed by peer",
            Interrupted,
            "then run the same again in all of them",
        ),
    ],
)
def test_a_process_that_was_lost_is_told_with_the_way_to_go_on(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str,
    became: type[FewstepError], end: str,
) -> None:  # fmt: skip
    def prepare(*_: object) -> None:
        raise RuntimeError(lost)

    monkeypatch.setattr(Teacher, "prepare", prepare)
    with pytest.raises(became) as said:
        fill(for_fill(cached(settings, tmp_path)))
    assert str(said.value).endswith(end)


def test_a_run_that_was_stopped_while_it_filled_resumes_bit_for_bit(settings: TrainSettings, tmp_path: Path) -> None:
    whole = distill(cached(settings, tmp_path / "a"))
    cut, calls = cached(settings, tmp_path / "b"), iter([False] * 2 + [True])
    with pytest.raises(Interrupted):
        distill(cut, should_stop=lambda: next(calls))
    assert same(distill(cut.replace(resume_from_checkpoint="latest")), whole)


def test_rollouts_are_made_from_a_cache_too(settings: TrainSettings, tmp_path: Path, work: Work) -> None:
    asked = cached(settings, tmp_path, teacher_rollouts=8)
    fill(for_fill(asked))
    before = work.done["pictures"]
    distill(asked)
    assert work.done["pictures"] == before


def test_captions_alone_are_kept_without_pictures(settings: TrainSettings, tmp_path: Path, work: Work) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\none\n")
    result = fill(for_fill(cached(settings, tmp_path, data_dir=None, prompts_file=prompts)))
    assert (result.latents, result.captions) == (0, 3), "one, two and the empty caption"
    assert work.done == {"captions": 3}


@pytest.mark.parametrize(("change", "named"), [("base", "base_fingerprint"), ("data", "data_fingerprint")])
def test_a_stale_cache_is_refused(
    settings: TrainSettings, v_base: Path, tmp_path: Path, change: str, named: str
) -> None:
    asked = cached(settings, tmp_path)
    fill(for_fill(asked))
    if change == "base":
        other = asked.replace(base_model=str(v_base))
    else:
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("something else\n")
        other = asked.replace(data_dir=None, prompts_file=prompts)
    with pytest.raises(CheckpointError, match=rf"cache' holds encodings with {named} .*; choose another folder"):
        distill(other)


def test_entries_of_which_nothing_says_what_they_are_of_are_refused(
    settings: TrainSettings, v_base: Path, tmp_path: Path
) -> None:
    asked = cached(settings, tmp_path)
    fill(for_fill(asked))
    (tmp_path / "cache" / "cache.json").unlink()
    for run in (asked, asked.replace(base_model=str(v_base))):
        with pytest.raises(
            CheckpointError, match=r"cache' holds encodings, but no cache\.json .*; choose another folder, or remove"
        ) as said:
            fill(for_fill(run))
        assert "\n" not in str(said.value)
    assert not (tmp_path / "cache" / "cache.json").exists()


def test_every_process_says_on_its_own_disk_what_it_keeps_there(tmp_path: Path) -> None:
    """As on a second machine, whose folder the main process does not see."""
    there = {"held": "cache_dir {} holds encodings", "of": "base"}
    file = tmp_path / "cache" / "cache.json"
    for _ in range(2):
        claim(file, {"base": 1}, **there)
    with pytest.raises(CheckpointError, match=r"holds encodings with base 1, this run has 2"):
        claim(file, {"base": 2}, **there)


def test_of_two_that_find_a_new_folder_one_writes_and_the_other_compares(tmp_path: Path) -> None:
    file = tmp_path / "cache.json"
    said: list[CheckpointError] = []

    def second() -> None:
        try:
            claim(file, {"base": 2}, held="cache_dir {} holds encodings", of="base")
        except CheckpointError as error:
            said.append(error)

    with FileLock(tmp_path / ".cache.json.lock"):  # the first one is about to write
        late = threading.Thread(target=second)
        late.start()
        late.join(0.5)
        file.write_text('{"base": 1}')
    late.join(30)
    assert "with base 1, this run has 2" in str(said[0])


def test_a_damaged_file_is_named(settings: TrainSettings, tmp_path: Path) -> None:
    asked = for_fill(cached(settings, tmp_path))
    fill(asked)
    damaged = next((tmp_path / "cache").glob("latents-*"))
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-9])
    with pytest.raises(CheckpointError, match=f"{damaged.name}' cannot be read"):
        fill(asked)
    damaged.unlink()
    assert fill(asked).latents > 0
    assert damaged.read_bytes() == content
    (tmp_path / "cache" / "cache.json").write_text("[1, ")
    with pytest.raises(CheckpointError, match=r"cache.json cannot be read"):
        fill(asked)


def test_a_full_disk_is_one_line_and_leaves_nothing_half_there(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encoding, "SHARD", 4)
    files, honest = [], encoding.write_bytes_atomic

    def full_after_two(path: Path, content: bytes) -> Path:
        if len(files) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        files.append(path)
        return honest(path, content)

    monkeypatch.setattr(encoding, "write_bytes_atomic", full_after_two)
    flags = ["--base_model", str(settings.base_model), "--data_dir", str(settings.data_dir), "--device", "cpu"]
    cache = tmp_path / "cache"
    assert cli.main(["cache", *flags, "--cache_dir", str(cache), "--max_steps", "10", "--batch_size", "2"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: cache_dir '{cache}' cannot be written to: No space left on device; ")
    there = [path for path in cache.iterdir() if path.name != ".cache.json.lock"]
    assert sorted(there) == sorted([cache / "cache.json", *files])
    monkeypatch.setattr(encoding, "write_bytes_atomic", honest)
    assert cli.main(["cache", *flags, "--cache_dir", str(cache), "--max_steps", "10", "--batch_size", "2"]) == 0


def test_cache_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cache"]) == 2
    assert "cache_dir: nothing came; allowed: a path" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ the files


def test_shards_give_back_what_was_put_in_whatever_file_it_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "SHARD", 5)
    shards = Shards(tmp_path, "latents")
    values = torch.randn(17, 3, 2).half().float()
    asked: list[int] = []

    def some(keys: list[int]) -> Tensor:
        def compute(places: list[int]) -> Tensor:
            asked.extend(keys[place] for place in places)
            return values[[keys[place] for place in places]]

        shards.complete([str(key) for key in keys], compute)
        return shards.get([str(key) for key in keys], torch.device("cpu"))

    for keys in ([3, 1, 3], [1, 2], [4, 5, 6, 7, 8, 9, 10], [0, 16, 9], [1]):
        assert torch.equal(some(keys), values[keys])
    assert asked == [3, 1, 2, 4, 5, 6, 7, 8, 9, 10, 0, 16], "each once, in order"
    shards.flush()
    again = Shards(tmp_path, "latents")
    assert again.keys() == {str(key) for key in asked} and Shards(tmp_path, "captions").keys() == set()
    assert torch.equal(again.get(["16", "3"], torch.device("cpu")), values[[16, 3]])
    assert all(file["values"].dtype == torch.float16 for file in map(load_file, tmp_path.glob("*.safetensors")))


def test_what_another_process_has_written_is_not_computed_again(tmp_path: Path) -> None:
    """In the next epoch each of several processes comes to what the others have computed."""
    values, asked = torch.randn(6, 3, 2).half().float(), list[str]()
    one, other = Shards(tmp_path, "latents"), Shards(tmp_path, "latents")

    def some(shards: Shards, places: list[int]) -> None:
        keys = [str(place) for place in places]

        def compute(missing: list[int]) -> Tensor:
            asked.extend(keys[place] for place in missing)
            return values[[places[place] for place in missing]]

        shards.complete(keys, compute)

    some(one, [0, 1, 2])
    some(other, [3, 4, 5])
    one.flush()
    other.flush()
    some(one, [3])  # written after it had looked
    one.flush()
    some(one, [4, 5])
    some(other, [0, 1, 2])
    assert asked == ["0", "1", "2", "3", "4", "5", "3"]
    assert torch.equal(one.get(["4", "1"], torch.device("cpu")), values[[4, 1]])


@pytest.mark.parametrize("place", ["value", "key"])
def test_a_flipped_bit_is_named(tmp_path: Path, place: str) -> None:
    shards = Shards(tmp_path, "latents")
    values = torch.randn(6, 3, 2).half().float()
    keys = [f"{number:03d}" for number in range(6)]
    shards.complete(keys, lambda places: values[places])
    shards.flush()
    file = next(tmp_path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    begin = len(content) - values.numel() * 2
    if place == "value":
        content[begin + 4 * 6 * 2 + 5] ^= 4  # in the fifth of six
    else:
        content[content.index(b"004") + 2] ^= 3  # 004 is 007 now: somebody else's picture
    file.write_bytes(content)
    again, name = Shards(tmp_path, "latents"), "004" if place == "value" else "007"
    whole = [key for key in keys if key != "004"]
    assert torch.equal(again.get(whole, torch.device("cpu")), values[[0, 1, 2, 3, 5]])
    with pytest.raises(CheckpointError, match=f"{file.name}' is damaged at latents {name}: .*; remove the file"):
        again.get(["000", name], torch.device("cpu"))


def test_a_file_without_checksums_is_no_file_of_a_cache(tmp_path: Path) -> None:
    save_file({"values": torch.zeros(1, 2)}, tmp_path / "latents-0.safetensors", {"keys": '["1"]'})
    with pytest.raises(CheckpointError, match=r"latents-0.safetensors' is no file of a cache \(.*; remove it"):
        Shards(tmp_path, "latents")


def test_numbers_beyond_fp16_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="fp16 cannot hold"):
        Shards(tmp_path, "latents").complete(["1"], lambda places: torch.full((1, 2), 1e5))


def test_a_folder_that_cannot_be_written_to(settings: TrainSettings, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match="cannot be written to"):
        fill(for_fill(cached(settings, tmp_path)))


# ------------------------------------------------------------------------------------------- networks off the device


def test_a_network_that_rests_is_woken_by_what_needs_it(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(base, device="cpu")
    elsewhere = replace(backbone, device=torch.device("meta"))
    assert elsewhere.embed(["a"]).device.type == "meta"
    moved: list[str] = []
    monkeypatch.setattr(backbone.vae, "to", lambda place: moved.append(str(place)))
    elsewhere._wake(backbone.vae)
    elsewhere.rest(backbone.vae)
    backbone.rest(backbone.vae)
    assert moved == ["meta", "cpu"], "on the CPU there is nowhere to go"


def test_a_network_stays_while_a_cache_fills(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is new and what is there come in turns then, and it would travel for each."""
    rested: list[bool] = []
    backbone = load_backbone(base, device="cpu")
    monkeypatch.setattr(Backbone, "rest", lambda self, network: rested.append(network is self.text_encoder))
    monkeypatch.setattr(encoding, "QUIET", 3)
    cache = Cached(tmp_path, backbone, {})
    for captions in ("a", "a", "a", "b", "a", "b"):
        cache.embed([captions])
    assert rested == []
    cache.embed(["a"])
    assert rested == [True]
    cache.flush()
    Cached(tmp_path, backbone, {}).embed(["a"])
    assert rested == [True, True], "where all is there from the start it leaves at once"


@pytest.mark.gpu
def test_a_network_that_rests_leaves_the_gpu(base: Path) -> None:
    backbone = load_backbone(base, device="cuda")
    backbone.rest(backbone.vae)
    assert next(backbone.vae.parameters()).device.type == "cpu"
    assert backbone.decode(torch.zeros(1, 4, 8, 8)).device.type == "cuda"
