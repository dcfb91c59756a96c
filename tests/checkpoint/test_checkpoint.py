"""Checkpoints: whole or not there, exact, without pickle, and nothing lost in silence."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep import checkpoint
from fewstep.checkpoint import Record, Stateful, load, recorded, recorded_base, recorded_steps, resolve, save, verify
from fewstep.errors import CheckpointError
from tests.faults.harness import HARMS, harm

RECORD = Record(
    step=3,
    base_model="someone/base",
    base_fingerprint="0123",
    step_counts=(1, 2, 4, 8),
    revision="main",
    more={"rank": 4, "loss": 0.1},
)
SETTINGS = 'base_model = "someone/base"\nnum_inference_steps = [1, 2, 4, 8]\n'


class Box:
    """Any state."""

    def __init__(self, state: Mapping[Any, Any] | None = None) -> None:
        self.state: Any = state

    def state_dict(self) -> Mapping[Any, Any]:
        return self.state

    def load_state_dict(self, state: Any, /) -> None:
        self.state = state


def write_adapter(folder: Path) -> None:
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"weights" * 100)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")


def make(folder: Path, stateful: Mapping[str, Stateful] | None = None, record: Record = RECORD) -> Path:
    return save(folder, write_adapter, settings=SETTINGS, record=record, stateful=stateful)


def test_the_layout_is_the_contracts(tmp_path: Path) -> None:
    folder = make(
        tmp_path / "lora" / "checkpoint-3", {"optimizer": Box({"step": torch.ones(2)}), "progress": Box({"n": 3})}
    )
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "pytorch_lora_weights.safetensors",
        "scheduler/scheduler_config.json",
        "settings.toml",
        "manifest.json",
        "resume/optimizer.safetensors",
        "resume/state.json",
    }
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint-3"]
    listed = json.loads((folder / "manifest.json").read_text())
    assert listed["files"].keys() == files - {"manifest.json"} and listed["schema_version"] == 3
    final = make(tmp_path / "lora" / "final")
    assert not (final / "resume").exists()
    assert verify(folder) == verify(final) == recorded(final) == RECORD


def train(updates: int, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, seed: int) -> None:
    for update in range(updates):
        generator = torch.Generator().manual_seed(seed + update)
        loss = sum(((p - torch.randn(p.shape, generator=generator)) ** 2).sum() for p in parameters)
        assert isinstance(loss, Tensor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def fresh() -> tuple[list[nn.Parameter], torch.optim.AdamW, torch.optim.lr_scheduler.LRScheduler]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]
    groups = [{"params": parameters[:1], "lr": 0.1 / 3}, {"params": parameters[1:], "weight_decay": 0.03}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), amsgrad=True)
    return parameters, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


class Parameters:
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters

    def state_dict(self) -> dict[int, Tensor]:
        return dict(enumerate(self.parameters))

    def load_state_dict(self, state: Mapping[int, Tensor], /) -> None:
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters):
                parameter.copy_(state[number])


def test_adamw_resumes_bit_for_bit(tmp_path: Path) -> None:
    parameters, optimizer, schedule = fresh()
    train(5, parameters, optimizer, seed=1)
    schedule.step()
    make(tmp_path / "c", {"adapter": Parameters(parameters), "optimizer": optimizer, "schedule": schedule})
    train(5, parameters, optimizer, seed=2)

    others, another, rate = fresh()
    record = load(tmp_path / "c", {"adapter": Parameters(others), "optimizer": another, "schedule": rate})
    assert record.step == 3 and rate.last_epoch == schedule.last_epoch == 1
    assert (
        another.param_groups[0]["betas"] == (0.9, 0.95)
        and another.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    )
    train(5, others, another, seed=2)
    assert all(torch.equal(one, two) for one, two in zip(parameters, others, strict=True))
    for number, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, another.state_dict()["state"][number][key]) for key, value in state.items())


def test_any_nested_state_comes_back_exactly(tmp_path: Path) -> None:
    values = random.Random(0)
    state = {
        "floats": [values.uniform(-1e9, 1e9) for _ in range(50)] + [math.pi, 1e-310, -0.0, math.inf, -math.inf],
        "nested": {1: (True, None, "text", {"x": []}), "1": (), 2: {"deep": [torch.arange(3)]}},
        "tensors": {
            "rng": torch.get_rng_state(),
            "half": torch.randn(3).half(),
            "brain": torch.randn(2, 2).bfloat16(),
            "scalar": torch.tensor(7.5, dtype=torch.float64),
            "empty": torch.zeros(0, 3),
            "view": torch.arange(12.0).reshape(3, 4).T,
        },
        "a.b": torch.ones(1),
        "a": {"b": torch.zeros(1)},
    }
    shared = torch.ones(4)
    state["shared"] = [shared, shared[:2]]
    back = Box()
    make(tmp_path / "c", {"box": Box(state)})
    load(tmp_path / "c", {"box": back})

    def same(one: Any, two: Any) -> bool:
        if isinstance(one, Tensor):
            return isinstance(two, Tensor) and one.dtype == two.dtype and torch.equal(one, two)
        if isinstance(one, dict):
            return list(one) == list(two) and all(same(value, two[key]) for key, value in one.items())
        if isinstance(one, list | tuple):
            return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
        return type(one) is type(two) and repr(one) == repr(two)

    assert same(state, back.state)


def test_what_cannot_be_held_is_refused_and_nothing_appears(tmp_path: Path) -> None:
    for state in ({"x": {1, 2}}, {"x": print}, {(1, 2): 3}, {"x": torch.float32}):
        with pytest.raises(CheckpointError, match="allowed are"):
            make(tmp_path / "c", {"box": Box(state)})
    assert list(tmp_path.iterdir()) == []


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    folder = make(tmp_path / "c", {"optimizer": fresh()[1], "box": Box({"x": torch.ones(1)})})
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".safetensors", ".json", ".toml"}


def test_a_checkpoint_that_is_not_proven_is_not_published(tmp_path: Path) -> None:
    old = make(tmp_path / "final")

    def fail(folder: Path) -> None:
        write_adapter(folder)
        raise CheckpointError("the adapter is not the student")

    with pytest.raises(CheckpointError, match="not the student"):
        save(tmp_path / "final", fail, settings="x = 1\n", record=RECORD)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (old / "settings.toml").read_text() == SETTINGS
    verify(old)
    replaced = save(tmp_path / "final", write_adapter, settings="x = 1\n", record=RECORD)
    assert (replaced / "settings.toml").read_text() == "x = 1\n"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_disk_without_room_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make(tmp_path / "lora" / "checkpoint-2")
    free = 2**20 + 2_000  # what is set aside, and room for one adapter or for the state
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free))
    state = {"box": Box({"x": [torch.ones(100), {"y": torch.ones(100)}]})}
    with pytest.raises(CheckpointError, match=r"checkpoint-3 cannot .* needs 1,052,376 bytes, 1,050,576 are free; "):
        save(
            tmp_path / "lora" / "checkpoint-3",
            lambda folder: pytest.fail("it was written"),
            settings=SETTINGS,
            record=RECORD,
            stateful=state,
            adapter_bytes=1_500,
        )
    assert [path.name for path in old.parent.iterdir()] == ["checkpoint-2"]
    verify(old)
    make(tmp_path / "lora" / "checkpoint-3", state)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    old = make(tmp_path / "lora" / "best")

    def fail(folder: Path) -> None:
        write_adapter(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match=r"best cannot be written .*: No space left on device; what was saved"):
        save(old, fail, settings="x = 1\n", record=RECORD)
    assert [path.name for path in old.parent.iterdir()] == ["best"]
    verify(old)
    with pytest.raises(CheckpointError, match=r"checkpoint-1 cannot be written .*: No such file"):
        make(tmp_path / "gone" / "lora" / "checkpoint-1")
    assert not (tmp_path / "gone").exists(), "a run's folder that was taken away is not made again"


def test_leftovers_of_a_killed_run_do_no_harm(tmp_path: Path) -> None:
    partial = tmp_path / "lora" / ".checkpoint-3.partial"
    partial.mkdir(parents=True)
    (partial / "pytorch_lora_weights.safetensors").write_bytes(b"half")
    assert resolve(tmp_path, "auto") is None
    make(tmp_path / "lora" / "checkpoint-3")
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["checkpoint-3"]


def test_everything_is_synchronised_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synchronised: list[str] = []
    real = os.fsync

    def note(handle: int) -> None:
        synchronised.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", note)
    folder = make(tmp_path / "checkpoint-3", {"box": Box({"x": torch.ones(1)})})
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    partial = tmp_path / ".checkpoint-3.partial"
    assert {str(partial / name) for name in names} | {str(partial)} <= set(synchronised)
    assert synchronised[-1] == str(tmp_path)


FILES = (
    "pytorch_lora_weights.safetensors",
    "scheduler/scheduler_config.json",
    "settings.toml",
    "manifest.json",
    "resume/box.safetensors",
    "resume/state.json",
)


@pytest.mark.parametrize("how", HARMS)
@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_with_a_damaged_file_is_not_loaded(tmp_path: Path, name: str, how: str) -> None:
    folder = make(tmp_path / "c", {"box": Box({"x": torch.ones(8)})})
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == set(FILES)
    harm(folder / name, how)
    box = Box("untouched")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError) as caught:
        load(folder, {"box": box})
    assert str(folder) in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)
    assert box.state == "untouched"


def test_every_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    folder = make(tmp_path / "c")
    manifest = folder / "manifest.json"
    content = manifest.read_bytes()
    for place, byte in enumerate(content):
        manifest.write_bytes(content[:place] + bytes([byte ^ 1 << place % 8]) + content[place + 1 :])
        with pytest.raises(CheckpointError):
            verify(folder)
    manifest.write_bytes(content)
    verify(folder)


@pytest.mark.parametrize(
    ("content", "words"), [("[]", "no JSON object"), ('{"schema_version": 99, "files": {}}', "this release reads 3")]
)
def test_a_manifest_of_another_kind_is_refused(tmp_path: Path, content: str, words: str) -> None:
    folder = make(tmp_path / "c")
    (folder / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=words):
        verify(folder)


def test_asked_for_but_missing_raises_and_so_does_the_reverse(tmp_path: Path) -> None:
    folder = make(tmp_path / "c", {"optimizer": Box({"a": 1}), "ema": Box({"a": 1})})
    box = Box("untouched")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="holds no scaler"):
        load(folder, {"optimizer": box, "ema": Box(), "scaler": Box()})
    with pytest.raises(CheckpointError, match="also holds ema, which nothing asks for"):
        load(folder, {"optimizer": box})
    assert box.state == "untouched"
    with pytest.raises(CheckpointError, match="nothing to resume from"):
        load(make(tmp_path / "final"), {"optimizer": box})
    with pytest.raises(ValueError, match="names an object"):
        make(tmp_path / "d", {"../x": box})


def test_resolving(tmp_path: Path) -> None:
    assert resolve(tmp_path, "auto") is None
    with pytest.raises(CheckpointError, match="'auto' for that or a fresh start"):
        resolve(tmp_path, "latest")
    folders = {step: make(tmp_path / "lora" / f"checkpoint-{step}") for step in (500, 1000, 9)}
    make(tmp_path / "lora" / "final")
    (tmp_path / "lora" / "checkpoint-x").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(tmp_path, "latest") == resolve(tmp_path, "auto") == folders[1000]
        assert resolve(tmp_path, str(folders[9])) == folders[9]
    assert checkpoint.checkpoints(tmp_path) == [folders[1000], folders[500], folders[9]]

    (folders[1000] / "settings.toml").write_text("other = 1\n")
    heard: list[str] = []
    assert resolve(tmp_path, "latest", warn=heard.append) == folders[500]
    assert (
        len(heard) == 1 and "passed over" in heard[0] and "checkpoint-1000" in heard[0] and "settings.toml" in heard[0]
    )
    with pytest.warns(UserWarning, match="passed over"):
        assert resolve(tmp_path, "auto") == folders[500]
    with pytest.raises(CheckpointError, match=r"settings\.toml is not the file"):
        resolve(tmp_path, folders[1000])
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(tmp_path, tmp_path / "nowhere")
    for step in (500, 9):
        (folders[step] / "manifest.json").unlink()
    for which in ("auto", "latest"):
        with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
            resolve(tmp_path, which, warn=heard.append)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [(0, 0, [5, 10, 15, 20, 25]), (1, 0, [25]), (2, 10, [10, 20, 25]), (9, 0, [5, 10, 15, 20, 25])],
)
def test_old_checkpoints_go_and_the_finished_adapter_stays(
    tmp_path: Path, keep_last: int, keep_every: int, left: list[int]
) -> None:
    for step in (5, 10, 15, 20, 25):
        make(tmp_path / "lora" / f"checkpoint-{step}")
    make(tmp_path / "lora" / "final")
    removed = checkpoint.prune(tmp_path, keep_last=keep_last, keep_every=keep_every)
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == sorted(
        ["final", *(f"checkpoint-{step}" for step in left)]
    )
    assert len(removed) == 5 - len(left)
    assert resolve(tmp_path, "latest") == tmp_path / "lora" / "checkpoint-25"


def test_an_adapter_remembers_its_base_and_its_step_counts(tmp_path: Path) -> None:
    folder = make(tmp_path / "final")
    assert recorded_base(folder) == "someone/base" and recorded_steps(folder) == (1, 2, 4, 8)
    (folder / "manifest.json").unlink()
    assert recorded(folder) is None
    assert recorded_base(folder) == "someone/base" and recorded_steps(folder) == (1, 2, 4, 8)
    (folder / "settings.toml").unlink()
    assert recorded_base(folder) is None and recorded_steps(folder) is None
    (folder / "manifest.json").write_text('{"name": "a browser extension"}')
    assert recorded_base(folder) is None
    (folder / "settings.toml").write_text("a browser's = own")
    assert recorded_base(folder) is None and recorded_steps(folder) is None
    (folder / "settings.toml").write_text("base_model = broken")
    with pytest.raises(CheckpointError, match="cannot be read"):
        recorded_base(folder)


@pytest.mark.parametrize("content", ["[]", "[" * 100_000, '"text"', "not JSON", "", '{"name": "a browser extension"}'])
def test_a_manifest_that_is_not_ours_is_none_for_drawing(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    assert recorded(tmp_path) is None and recorded_base(tmp_path) is None and recorded_steps(tmp_path) is None
    with pytest.raises(CheckpointError):
        verify(tmp_path)


def test_our_own_broken_manifest_is_an_error_for_drawing(tmp_path: Path) -> None:
    manifest = make(tmp_path / "final") / "manifest.json"
    whole = manifest.read_bytes()
    harms = (whole[: len(whole) // 2], whole + b"}", whole.replace(b"{", b"[", 1), whole.replace(b"{", b"{\xff", 1))
    for content in (*harms, whole.replace(b'"step":', b'"stop":')):
        manifest.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            recorded(tmp_path / "final")
