"""What saves memory changes no number that matters."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fewstep.arithmetic import kept_for_backward
from fewstep.backbone import Backbone, threads
from fewstep.config import TrainSettings
from fewstep.data import Batch
from fewstep.methods.kstep import KStep
from fewstep.reporting import SILENT
from fewstep.train import start
from fewstep.train.encoding import Fresh
from fewstep.train.rollouts import Lesson, Teacher


@dataclass
class Prepared:
    """A base with a student that has learnt something at random, and a lesson for it."""

    backbone: Backbone
    method: KStep
    parameters: list[nn.Parameter]
    lesson: Lesson

    def loss(self) -> Tensor:
        return self.lesson.loss(self.method, self.backbone.denoiser())[0]

    def kept(self) -> int:
        return kept_for_backward(self.loss, self.backbone.unet.parameters())


def prepared(settings: TrainSettings) -> Prepared:
    random = torch.Generator().manual_seed(1)
    backbone, resolved = start.open_base(settings, "cpu", None, SILENT)
    parameters, method = start.student_of(resolved, backbone), start.method_of(resolved, backbone)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.02 * torch.randn(parameter.shape, generator=random)
    positions = (0, 1, 2)
    pictures = torch.randint(256, (3, 64, 64, 3), dtype=torch.uint8, generator=random)
    batch = Batch(
        update=0, micro=0, positions=positions, items=positions, pictures=pictures, captions=("a", "b", "c"),
        replaced=(),
    )  # fmt: skip
    return Prepared(backbone, method, parameters, Teacher(backbone, Fresh(backbone), method, 3, (4, 8, 8))(batch))


def test_checkpointed_gradients_are_the_same_and_less_is_kept_for_them(settings: TrainSettings) -> None:
    whole, frugal = prepared(settings), prepared(settings.replace(gradient_checkpointing=True))
    assert torch.equal(whole.lesson.pairs.target, frugal.lesson.pairs.target), "the teacher is as it was"
    for one in (whole, frugal):
        one.loss().backward()
    assert torch.equal(whole.loss(), frugal.loss())
    for mine, theirs in zip(frugal.parameters, whole.parameters, strict=True):
        assert theirs.grad is not None and theirs.grad.abs().sum() > 0
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    assert frugal.kept() < 0.5 * whole.kept()


def test_nothing_is_checkpointed_in_the_teachers_forwards(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    frugal = prepared(settings.replace(gradient_checkpointing=True))

    def checkpointed(*_: object, **__: object) -> None:
        raise AssertionError("a forward was checkpointed")

    monkeypatch.setattr("torch.utils.checkpoint.checkpoint", checkpointed)
    with torch.no_grad():
        frugal.loss()
    with pytest.raises(AssertionError, match="was checkpointed"):
        frugal.loss()


def test_a_large_vae_takes_one_picture_at_a_time_and_says_the_same(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, _ = start.open_base(settings, "cpu", None, SILENT)
    monkeypatch.setattr(threads, "SMALL", 0)
    large, _ = start.open_base(settings, "cpu", None, SILENT)
    assert large.vae.use_slicing and not small.vae.use_slicing
    pixels = torch.rand(3, 3, 64, 64) * 2 - 1
    torch.testing.assert_close(large.encode(pixels), small.encode(pixels), rtol=1e-4, atol=1e-5)
    latents = torch.randn(3, 4, 8, 8)
    torch.testing.assert_close(large.decode(latents), small.decode(latents), rtol=1e-4, atol=1e-5)
