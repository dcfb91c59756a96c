"""K-step distillation: one unguided jump of the student learns where K guided DDIM steps of the teacher arrive.

    x_t = √ᾱ_t x0 + √(1−ᾱ_t) ε                          a noised clean latent, or ε itself at the noisiest t
    target(x_t) = DDIM_K(teacher, guidance; t → … → x0)   no gradient; or DPM-Solver++ in K steps
    loss = w(t) ‖ f_student(x_t, t) − target(x_t) ‖²       f as the few-step sampler maps the network to x0

t is drawn as sampling will ask for it: a promised number of steps, then one of its timesteps, both evenly.

The clean latent x0 is data, or a picture of the teacher's own, where it arrives from pure noise in K guided steps: no
data is needed then, and the student is trained where the teacher's pictures are. Such a picture is never what is aimed
at: it is noised to t, and the target is where the teacher gets to from there, in a second rollout. (To aim at the
picture that was noised would be plain denoising: its answer is the mean of all pictures that fit, a blur.)

Or x_t is where the student itself stands when it is sampled in the drawn number of steps and comes to t. It is trained
then where its own errors take it, on states that change as it learns.

A rollout from t passes the student's own timesteps below t (`timesteps.rollout_grid` sees to it), and each state there
has the same end point: one more pair (state, target) at no cost to the teacher. With `pairs_per_rollout` above 1 some
of them are learnt from too, weighted so that every timestep counts as much as without: the objective stays what it is,
up to where the states come from (the teacher's path instead of noised pictures).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar, Literal, NoReturn

import torch
from torch import Tensor

from fewstep.arms import Arm, sampler_timesteps, student_arm
from fewstep.errors import InputError
from fewstep.losses import LOSSES, WEIGHTINGS, LossName, Weighting
from fewstep.randomness import generator
from fewstep.schedule import NoiseSchedule
from fewstep.solver import Denoiser, TeacherSolver, rollout
from fewstep.timesteps import promised_points, rollout_grid, rollout_grids
from fewstep.transfer import upload

StudentSampler = Literal["lcm", "ddim"]
"""How a student is going to be sampled: what `arms.Arm` calls its sampler."""


@dataclass(frozen=True, eq=False)
class Draws:
    """What chance decides about B training samples, on the CPU.

    Attributes:
        t: int64 [B].
        noise: [B, C, H, W] fp32, standard normal.
        pure: bool [B]; the sample starts from `noise` alone.
        steps: int64 [B], the number of steps in which the student would come by t.
        order: [B, K] fp32 in 0 … 1; of the states that a rollout passes, those with the lowest numbers are learnt from.
    """

    t: Tensor
    noise: Tensor
    pure: Tensor
    steps: Tensor
    order: Tensor

    @property
    def noised(self) -> list[int]:
        """The samples that start from a noised clean latent."""
        return (~self.pure).nonzero().squeeze(1).tolist()


@dataclass(frozen=True, eq=False)
class Pairs:
    """What a batch of B rollouts teaches: N ≥ B states and where to jump from there.

    Attributes:
        x_t: [N, C, H, W], without gradient.
        t: int64 [N], on the CPU.
        rows: int64 [N], on the CPU: which of the B samples each belongs to; the first B are the starts themselves.
        weight: [N] fp32; Σ weight · loss / B is the batch's loss.
        target: [N, C, H, W], the x0 that is aimed at.
    """

    x_t: Tensor
    t: Tensor
    rows: Tensor
    weight: Tensor
    target: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class KStep:
    """The method and its settings.

    Attributes:
        schedule: of the base model, on the device that trains.
        step_counts: the numbers of steps promised to whoever samples, 1 to 50 each.
        num_ddim_steps: K.
        solver: how the teacher takes its K steps.
        guidance: the teacher's w in u + w (c − u); at 1 or less it is not guided.
        pure_noise_share: which share of the draws at the noisiest t starts from pure noise, as sampling always does.
            The rest are noised pictures, which at that t still show through (SD1.5: ᾱ = 0.0047).
        criterion: the loss, by its name in `losses.LOSSES`.
        weighting: w(t), by its name in `losses.WEIGHTINGS`.
        pairs_per_rollout: at most how many pairs are learnt from a rollout, its start included.
        guidance_interval: (low, high), the timesteps at which the teacher is guided; None for all.
        from_noise: every rollout starts from pure noise at the noisiest timestep; the others are met on its way.
        span: the share of the schedule in which the timesteps after the first lie, of a student that DDIM samples.
    """

    schedule: NoiseSchedule
    step_counts: Sequence[int]
    num_ddim_steps: int
    guidance: float
    solver: TeacherSolver = "ddim"
    pure_noise_share: float = 1.0
    criterion: LossName = "mse"
    weighting: Weighting = "x0"
    pairs_per_rollout: int = 1
    guidance_interval: tuple[int, int] | None = None
    from_noise: bool = False
    span: float = 1.0

    sampler: ClassVar[StudentSampler] = "lcm"
    """How the student is going to be sampled; it decides at which timesteps."""

    def __post_init__(self) -> None:
        """Find out before training whether every rollout exists.

        Raises:
            InputError: no step counts, a step count or K that is impossible, or a share outside 0 … 1.
        """
        if not self.step_counts:
            raise InputError("no step counts came; at least one must be promised; pass --num_inference_steps 1 2 4 8")
        if not 0 <= self.pure_noise_share <= 1:
            raise InputError(f"pure_noise_share {self.pure_noise_share} came; it is a share; choose one from 0 to 1")
        if self.pairs_per_rollout < 1:
            raise InputError(f"pairs_per_rollout {self.pairs_per_rollout} came; allowed is 1 or more; 1 learns no more")
        if self.from_noise and self.pairs_per_rollout == 1 and len(self.points) > 1:
            raise InputError(
                "pairs_per_rollout 1 came with rollouts that all start from pure noise: timesteps below would never be "
                "learnt; allowed is 2 or more; raise --pairs_per_rollout"
            )
        self._check_weights()
        self._check_rollouts()

    def _check_weights(self) -> None:
        """Refuse, by an `InputError`, a weighting that learns nothing at a timestep: where ᾱ is 0, some are 0."""
        alpha_bar = self.schedule.alpha_bar(torch.tensor(self.points))
        if alpha_bar.is_meta:  # shapes alone
            return
        for t, weight in zip(self.points, WEIGHTINGS[self.weighting](alpha_bar).tolist(), strict=True):
            if weight == 0:
                raise InputError(
                    f"loss_weighting {self.weighting} came with a base that has nothing but noise at t = {t}: there "
                    "its weight is 0, and nothing would be learnt; allowed are x0 and v; pass --loss_weighting v"
                )

    def _check_rollouts(self) -> None:
        """Refuse, by an `InputError`, a K with which a rollout does not exist or a timestep is never learnt from."""
        rollout_grids(self.points, self.num_ddim_steps, self.schedule.num_train_timesteps)
        if self.from_noise and not set(self.points) <= set(self._grid(self.points[0])):
            self._refuse_few_steps("a rollout from pure noise")

    def _refuse_few_steps(self, what: str) -> NoReturn:
        raise InputError(
            f"num_ddim_steps {self.num_ddim_steps} came; {what} has to pass all {len(self.points)} timesteps of the "
            "student; allowed are as many steps or more; raise --num_ddim_steps"
        )

    @cached_property
    def points(self) -> list[int]:
        """Every timestep that training visits, noisiest first."""
        return promised_points(
            self.step_counts,
            self.schedule.num_train_timesteps,
            partial(sampler_timesteps, self.sampler, span=self.span),
        )

    def arm(self, steps: int) -> Arm:
        """How the student is sampled in `steps` steps."""
        return student_arm(steps, 1.0, self.schedule.num_train_timesteps, sampler=self.sampler, span=self.span)

    def _visited_in(self, steps: int) -> tuple[int, ...]:
        """The timesteps of the student when it is sampled in `steps` steps."""
        return self.arm(steps).timesteps

    def draw(self, seed: int, update: int, positions: Sequence[int], shape: Sequence[int]) -> Draws:
        """The chance of each sample: a function of (seed, update, its position in the global batch), nothing else.

        Args:
            update: number of the optimizer update.
            positions: of the B samples at hand in the update's global batch, over micro-batches and processes.
            shape: of one latent, (C, H, W).
        """
        draws = [self._draw_one(generator(seed, "kstep", update, position), shape) for position in positions]
        t, noise, pure, steps, order = zip(*draws, strict=True)
        return Draws(torch.tensor(t), torch.stack(noise), torch.tensor(pure), torch.tensor(steps), torch.stack(order))

    def _draw_one(self, rng: torch.Generator, shape: Sequence[int]) -> tuple[int, Tensor, bool, int, Tensor]:
        """t, noise, whether it is pure, the number of steps, and the order of the states to learn from, of a sample."""
        steps = self.step_counts[_below(len(self.step_counts), rng)]
        t = self._visited_in(steps)[_below(steps, rng)]
        chance = torch.rand((), generator=rng).item()  # drawn at every t, so that the noise below never shifts
        noise = torch.randn(*shape, generator=rng)
        order = torch.rand(self.num_ddim_steps, generator=rng)
        if self.from_noise:
            t = self.points[0]
        pure = t == self.points[0] and (self.from_noise or chance < self.pure_noise_share)
        return t, noise, pure, steps, order

    def draw_origins(self, seed: int, update: int, positions: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The noise [B, C, H, W] fp32 that the teacher's own pictures begin from, on the CPU: its own at each sample.

        Args:
            seed, update, positions, shape: as in `draw`, whose noise is another one.
        """
        sources = [generator(seed, "kstep", "origin", update, position) for position in positions]
        return torch.stack([torch.randn(*shape, generator=source) for source in sources])

    def own_pictures(self, teacher: Denoiser, noise: Tensor, cond: Tensor, uncond: Tensor | None) -> Tensor:
        """Clean latents [B, C, H, W] of the teacher's own: K guided steps from pure noise [B, C, H, W], no gradient."""
        return self.target(teacher, noise, torch.full((len(noise),), self.points[0]), cond, uncond)

    @torch.no_grad()
    def own_states(
        self, student: Denoiser, draws: Draws, cond: Tensor, seed: int, update: int, positions: Sequence[int]
    ) -> Tensor:
        """The x_t [B, C, H, W] at which the student arrives, sampled from pure noise in `draws.steps` steps.

        As its sampler does it: a jump, on to the next timestep, the next jump. Noise alone at the noisiest timestep.

        Args:
            cond: embeddings [B, L, D].
            seed, update, positions: as in `draw`, whose noise is another one.
        """
        sources = [generator(seed, "kstep", "guess", update, position) for position in positions]
        ways = [
            [point for point in self._visited_in(steps) if point >= t]
            for t, steps in zip(draws.t.tolist(), draws.steps.tolist(), strict=True)
        ]

        def noise(rows: Sequence[int]) -> Tensor:
            drawn = [torch.randn(draws.noise.shape[1:], generator=sources[row]) for row in rows]
            return upload(torch.stack(drawn), cond.device)

        states = noise(range(len(ways)))
        for jump in range(max(map(len, ways)) - 1):
            rows = [row for row, way in enumerate(ways) if jump + 1 < len(way)]
            here = upload(torch.tensor(rows), cond.device)
            t = upload(torch.tensor([ways[row][jump] for row in rows]), cond.device)
            t_next = upload(torch.tensor([ways[row][jump + 1] for row in rows]), cond.device)
            x_t = states[here]
            states.index_copy_(0, here, self._step(student(x_t, t, cond[here]), x_t, t, t_next, noise(rows)))
        return states

    def _step(self, output: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, noise: Tensor) -> Tensor:
        """One step of the student's sampler from x_t at t to `t_next`; `output` is its network's there."""
        return self.schedule.add_noise(self._student_x0(output, x_t, t), noise, t_next)

    def _student_x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x0 [B, C, H, W] as the student's sampler makes it of its network's `output`."""
        return self.schedule.consistency(output, x_t, t)

    def start(self, x0: Tensor, draws: Draws) -> Tensor:
        """x_t [B, C, H, W] on the device of the clean latents `x0` [B, C, H, W]."""
        t, noise, pure = (upload(part, x0.device) for part in (draws.t, draws.noise, draws.pure))
        return torch.where(pure[:, None, None, None], noise, self.schedule.add_noise(x0, noise, t))

    @torch.no_grad()
    def target(self, teacher: Denoiser, x_t: Tensor, t: Tensor, cond: Tensor, uncond: Tensor | None) -> Tensor:
        """The teacher's x0 [B, C, H, W] after K guided DDIM steps from x_t [B, C, H, W], without gradient.

        Args:
            t: int64 [B]; on the CPU the device need not be waited for.
            cond, uncond: embeddings [B, L, D]; `uncond` may be [1, L, D].
        """
        return self._rollout(teacher, x_t, self._grids(t), cond, uncond)

    @torch.no_grad()
    def pairs(self, teacher: Denoiser, x_t: Tensor, draws: Draws, cond: Tensor, uncond: Tensor | None) -> Pairs:
        """One rollout a sample as in `target`, and every pair that is learnt from it.

        Args:
            x_t: the starts [B, C, H, W], at `draws.t`.
        """
        grids, visited = self._grids(draws.t), list[Tensor]()
        end = self._rollout(teacher, x_t, grids, cond, uncond, visited)
        rows, steps = self._learnt_from(grids, draws.order)
        rows_there = upload(rows, x_t.device)
        states = torch.stack(visited)[upload(steps, x_t.device), rows_there]
        t = grids[rows, steps]
        weight = upload(torch.tensor([self._weights[one] for one in t.tolist()]), x_t.device)
        return Pairs(states, t, rows, weight, end[rows_there])

    def _rollout(
        self,
        teacher: Denoiser,
        x_t: Tensor,
        grids: Tensor,
        cond: Tensor,
        uncond: Tensor | None,
        visited: list[Tensor] | None = None,
    ) -> Tensor:
        return rollout(
            teacher,
            self.schedule,
            x_t,
            grids,
            cond,
            uncond,
            self.guidance,
            visited=visited,
            interval=self.guidance_interval,
            solver=self.solver,
        )

    def _grids(self, t: Tensor) -> Tensor:
        """The rollout of each t, int64 [B, K + 1] on the CPU."""
        return torch.tensor([self._grid(one) for one in t.tolist()])

    def _grid(self, t: int) -> list[int]:
        return rollout_grid(t, self.num_ddim_steps, self.points, self.schedule.num_train_timesteps)

    def _learnt_from(self, grids: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Which (sample, step of its rollout) are learnt from, int64 [N] each: the starts, then some of the rest."""
        starts = torch.arange(len(grids))
        more = [
            (row, step)
            for row, grid in enumerate(grids.tolist())
            for step in sorted(self._passed(grid), key=order[row].tolist().__getitem__)[: self.pairs_per_rollout - 1]
        ]
        rows, steps = zip(*more, strict=True) if more else ((), ())
        return (
            torch.cat([starts, torch.tensor(rows, dtype=torch.int64)]),
            torch.cat([torch.zeros_like(starts), torch.tensor(steps, dtype=torch.int64)]),
        )

    def _passed(self, grid: Sequence[int]) -> list[int]:
        """The steps of a rollout at which it passes a timestep of the student's, the start not counted."""
        return [step for step, t in enumerate(grid[:-1]) if step > 0 and t in self.points]

    @cached_property
    def _weights(self) -> dict[int, float]:
        """What a pair at each timestep weighs: how much the timestep is to count, over how often it is learnt from.

        From a start that passes c of the student's timesteps, of which m are learnt from, each is with chance m / c.
        """
        started = dict.fromkeys(self.points, 0.0) | {self.points[0]: 1.0} if self.from_noise else self._drawn
        learnt = dict(started)
        for t, chance in started.items():
            grid = self._grid(t)
            passed = self._passed(grid)
            for step in passed:
                learnt[grid[step]] += chance * min(1.0, (self.pairs_per_rollout - 1) / len(passed))
        return {t: self._counts[t] / learnt[t] for t in self.points}

    @cached_property
    def _drawn(self) -> dict[int, float]:
        """How often each timestep is drawn: a step count, then one of its timesteps."""
        drawn = dict.fromkeys(self.points, 0.0)
        for steps in self.step_counts:
            for t in self._visited_in(steps):
                drawn[t] += 1 / (len(self.step_counts) * steps)
        return drawn

    @property
    def _counts(self) -> dict[int, float]:
        """How much each timestep is to count in the loss: as often as it is drawn; adds up to 1."""
        return self._drawn

    def loss(self, student: Denoiser, x_t: Tensor, t: Tensor, cond: Tensor, target: Tensor) -> Tensor:
        """One forward of the student, its x0 against the `target`: a loss a sample, [B] fp32, with gradient."""
        t = upload(t, x_t.device)
        x0 = self._student_x0(student(x_t, t, cond), x_t, t)
        return LOSSES[self.criterion](x0, target, WEIGHTINGS[self.weighting](self.schedule.alpha_bar(t)))

    def oracle(self, teacher: Denoiser, uncond: Tensor | None) -> Denoiser:
        """The student that has learnt everything: a denoiser whose x0 is the `target`.

        Under the student's sampler it gives the ceiling of what training can reach.
        """

        def perfect_student(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            return self.schedule.from_x0(self.target(teacher, x_t, t, cond, uncond), x_t, t)

        return perfect_student


def _below(count: int, rng: torch.Generator) -> int:
    """One of 0 … count − 1, evenly."""
    return int(torch.randint(count, (), generator=rng).item())
