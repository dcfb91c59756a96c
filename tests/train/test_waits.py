"""Nothing of an update waits for the device: no value is read back, and what is sent there is queued.

On a device that computes nothing, "meta": a value cannot be read from it at all, and each copy to it can be looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.backbone import Backbone, load_backbone
from fewstep.config import Start, TrainSettings
from fewstep.data import Batch
from fewstep.telemetry import LossByTimestep
from fewstep.train import start as begin
from fewstep.train.encoding import Cached, Encoder, Fresh
from fewstep.train.rollouts import Lesson, Teacher
from fewstep.transfer import upload

META = torch.device("meta")


class _Copies(TorchDispatchMode):
    """Refuses a copy from main memory that the host would wait for, and counts the others."""

    def __init__(self) -> None:
        super().__init__()
        self.queued = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if call is torch.ops.aten._to_copy.default:
            self._look(args[0].device, kwargs.get("device") or args[0].device, kwargs.get("non_blocking", False))
        if call is torch.ops.aten.copy_.default:
            self._look(args[1].device, args[0].device, (*args, *kwargs.values())[2:] == (True,))
        return call(*args, **kwargs)

    def _look(self, source: torch.device, target: torch.device, queued: bool) -> None:
        if source != target:
            assert queued, "a copy to the device that is waited for"
            self.queued += 1


@contextmanager
def nothing_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    honest = torch.tensor

    def made_here(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        assert device is None or torch.device(device).type == "cpu", "torch.tensor(..., device) is waited for, unseen"
        return honest(*args, **kwargs)

    with monkeypatch.context() as patched, _Copies() as copies:
        patched.setattr(torch, "tensor", made_here)
        patched.setattr(torch, "is_autocast_enabled", lambda kind: False)  # which knows no such device
        yield
    assert copies.queued


def opened(settings: TrainSettings, base: Path) -> tuple[Backbone, TrainSettings, Any]:
    """A base and its student on a device that computes nothing."""
    backbone = load_backbone(base, device="cpu")
    settings = begin.resolved(settings, backbone)
    method = begin.method_of(settings, backbone)
    schedule = copy(backbone.schedule)  # a new one would look at its values
    object.__setattr__(schedule, "alphas_cumprod", schedule.alphas_cumprod.to(META))
    elsewhere = replace(backbone, device=META, schedule=schedule)
    begin.student_of(settings, elsewhere)
    for network in (elsewhere.unet, elsewhere.vae, elsewhere.text_encoder):
        network.to(META)
    return elsewhere, settings, replace(method, schedule=schedule)


def batch_of(rows: int, side: int) -> Batch:
    each = tuple(range(rows))
    pictures = torch.zeros(rows, side, side, 3, dtype=torch.uint8)
    captions = tuple(f"picture {row}" for row in each)
    return Batch(update=0, micro=0, positions=each, items=each, pictures=pictures, captions=captions, replaced=())


@pytest.mark.parametrize(
    ("sampler", "start"), [("lcm", "data"), ("lcm", "teacher"), ("ddim", "student"), ("ddim", "noise")]
)
def test_a_lesson_and_what_is_learnt_from_it_wait_for_nothing(
    settings: TrainSettings, base: Path, monkeypatch: pytest.MonkeyPatch, sampler: Any, start: Start
) -> None:
    asked = settings.replace(
        sampler=sampler, start=start, num_ddim_steps=4, pairs_per_rollout=3, guidance_interval=(200, 900)
    )
    backbone, asked, method = opened(asked, base)
    shape = backbone.latent_shape(asked.resolution)
    losses = LossByTimestep(method.points, META)
    teacher = Teacher(backbone, Fresh(backbone), method, 0, shape, start)
    assert asked.resolution is not None
    batch = batch_of(6, asked.resolution)
    assert start != "data" or teacher.draw(batch).noised, "some pictures are noised"
    with nothing_waits(monkeypatch):
        lesson = teacher(batch)
        mean, each = lesson.loss(method, backbone.denoiser())
        mean.backward()
        losses.add(lesson.pairs.t, each)
    assert mean.device == META and len(lesson.pairs.t) > 6


def test_what_is_cached_or_kept_is_sent_without_waiting(
    settings: TrainSettings, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(base, device="cpu")
    encoder: Encoder = Cached(tmp_path, backbone, {})
    settings = begin.resolved(settings, backbone)
    method, shape = begin.method_of(settings, backbone), backbone.latent_shape(settings.resolution)
    assert settings.resolution is not None
    batch = batch_of(6, settings.resolution)
    lesson = Teacher(backbone, encoder, method, 0, shape)(batch)
    encoder.device = META  # type: ignore[misc]
    with nothing_waits(monkeypatch):
        assert encoder.embed(batch.captions).device == encoder.encode(batch, [0, 1]).device == META
    with nothing_waits(monkeypatch):
        there: Lesson = lesson.on(META)
    assert there.cond.device == there.pairs.x_t.device == there.pairs.target.device == there.pairs.weight.device == META
    assert there.pairs.t is lesson.pairs.t and there.pairs.rows is lesson.pairs.rows


def test_a_copy_that_is_waited_for_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.zeros(3)
    with pytest.raises(AssertionError, match="waited for"), nothing_waits(monkeypatch):
        here.to(META)
    with pytest.raises(AssertionError, match="unseen"), nothing_waits(monkeypatch):
        torch.tensor([1.0], device=META)
    with pytest.raises(RuntimeError), nothing_waits(monkeypatch):
        upload(here, META).sum().item()
