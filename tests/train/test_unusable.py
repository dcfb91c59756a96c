"""What one of several processes meets is known to all, and what they do not have alike is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fewstep import processes
from fewstep.data.loader import Noted, Replaced
from fewstep.errors import DataError, InputError
from fewstep.train import unusable
from fewstep.train.start import loading_workers
from fewstep.train.unusable import Unusable


def bad(name: str) -> Replaced:
    return Replaced(name, "damaged")


def with_others(monkeypatch: pytest.MonkeyPatch, *theirs: Sequence[Any]) -> None:
    """What other processes tell, at one meeting after another."""
    told = iter(theirs)
    monkeypatch.setattr(unusable, "gather_object", lambda own: [*own, *next(told)])


def test_what_others_meet_is_named_once_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with_others(monkeypatch, [bad("b"), Noted("odd ones"), bad("a")], [bad("b")], [bad("c")])
    known = Unusable(2, said.append)
    known.meet([bad("a")])
    assert said == ["a: damaged; another picture took its place"]
    known.share()
    known.share()
    assert said[1:] == ["b: damaged; another picture took its place", "odd ones"]
    with pytest.raises(DataError, match=r"3 pictures turned out to be no good.*c: damaged.*allowed is 2 more"):
        known.share()


def test_the_first_difference_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"seed": "1", "guidance_scale": "3.0"}
    monkeypatch.setattr(processes, "gather_object", lambda mine: [*mine, own, {**own, "guidance_scale": "9.0"}])
    with pytest.raises(InputError, match=r"guidance_scale is 9\.0 in process 2 and 3\.0 in process 0; allowed is the"):
        processes.require_agreement(own)
    monkeypatch.setattr(processes, "gather_object", lambda mine: [*mine, own])
    processes.require_agreement(own)


def test_a_folder_that_is_not_one_for_all_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def of_two(first: bool) -> Any:
        return SimpleNamespace(num_processes=2, is_main_process=first, wait_for_everyone=lambda: None)

    marks = list[dict[str, str]]()
    monkeypatch.setattr(processes, "require_agreement", lambda facts: marks.append(dict(facts)))
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    processes.require_one_folder(tmp_path / "there", "teacher_cache", of_two(first=False))
    processes.require_one_folder(tmp_path / "here", "teacher_cache", of_two(first=True))
    (one,), (other,) = (mark.items() for mark in marks)
    assert one[0] == other[0] == "teacher_cache (by a mark in it)" and one[1] != other[1]
    assert not any((tmp_path / "here").iterdir())


def test_cores_are_shared_out_among_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(128)), raising=False)
    monkeypatch.setenv("WORLD_SIZE", "64")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    cuda, cpu = (type("Device", (), {"type": kind}) for kind in ("cuda", "cpu"))
    assert loading_workers(cuda) == 8 and loading_workers(cpu) == 0  # type: ignore[arg-type]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert loading_workers(cuda) == 4  # type: ignore[arg-type]
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert loading_workers(cuda) == 8  # type: ignore[arg-type]
