"""Several processes on the CPU, and Stable Diffusion 1.5's own architecture: what takes longer than a moment."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch.distributed import DistNetworkError

from fewstep import processes
from fewstep.backbone import Backbone, random_backbone
from fewstep.config import TrainSettings, settings_toml
from fewstep.errors import DataError, InputError, Interrupted
from fewstep.processes import join_processes, noticing_losses
from fewstep.train import distill, start
from tests.train.conftest import Heard
from tests.train.test_distill import assert_same, few_updates, weights


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(InputError, match="3 processes came for 2 GPUs; allowed is one process a GPU"):
        join_processes("auto")
    assert join_processes("cpu").num_processes == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the processes share the GPUs out")
def test_processes_that_would_each_take_themselves_for_the_only_one_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where a driver is broken: accelerate finds no GPU, and makes no group of them."""
    for name, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"2 processes came, and torch finds no GPUs .*; look at `fewstep doctor`"):
        join_processes("auto")


def test_what_a_launcher_was_told_is_heeded_or_said(settings: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = list[str]()
    assert start.as_launched(settings, heard.append) == settings and not heard
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    open_to_it = settings.replace(mixed_precision="auto")
    assert start.as_launched(open_to_it, heard.append).mixed_precision == "fp16"
    assert heard.pop() == (
        "accelerate was told gradient_accumulation_steps 4, and 2 counts: pass --gradient_accumulation_steps to fewstep"
    )
    assert start.as_launched(settings.replace(mixed_precision="bf16"), heard.append).mixed_precision == "bf16"
    assert heard[0] == "accelerate was told mixed_precision fp16, and bf16 counts: pass --mixed_precision to fewstep"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # a launcher's default says nothing
    assert start.as_launched(open_to_it, heard.append) == open_to_it


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP"])
def test_a_launcher_that_would_cut_the_model_up_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(InputError, match=f"ACCELERATE_USE_{name} is set.*accelerate launch --multi_gpu"):
        join_processes("auto")


def test_what_accelerate_lacks_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(**_: object) -> None:
        raise NotImplementedError("Using RTX 4000 series doesn't support faster communication. Set NCCL_P2P_DISABLE")

    monkeypatch.setattr(processes, "PartialState", refuses)
    with pytest.raises(InputError, match=r"RTX 4000 series.*Set NCCL_P2P_DISABLE"):
        join_processes("auto")


def test_two_processes_do_what_one_does(settings: TrainSettings, tmp_path: Path) -> None:
    """4 pictures each on two processes, or 8 on one, through the command that users type."""
    asked = few_updates(settings, tmp_path / "runs")
    one = distill(asked.replace(run_name="one", batch_size=8))
    (tmp_path / "settings.toml").write_text(settings_toml(asked.replace(batch_size=4)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "fewstep", "train", "--config", str(tmp_path / "settings.toml")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    # accelerate launch --cpu starts one process without a word: see that there are as many as were asked for.
    assert done.stdout.count("training: 3 steps of 8 pictures (4 x 1 micro-batches x 2 processes)") == 1
    run = tmp_path / "runs" / "whole"
    assert_same(weights(run / "lora" / "final"), weights(one.adapter), rtol=1e-3, atol=2e-6)
    split = distill(asked.replace(run_name="split", batch_size=4, gradient_accumulation_steps=2))
    assert_same(weights(split.adapter), weights(one.adapter), rtol=1e-3, atol=2e-6)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3, "only the first process writes"


@pytest.mark.parametrize(
    ("error", "became", "words"),
    [
        (RuntimeError("[…/gloo/transport/tcp/pair.cc:553] Connection closed by peer\nmore"), Interrupted, "peer\\)"),
        (DistNetworkError("connection reset"), Interrupted, "another process of this run has gone"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), DataError, "a process that loads"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError, "mat1"),
        (ValueError("gloo"), ValueError, "gloo"),
    ],
)
def test_a_process_that_died_is_told_from_a_bug(error: Exception, became: type[Exception], words: str) -> None:
    with pytest.raises(became, match=words) as caught, noticing_losses():
        raise error
    assert type(caught.value) is became and "\n" not in str(caught.value)


def stable_diffusion() -> Backbone:
    """Stable Diffusion 1.5's architecture; layers of as many inputs share their random numbers, which are few then."""
    backbone, shared = random_backbone("sd15", device="meta"), dict[int, torch.Tensor]()
    networks = [one.to_empty(device="cpu") for one in (backbone.unet, backbone.vae, backbone.text_encoder)]
    for value in sorted(chain(*(one.parameters() for one in networks)), key=torch.Tensor.numel, reverse=True):
        inputs = value[0].numel()
        if inputs not in shared:
            shared[inputs] = torch.randn(value.numel()) / inputs**0.5
        value.data = shared[inputs][: value.numel()].view_as(value)
    for positions in backbone.text_encoder.buffers():  # the only one there is
        positions.copy_(torch.arange(positions.shape[-1]))
    return replace(backbone, device=torch.device("cpu"))


@pytest.mark.slow
def test_sd15s_own_architecture_takes_a_step(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.opening.load_backbone", lambda *_, **__: stable_diffusion())
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
