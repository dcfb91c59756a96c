"""How far an arm's pictures, taken together, are from real ones and from the teacher's.

The features are of the model that was asked for, else the base's own where it brings some, else the picture embeddings
of the alignment model. References are pictures of the same captions, the base's own or the data's; they are passed
through the VAE, so that what the VAE loses is not held against an arm, and taken raw beside that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.backbone.threads import lone_threads
from fewstep.benchmark.drawing import features_among, features_of, looks_of
from fewstep.benchmark.plan import Plan
from fewstep.benchmark.real import through_vae
from fewstep.metrics.frechet import frechet_distance
from fewstep.metrics.halves import half_sample_distances, half_samples, with_spread, within_halves
from fewstep.metrics.intervals import bootstrap
from fewstep.metrics.kernels import cmmd, kid
from fewstep.metrics.manifold import NEIGHBOURS, precision_recall
from fewstep.metrics.variety import diversity, paired_distance
from fewstep.pictures import Evaluation, picture_ids
from fewstep.records import Frechet, Interval
from fewstep.reporting import Reporter


@dataclass(frozen=True, kw_only=True)
class Distributions:
    """What was found, by arm.

    Attributes:
        extractor: what the features are of; None where there are none.
        frechet: to pictures of the same captions.
        distances: "kid", "cmmd", "precision", "recall" to pictures of the same captions, and these and "frechet" to
            the teacher's pictures, as "kid_teacher" and so on.
        variety: "diversity", over the teacher's, and "faithfulness", the paired distance to the teacher's pictures.
    """

    extractor: str | None = None
    frechet: dict[str, Frechet] = field(default_factory=dict)
    distances: dict[str, dict[str, Interval]] = field(default_factory=dict)
    variety: dict[str, dict[str, Interval]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Pictures:
    """A set of pictures as the metrics see it: features [N, D], embeddings [N, E] or None, and each one's prompt.

    ``raw``: features of real pictures before they went through the VAE; an arm's own features again.
    """

    features: Tensor
    embeddings: Tensor | None
    raw: Tensor
    prompts: list[int]
    is_real: bool = False


def measure_distributions(plan: Plan, evaluations: Mapping[str, Evaluation], reporter: Reporter) -> Distributions:
    """Everything that can be measured with the features, references and teacher at hand."""
    references = _references(plan, reporter)
    arms = {name: _judged(found) for name, found in evaluations.items()}
    drawn = {name: arm for name, arm in arms.items() if arm is not None}
    if len(drawn) < len(arms):
        return Distributions()
    teacher = next((drawn[name] for name, found in evaluations.items() if found.arm.is_baseline), None)
    real = next((pictures for pictures in drawn.values() if pictures.is_real), None)
    halves = half_samples(next(iter(drawn.values())).prompts)

    extractor = plan.features or plan.alignment
    result = Distributions(extractor=extractor.name if extractor else None)
    theirs = None if references is None or teacher is None else _Within.of(teacher, references, halves)

    def measure(pictures: _Pictures) -> tuple[Frechet | None, dict[str, Interval], dict[str, Interval]]:
        return (
            None if references is None else _frechet(pictures, theirs, references, halves),
            _to_real(pictures, references, real, halves) | _to_teacher(pictures, teacher, halves),
            _variety(pictures, teacher),
        )

    # A thread an arm, each computing alone: these matrices are too small to be shared out.
    with reporter.progress("distances", len(drawn)) as bar, lone_threads(torch.get_num_threads()) as pool:
        for name, (frechet, distances, variety) in zip(drawn, pool.map(measure, drawn.values()), strict=True):
            if frechet is not None:
                result.frechet[name] = frechet
            result.distances[name], result.variety[name] = distances, variety
            bar.advance()
    return result


def _judged(found: Evaluation) -> _Pictures | None:
    others = found.found.get("others")
    if others:
        return _Pictures(
            features_among(others), others.get("embedding"), others["raw"], found.prompt_numbers, is_real=True
        )
    embeddings = found.found.get("alignment", {}).get("embedding")
    features = found.found.get("features", {}).get("all", embeddings)
    return None if features is None else _Pictures(features, embeddings, features, found.prompt_numbers)


def _references(plan: Plan, reporter: Reporter) -> _Pictures | None:
    """Reference pictures of the same captions; None where they were not asked for or cannot be had."""
    settings, prompts, real = plan.settings, len(plan.prompts), plan.real
    if not settings.frechet_images:
        return None
    if real is None:
        reporter.warn(
            f"no Fréchet distance: the base {plan.backbone.name} makes no real pictures; pass some with --data_dir"
        )
        return None
    if plan.features is None and plan.alignment is None:
        reporter.warn("no Fréchet distance: there are no features to take it between")
        return None
    if min(real.references, settings.num_images) * prompts < 2:
        reporter.warn("no Fréchet distance: it takes at least two pictures")
        return None
    ids = picture_ids(prompts, real.references)
    raw, found = [], []
    with reporter.progress("reference pictures", len(ids)) as bar:
        for start in range(0, len(ids), settings.batch_size):
            some = ids[start : start + settings.batch_size]
            pixels = real.reference(some)
            raw.append(features_of(plan, pixels))
            found.append(looks_of(plan, through_vae(plan.backbone, pixels)))
            bar.advance(len(some))
    looks = {name: torch.cat([one[name] for one in found]) for name in found[0]}
    return _Pictures(
        features_among(looks), looks.get("embedding"), torch.cat(raw), [prompt for prompt, _ in ids], is_real=True
    )


# -------------------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True)
class _Within:
    """A Fréchet distance to real pictures: of the whole, and within each half."""

    whole: float
    halves: list[float]

    @classmethod
    def of(cls, pictures: _Pictures, real: _Pictures, halves: list[frozenset[int]]) -> _Within:
        in_halves = half_sample_distances(
            pictures.features, pictures.prompts, real.features, real.prompts, halves, frechet_distance
        )
        return cls(frechet_distance(pictures.features, real.features), in_halves)


def _frechet(pictures: _Pictures, teacher: _Within | None, real: _Pictures, halves: list[frozenset[int]]) -> Frechet:
    found = _Within.of(pictures, real, halves)
    difference = None
    if teacher is not None:
        # On the same halves, so that what both have in common falls out.
        in_halves = [mine - theirs for mine, theirs in zip(found.halves, teacher.halves, strict=True)]
        difference = with_spread(found.whole - teacher.whole, in_halves, pictures.prompts)
    return Frechet(
        through_vae=with_spread(found.whole, found.halves, pictures.prompts, least=0.0),
        raw=_figure(frechet_distance, pictures.raw, pictures, real.raw, real, halves),
        difference=difference,
        pictures=len(pictures.features),
        references=len(real.features),
        dimensions=real.features.shape[1],
    )


def _to_real(
    pictures: _Pictures, references: _Pictures | None, real: _Pictures | None, halves: list[frozenset[int]]
) -> dict[str, Interval]:
    """Against the references; precision and recall, which want sets of a size, against the real arm's pictures where
    there are more or fewer references than pictures."""
    if references is None:
        return {}
    found = _kernels(pictures, references, halves)
    if real is not None and not pictures.is_real and len(pictures.features) > NEIGHBOURS:
        alike = references if len(references.features) == len(pictures.features) else real
        found |= _manifolds(pictures, alike, halves)
    return found


def _kernels(pictures: _Pictures, others: _Pictures, halves: list[frozenset[int]]) -> dict[str, Interval]:
    """KID, and CMMD where both sets have embeddings; neither where a set has only one prompt."""
    if min(len(set(pictures.prompts)), len(set(others.prompts))) < 2:
        return {}
    found = {"kid": _between_prompts(kid, pictures.features, pictures, others.features, others, halves)}
    if pictures.embeddings is not None and others.embeddings is not None:
        found["cmmd"] = _between_prompts(cmmd, pictures.embeddings, pictures, others.embeddings, others, halves)
    return found


def _manifolds(pictures: _Pictures, others: _Pictures, halves: list[frozenset[int]]) -> dict[str, Interval]:
    """Precision and recall of two sets of more than k pictures."""
    a, b = pictures.features, others.features
    in_halves = half_sample_distances(
        a, pictures.prompts, b, others.prompts, halves, precision_recall, least=NEIGHBOURS + 1
    )
    found = zip(precision_recall(a, b), *in_halves, strict=True)
    return {
        name: with_spread(share, shares, pictures.prompts, least=0.0, most=1.0)
        for name, (share, *shares) in zip(("precision", "recall"), found, strict=True)
    }


def _to_teacher(pictures: _Pictures, teacher: _Pictures | None, halves: list[frozenset[int]]) -> dict[str, Interval]:
    if teacher is None or teacher is pictures or pictures.is_real or len(pictures.features) < 2:
        return {}
    found = {"frechet": _figure(frechet_distance, pictures.features, pictures, teacher.features, teacher, halves)}
    found |= _kernels(pictures, teacher, halves)
    if min(len(pictures.features), len(teacher.features)) > NEIGHBOURS:
        found |= _manifolds(pictures, teacher, halves)
    return {f"{name}_teacher": figure for name, figure in found.items()}


def _figure(
    distance: Callable[[Tensor, Tensor], float],
    a: Tensor,
    of_a: _Pictures,
    b: Tensor,
    of_b: _Pictures,
    halves: list[frozenset[int]],
) -> Interval:
    in_halves = half_sample_distances(a, of_a.prompts, b, of_b.prompts, halves, distance)
    return with_spread(distance(a, b), in_halves, of_a.prompts, least=0.0)


def _between_prompts(
    distance: Callable[[Tensor, Tensor, Sequence[int], Sequence[int]], float],
    a: Tensor,
    of_a: _Pictures,
    b: Tensor,
    of_b: _Pictures,
    halves: list[frozenset[int]],
) -> Interval:
    """The figure of a distance that must know each picture's prompt, in the halves as in the whole."""
    drawn, real = torch.tensor(of_a.prompts), torch.tensor(of_b.prompts)

    def within(mine: Tensor, theirs: Tensor) -> float:
        return distance(a[mine], b[theirs], drawn[mine].tolist(), real[theirs].tolist())

    in_halves = within_halves(of_a.prompts, of_b.prompts, halves, within)
    return with_spread(distance(a, b, of_a.prompts, of_b.prompts), in_halves, of_a.prompts)


def _variety(pictures: _Pictures, teacher: _Pictures | None) -> dict[str, Interval]:
    if teacher is None or teacher is pictures or teacher.prompts != pictures.prompts:
        return {}
    prompts = pictures.prompts
    found = {}
    if not pictures.is_real:  # those came from no noise
        found["faithfulness"] = bootstrap(paired_distance(pictures.features, teacher.features), prompts)
    own, theirs = diversity(pictures.features, prompts), diversity(teacher.features, prompts)
    if bool(own.isfinite().all() and (theirs > 0).all()):
        columns = torch.stack([own, theirs], dim=1)
        found["diversity"] = bootstrap(columns, prompts, lambda means: means[:, 0] / means[:, 1])
    return found
