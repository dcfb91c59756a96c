"""Distillation along the teacher's path, for a student that DDIM will sample: each jump ends where the next one begins.

A student of `kstep` jumps to x0 from everywhere, gets fresh noise, and jumps again: from much noise that is too far to
be learnt well by a small adapter, and what its guess has lost the noise cannot bring back. Sampled by DDIM on the few
timesteps that it promises, nothing is drawn anew, and a jump need not be longer than to the next of them:

    path(t → s) = DDIM or DPM-Solver++(teacher, guidance; on a fine grid from t down to s)        no gradient
    target(x_t) = (path(t → s) − r x_t) / (√ᾱ_s − r √ᾱ_t),  r = √((1−ᾱ_s) / (1−ᾱ_t))
    loss = w(t) ‖ f_student(x_t, t) − target(x_t) ‖²

The target is the x0 with which one DDIM step from x_t lands where the teacher's path is at s: that of progressive
distillation (Salimans & Ho 2022, appendix G), which halves the steps again and again, here in one go on a fixed grid.
It is also one phase of a phased consistency model (Wang et al. 2024), learnt at the phase's edge. s is the timestep
after t in the student's grid; where several step counts pass t, in that of the one promised first: a network has one
answer at a timestep, and another's jump from there then ends a little off.

The fine grid has K steps from the noisiest timestep down to x0 and passes all of the student's timesteps. So one path
from pure noise is a lesson at each of them (`from_noise`), for captions without pictures; a rollout from a lower t is
the rest of the grid, on which DPM-Solver++ begins anew: it remembers nothing of what came before t. Each timestep
counts alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.methods.kstep import Draws, KStep, Pairs, StudentSampler
from fewstep.solver import Denoiser, ddim_step, guided_output, solver_step
from fewstep.timesteps import rollout_grid
from fewstep.transfer import upload

Memory = tuple[Tensor, Tensor]
"""The x0 [B, C, H, W] of a solver's step before, and the timestep int64 [B] that it was taken at."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Trajectory(KStep):
    """The method and its settings: those of `KStep`, with K the steps of the whole path from the noisiest timestep."""

    sampler: ClassVar[StudentSampler] = "ddim"

    def _check_rollouts(self) -> None:
        """From a low t it is not K steps that are taken but the rest of the path, which has to exist as a whole."""
        if self.num_ddim_steps < len(self.points):
            self._refuse_few_steps("the teacher's path")
        _ = self.fine_grid

    @cached_property
    def fine_grid(self) -> list[int]:
        """The K + 1 timesteps of the teacher's path, from the noisiest to −1 (x0)."""
        return rollout_grid(self.points[0], self.num_ddim_steps, self.points, self.schedule.num_train_timesteps)

    @property
    def _counts(self) -> dict[int, float]:
        """All timesteps count alike, as a path passes each of them once."""
        return dict.fromkeys(self.points, 1 / len(self.points))

    @cached_property
    def landings(self) -> dict[int, int]:
        """Where the jump from each of the student's timesteps ends; −1 is x0."""
        ends = dict[int, int]()
        for steps in reversed(self.step_counts):  # the first one last: it stays
            ends |= dict(pairwise((*self._visited_in(steps), -1)))
        return ends

    @torch.no_grad()
    def target(self, teacher: Denoiser, x_t: Tensor, t: Tensor, cond: Tensor, uncond: Tensor | None) -> Tensor:
        """The x0 [B, C, H, W] to aim at from x_t [B, C, H, W]; arguments as in `KStep.target`."""
        path, _ = self._path(teacher, x_t, t, self._landings_of(t), cond, uncond)
        return self._aim(path, t, torch.arange(len(t)))

    def oracle(self, teacher: Denoiser, uncond: Tensor | None) -> Denoiser:
        """As `KStep.oracle`. Paths that are learnt whole from noise are followed as a whole: where a jump goes on from
        the landing of the call before, the teacher's solver remembers what it did there."""
        landed: tuple[Tensor, Memory] | None = None

        @torch.no_grad()
        def perfect_student(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            nonlocal landed
            here, ends, memory = t.cpu(), self._landings_of(t), None
            if self.from_noise and landed is not None and torch.equal(landed[0], here):
                memory = landed[1]
            path, memory = self._path(teacher, x_t, here, ends, cond, uncond, memory)
            landed = ends, memory
            return self.schedule.from_x0(self._aim(path, here, torch.arange(len(t))), x_t, t)

        return perfect_student

    def own_pictures(self, teacher: Denoiser, noise: Tensor, cond: Tensor, uncond: Tensor | None) -> Tensor:
        """Clean latents [B, C, H, W] of the teacher's own: the whole path from pure noise [B, C, H, W]."""
        top = torch.full((len(noise),), self.points[0])
        with torch.no_grad():
            path, _ = self._path(teacher, noise, top, torch.full_like(top, -1), cond, uncond)
        return path[-1]

    @torch.no_grad()
    def pairs(self, teacher: Denoiser, x_t: Tensor, draws: Draws, cond: Tensor, uncond: Tensor | None) -> Pairs:
        """One path a sample down from its start, and every pair that is learnt from it; as `KStep.pairs`."""
        grids = self._grids(draws.t)
        rows, steps = self._learnt_from(grids, draws.order)
        t = grids[rows, steps]
        lowest = draws.t.scatter_reduce(0, rows, self._landings_of(t), "amin")
        path, _ = self._path(teacher, x_t, draws.t, lowest, cond, uncond)
        weight = upload(torch.tensor([self._weights[one] for one in t.tolist()]), x_t.device)
        return Pairs(self._at(path, t, rows), t, rows, weight, self._aim(path, t, rows))

    def _grids(self, t: Tensor) -> Tensor:
        """What is left of the fine grid from each t, int64 [B, K + 1] on the CPU, filled up with −1."""
        rest = [self._grid(one) for one in t.tolist()]
        return torch.tensor([grid + [-1] * (self.num_ddim_steps + 1 - len(grid)) for grid in rest])

    def _grid(self, t: int) -> list[int]:
        return self.fine_grid[self.fine_grid.index(t) :]

    def _path(
        self,
        teacher: Denoiser,
        x_t: Tensor,
        starts: Tensor,
        ends: Tensor,
        cond: Tensor,
        uncond: Tensor | None,
        memory: Memory | None = None,
    ) -> tuple[Tensor, Memory]:
        """The path of each sample along the fine grid, [K + 1, B, C, H, W]: it stands still above its start and below
        its end.

        Args:
            starts, ends: int64 [B], timesteps of the fine grid; best on the CPU: no device need be waited for then.
            memory: what the solver remembers from above the starts; nothing where it begins there.

        Returns:
            The path, and what the solver remembers at its end.
        """
        starts, ends, x = starts.cpu(), ends.cpu(), x_t
        path, (x0, t_before) = [x], memory or (x, upload(starts, x.device))
        for here, below in pairwise(self.fine_grid):
            rows = upload(((starts >= here) & (here > ends)).nonzero().squeeze(1), x.device)
            if len(rows):
                on_way = rows if len(rows) < len(x) else slice(None)
                t = torch.full((len(rows),), here, device=x.device)
                t_next = torch.full_like(t, below)
                output = self._guided(teacher, x[on_way], t, here, cond[on_way], uncond)
                there, x0_here = solver_step(
                    self.solver, self.schedule, output, x[on_way], t, t_next, x0[on_way], t_before[on_way]
                )
                x, x0 = x.index_copy(0, rows, there), x0.index_copy(0, rows, x0_here)
                t_before = t_before.index_copy(0, rows, t)
            path.append(x)
        return torch.stack(path), (x0, t_before)

    def _guided(
        self, teacher: Denoiser, x_t: Tensor, t: Tensor, here: int, cond: Tensor, uncond: Tensor | None
    ) -> Tensor:
        low, high = self.guidance_interval or (0, here)
        return guided_output(teacher, x_t, t, cond, uncond, self.guidance if low <= here <= high else 1.0)

    def _landings_of(self, t: Tensor) -> Tensor:
        return torch.tensor([self.landings[one] for one in t.tolist()])

    def _at(self, path: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """Where the paths of samples `rows` are at timesteps t, [N, C, H, W]."""
        steps = torch.tensor([self.fine_grid.index(one) for one in t.tolist()])
        return path[upload(steps, path.device), upload(rows, path.device)]

    def _aim(self, path: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """The x0 [N, C, H, W] with which one step from where the paths of `rows` are at t lands on them again."""
        landings = self._landings_of(t)
        here, there = self._at(path, t, rows), self._at(path, landings, rows)
        return self.schedule.jump_x0(here, there, upload(t, path.device), upload(landings, path.device))

    def _step(self, output: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, noise: Tensor) -> Tensor:
        return ddim_step(self.schedule, output, x_t, t, t_next)

    def _student_x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return self.schedule.to_x0(output, x_t, t)
