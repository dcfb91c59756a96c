"""How far an arm's pictures, taken together, are from real ones and from the teacher's.

The features are the base's own where it brings some, else the picture embeddings of the alignment model. References
are pictures of the same captions; those of the base's own making are passed through the VAE, so that what the VAE loses
is not held against an arm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.benchmark.drawing import features_of
from fewstep.benchmark.plan import Plan
from fewstep.metrics.frechet import frechet_distance
from fewstep.metrics.halves import Distance, half_sample_distances, half_samples, with_spread
from fewstep.metrics.intervals import bootstrap
from fewstep.metrics.kernels import cmmd, kid
from fewstep.metrics.manifold import NEIGHBOURS, precision_recall
from fewstep.metrics.variety import diversity, paired_distance
from fewstep.pictures import Evaluation, as_bytes
from fewstep.records import Frechet, Interval
from fewstep.reporting import Reporter

OWN_FEATURES = "the base's own features"


@dataclass(frozen=True, kw_only=True)
class Distributions:
    """What was found, by arm.

    Attributes:
        extractor: what the features are of; None where there are none.
        frechet: to pictures of the same captions.
        distances: "kid", "cmmd", "precision", "recall" to pictures of the same captions, and "kid_teacher",
            "cmmd_teacher" to the teacher's pictures.
        variety: "diversity", over the teacher's, and "faithfulness", the paired distance to the teacher's pictures.
        reference_frechet, reference_distances: the same of real pictures against real ones, at an arm's N.
    """

    extractor: str | None = None
    frechet: dict[str, Frechet] = field(default_factory=dict)
    distances: dict[str, dict[str, Interval]] = field(default_factory=dict)
    variety: dict[str, dict[str, Interval]] = field(default_factory=dict)
    reference_frechet: float | None = None
    reference_distances: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Pictures:
    """A set of pictures as the metrics see it: features [N, D], embeddings [N, E] or None, and each one's prompt."""

    features: Tensor
    embeddings: Tensor | None
    prompts: list[int]


@dataclass(frozen=True)
class _References:
    """Pictures of the same captions; ``again`` are others of them, as many as an arm has."""

    through_vae: _Pictures
    raw: _Pictures
    again: _Pictures


def measure_distributions(plan: Plan, evaluations: Mapping[str, Evaluation], reporter: Reporter) -> Distributions:
    """Everything that can be measured with the features, references and teacher at hand."""
    references = _references(plan, reporter)
    arms = {name: _judged(found) for name, found in evaluations.items()}
    if any(arm is None for arm in arms.values()):
        return Distributions()
    drawn = {name: arm for name, arm in arms.items() if arm is not None}
    own = any("features" in found.found for found in evaluations.values())
    teacher = next((drawn[name] for name, found in evaluations.items() if found.arm.is_baseline), None)
    halves = half_samples(next(iter(drawn.values())).prompts)

    result = Distributions(extractor=OWN_FEATURES if own else plan.alignment.name if plan.alignment else None)
    with reporter.progress("distances", len(drawn)) as bar:
        if references is not None:
            result = _reference_figures(result, references)
            result.frechet.update(_frechets(drawn, teacher, references, halves))
        for name, pictures in drawn.items():
            result.distances[name] = _to_real(pictures, references, halves) | _to_teacher(pictures, teacher, halves)
            result.variety[name] = _variety(pictures, teacher)
            bar.advance()
    return result


def _judged(found: Evaluation) -> _Pictures | None:
    embeddings = found.found.get("alignment", {}).get("embedding")
    features = found.found.get("features", {}).get("all", embeddings)
    return None if features is None else _Pictures(features, embeddings, found.prompt_numbers)


# ----------------------------------------------------------------------------------------------------------- references


def _references(plan: Plan, reporter: Reporter) -> _References | None:
    """Reference pictures of the same captions; None where they were not asked for or cannot be had."""
    settings, backbone, alignment, prompts = plan.settings, plan.backbone, plan.alignment, plan.prompts
    per_prompt, abilities = settings.frechet_images or 0, backbone.abilities
    if per_prompt == 0:
        return None
    if abilities is None:
        reporter.warn(f"no Fréchet distance: the base {backbone.name} brings no features and no pictures")
        return None
    if min(per_prompt, settings.num_images) * len(prompts) < 2:
        reporter.warn("no Fréchet distance: it takes at least two pictures")
        return None
    network = abilities.features()
    first = abilities.reference_pictures(list(prompts), per_prompt, settings.seed)
    # Other drawings of the same captions: what the distance is when nothing is wrong.
    second = abilities.reference_pictures(list(prompts), settings.num_images, settings.seed + 1)
    with reporter.progress("reference pictures", 2 * len(first) + len(second)) as bar:

        def judged(pictures: np.ndarray[Any, Any], each: int, *, vae: bool) -> _Pictures:
            features, embeddings = [], []
            for start in range(0, len(pictures), settings.batch_size):
                some = torch.from_numpy(np.ascontiguousarray(pictures[start : start + settings.batch_size]))
                pixels = some.permute(0, 3, 1, 2)
                if vae:
                    latents = backbone.encode((pixels.float() / 127.5 - 1).to(backbone.device))
                    pixels = as_bytes(backbone.decode(latents))
                features.append(features_of(network, pixels.float() / 255))
                if alignment is not None:
                    embeddings.append(alignment.images(pixels))
                bar.advance(len(some))
            numbers = [prompt for prompt in range(len(prompts)) for _ in range(each)]
            return _Pictures(torch.cat(features), torch.cat(embeddings) if embeddings else None, numbers)

        return _References(
            through_vae=judged(first, per_prompt, vae=True),
            raw=judged(first, per_prompt, vae=False),
            again=judged(second, settings.num_images, vae=True),
        )


def _reference_figures(result: Distributions, references: _References) -> Distributions:
    """Real against real, at an arm's N: what the figures are when nothing is wrong."""
    again, real = references.again, references.through_vae
    figures = {"kid": kid(again.features, real.features)}
    if again.embeddings is not None and real.embeddings is not None:
        figures["cmmd"] = cmmd(again.embeddings, real.embeddings)
    return Distributions(
        extractor=result.extractor,
        reference_frechet=frechet_distance(again.features, real.features),
        reference_distances=figures,
    )


# -------------------------------------------------------------------------------------------------------------- figures


def _frechets(
    drawn: Mapping[str, _Pictures], teacher: _Pictures | None, references: _References, halves: list[frozenset[int]]
) -> dict[str, Frechet]:
    def within_halves(pictures: _Pictures, real: _Pictures) -> list[float]:
        return half_sample_distances(
            pictures.features, pictures.prompts, real.features, real.prompts, halves, frechet_distance
        )

    real, raw = references.through_vae, references.raw
    theirs = None if teacher is None else frechet_distance(teacher.features, real.features)
    their_halves = [] if teacher is None else within_halves(teacher, real)
    found = {}
    for name, pictures in drawn.items():
        value, in_halves = frechet_distance(pictures.features, real.features), within_halves(pictures, real)
        difference = None
        if theirs is not None:
            # On the same halves, so that what both have in common falls out.
            difference = with_spread(
                value - theirs, [mine - other for mine, other in zip(in_halves, their_halves, strict=True)]
            )
        found[name] = Frechet(
            through_vae=with_spread(value, in_halves),
            raw=with_spread(frechet_distance(pictures.features, raw.features), within_halves(pictures, raw)),
            difference=difference,
            pictures=len(pictures.features),
            references=len(real.features),
            dimensions=real.features.shape[1],
        )
    return found


def _to_real(pictures: _Pictures, references: _References | None, halves: list[frozenset[int]]) -> dict[str, Interval]:
    if references is None:
        return {}
    real, equal = references.through_vae, references.again
    found = {"kid": _figure(kid, pictures.features, pictures, real.features, real, halves)}
    if pictures.embeddings is not None and real.embeddings is not None:
        found["cmmd"] = _figure(cmmd, pictures.embeddings, pictures, real.embeddings, real, halves)
    if len(pictures.features) > NEIGHBOURS:
        for index, name in enumerate(("precision", "recall")):
            found[name] = _figure(
                lambda a, b, index=index: precision_recall(a, b)[index],  # type: ignore[misc]
                pictures.features, pictures, equal.features, equal, halves, least=NEIGHBOURS + 1,
            )  # fmt: skip
    return found


def _to_teacher(pictures: _Pictures, teacher: _Pictures | None, halves: list[frozenset[int]]) -> dict[str, Interval]:
    if teacher is None or teacher is pictures or len(pictures.features) < 2:
        return {}
    found = {"kid_teacher": _figure(kid, pictures.features, pictures, teacher.features, teacher, halves)}
    if pictures.embeddings is not None and teacher.embeddings is not None:
        found["cmmd_teacher"] = _figure(cmmd, pictures.embeddings, pictures, teacher.embeddings, teacher, halves)
    return found


def _figure(
    distance: Distance,
    a: Tensor,
    of_a: _Pictures,
    b: Tensor,
    of_b: _Pictures,
    halves: list[frozenset[int]],
    least: int = 2,
) -> Interval:
    return with_spread(distance(a, b), half_sample_distances(a, of_a.prompts, b, of_b.prompts, halves, distance, least))


def _variety(pictures: _Pictures, teacher: _Pictures | None) -> dict[str, Interval]:
    if teacher is None or teacher is pictures or teacher.prompts != pictures.prompts:
        return {}
    prompts = pictures.prompts
    found = {"faithfulness": bootstrap(paired_distance(pictures.features, teacher.features), prompts)}
    own, theirs = diversity(pictures.features, prompts), diversity(teacher.features, prompts)
    if bool(own.isfinite().all() and (theirs > 0).all()):
        columns = torch.stack([own, theirs], dim=1)
        found["diversity"] = bootstrap(columns, prompts, lambda means: means[:, 0] / means[:, 1])
    return found
