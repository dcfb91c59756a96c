"""What a benchmark has settled before it draws: which arms, with which networks, on which prompts, judged by whom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep import lora
from fewstep.arms import Arm, check_arms, real_arm, solver_arm, student_arm, teacher_arm
from fewstep.backbone import Backbone
from fewstep.benchmark.adapters import Adapters, controls, origin_of
from fewstep.benchmark.options import Options
from fewstep.benchmark.real import DataPictures, OwnPictures, RealPictures, pictures_of_data
from fewstep.config import BenchSettings
from fewstep.data import require_there
from fewstep.errors import CheckpointError, InputError
from fewstep.metrics.alignment import CLIPAlignment
from fewstep.metrics.features import INCEPTION, DINOFeatures, Features, InceptionFeatures, OwnFeatures
from fewstep.metrics.pretrained import ModelNotAtHand
from fewstep.opening import Sampling, open_base, read_prompts, recorded_sampling, warn_of_prompts
from fewstep.report import arm_folder, refuse_another_run
from fewstep.reporting import Reporter

REFERENCES = 5
"""Reference pictures a prompt, where none are asked for and the base draws its own."""

NO_ALIGNMENT = "none"
"""What `--clip_model_id` says where alignment is to be left out."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that drawing, judging and summing up share.

    Attributes:
        settings: with all that was left open filled in; what they say can be passed back to --config.
        backbone: the base, which every arm draws with.
        adapter: what is known of the run's own adapter; None where there is none.
        adapters: the run's own adapter and the further ones.
        options: what may make arms faster.
        arms: in the order in which they are drawn and shown.
        prompts: their texts.
        real: pictures of the same captions that no arm drew; None where there are none, or none are wanted.
        alignment: the alignment model; None where it is left out.
        preference: the model that tells which picture people would prefer; None where it was not asked for, or is
            not at hand.
        features: what distances are taken between; None where it is the alignment model's embeddings.
    """

    settings: BenchSettings
    backbone: Backbone
    adapter: Mapping[str, str] | None
    adapters: Adapters
    options: Options
    arms: tuple[Arm, ...]
    prompts: tuple[str, ...]
    real: RealPictures | None
    alignment: CLIPAlignment | None
    preference: CLIPAlignment | None
    features: Features | None

    @property
    def folders(self) -> dict[str, Path]:
        """Arm id to the folder of its pictures."""
        apart = self.settings.baseline_outdir
        return {
            arm.id: arm_folder((apart if arm.is_baseline else None) or self.settings.outdir, arm.id)
            for arm in self.arms
        }

    @property
    def baseline(self) -> Arm | None:
        """The arm that the others are compared with."""
        return next((arm for arm in self.arms if arm.is_baseline), None)

    @property
    def key(self) -> dict[str, Any]:
        """Everything that pictures and judgements of all arms depend on."""
        names = ("seed", "num_images", "batch_size", "resolution", "negative_prompt")
        return {name: getattr(self.settings, name) for name in names} | {
            "base": self.backbone.fingerprint,
            "prediction_type": self.backbone.schedule.prediction_type,
            "precision": str(self.backbone.dtype).removeprefix("torch."),
            "device": self.backbone.device.type,
            "alignment_model": self.alignment.name if self.alignment else None,
            "preference_model": self.preference.name if self.preference else None,
            "features": self.features.name if self.features else None,
            "prompts": list(self.prompts),
            "real_pictures": self.real.key if self.real else None,
            **self._judges(),
        }

    def _judges(self) -> dict[str, str]:
        """Fingerprints of the models that look at pictures, by what they are asked about."""
        abilities = self.backbone.abilities
        answers = None if abilities is None else OwnFeatures(abilities.features())
        asked = {
            "alignment": self.alignment,
            "preference": self.preference,
            "features": self.features,
            "answers": answers,
        }
        return {f"{name}_weights": model.fingerprint for name, model in asked.items() if model is not None}

    def key_of(self, arm: Arm) -> dict[str, str | None]:
        """The weights that `arm` draws with besides the base's: their SHA-256."""
        with self.adapters.on(arm):
            weights = lora.digest(self.backbone.unet) if arm.adapter else None
        return {"weights": weights} | self.options.key_of(arm)

    @contextmanager
    def painter(self, arm: Arm) -> Iterator[Backbone]:
        """The base as `arm` draws with it."""
        with self.adapters.on(arm), self.options.on(self.backbone, arm) as painter:
            yield painter


def make_plan(
    settings: BenchSettings,
    *,
    device: str,
    backbone: Backbone | None,
    arms: Sequence[Arm] | None,
    reporter: Reporter,
) -> Plan:
    """Open everything, and refuse what cannot be used; nothing is written.

    Args:
        settings: what to compare.
        device: where this process runs its networks.
        backbone, arms: see `benchmark`.
        reporter: told what was found.

    Raises:
        InputError: prompts, arms, options or a base that cannot be used; no adapter to measure; a folder of another
            kind of run.
        CheckpointError: an adapter that attaches nothing or changes nothing; CLIP weights that are not at hand.
    """
    refuse_another_run(settings.outdir, "benchmark")
    prompts = read_prompts(settings)
    require_there(settings.data_dir)
    named = settings.lora_path is not None or settings.lora_id is not None
    # With other adapters the base's own one is not taken unasked.
    others = settings.adapters_file is not None or settings.adapters is not None
    wants_adapter = (named or not others) if arms is None else any(arm.adapter for arm in arms)
    opened = open_base(
        settings,
        device=device,
        backbone=backbone,
        with_adapter=wants_adapter,
        step_counts=settings.steps,
        reporter=reporter,
        origin=origin_of(settings) if backbone is None else None,
    )
    backbone = opened.backbone
    if backbone.abilities is not None and settings.resolution not in (None, backbone.resolution):
        raise InputError(
            f"resolution {settings.resolution} came; allowed is the {backbone.resolution} at which the base "
            f"{backbone.name} is judged; leave --resolution out"
        )
    data = pictures_of_data(settings, backbone, reporter)
    if prompts is None:
        prompts = data.prompts if data else _own_prompts(settings, backbone)
    settings = _resolved(settings, backbone, data)
    adapters = Adapters(settings, backbone, opened.source, reporter)
    options = Options(settings, backbone, reporter)
    sampling = recorded_sampling(opened.source, reporter) if wants_adapter and not arms else None
    arms = options.beside(arms or _arms(settings, backbone, adapters, sampling))
    real: RealPictures | None = data
    if data is None and backbone.abilities is not None:
        real = OwnPictures(backbone.abilities, prompts, settings)
    if not settings.frechet_images:
        real = None
    if real is not None:
        arms = (*arms, real_arm())
    check_arms(arms, settings.negative_prompt)
    warn_of_prompts(prompts, backbone, reporter, settings.negative_prompt)
    adapters.warn_of_timesteps(arms, reporter)
    alignment = _alignment(settings, backbone, reporter)
    longer = alignment.overlong(prompts) if alignment else []
    if longer:
        reporter.warn(
            f"{len(longer)} prompts, such as number {longer[0]}, are longer than the alignment model reads: they are "
            "judged by their beginning"
        )
    if settings.timing_repeats < 5:
        reporter.warn(f"timing_repeats {settings.timing_repeats} came; below 5, medians and spreads mean little")
    return Plan(
        settings=settings,
        backbone=backbone,
        adapter=opened.adapter,
        adapters=adapters,
        options=options,
        arms=arms,
        prompts=tuple(prompts),
        real=real,
        alignment=alignment,
        preference=_preference(settings, backbone, reporter),
        features=_features(settings, backbone, alignment, reporter),
    )


def _own_prompts(settings: BenchSettings, backbone: Backbone) -> list[str]:
    if backbone.abilities is None:
        raise InputError(
            f"no prompt came and the base {backbone.name} brings none; allowed is --prompt TEXT, --prompts_file FILE "
            "with a prompt a line, or --data_dir FOLDER with pictures and captions; add one of them"
        )
    return backbone.abilities.prompts(settings.num_prompts, settings.seed)


def _resolved(settings: BenchSettings, backbone: Backbone, data: DataPictures | None) -> BenchSettings:
    """What was left open is the base's, or the data's."""
    own_pictures = data.references if data else 0 if backbone.abilities is None else REFERENCES
    return settings.replace(
        base_model=backbone.name,
        prediction_type=backbone.schedule.prediction_type,
        resolution=settings.resolution or backbone.resolution,
        frechet_images=own_pictures if settings.frechet_images is None else settings.frechet_images,
        baseline_steps=settings.baseline_steps or backbone.teacher_steps,
        baseline_guidance=backbone.guidance_scale if settings.baseline_guidance is None else settings.baseline_guidance,
    )


def _arms(settings: BenchSettings, backbone: Backbone, adapters: Adapters, sampling: Sampling | None) -> list[Arm]:
    """The arms that the settings describe; ``sampling`` is the run's own adapter's, None where there is none."""
    count = backbone.schedule.num_train_timesteps
    students = []
    if sampling is not None:
        students += [
            student_arm(n, settings.flash_guidance, count, sampler=sampling.sampler, span=sampling.span)
            for n in settings.steps
        ]
    students += adapters.arms()
    if not settings.compare_baseline:
        return students
    guidance = backbone.guidance_scale if settings.baseline_guidance is None else settings.baseline_guidance
    alpha_bar = backbone.schedule.alphas_cumprod.tolist()
    solvers = [
        solver_arm(steps, guidance, alpha_bar, karras=karras)
        for karras in ((False, True) if settings.solver_karras else (False,))
        for steps in settings.solver_steps
        if steps
    ]
    teacher = teacher_arm(settings.baseline_steps or backbone.teacher_steps, guidance, count)
    return [teacher, *solvers, *students, *controls(students, count)]


def _alignment(settings: BenchSettings, backbone: Backbone, reporter: Reporter) -> CLIPAlignment | None:
    """The alignment model: the base's own, unless another one was asked for; None where it is to be left out."""
    asked = settings.clip_model_id
    if asked == NO_ALIGNMENT:
        reporter.say("alignment is left out, as asked")
        return None
    own = backbone.abilities is not None and asked == BenchSettings.model_fields["clip_model_id"].default
    model = backbone.abilities.alignment_model() if own and backbone.abilities else asked
    try:
        # Not named by the folder that it lies in: that is another one in another checkout.
        name = "the base's own alignment model" if own else None
        return CLIPAlignment(model, device=backbone.device, allow_pickle=settings.allow_pickle, name=name)
    except ModelNotAtHand as error:
        raise CheckpointError(f"{error}, or --clip_model_id {NO_ALIGNMENT} to leave alignment out") from error


def _preference(settings: BenchSettings, backbone: Backbone, reporter: Reporter) -> CLIPAlignment | None:
    name = settings.preference_model
    if name is None:
        return None
    try:
        return CLIPAlignment(
            name, device=backbone.device, allow_pickle=settings.allow_pickle, flag="--preference_model"
        )
    except ModelNotAtHand as error:
        reporter.warn(f"no preference: preference_model {name!r} was asked for and is not at hand ({error.reason})")
        return None


def _features(
    settings: BenchSettings, backbone: Backbone, alignment: CLIPAlignment | None, reporter: Reporter
) -> Features | None:
    """The features that were asked for, else the base's own, else none."""
    name = settings.feature_model
    own = None if backbone.abilities is None else OwnFeatures(backbone.abilities.features())
    if name is None:
        return own
    try:
        if name == INCEPTION:
            return InceptionFeatures(device=backbone.device, allow_pickle=settings.allow_pickle)
        return DINOFeatures(name, device=backbone.device, allow_pickle=settings.allow_pickle)
    except ModelNotAtHand as error:
        instead = own or alignment
        reporter.warn(
            f"feature_model {name!r} was asked for and is not at hand ({error.reason}): "
            + (f"distances are over {instead.name} instead" if instead else "no distances")
        )
        return own
