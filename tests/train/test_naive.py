"""What an update computes is what the naive form of it does, which the benchmark of it is measured against."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.train_step import Job, attached, gradients, naive, ours
from fewstep.backbone import load_backbone
from fewstep.data import Batch
from fewstep.methods.kstep import KStep
from fewstep.train.encoding import Cached, Fresh
from fewstep.train.rollouts import Teacher

COUNT, SIDE = 5, 64


@pytest.fixture(scope="module")
def job(base: Path) -> Job:
    backbone = load_backbone(base, device="cpu")
    method = KStep(schedule=backbone.schedule, step_counts=(1, 2, 4), num_ddim_steps=4, guidance=4.0)
    second = copy.deepcopy(backbone.unet)
    each, random = tuple(range(COUNT)), torch.Generator().manual_seed(0)
    batch = Batch(
        update=0,
        micro=0,
        positions=each,
        items=each,
        pictures=torch.randint(256, (COUNT, SIDE, SIDE, 3), generator=random, dtype=torch.uint8),
        captions=tuple(f"a picture of {number} things" for number in each),
        replaced=(),
    )
    job = Job(backbone, method, batch, attached(backbone), second)
    assert 0 < len(job.draws.noised) < COUNT, "some start from pictures, some from noise"
    return job


@pytest.mark.parametrize("cached", [False, True])
def test_an_update_is_the_naive_one_in_loss_and_gradients(job: Job, tmp_path: Path, cached: bool) -> None:
    loss, wanted = gradients(job, naive)
    assert loss is not None and wanted.abs().max() > 0
    encoder = Cached(tmp_path, job.backbone, {}) if cached else Fresh(job.backbone)
    own, found = gradients(job, lambda one: ours(one, encoder=encoder))
    assert own is not None
    tolerance = 2e-3 if cached else 1e-4  # what is cached is rounded to fp16
    torch.testing.assert_close(own, loss, rtol=tolerance, atol=0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


def test_more_pairs_of_a_rollout_begin_with_those_of_one(job: Job) -> None:
    def lesson(pairs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        method, shape = replace(job.method, pairs_per_rollout=pairs), job.backbone.latent_shape(SIDE)
        found = Teacher(job.backbone, Fresh(job.backbone), method, 0, shape)(job.batch).pairs
        return found.x_t, found.target, found.t

    for one, more in zip(lesson(1), lesson(4), strict=True):
        assert len(more) > len(one) == COUNT
        torch.testing.assert_close(more[:COUNT], one)
