"""How much each stage of `fewstep pretrain` draws and trains, by `--size`."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.scenes.loop import Plan

STAGES = ("vae", "vae-refine", "judges", "denoiser-half", "denoiser", "refine-half", "refine")
"""One goes on where the one before stopped; a half is the first one, so that none takes longer than 90 minutes."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much each stage draws and trains."""

    drawings: int
    latents: int
    flawed: int
    reconstructed: int
    tested: int
    tested_flawed: int
    swept: int
    proved: int
    larger_on_gpu: int  # how many times as large a batch
    minutes: dict[str, int]  # by stage, on two cores without bf16 matrix units; with them about half of that
    vae: Plan
    judge: Plan
    alignment: Plan
    text: Plan
    denoiser: Plan
    refine: Plan


SIZES = {
    "full": Sizes(
        drawings=20_000,
        latents=40_000,
        flawed=6_000,
        reconstructed=10_000,
        tested=2_000,
        tested_flawed=600,
        swept=200,
        proved=256,
        larger_on_gpu=8,
        minutes={
            "vae": 80,
            "vae-refine": 80,
            "judges": 40,
            "denoiser-half": 75,
            "denoiser": 65,
            "refine-half": 80,
            "refine": 90,
        },
        vae=Plan(steps=4_200, batch_size=8, parts=2, learning_rate=1e-3, beta2=0.999, ema_decay=0.999),
        judge=Plan(steps=2_200, batch_size=64, parts=2, learning_rate=2e-3),
        alignment=Plan(steps=500, batch_size=96, learning_rate=1e-3),
        text=Plan(steps=400, batch_size=64, learning_rate=1e-3, ema_decay=0.98),
        denoiser=Plan(steps=4_900, batch_size=64, parts=2, learning_rate=2e-3, ema_decay=0.999),
        refine=Plan(steps=6_000, batch_size=64, parts=2, learning_rate=1.5e-3, ema_decay=0.999),
    ),
    "tiny": Sizes(
        drawings=64,
        latents=96,
        flawed=24,
        reconstructed=32,
        tested=16,
        tested_flawed=12,
        swept=2,
        proved=4,
        larger_on_gpu=1,
        minutes=dict.fromkeys(STAGES, 1),
        vae=Plan(steps=20, batch_size=4, parts=2, learning_rate=2e-3, ema_decay=0.9),
        judge=Plan(steps=10, batch_size=8, parts=2, learning_rate=2e-3, ema_decay=0.9),
        alignment=Plan(steps=6, batch_size=8, learning_rate=1e-3, ema_decay=0.9),
        text=Plan(steps=6, batch_size=8, learning_rate=1e-3, ema_decay=0.9),
        denoiser=Plan(steps=20, batch_size=8, parts=2, learning_rate=1e-3, ema_decay=0.9),
        refine=Plan(steps=10, batch_size=8, parts=2, learning_rate=1e-3, ema_decay=0.9),
    ),
}
