"""Settings of the commands about the embedded base: `fewstep demo` and `fewstep pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fewstep.config.base import BaseModelSettings, Settings
from fewstep.config.kinds import (
    Count,
    Folder,
    Names,
    Precision,
    SolverSteps,
    Span,
    StepCounts,
    StudentSteps,
    TeacherSteps,
)


class PretrainSettings(Settings):
    """Rebuild the embedded base and its judges from nothing."""

    mixed_precision: Precision = Field(
        "auto",
        description="Precision to train in: no or bf16; auto is bf16 on a GPU and on processors with matrix units for "
        "it, else no.",
    )

    output_dir: Folder = Field(Path("./scenes_base"), description="Folder for the weights; a stopped run goes on here.")
    size: Literal["full", "tiny"] = Field("full", description="full is the shipped size; tiny takes a minute.")
    stage: Literal["all", "vae", "vae-refine", "judges", "denoiser-half", "denoiser", "refine-half", "refine"] = Field(
        "all",
        description="Which stage to train; vae-refine goes on from vae, refine from denoiser, and a half is the first "
        "one of what goes on from there.",
    )


class DemoSettings(BaseModelSettings):
    """Distil a base that draws its own data into a LoRA, measure it against its teacher, and show both."""

    outdir: Folder = Field(Path("./demo_outputs"), description="Folder for the adapter, pictures and tables.")
    teacher_rollouts: Count = Field(480, description="Paths of the teacher, gone through again and again.")
    max_steps: Count = Field(320, description="Optimizer updates.")
    batch_size: Count = Field(16, description="Paths a micro-batch, each learnt from at one timestep.")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        1e-3, description="AdamW's learning rate, falling to 0 by half a cosine."
    )
    lora_rank: Count = Field(32, description="Rank of the adapter.")
    lora_alpha: Count | None = Field(None, description="Alpha of the adapter. Unset: 8 x lora_rank.")
    lora_targets: Names = Field(
        ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
        description="UNet layers that get an adapter, by the end of their names.",
    )
    num_ddim_steps: StudentSteps = Field(8, description="Steps K of the teacher from noise to x0, DPM-Solver++'s.")
    num_inference_steps: StepCounts = Field((4,), description="Step counts to train for.")
    timestep_span: Span = Field(
        0.85, description="Share of the schedule in which the student's timesteps after the first lie, evenly."
    )
    steps: StepCounts = Field((1, 2, 4, 8), description="Step counts to measure.")
    baseline_steps: TeacherSteps = Field(50, description="DDIM steps of the teacher it is measured against.")
    solver_steps: SolverSteps = Field(
        (0,),
        description="Step counts at which the teacher is also drawn with DPM-Solver++, which costs no training: 8 is "
        "the fewest worth a look; 0 leaves it out.",
    )
    num_prompts: Count = Field(20, description="How many of the base's own prompts to draw.")
    num_images: Count = Field(10, description="Pictures a prompt.")
