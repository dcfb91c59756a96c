"""Counted operations, measured rate, peak memory."""

from __future__ import annotations

import json
from mmap import mmap
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from fewstep import sd15
from fewstep.arithmetic import flops, peak_memory, peak_so_far
from fewstep.backbone import random_backbone
from fewstep.timing import affordable_side, matrix_rate, quick_matrix_rate


def test_products_convolutions_and_attention_are_counted() -> None:
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert flops(lambda: a @ b) == 2 * 3 * 5 * 7
    assert flops(lambda: nn.Conv2d(2, 4, 3, padding=1)(torch.randn(1, 2, 8, 8))) == 2 * 4 * 2 * 9 * 64
    q, k = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 9, 8)
    # Scores and their product with the values: 2 heads, 6 × 9 of them, 8 wide each time.
    assert flops(lambda: nn.functional.scaled_dot_product_attention(q, k, k)) == 2 * (2 * 2 * 6 * 9 * 8)


def test_stable_diffusions_counts_are_the_known_ones() -> None:
    parts = Path(sd15.__file__).parent
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((parts / "unet" / "config.json").read_text()))
        vae = AutoencoderKL.from_config(json.loads((parts / "vae" / "config.json").read_text()))
        latents, text, t = torch.zeros(1, 4, 64, 64), torch.zeros(1, 77, 768), torch.zeros(1, dtype=torch.long)
        assert flops(lambda: unet(latents, t, text)) == pytest.approx(0.803e12, rel=1e-3)
        assert flops(lambda: vae.decode(latents)) == pytest.approx(2.515e12, rel=1e-3)
        # At 4 steps the decoder is 44 % of the arithmetic.
        decode, forward = flops(lambda: vae.decode(latents)), flops(lambda: unet(latents, t, text))
        assert decode / (decode + 4 * forward) == pytest.approx(0.44, abs=0.005)
        assert flops(lambda: vae.encode(torch.zeros(1, 3, 512, 512))) == pytest.approx(1.117e12, rel=1e-3)


def test_a_network_costs_in_proportion_to_its_batch() -> None:
    torch.set_num_threads(1)
    base = random_backbone("tiny")
    network = base.denoiser()

    def forward(batch: int) -> int:
        shape = torch.randn(batch, 4, 8, 8), torch.full((batch,), 9), torch.randn(batch, 77, 32)
        return flops(lambda: network(*shape))

    assert forward(3) == 3 * forward(1) > 0


def test_the_rate_is_one_a_machine_can_have() -> None:
    cpu = torch.device("cpu")
    assert 1e8 < matrix_rate(cpu, torch.float32) < 1e15
    quick = quick_matrix_rate(cpu, torch.float32)
    assert 1e8 < quick == quick_matrix_rate(cpu, torch.float32), "measured once"


@pytest.mark.parametrize(
    ("wanted", "rate", "side"),
    # A core in fp32 at 70 GFLOP/s; without units for bf16 at 0.7; and whatever comes, not below the probe's own.
    [(1536, 70e9, 1536), (768, 70e9, 768), (1536, 0.7e9, 384), (768, 0.7e9, 384), (1536, 1e3, 384)],
)
def test_a_rate_is_measured_in_seconds_not_minutes(wanted: int, rate: float, side: int) -> None:
    assert affordable_side(wanted, 2 * 384**3 / rate) == side


def test_work_is_done_where_nobody_tells_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    done: list[str] = []
    assert peak_memory(lambda: done.append("cpu"), torch.device("cpu")) is None
    assert peak_memory(lambda: done.append("mps"), torch.device("mps")) is None
    assert done == ["cpu", "mps"]


def test_peak_memory_sees_what_is_gone_again() -> None:
    def work() -> None:
        with mmap(-1, 200_000_000) as region:  # straight from the system: no allocator has it lying about
            for _ in range(200):
                region.write(b"1" * 1_000_000)

    peak, again = peak_memory(work, torch.device("cpu")), peak_memory(lambda: None, torch.device("cpu"))
    if peak is not None and again is not None:  # Linux, where the peak may be reset
        assert peak - again > 150_000_000
        assert again <= (peak_so_far(torch.device("cpu")) or 0)


def test_what_was_freed_before_is_no_part_of_it() -> None:
    """Though it is kept for what comes next: see `allocator`."""
    before = [torch.ones(1 << 18) for _ in range(200)]
    held = peak_memory(lambda: None, torch.device("cpu"))
    del before
    freed = peak_memory(lambda: None, torch.device("cpu"))
    if held is not None and freed is not None:
        assert held - freed > 150_000_000
