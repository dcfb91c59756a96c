"""Settings of `fewstep train`, and of the commands that take its flags."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fewstep.config.base import BaseModelSettings, forbid_both
from fewstep.config.kinds import (
    CAPTION_COLUMN,
    CLIP_MODEL,
    IMAGE_COLUMN,
    MAX_DROPPED,
    Count,
    CountOrNone,
    Folder,
    FolderName,
    Guidance,
    Interval,
    Names,
    Share,
    Side,
    Span,
    Start,
    StepCounts,
    StudentSteps,
    Text,
)
from fewstep.config.spelling import spell


class TrainSettings(BaseModelSettings):
    """Distil a base model into a few-step LoRA."""

    dataset_name: Text | None = Field(
        None,
        description="Hugging Face dataset to train on, or the URL of .tar shards, several as "
        "https://HOST/NAME-{0000..0123}.tar.",
    )
    streaming: bool = Field(
        False,
        description="Fetch the dataset file by file as it is needed, a few at a time, instead of all of it first; "
        "shards by URL always are.",
    )
    data_dir: Folder | None = Field(
        None,
        description="Folder to train on: COCO 2014/2017, images/ + captions/, picture + .txt, metadata.jsonl, .tar "
        "shards, or .parquet. Unset, like dataset_name: the base's own data, where it has any.",
    )
    prompts_file: Folder | None = Field(
        None, description="Text file with one caption a line to train on, without any pictures."
    )
    image_column: Text | None = IMAGE_COLUMN
    caption_column: Text | None = CAPTION_COLUMN
    max_dropped: Share = MAX_DROPPED
    output_dir: Folder = Field(Path("./checkpoints"), description="Folder that holds the runs.")
    run_name: FolderName = Field("lora_flash", description="Folder of this run inside output_dir.")
    log_file: Folder | None = Field(
        None, description="Also write what a training prints to this file, without its progress."
    )
    resume_from_checkpoint: Text | None = Field(
        None,
        description="checkpoint-N folder to go on from; 'latest': this run's newest, an error where there is none; "
        "'auto': the same, or a fresh start.",
    )

    max_steps: Count = Field(3000, description="Optimizer updates.")
    batch_size: Count = Field(8, description="Pictures a process and micro-batch.")
    gradient_accumulation_steps: Count = Field(1, description="Micro-batches an update.")
    gradient_checkpointing: bool = Field(
        False,
        description="Keep fewer of the student's activations and compute them again in the backward pass: less memory "
        "for one more forward; the gradients are the same.",
    )
    compile: bool = Field(
        False,
        description="torch.compile of the UNet for the teacher's and the student's batches, proven against the UNet "
        "itself before training; compiling takes minutes.",
    )
    channels_last: bool = Field(
        False,
        description="Keep the UNet's and the VAE's weights in the memory order channels-last, which tensor cores take "
        "convolutions in.",
    )
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(1e-4, description="AdamW's learning rate.")
    lr_schedule: Literal["constant", "cosine"] = Field("constant", description="Learning rate after the warm-up.")
    lr_warmup_steps: CountOrNone = Field(0, description="Updates over which the learning rate rises from 0.")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Gradients are clipped to this norm.")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Decay of the running average of the adapter that is saved to sample with; 0 is off."
    )

    lora_rank: Count = Field(4, description="Rank of the adapter.")
    lora_alpha: Count | None = Field(None, description="Alpha of the adapter. Unset: 8 x lora_rank.")
    lora_targets: Names = Field(
        ("to_q", "to_k", "to_v", "to_out.0"), description="UNet layers that get an adapter, by the end of their names."
    )

    init_lora: Folder | None = Field(
        None,
        description="Adapter file or folder that the student begins with, of the same rank and targets; unset: the "
        "base itself.",
    )

    guidance_scale: Guidance | None = Field(
        None, description="The teacher's guidance w in u + w(c - u). Unset: the base's own, else 7.5."
    )
    guidance_interval: Interval | None = Field(
        None,
        description="LOW HIGH: the timesteps at which the teacher is guided; at others a step costs it half. "
        "Unset: all.",
    )
    sampler: Literal["lcm", "ddim"] = Field(
        "lcm",
        description="How the student will be sampled, which decides what it learns: lcm, jumps to x0 with fresh noise "
        "between them; ddim, jumps from each of its timesteps to the next along the teacher's path.",
    )
    timestep_span: Span = Field(
        1.0,
        description="With ddim: all of the student's timesteps but the first lie evenly in this share of the schedule, "
        "counted from its clean end; 1 spaces them evenly as stock schedulers do.",
    )
    teacher_solver: Literal["ddim", "dpmpp"] = Field(
        "ddim",
        description="How the teacher takes its K steps: ddim, or dpmpp (DPM-Solver++ 2M), which in half as many steps "
        "is as near to where very many would take it.",
    )
    num_ddim_steps: StudentSteps | None = Field(
        None,
        description="Steps K of the teacher: with lcm from any t to x0, with ddim of its whole path. Unset: 8, "
        "with ddim 16.",
    )
    num_inference_steps: StepCounts = Field(
        (1, 2, 4, 8),
        description="Step counts promised: the student is trained on exactly their timesteps. With ddim, where two "
        "would jump from the same timestep to different ones, the one named first has its way.",
    )
    pure_noise_share: Share = Field(
        1.0, description="Share of the draws at the highest timestep that start from pure noise, as sampling does."
    )
    start: Start | None = Field(
        None,
        description="What is noised to start a rollout below the highest timestep: data, the pictures of the data set; "
        "teacher, the teacher's own to the same captions, which takes a second rollout; student, the student's guesses "
        "as it is sampled, at the timestep before (with ddim: where it stands itself). Or noise: every rollout starts "
        "from pure noise, and the other timesteps are learnt on the teacher's way. Unset: with lcm data, or teacher "
        "where there is a prompts_file; with ddim noise.",
    )
    pairs_per_rollout: Count | None = Field(
        None,
        description="At most how many pairs are learnt from a rollout of the teacher: its start, and states on its way "
        "at other timesteps of the student, which cost the teacher nothing. Unset: 1, with ddim all there are.",
    )
    pairs_per_visit: Count | None = Field(
        None,
        description="With kept rollouts: at most how many pairs of each rollout in its batch an update learns from; "
        "the others have their turn when it comes up again. Few pairs of many rollouts teach more than many pairs of "
        "few. Unset: all.",
    )
    teacher_rollouts: Count | None = Field(
        None,
        description="How many rollouts the teacher makes before training, kept on disk and gone through again and "
        "again; rounded up to whole updates. Unset: with teacher_cache one a sample of the run, else each update makes "
        "its own.",
    )
    teacher_cache: Folder | None = Field(
        None,
        description="Folder of kept rollouts; runs that ask the teacher the same, with the same seed and pictures an "
        "update, can share it. Unset: rollouts/ in the run's folder, where teacher_rollouts is given.",
    )
    cache_dir: Folder | None = Field(
        None,
        description="Folder of latents and text embeddings, computed once and kept in fp16; runs with the same base "
        "and data share it. Unset: they are computed when they are needed.",
    )
    loss: Literal["mse", "huber"] = Field("mse", description="Distance between the student's and the teacher's x0.")
    loss_weighting: Literal["x0", "eps", "v", "mid"] = Field(
        "x0",
        description="In which quantity the distance is measured: x0 as it is; eps or v, re-weighted by timestep; mid, "
        "halfway between x0 and eps.",
    )
    resolution: Side | None = Field(None, description="Side in pixels. Unset: the base's own, else sample_size x 8.")

    checkpoint_every: CountOrNone = Field(500, description="Updates between checkpoints; 0 saves the end alone.")
    keep_last: CountOrNone = Field(0, description="Newest checkpoints to keep; 0 keeps all.")
    keep_every: CountOrNone = Field(0, description="With keep_last: those at multiples of this stay too; 0: none.")
    validate_every: CountOrNone = Field(
        500, description="Updates between grids of previews, and figures of the student; 0 is off."
    )
    validate_images: CountOrNone = Field(
        16,
        description="Pictures at each promised step count behind the figure by which the best student is kept in "
        "lora/best: of the base's answer key, else of a CLIP model that is at hand; 0 is off.",
    )
    clip_model_id: Text = CLIP_MODEL
    log_every: Count = Field(10, description="Updates between lines of metrics.jsonl.")
    oracle_images: CountOrNone | None = Field(
        None,
        description="Pictures behind the oracle, what a perfect student would reach, measured before training; 0 is "
        "off. Unset: 16 where the base has an answer key, else 0.",
    )

    @property
    def alpha(self) -> int:
        """LoRA alpha, resolved: the scale alpha / rank stays 8 whatever the rank."""
        return 8 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    @property
    def run_dir(self) -> Path:
        return self.output_dir / self.run_name

    @property
    def starts_from(self) -> Start:
        """`start`, resolved."""
        if self.start is None and self.sampler == "ddim":
            return "noise"
        return self.start or ("data" if self.prompts_file is None else "teacher")

    @property
    def teacher_steps(self) -> int:
        """`num_ddim_steps`, resolved."""
        return self.num_ddim_steps or (16 if self.sampler == "ddim" else 8)

    @property
    def keeps_rollouts(self) -> bool:
        return self.teacher_rollouts is not None or self.teacher_cache is not None

    @property
    def rollout_dir(self) -> Path:
        return self.teacher_cache or self.run_dir / "rollouts"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for first, second in combinations(("dataset_name", "data_dir", "prompts_file"), 2):
            forbid_both(self, first, second, "leave one out")
        if self.streaming and self.dataset_name is None:
            raise ValueError(
                "streaming came without dataset_name; allowed is a dataset of the Hub or the URL of shards; leave "
                "--streaming out"
            )
        if self.prompts_file is not None and self.start == "data":
            raise ValueError(
                f"start data came with prompts_file {spell(self.prompts_file)}, which has no pictures; allowed "
                "are teacher, student and noise; leave --start out, or pass pictures with --data_dir or --dataset_name"
            )
        if self.start == "student" and self.keeps_rollouts:
            kept = "teacher_rollouts" if self.teacher_cache is None else "teacher_cache"
            raise ValueError(
                f"start student came with {kept}; the student's guesses change as it learns, and rollouts from them "
                "cannot be kept; allowed there are data, teacher and noise; leave one of the two out"
            )
        if self.pairs_per_visit is not None and not self.keeps_rollouts:
            raise ValueError(
                f"pairs_per_visit {self.pairs_per_visit} came without kept rollouts, and others are visited once; "
                "allowed is with teacher_rollouts or teacher_cache; add one of them, or leave --pairs_per_visit out"
            )
        if self.starts_from in ("student", "noise") and self.pure_noise_share < 1:
            raise ValueError(
                f"pure_noise_share {self.pure_noise_share:g} came with start {self.starts_from}; allowed is 1, for it "
                "starts from pure noise; leave --pure_noise_share out"
            )
        if self.timestep_span < 1 and self.sampler != "ddim":
            raise ValueError(
                f"timestep_span {self.timestep_span:g} came with sampler {self.sampler}, whose timesteps are its "
                "scheduler's; allowed there is 1; add --sampler ddim, or leave --timestep_span out"
            )
        if self.lr_warmup_steps >= self.max_steps:
            raise ValueError(
                f"lr_warmup_steps {self.lr_warmup_steps} came with max_steps {self.max_steps}; allowed is a warm-up "
                "shorter than the training; lower --lr_warmup_steps"
            )
        return self


class TrainCommand(TrainSettings):
    """Distil a base model into a few-step LoRA."""

    dry_run: bool = Field(
        False,
        description="Train for a few steps at batch 1 and 2, write nothing, and say what the run would take: memory, "
        "the largest batch, time, disk.",
    )


class CacheSettings(TrainSettings):
    """Compute, once, the latents and text embeddings that `fewstep train` with the same flags will ask for."""

    cache_dir: Folder = Field(description="Folder for them, in fp16; what is there already is not computed again.")


class DoctorSettings(TrainSettings):
    """Check, before anything long, all that `fewstep train` with the same flags needs."""
