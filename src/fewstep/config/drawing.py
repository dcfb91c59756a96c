"""Settings of the commands that use a student: `fewstep generate`, `bench`, `report`, `export`."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from fewstep.config.adapters import AdapterEntry, adapter_of, distinct_ids, load_adapters
from fewstep.config.base import BaseModelSettings, Checked, forbid_both
from fewstep.config.kinds import (
    CAPTION_COLUMN,
    CLIP_MODEL,
    IMAGE_COLUMN,
    MAX_DROPPED,
    Count,
    CountOrNone,
    Counts,
    FastOptions,
    Folder,
    Folders,
    Guidance,
    Names,
    Share,
    Side,
    SolverSteps,
    StepCounts,
    TeacherSteps,
    Text,
)
from fewstep.errors import InputError


class AdapterSettings(BaseModelSettings):
    """A base, and an adapter on it."""

    lora_path: Folder | None = Field(
        None,
        description="Adapter file or folder. Unset, like lora_id: the one shipped with the base, if any; in a "
        "benchmark none where further adapters are given.",
    )
    lora_id: Text | None = Field(None, description="Adapter on the Hub.")

    @model_validator(mode="after")
    def _one_adapter(self) -> Self:
        forbid_both(self, "lora_path", "lora_id", "--lora_path is an adapter on disk, --lora_id one on the Hub")
        return self


class SamplingSettings(AdapterSettings):
    """What generation and benchmark share: prompts, adapter, student."""

    prompt: Text | None = Field(None, description="What to draw.")
    prompts_file: Folder | None = Field(None, description="Text file with one prompt a line.")
    negative_prompt: str | None = Field(None, description="What to keep away from; needs guidance above 1.")
    num_images: Count = Field(1, description="Pictures a prompt.")
    batch_size: Count = Field(
        8, description="Pictures drawn at once; changes them by rounding at most, and --resume takes the same."
    )
    resolution: Side | None = Field(None, description="Side in pixels. Unset: the base's own, else sample_size x 8.")
    outdir: Folder = Field(Path("./outputs"), description="Folder for the results.")
    flash_guidance: Guidance = Field(1.0, description="Guidance of the student; above 1 doubles its work.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        forbid_both(self, "prompt", "prompts_file", "add the prompt to the file as a line")
        if self.negative_prompt and self.flash_guidance <= 1 and not self._says_guidance_elsewhere():
            raise ValueError(
                f"negative_prompt came with flash_guidance {self.flash_guidance:g}, where it has no effect; allowed is "
                "guidance above 1; add --flash_guidance 1.5 or leave --negative_prompt out"
            )
        return self

    def _says_guidance_elsewhere(self) -> bool:
        """Whether what is drawn may have another guidance than `flash_guidance`."""
        return False


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
    image_column: Text | None = IMAGE_COLUMN
    caption_column: Text | None = CAPTION_COLUMN
    max_dropped: Share = MAX_DROPPED
    compare_baseline: bool = Field(
        False, description="Also draw with the teacher and with the base without adapter at the same few steps."
    )
    baseline_steps: TeacherSteps | None = Field(
        None, description="DDIM steps of the teacher. Unset: the base's own, else 50."
    )
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
    overwrite: bool = Field(False, description="Replace the benchmark in outdir, stopped or finished.")

    @field_validator("adapters")
    @classmethod
    def _adapters_are_some(cls, values: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for value in values or ():
            try:
                adapter_of(value)
            except InputError as error:
                raise ValueError(str(error)) from None
        return values

    def _says_guidance_elsewhere(self) -> bool:
        return bool(self.adapters or self.adapters_file)  # each its own, which is looked at when all arms are known

    @model_validator(mode="after")
    def _what_becomes_of_an_earlier_one(self) -> Self:
        if self.resume and self.overwrite:
            raise ValueError(
                "resume and overwrite came together; allowed is one of the two; --resume goes on with the benchmark in "
                "outdir, --overwrite begins it anew"
            )
        return self

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
            forbid_both(self, first, second, "leave one out")
        given = "prompts_file" if self.prompts_file is not None else "prompt" if self.prompt is not None else None
        # Settings files hold the default, too.
        if given is not None and self.num_prompts != type(self).model_fields["num_prompts"].default:
            raise ValueError(
                f"num_prompts {self.num_prompts} came with {given}, which is drawn whole; allowed is num_prompts with "
                "the data's captions or the base's own prompts; leave it out"
            )
        return self


def adapter_entries(settings: BenchSettings) -> tuple[AdapterEntry, ...]:
    """The further adapters of a benchmark: those of its file, then those given in one word each.

    Raises:
        InputError: see `load_adapters`; or an id that comes twice.
    """
    filed = load_adapters(settings.adapters_file) if settings.adapters_file else ()
    entries = (*filed, *(adapter_of(word) for word in settings.adapters or ()))
    distinct_ids(entries)
    return entries


class GenerateSettings(SamplingSettings):
    """Draw pictures in a few steps."""

    outdir: Folder = Field(
        Path("./pictures"), description="Folder for the pictures; those of further calls are numbered on."
    )
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


class ExportSettings(AdapterSettings):
    """Write an adapter as one file for ComfyUI, the web UIs and others that read kohya's layout."""

    outfile: Folder = Field(Path("./adapter.safetensors"), description="The file to write; it must not be there yet.")

    @field_validator("outfile")
    @classmethod
    def _a_file_of_tensors(cls, file: Path) -> Path:
        if file.suffix != ".safetensors":
            raise ValueError(f"outfile {str(file)!r} came; allowed is a name that ends in .safetensors; add that to it")
        return file


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
