"""A benchmark's record made by hand, with figures that are easy to recognise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from fewstep.arms import Arm, base_arm, faster_arm, real_arm, student_arm, teacher_arm
from fewstep.records import (
    SCHEMA_VERSION,
    ArmSummary,
    ArmTiming,
    BenchmarkRecord,
    FloorRecord,
    Frechet,
    Interval,
    PictureScore,
    Spread,
)
from fewstep.report import arm_folder, picture_path, save_picture

PROMPTS = ("a red house", "<script>alert(1)</script> & two birds")


def interval(value: float, half: float) -> Interval:
    return Interval(
        value=value, low=value - half, high=value + half, standard_error=half / 1.96, method="bootstrap over prompts"
    )


def timing(seconds: float, arm: Arm) -> ArmTiming:
    def spread(value: float) -> Spread:
        return Spread(median=value, iqr=value / 10, repeats=5)

    return ArmTiming(
        batch_size=1,
        end_to_end=spread(seconds),
        text=spread(0.001),
        unet_forward=spread(seconds / (2 * max(1, arm.steps))),
        unet_calls=arm.steps,
        decode=spread(seconds / 4),
        flops=round(1e9 * seconds),
        decode_flops=round(4e8 * seconds),
        peak_memory_bytes=321_000_000,
        precision="bfloat16" if arm.option == "bf16" else "float32",
        matrix_rate=4e9,
    )


def summary(arm: Arm, seconds: float, right: float, alignment: float, **changes: object) -> ArmSummary:
    plain = ArmSummary(
        arm=arm,
        prompts=2,
        pictures=4,
        time_per_image_s=seconds,
        speedup_vs_baseline=2.0 / seconds,
        timings=(timing(seconds, arm),),
        alignment=interval(alignment, 0.5),
        alignment_std=1.0,
        floor=interval(20.0, 0.2),
        delta_alignment=interval(alignment - 33, 0.4),
        retention_raw=interval(alignment / 33, 0.01),
        retention_corrected=interval((alignment - 20) / 13, 0.03),
        all_right=interval(right, 0.05),
        delta_all_right=interval(right - 0.56, 0.05),
        attributes={"sky": interval(0.9, 0.02), "birds": interval(0.7, 0.02)},
        frechet=Frechet(
            through_vae=interval(3.2, 0.4),
            raw=interval(4.1, 0.4),
            difference=interval(0.3, 0.1),
            pictures=4,
            references=10,
            dimensions=64,
        ),
        delta_attributes={"sky": interval(-0.01, 0.02), "birds": interval(-0.1, 0.03)},
        distances={"kid": interval(0.012, 0.003), "precision": interval(0.8, 0.1)},
        diversity=interval(0.9, 0.05),
        faithfulness=interval(1.4, 0.1),
        saturation=(1.0, 0.99, 1.02, 1.01),
        mean_saturation=Interval(value=1.005, low=0.98, high=1.03),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def record() -> BenchmarkRecord:
    arms = {
        "teacher-50": summary(teacher_arm(50, 7.5), 2.0, 0.56, 33.0),
        "student-4": summary(
            student_arm(4), 0.1, 0.55, 32.5, control="base-4", gain_all_right=interval(0.23, 0.05)
        ),
        "base-4": summary(base_arm(4), 0.1, 0.32, 27.0),
    }  # fmt: skip
    return BenchmarkRecord(
        schema_version=SCHEMA_VERSION,
        created="2026-01-01T00:00:00+00:00",
        settings={"seed": 42, "prompt": "<b>bold</b>"},
        versions={"torch": "2.13.0"},
        machine={"device": "A CPU of 2 cores", "precision": "float32", "threads": "2"},
        base={"name": "a base", "why": "asked for", "fingerprint": "00"},
        adapter={"source": "lora/final"},
        adapters={},
        alignment_model="a/clip",
        preference_model=None,
        prompts=PROMPTS,
        floor=FloorRecord(value=20.0, arm="teacher-50", by_arm={"teacher-50": 20.0}),
        feature_extractor="a/clip",
        warnings=("a <i>warning</i>",),
        summary=arms,
        scores=(
            PictureScore(
                arm="student-4", prompt_idx=0, picture_idx=1, clip_align_x100=31.0, clip_floor_x100=20.0,
                preference=None, right={"sky": True},
            ),
        ),
    )  # fmt: skip


def with_real(found: BenchmarkRecord) -> BenchmarkRecord:
    """The same benchmark on a base that has real pictures."""
    frechet = Frechet(
        through_vae=interval(2.5, 0.3), raw=interval(2.4, 0.3), difference=interval(-0.4, 0.1), pictures=4,
        references=10, dimensions=64,
    )  # fmt: skip
    real = summary(
        real_arm(), 1.0, 0.97, 34.0, time_per_image_s=None, speedup_vs_baseline=None, timings=(), frechet=frechet,
        distances={"kid": interval(-0.0002, 0.0004)}, faithfulness=None,
    )  # fmt: skip
    return replace(found, summary={**found.summary, "real": real})


def with_options(found: BenchmarkRecord) -> BenchmarkRecord:
    """The same benchmark with two options beside the student: one that is faster, one that is worse."""

    def beside(option: str, seconds: float, change: float) -> ArmSummary:
        return summary(
            faster_arm(student_arm(4), option), seconds, 0.55 + change, 32.5, control="base-4", plain="student-4",
            speedup_vs_plain=0.1 / seconds, change_all_right=interval(change, 0.01),
            change_alignment=interval(0.0, 0.2),
        )  # fmt: skip

    faster = {arm.arm.id: arm for arm in (beside("fused", 0.08, 0.0), beside("bf16", 0.125, -0.2))}
    return replace(found, summary={**found.summary, **faster})


def without_answers(found: BenchmarkRecord) -> BenchmarkRecord:
    """The same benchmark on a base without an answer key."""
    bare = {
        name: replace(
            arm, all_right=None, delta_all_right=None, gain_all_right=None, attributes={}, frechet=None,
            gain_alignment=interval(5.5, 0.5) if arm.control else None,
        )
        for name, arm in found.summary.items()
    }  # fmt: skip
    return replace(found, summary=bare)


def pictures(folder: Path, found: BenchmarkRecord, *, side: int = 32, count: int = 2) -> dict[str, Path]:
    """A picture for every arm, prompt and number; arm id to folder."""
    random = np.random.default_rng(0)
    folders = {name: arm_folder(folder, name) for name in found.summary}
    for target in folders.values():
        for prompt in range(len(found.prompts)):
            for number in range(count):
                save_picture(
                    picture_path(target, prompt, number), random.integers(0, 256, (side, side, 3), dtype=np.uint8)
                )
    return folders
