"""What an arm of a benchmark is: adapter on or off, a sampler, its timesteps, a guidance. Pure data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import ge, gt
from typing import Literal

from fewstep.errors import InputError
from fewstep.timesteps import karras_grid, student_grid, teacher_grid

Sampler = Literal["ddim", "lcm", "tcd", "dpmpp", "dpmpp-karras", "none"]
Role = Literal["teacher", "solver", "student", "base", "real"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of drawing pictures, as compared with others from the same initial noise.

    Args:
        id: names files and rows; small letters, digits and hyphens.
        role: ``teacher``: what is to be matched; ``solver``: the teacher in fewer steps by a better solver, the
            alternative that costs no training; ``student``: with adapter; ``base``: the control without one;
            ``real``: the ceiling, pictures of the same captions that no network drew.
        adapter: whether the adapter is on.
        sampler: ``ddim`` (trailing, deterministic), ``lcm`` (re-noises between steps), ``tcd`` (re-noises as far as
            ``eta`` says), ``dpmpp`` (DPM-Solver++ 2M, trailing) or ``dpmpp-karras`` (the same on Karras noise levels);
            ``none`` for real pictures.
        steps: how many network evaluations a picture takes, those for guidance not counted.
        timesteps: the timesteps visited, descending; after the last one comes x0.
        guidance: w in u + w(c - u); at 1 and below nothing is guided (facts: as in diffusers' pipelines).
        is_baseline: whether the others are compared with it.
        source: which of several adapters it draws with; None is the run's own.
        scale: strength of the adapter.
        eta: of ``tcd``, 0 to 1.
        span: of ``ddim``, the share of the schedule in which its timesteps after the first lie; see `teacher_grid`.
        option: what is meant to make it faster than the same arm without, several joined by +; None for most.
    """

    id: str
    role: Role
    adapter: bool
    sampler: Sampler
    steps: int
    timesteps: tuple[int, ...]
    guidance: float
    is_baseline: bool = False
    source: str | None = None
    scale: float = 1.0
    eta: float = 0.0
    span: float = 1.0
    option: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.id):
            raise InputError(f"{self.id!r} came as an arm's id; allowed are a-z, 0-9 and single hyphens between them")
        if (self.steps < 1 and self.is_drawn) or self.steps != len(self.timesteps):
            raise InputError(
                f"arm {self.id} came with {self.steps} steps and {len(self.timesteps)} timesteps; "
                "allowed are as many timesteps as steps, at least one"
            )
        falls = ge if self.sampler == "dpmpp-karras" else gt  # between timesteps there may be several levels
        if not all(falls(earlier, later) for earlier, later in pairwise(self.timesteps)):
            raise InputError(f"arm {self.id} came with timesteps {self.timesteps}; allowed are descending ones")

    @property
    def is_drawn(self) -> bool:
        """Whether a network draws it, which takes time: real pictures are there."""
        return self.role != "real"

    @property
    def guided(self) -> bool:
        return self.guidance > 1

    @property
    def evaluations(self) -> int:
        """Network evaluations a picture: guidance takes two a step."""
        return self.steps * (2 if self.guided else 1)

    @property
    def family(self) -> str:
        """What its id says besides the number of steps: arms of one family are one curve."""
        return self.id.removesuffix(f"-{self.steps}")

    @property
    def title(self) -> str:
        """For people: ``student, 4 steps``."""
        if not self.is_drawn:
            return "real pictures"
        name = {"dpmpp": "DPM-Solver++", "dpmpp-karras": "DPM-Solver++ Karras"}.get(self.sampler, self.role)
        name = self.source or name
        name += f" {self.option}" if self.option else ""
        return f"{name}, {self.steps} step{'s' if self.steps != 1 else ''}"


def sampler_timesteps(sampler: Sampler, steps: int, num_train_timesteps: int, span: float = 1.0) -> tuple[int, ...]:
    """The timesteps that ``sampler`` visits: LCMScheduler's and TCDScheduler's own grid, else `teacher_grid`."""
    if sampler in ("lcm", "tcd"):
        return tuple(student_grid(steps, num_train_timesteps))
    return tuple(teacher_grid(steps, num_train_timesteps, span))


def teacher_arm(steps: int, guidance: float, num_train_timesteps: int = 1000) -> Arm:
    """The baseline: no adapter, guidance, DDIM trailing."""
    return Arm(
        id=f"teacher-{steps}",
        role="teacher",
        adapter=False,
        sampler="ddim",
        steps=steps,
        timesteps=sampler_timesteps("ddim", steps, num_train_timesteps),
        guidance=guidance,
        is_baseline=True,
    )


def solver_arm(steps: int, guidance: float, alphas_cumprod: Sequence[float], *, karras: bool) -> Arm:
    """The teacher in fewer steps: DPM-Solver++ (2M), which needs no training.

    Args:
        alphas_cumprod: the base's ᾱ of every timestep, falling.
        karras: on Karras noise levels instead of trailing timesteps.
    """
    sampler: Sampler = "dpmpp-karras" if karras else "dpmpp"
    timesteps = karras_grid(steps, alphas_cumprod)[0] if karras else teacher_grid(steps, len(alphas_cumprod))
    return Arm(
        id=f"{sampler}-{steps}",
        role="solver",
        adapter=False,
        sampler=sampler,
        steps=steps,
        timesteps=tuple(timesteps),
        guidance=guidance,
    )


def student_arm(
    steps: int,
    guidance: float = 1.0,
    num_train_timesteps: int = 1000,
    *,
    name: str = "student",
    source: str | None = None,
    sampler: Sampler = "lcm",
    eta: float = 0.0,
    span: float = 1.0,
    scale: float = 1.0,
) -> Arm:
    """An adapter at a few steps, by default the run's own with the LCM sampler."""
    return Arm(
        id=f"{name}-{steps}",
        role="student",
        adapter=True,
        sampler=sampler,
        steps=steps,
        timesteps=sampler_timesteps(sampler, steps, num_train_timesteps, span),
        guidance=guidance,
        source=source,
        eta=eta,
        span=span,
        scale=scale,
    )


def base_arm(
    steps: int,
    guidance: float = 1.0,
    num_train_timesteps: int = 1000,
    *,
    sampler: Sampler = "lcm",
    eta: float = 0.0,
    span: float = 1.0,
) -> Arm:
    """The negative control: what a student's sampler and steps give without the adapter."""
    parts = ["base"]
    parts += [sampler] if sampler != "lcm" else []
    parts += [f"eta{100 * eta:g}".replace(".", "p")] if eta else []
    parts += [f"span{span:g}".replace(".", "")] if span < 1 else []  # 0.85 as 085: all of these begin with 0.
    parts += [f"w{guidance:g}".replace(".", "p")] if guidance > 1 else []
    return Arm(
        id="-".join([*parts, str(steps)]),
        role="base",
        adapter=False,
        sampler=sampler,
        steps=steps,
        timesteps=sampler_timesteps(sampler, steps, num_train_timesteps, span),
        guidance=guidance,
        eta=eta,
        span=span,
    )


def faster_arm(arm: Arm, option: str) -> Arm:
    """``arm`` with an option that is meant to make it faster."""
    return replace(arm, id=f"{arm.family}-{option.replace('+', '-')}-{arm.steps}", option=option)


def plain_of(arm: Arm, arms: Iterable[Arm]) -> Arm | None:
    """The arm that differs from ``arm`` in the option alone."""
    if arm.option is None:
        return None
    return next((other for other in arms if replace(arm, id=other.id, option=None) == other), None)


def real_arm() -> Arm:
    """The ceiling: real pictures of the same captions, as many as an arm draws."""
    return Arm(id="real", role="real", adapter=False, sampler="none", steps=0, timesteps=(), guidance=1.0)


def control_of(arm: Arm, arms: Iterable[Arm]) -> Arm | None:
    """The arm that differs from ``arm`` in the adapter alone."""
    if not arm.adapter:
        return None
    return next(
        (
            other
            for other in arms
            if not other.adapter
            and (other.sampler, other.timesteps, max(1.0, other.guidance), other.eta)
            == (arm.sampler, arm.timesteps, max(1.0, arm.guidance), arm.eta)  # at 1 or less there is none
        ),
        None,
    )


def check_arms(arms: Sequence[Arm], negative_prompt: str | None = None) -> None:
    """Refuse arms that cannot be told apart, several baselines, and a negative prompt where it has no effect."""
    if not arms:
        raise InputError("no arms came; allowed is at least one; pass --steps 4")
    ids = [arm.id for arm in arms]
    repeated = sorted({name for name in ids if ids.count(name) > 1})
    if repeated:
        raise InputError(f"arm {repeated[0]} came twice; allowed is each id once; rename or leave one out")
    baselines = [arm.id for arm in arms if arm.is_baseline]
    if len(baselines) > 1:
        raise InputError(f"{len(baselines)} baselines came ({', '.join(baselines)}); allowed is one")
    unguided = [arm.id for arm in arms if arm.role == "student" and not arm.guided]
    if negative_prompt and unguided:
        raise InputError(
            f"a negative prompt came, but {unguided[0]} has no guidance to use it with; allowed is guidance above 1; "
            "pass --flash_guidance 1.5 or leave --negative_prompt out"
        )
