"""One frozen settings class a command: defaults, units, help texts and checks in one place.

Command line, TOML file and Python all fill the same objects; a field's ``description`` is its help text. Whatever is
wrong is raised as one `InputError` of one line: what came, what is allowed, the fix. Nothing here imports torch.

Fields that may be ``None`` are filled in by the procedure, from the base model or from another field; the resolved
object is what gets printed and saved as ``settings.toml``.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from fewstep.errors import InputError
from fewstep.files import at_home

EMBEDDED_BASE = "scenes"
"""The base that ships with the package: the default of every ``fewstep`` command."""

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
"""The default base of the two root scripts."""

LONGEST_NAME = 200
"""Bytes of a folder's name: file systems take 255, and what is being written has a longer one for a moment."""

MOST_STUDENT_STEPS = 50
"""LCMScheduler and TCDScheduler pick a student's steps out of 50: no student takes more."""

SettingsT = TypeVar("SettingsT", bound="Checked")

Precision = Literal["auto", "no", "fp16", "bf16"]
FAST_OPTIONS = ("fused", "tiny-vae", "bf16", "fp16", "channels-last", "compile")
"""What may make few steps faster, in the order in which several are applied; tiny-vae has a flag of its own."""
Start = Literal["data", "teacher", "student", "noise"]


# ---------------------------------------------------------------------------------------------------- kinds of values


def _as_list(value: Any) -> Any:
    """A single number or name stands for a list of one: ``steps = 4``."""
    return (value,) if isinstance(value, int | str) else value


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    repeated = [value for position, value in enumerate(values) if value in values[:position]]
    if repeated:
        raise ValueError(f"{repeated[0]} came twice in {spell(values)}; allowed is each value once; leave one out")
    return values


def _fast_option(value: str) -> str:
    """One option, or several joined by +, brought into the order in which they are applied."""
    parts = value.split("+")
    odd = next((part for part in parts if part not in FAST_OPTIONS), None)
    names = spell(FAST_OPTIONS).replace(" ", ", ")
    if odd is not None or len(set(parts)) < len(parts) or {"bf16", "fp16"} <= set(parts) or value == "tiny-vae":
        raise ValueError(
            f"{value!r} came; allowed: {names}, each once and one of the precisions, tiny-vae beside others; for "
            "example --fast_options fused bf16 fused+channels-last"
        )
    return "+".join(sorted(parts, key=FAST_OPTIONS.index))


def _solvable(values: tuple[int, ...]) -> tuple[int, ...]:
    if 1 in values or (0 in values and len(values) > 1):
        raise ValueError(f"{spell(values)} came; allowed are step counts from 2, or 0 alone to leave the solvers out")
    return values


def _rising(values: tuple[int, int]) -> tuple[int, int]:
    if values[0] > values[1]:
        raise ValueError(f"{spell(values)} came; allowed is the lower timestep first; write {values[1]} {values[0]}")
    return values


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", value):
        raise ValueError(f"{value!r} came; allowed: auto, cpu, cuda, cuda:N, mps, xpu; for example --device auto")
    return value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("an empty text came; allowed is any other text; leave the setting out to get its default")
    return value


def _path(value: str) -> str:
    if "\0" in value:
        raise ValueError(f"{value!r} came; allowed is a path without NUL characters; leave them out")
    return _not_blank(value)


def _folder_name(value: str) -> str:
    """The name of one folder, on every system: nothing that leads elsewhere, and nothing that one of them reserves."""
    wrong = (
        re.search(r'[/\\\x00-\x1f\x7f<>:"|?*]', value)
        or value[-1] in ". "
        or value[0] == " "
        or re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", value)
        or len(value.encode("utf-8", "replace")) > LONGEST_NAME
    )
    if wrong:
        raise ValueError(
            f"{value[:60]!r} came; allowed is the name of one folder, of at most {LONGEST_NAME} bytes, without "
            '/ \\ : * ? " < > | or control characters, that no system reserves; give its parent as --output_dir'
        )
    return value


Text = Annotated[str, AfterValidator(_not_blank)]
FolderName = Annotated[str, AfterValidator(_path), AfterValidator(_folder_name)]
Folder = Annotated[Path, BeforeValidator(lambda value: _path(value) if isinstance(value, str) else value),
                   AfterValidator(at_home)]  # fmt: skip
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Guidance = Annotated[float, Field(ge=0, le=100)]
Side = Annotated[int, Field(ge=8, le=8192, multiple_of=8)]
Share = Annotated[float, Field(ge=0, le=1)]
StudentSteps = Annotated[int, Field(ge=1, le=MOST_STUDENT_STEPS)]
TeacherSteps = Annotated[int, Field(ge=1, le=1000)]
StepCounts = Annotated[
    tuple[StudentSteps, ...], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_distinct)
]
Span = Annotated[float, Field(gt=0, le=1)]
Timestep = Annotated[int, Field(ge=0, le=999)]
Interval = Annotated[tuple[Timestep, Timestep], BeforeValidator(_as_list), AfterValidator(_rising)]
Counts = Annotated[tuple[Count, ...], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_distinct)]
SolverSteps = Annotated[
    tuple[Annotated[int, Field(ge=0, le=MOST_STUDENT_STEPS)], ...],
    BeforeValidator(_as_list),
    Field(min_length=1),
    AfterValidator(_distinct),
    AfterValidator(_solvable),
]
Names = Annotated[tuple[Text, ...], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_distinct)]
FastOption = Annotated[str, AfterValidator(_fast_option)]
FastOptions = Annotated[
    tuple[FastOption, ...], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_distinct)
]
Folders = Annotated[tuple[Folder, ...], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_distinct)]
Device = Annotated[str, AfterValidator(_device)]

CLIP_MODEL = Field(
    "openai/clip-vit-base-patch32",
    description="CLIP model of the alignment metric, for bases that bring none of their own; none leaves it out.",
)


# ------------------------------------------------------------------------------------------------------- the base class


class Checked(BaseModel):
    """What all settings share: frozen, keyword-only, unknown names refused, errors of one line."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, values: Any) -> Any:
        # Python counts True as 1: without this, ``max_steps = true`` would train for one step.
        for name, value in values.items():
            if isinstance(value, bool) and name in cls.model_fields and cls.model_fields[name].annotation is not bool:
                raise ValueError(refusal(name, value, cls))
        return values

    # Static checkers keep the signature that pydantic derives from the fields; at run time its errors become ours.
    if not TYPE_CHECKING:

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise InputError(one_line(error, type(self))) from None

    def replace(self, **changes: Any) -> Self:
        """The same settings with some of them changed, checked again."""
        return type(self)(**{**dict(self), **changes})


class Settings(Checked):
    """What all commands share."""

    device: Device = Field("auto", description="auto, cpu, cuda, cuda:N, mps or xpu; auto takes the fastest at hand.")
    mixed_precision: Precision = Field(
        "auto", description="Precision of the networks; auto is bf16 or fp16 on a GPU and no on a CPU."
    )
    seed: Seed = Field(42, description="All noise, data order and choices derive from it.")


class BaseModelSettings(Settings):
    """Which base model to work on."""

    base_model: Text | None = Field(
        None,
        description="Hub id, diffusers folder, single .safetensors/.ckpt file, or 'scenes', the base that comes with "
        "fewstep. Unset: the one recorded in the given adapter, else the default base.",
    )
    default_base: Text = Field(
        EMBEDDED_BASE, description="Base taken where neither --base_model nor the adapter names one."
    )
    revision: Text | None = Field(None, description="Branch, tag or commit of a base from the Hub.")
    allow_pickle: bool = Field(
        False, description="Also open pickled weights (.ckpt, .bin), tensors only; otherwise only safetensors."
    )

    def chosen_base(self, recorded: str | None = None) -> tuple[str, str]:
        """The base model to open and why, as the first printed line names them.

        ``recorded`` is the base that the given adapter names, if it names one.
        """
        if self.base_model is not None:
            return self.base_model, "asked for with base_model"
        if recorded is not None:
            return recorded, "recorded in the adapter"
        return self.default_base, "the default base"


def _forbid_both(settings: Checked, first: str, second: str, fix: str) -> None:
    if getattr(settings, first) is not None and getattr(settings, second) is not None:
        raise ValueError(f"{first} and {second} came together; allowed is one of the two; {fix}")


# ------------------------------------------------------------------------------------------------------------ commands


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
    image_column: Text | None = Field(None, description="Column of the pictures. Unset: found by its type.")
    caption_column: Text | None = Field(None, description="Column of the captions. Unset: found by its name.")
    max_dropped: Share = Field(0.01, description="Share of unusable pictures above which training refuses to start.")
    output_dir: Folder = Field(Path("./checkpoints"), description="Folder that holds the runs.")
    run_name: FolderName = Field("lora_flash", description="Folder of this run inside output_dir.")
    log_file: Folder | None = Field(None, description="Also write what is printed to this file.")
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
        "again. Unset: each update makes its own.",
    )
    teacher_cache: Folder | None = Field(
        None,
        description="Folder of kept rollouts; runs that ask the teacher the same can share it. Unset: rollouts/ in the "
        "run's folder, where teacher_rollouts is given.",
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
    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        None, description="What the network predicts. Unset: as its scheduler says."
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
            _forbid_both(self, first, second, "leave one out")
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


class SamplingSettings(BaseModelSettings):
    """What generation and benchmark share: prompts, adapter, student."""

    prompt: Text | None = Field(None, description="What to draw.")
    prompts_file: Folder | None = Field(None, description="Text file with one prompt a line.")
    negative_prompt: str | None = Field(None, description="What to keep away from; needs guidance above 1.")
    num_images: Count = Field(1, description="Pictures a prompt.")
    batch_size: Count = Field(8, description="Pictures drawn at once; does not change them.")
    resolution: Side | None = Field(None, description="Side in pixels. Unset: the base's own, else sample_size x 8.")
    outdir: Folder = Field(Path("./outputs"), description="Folder for the results.")
    lora_path: Folder | None = Field(
        None, description="Adapter file or folder. Unset, like lora_id: the one shipped with the base, if any."
    )
    lora_id: Text | None = Field(None, description="Adapter on the Hub.")
    flash_guidance: Guidance = Field(1.0, description="Guidance of the student; above 1 doubles its work.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _forbid_both(self, "lora_path", "lora_id", "--lora_path is an adapter on disk, --lora_id one on the Hub")
        _forbid_both(self, "prompt", "prompts_file", "add the prompt to the file as a line")
        if self.negative_prompt and self.flash_guidance <= 1:
            raise ValueError(
                f"negative_prompt came with flash_guidance {self.flash_guidance:g}, where it has no effect; allowed is "
                "guidance above 1; add --flash_guidance 1.5 or leave --negative_prompt out"
            )
        return self


class BenchSettings(SamplingSettings):
    """Measure a student: time, alignment, and what few steps cost."""

    steps: StepCounts = Field((2, 4, 8), description="Step counts of the student.")
    num_prompts: Count = Field(
        20,
        description="How many of the data's captions, or of the base's own prompts, to take where no others are given.",
    )
    dataset_name: Text | None = Field(None, description="Like data_dir, a Hugging Face dataset.")
    data_dir: Folder | None = Field(
        None,
        description="Pictures with captions, laid out as for training: the captions are the prompts, the pictures the "
        "real ones that arms are measured against.",
    )
    image_column: Text | None = Field(None, description="Column of the pictures. Unset: found by its type.")
    caption_column: Text | None = Field(None, description="Column of the captions. Unset: found by its name.")
    max_dropped: Share = Field(0.01, description="Share of unusable pictures above which data is refused.")
    compare_baseline: bool = Field(
        False, description="Also draw with the teacher and with the base without adapter at the same few steps."
    )
    baseline_steps: TeacherSteps = Field(50, description="DDIM steps of the teacher.")
    baseline_guidance: Guidance | None = Field(
        None, description="Guidance of the teacher. Unset: the base's own, else 7.5."
    )
    solver_steps: SolverSteps = Field(
        (8, 12, 20),
        description="With compare_baseline: step counts at which the teacher is also drawn with DPM-Solver++, which "
        "costs no training; 0 leaves it out.",
    )
    solver_karras: bool = Field(True, description="Draw these on Karras noise levels as well.")
    baseline_outdir: Folder | None = Field(
        None, description="Folder for the teacher's pictures. Unset: beside the others."
    )
    adapters_file: Folder | None = Field(
        None,
        description="TOML file with an [[adapter]] table for each further adapter to compare with: id, lora_path or "
        "lora_id, and sampler, timestep_span, eta, guidance, scale, steps.",
    )
    adapters: Names | None = Field(
        None,
        description="The same without a file, each as id=NAME,lora_id=OWNER/NAME,sampler=tcd,eta=0.3,steps=4+8.",
    )
    fast_options: FastOptions | None = Field(
        None,
        description="What may make the student faster, each an arm of its own beside the plain one, for each of its "
        "step counts: fused (the adapter merged into the weights), channels-last, compile (torch.compile of the UNet), "
        "bf16, fp16; several in one arm as fused+channels-last or, with tiny_vae, tiny-vae+bf16.",
    )
    tiny_vae: Text | None = Field(
        None, description="Folder or Hub id of an AutoencoderTiny: one more such arm, which decodes with it."
    )
    clip_model_id: Text = CLIP_MODEL
    preference_model: Text | None = Field(
        None,
        description="PickScore by folder or Hub id (yuvalkirstain/PickScore_v1): which picture people would prefer. "
        "Left out, and named in the report, where its weights are not at hand.",
    )
    feature_model: Text | None = Field(
        None,
        description="DINOv2 by folder or Hub id, such as facebook/dinov2-base, or inception (needs fewstep[fid] and "
        "--allow_pickle), between whose features distances are taken. Unset, or where it is not at hand, which the "
        "report names: the base's own, else CLIP's.",
    )
    batch_sizes: Counts | None = Field(None, description="Pictures a timed batch. Unset: 1 and batch_size.")
    timing_repeats: Count = Field(5, description="Timed runs after the warm-up; the median is reported.")
    frechet_images: CountOrNone | None = Field(
        None,
        description="Reference pictures a prompt for the Fréchet distance; 0 leaves it and the arm of real pictures "
        "out. Unset: 1 with data, 5 where the base draws pictures of its own, else 0.",
    )
    resume: bool = Field(
        False,
        description="Go on with the benchmark in outdir, stopped or finished: what was drawn and timed is not done "
        "again. Steps, adapters and options may have come to it, nothing else may have changed.",
    )

    @field_validator("adapters")
    @classmethod
    def _adapters_are_some(cls, values: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for value in values or ():
            try:
                _adapter_of(value)
            except InputError as error:
                raise ValueError(str(error)) from None
        return values

    @model_validator(mode="after")
    def _decoder_for_combinations(self) -> Self:
        combined = next((option for option in self.fast_options or () if "tiny-vae" in option.split("+")), None)
        if combined is not None and self.tiny_vae is None:
            raise ValueError(
                f"fast_options {combined} came without tiny_vae; allowed is tiny-vae together with a decoder; add "
                "--tiny_vae FOLDER|HUB_ID"
            )
        return self

    @model_validator(mode="after")
    def _prompts_from_one_place(self) -> Self:
        for first, second in combinations(("dataset_name", "data_dir", "prompts_file", "prompt"), 2):
            _forbid_both(self, first, second, "leave one out")
        return self


class AdapterEntry(Checked):
    """One further adapter of a benchmark: an [[adapter]] table of its adapters_file."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=64)] = Field(
        description="Name of its arms: small letters, digits and single hyphens between them."
    )
    lora_path: Folder | None = Field(None, description="Adapter file or folder.")
    lora_id: Text | None = Field(None, description="Adapter on the Hub.")
    sampler: Literal["lcm", "tcd", "ddim"] | None = Field(
        None, description="Its sampler. Unset: of the scheduler saved beside it, else lcm."
    )
    timestep_span: Span | None = Field(
        None,
        description="Of ddim: the share of the schedule in which its timesteps after the first lie. Unset: as the "
        "adapter was trained, else 1.",
    )
    eta: Share = Field(0.0, description="Of tcd: how much of the noise between two steps is drawn anew.")
    guidance: Guidance = Field(1.0, description="Guidance it is sampled with.")
    scale: Annotated[float, Field(gt=0, le=10)] = Field(1.0, description="Strength of the adapter.")
    steps: StepCounts | None = Field(None, description="Step counts. Unset: those of the benchmark that it promises.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _forbid_both(self, "lora_path", "lora_id", "lora_path is an adapter on disk, lora_id one on the Hub")
        if self.lora_path is None and self.lora_id is None:
            raise ValueError(f"adapter {self.id} has neither lora_path nor lora_id; allowed is one of the two; add it")
        if self.timestep_span is not None and self.sampler not in (None, "ddim"):
            raise ValueError(
                f"adapter {self.id} has timestep_span {self.timestep_span:g} for {self.sampler}, which has none; leave "
                "it out"
            )
        if self.eta and self.sampler not in (None, "tcd"):
            raise ValueError(f"adapter {self.id} has eta {self.eta:g} for {self.sampler}, which has none; leave it out")
        return self


class GenerateSettings(SamplingSettings):
    """Draw pictures in a few steps."""

    steps: StepCounts = Field((4,), description="Step counts of the student; each makes its own pictures.")
    safety_checker: bool = Field(
        False, description="Blacken pictures that the base's safety checker objects to, where it has one."
    )

    @model_validator(mode="after")
    def _something_to_draw(self) -> Self:
        if self.prompt is None and self.prompts_file is None:
            raise ValueError(
                "no prompt came; allowed is a prompt or a file with one a line; "
                'add --prompt "a red house" or --prompts_file FILE'
            )
        return self


class ReportSettings(Checked):
    """Draw a benchmark's report again, or set several benchmarks side by side."""

    runs: Folders = Field(description="Folders of finished benchmarks; the first one's teacher is the teacher.")
    outdir: Folder | None = Field(None, description="Folder for report.html. Unset: the first run's.")

    @model_validator(mode="after")
    def _somewhere(self) -> Self:
        if len(self.runs) > 1 and self.outdir is None:
            raise ValueError(
                f"{len(self.runs)} runs came without outdir; allowed is a folder of its own for what they share; add "
                "--outdir FOLDER"
            )
        return self


class PretrainSettings(Settings):
    """Rebuild the embedded base and its judges from nothing."""

    output_dir: Folder = Field(Path("./scenes_base"), description="Folder for the weights; a stopped run goes on here.")
    size: Literal["full", "tiny"] = Field("full", description="full is the shipped size; tiny takes a minute.")
    stage: Literal["all", "vae", "judges", "denoiser", "refine"] = Field("all", description="Which stage to train.")


class DemoSettings(BaseModelSettings):
    """Distil the base into a LoRA, measure it against its teacher, and show both."""

    outdir: Folder = Field(Path("./demo_outputs"), description="Folder for the adapter, pictures and tables.")
    teacher_rollouts: Count = Field(240, description="Paths of the teacher, gone through again and again.")
    max_steps: Count = Field(160, description="Optimizer updates.")
    batch_size: Count = Field(4, description="Paths a micro-batch, each learnt from at every timestep.")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        1e-3, description="AdamW's learning rate, falling to 0 by half a cosine."
    )
    lora_rank: Count = Field(32, description="Rank of the adapter.")
    lora_alpha: Count | None = Field(None, description="Alpha of the adapter. Unset: 8 x lora_rank.")
    lora_targets: Names = Field(
        ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
        description="UNet layers that get an adapter, by the end of their names.",
    )
    num_ddim_steps: StudentSteps = Field(16, description="DDIM steps K of the teacher from noise to x0.")
    steps: StepCounts = Field((1, 2, 4, 8), description="Step counts to train for and to measure.")
    baseline_steps: TeacherSteps = Field(50, description="DDIM steps of the teacher it is measured against.")
    num_prompts: Count = Field(20, description="How many of the base's own prompts to draw.")
    num_images: Count = Field(10, description="Pictures a prompt.")


# ----------------------------------------------------------------------------------------------------------- TOML files


def load_toml(path: Path | str) -> dict[str, Any]:
    """The flat table of a settings file; an `InputError` where it cannot be read or is not flat."""
    path = at_home(path)
    values = _toml(path)
    for key, value in values.items():
        if isinstance(value, dict):
            raise InputError(
                f"{str(path)!r} has a table [{key}]; settings files are flat; move its keys to the top, without [{key}]"
            )
    return values


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no settings file {str(path)!r}; allowed is a TOML file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} cannot be read ({error}); allowed is a TOML file in UTF-8") from None
    except (ValueError, RecursionError) as error:  # tomllib's own, of numbers without end, of nesting without end
        raise InputError(f"{str(path)!r} is no TOML: {error}; allowed are lines such as max_steps = 300") from None


def load_adapters(path: Path | str) -> tuple[AdapterEntry, ...]:
    """The further adapters of a benchmark's file, in its order.

    Raises:
        InputError: no TOML, no [[adapter]] table, anything else in it, or an id that comes twice.
    """
    path = at_home(path)
    values = _toml(path)
    tables = values.get("adapter")
    if set(values) != {"adapter"} or not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise InputError(
            f"{str(path)!r} is no list of adapters; allowed is one [[adapter]] table or more and nothing else, each "
            "with an id and a lora_path or lora_id"
        )
    entries = []
    for number, table in enumerate(tables):
        if "id" not in table:
            raise InputError(f"{str(path)!r}: adapter {number} has no id; allowed is one that names its arms; add it")
        try:
            entries.append(AdapterEntry(**table))
        except InputError as error:
            raise InputError(f"{str(path)!r}: {error}") from None
    _distinct_ids(entries, f"{str(path)!r}: ")
    return tuple(entries)


def adapter_entries(settings: BenchSettings) -> tuple[AdapterEntry, ...]:
    """The further adapters of a benchmark: those of its file, then those given in one word each.

    Raises:
        InputError: see `load_adapters`; or an id that comes twice.
    """
    filed = load_adapters(settings.adapters_file) if settings.adapters_file else ()
    entries = (*filed, *(_adapter_of(word) for word in settings.adapters or ()))
    _distinct_ids(entries)
    return entries


def _adapter_of(word: str) -> AdapterEntry:
    """``id=NAME,lora_id=OWNER/NAME,steps=4+8`` as the table of a file would say it."""
    pairs = [part.partition("=") for part in word.split(",")]
    odd = next((name for name, equals, value in pairs if not (equals and value)), None)
    names = [name.strip() for name, _, _ in pairs]
    if odd is not None or len(set(names)) < len(names) or "id" not in names:
        raise InputError(
            f"{word!r} came; allowed is NAME=VALUE with a comma between two, each name once, id among them; for "
            "example id=hyper,lora_id=OWNER/NAME,sampler=tcd,eta=0.3,steps=4+8"
        )
    table: dict[str, Any] = dict(zip(names, (value.strip() for _, _, value in pairs), strict=True))
    if "steps" in table:
        table["steps"] = table["steps"].split("+")
    return AdapterEntry(**table)


def _distinct_ids(entries: Iterable[AdapterEntry], where: str = "") -> None:
    ids = [entry.id for entry in entries]
    repeated = sorted({one for one in ids if ids.count(one) > 1})
    if repeated:
        raise InputError(f"{where}adapter id {repeated[0]} came twice; allowed is each once; rename one")


def merged(
    settings: type[SettingsT],
    given: Mapping[str, Any],
    *,
    config: Path | str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> SettingsT:
    """Settings from three sources, the later wins: ``defaults``, the TOML file ``config``, what was ``given``.

    They are checked once, together; a key of the file that is no setting of this class is refused.
    """
    filed = {key.replace("-", "_"): value for key, value in (load_toml(config) if config else {}).items()}
    for key in filed:
        if key not in settings.model_fields:
            raise InputError(f"{str(config)!r}: {unknown_name(key, settings)}")
    return settings(**{**(defaults or {}), **filed, **given})


def settings_toml(settings: Settings) -> str:
    """The settings as flat TOML, ``None`` left out: reading it back gives equal settings."""
    lines = [f"{name} = {_toml_value(value)}" for name, value in dict(settings).items() if value is not None]
    return "\n".join(lines) + "\n"


def command_line(command: str, settings: type[Checked], values: Mapping[str, Any]) -> str:
    """The command that these settings came from, or one like it: the flags whose values are not the defaults."""
    words, defaults = ["fewstep", command], settings.model_construct().model_dump(mode="json")
    for name in settings.model_fields:
        value = values.get(name)
        if value is None or value == defaults.get(name):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            several = value if isinstance(value, list | tuple) else [value]
            words += [f"--{name}", *(shlex.quote(str(one)) for one in several)]
    return " ".join(words)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        # A JSON string is a TOML basic string, but for the one control character that JSON leaves alone.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"[{', '.join(_toml_value(item) for item in value)}]"


# ------------------------------------------------------------------------------------------------- errors of one line


def spell(value: Any) -> str:
    """A value as one types it on the command line: lists without brackets, words and numbers bare."""
    if isinstance(value, list | tuple):
        return " ".join(spell(item) for item in value)
    if isinstance(value, str | Path):
        text = str(value)
        return text if re.fullmatch(r"[^\s'\"]+", text) else repr(text)
    return f"{value:g}" if isinstance(value, float) else str(value)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that was most likely meant, if any is near."""
    found = difflib.get_close_matches(name.replace("-", "_"), list(names), n=1, cutoff=0.6)
    return found[0] if found else None


def one_line(error: ValidationError, settings: type[Checked]) -> str:
    """A pydantic error in one line: what came, what is allowed, the fix; further ones are counted."""
    details = error.errors(include_url=False)
    first = details[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        message = unknown_name(name, settings)
    elif first["type"] == "value_error":
        reason = str(first["ctx"]["error"])
        message = f"{name}: {reason}" if name else reason
    else:
        nothing = first["type"] == "missing" and len(first["loc"]) == 1  # else it is one of several that is missing
        message = refusal(name, "" if nothing else first["input"], settings)
    others = len({detail["loc"][:1] for detail in details}) - 1
    return " ".join(message.split()) + (f" (and {others} more)" if others else "")


def refusal(name: str, came: Any, settings: type[Checked]) -> str:
    """What came for a field, what is allowed there, and an example of it."""
    field = settings.model_fields[name]
    message = f"{name}: {_came(came)} came; allowed: {allowed(field)}"
    if not field.is_required() and field.default is not None and not isinstance(field.default, bool):
        message += f"; for example --{name} {spell(field.default)}"
    return message


def unknown_name(name: str, settings: type[Checked]) -> str:
    """The line for a name that no field has: the nearest one, or all of them where none is near."""
    near = nearest(name, settings.model_fields)
    fix = f"did you mean {near}?" if near else f"known are {', '.join(sorted(settings.model_fields))}"
    return f"unknown setting {name!r}; {fix}"


def _came(value: Any) -> str:
    """A value as it is quoted in an error: short."""
    text = spell(value) if value not in ("", (), []) else "nothing"
    return text if len(text) <= 60 else f"{text[:57]}..."


def allowed(field: FieldInfo) -> str:
    """In words, what a field takes: ``a whole number, at least 1``."""
    return _allowed(field.annotation, field.metadata)


def _allowed(annotation: Any, metadata: Iterable[Any]) -> str:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        inner, *extra = typing.get_args(annotation)
        return _allowed(inner, [*metadata, *extra])
    if origin in (typing.Union, types.UnionType):
        inner = next(part for part in typing.get_args(annotation) if part is not type(None))
        return _allowed(inner, metadata)
    if origin is Literal:
        return ", ".join(map(str, typing.get_args(annotation)))
    if origin is tuple:
        inner, *more = typing.get_args(annotation)
        return f"{'one or several' if more == [...] else f'{1 + len(more)} of them'}, each {_allowed(inner, [])}"
    kind = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}.get(annotation, "a text")
    return ", ".join([kind, *_bounds(metadata)])


def _bounds(metadata: Iterable[Any]) -> list[str]:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "multiple_of": "a multiple of"}
    # ``Annotated[int, Field(ge=1)]`` keeps its constraints one level down.
    flat = [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
    return [
        f"{word} {spell(getattr(part, bound))}"
        for part in flat
        for bound, word in words.items()
        if getattr(part, bound, None) is not None
    ]
