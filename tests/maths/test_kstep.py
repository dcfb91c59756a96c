"""K-step distillation: what is drawn, what is aimed at, what is lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fewstep.errors import InputError
from fewstep.methods import METHODS
from fewstep.methods.kstep import KStep
from fewstep.randomness import generator
from fewstep.sampling import PictureNoise, lcm_sample
from fewstep.schedule import NoiseSchedule
from fewstep.solver import rollout
from fewstep.timesteps import promised_points, rollout_grid, student_grid

SHAPE = (4, 6, 6)


def kstep(schedule: NoiseSchedule, **changes: Any) -> KStep:
    settings: dict[str, Any] = {"step_counts": (1, 2, 4, 8), "num_ddim_steps": 8, "guidance": 7.5}
    return KStep(schedule=schedule, **(settings | changes))


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Four noised samples, prompts, and the empty prompt."""
    return {
        "x_t": torch.randn(4, *SHAPE),
        "t": torch.tensor([999, 499, 139, 259]),
        "cond": torch.randn(4, 2, 6),
        "uncond": torch.randn(1, 2, 6),
    }


def test_it_is_listed() -> None:
    assert METHODS["lcm"] is KStep


def test_timesteps_are_drawn_as_sampling_asks_for_them(schedule: NoiseSchedule) -> None:
    draws = kstep(schedule).draw(0, 0, range(8_000), (1,))
    counts = Counter(draws.t.tolist())
    expected: Counter[int] = Counter()
    for steps in (1, 2, 4, 8):
        for t in student_grid(steps):
            expected[t] += 8_000 / 4 / steps
    assert expected[999] == pytest.approx(0.46875 * 8_000)  # "999 gets 47 %"
    assert set(counts) == set(expected) == set(promised_points([1, 2, 4, 8]))
    chi_squared = sum((counts[t] - expected[t]) ** 2 / expected[t] for t in expected)
    assert chi_squared < 24.3  # 7 degrees of freedom, p = 0.001; the draw is the same on every run


def test_noise_is_standard_normal_and_does_not_follow_t(schedule: NoiseSchedule) -> None:
    draws = kstep(schedule).draw(0, 0, range(4000), (8,))
    assert draws.noise.dtype == torch.float32
    assert draws.noise.mean().abs() < 0.02
    assert abs(draws.noise.std().item() - 1) < 0.02
    top = draws.t == 999
    assert (draws.noise[top].mean() - draws.noise[~top].mean()).abs() < 0.04


def test_a_draw_depends_on_seed_update_and_position_alone(schedule: NoiseSchedule) -> None:
    method = kstep(schedule, pure_noise_share=0.5)
    whole = method.draw(7, 3, range(16), SHAPE)
    for positions in ([5], [0, 1], [12, 3, 9], list(range(8, 16))):
        part = method.draw(7, 3, positions, SHAPE)
        assert torch.equal(part.t, whole.t[positions])
        assert torch.equal(part.noise, whole.noise[positions])
        assert torch.equal(part.pure, whole.pure[positions])
        assert torch.equal(part.steps, whole.steps[positions])
    assert all(t in student_grid(steps) for t, steps in zip(whole.t.tolist(), whole.steps.tolist(), strict=True))
    for seed, update in ((8, 3), (7, 4)):
        assert not torch.equal(method.draw(seed, update, range(16), SHAPE).noise, whole.noise)


def test_the_students_own_state_is_where_its_sampler_stands_at_t(schedule: NoiseSchedule, toy: Any) -> None:
    method = kstep(schedule)
    draws = method.draw(7, 3, range(12), SHAPE)
    cond = torch.randn(12, 2, 6)
    states = method.own_states(toy, draws, cond, 7, 3, range(12))

    class Noise:
        def __init__(self, position: int) -> None:
            self.source = generator(7, "kstep", "guess", 3, position)

        def draw(self, shape: tuple[int, ...]) -> Tensor:
            return torch.randn(1, *shape, generator=self.source)

    jumps = 0
    for row, (t, steps) in enumerate(zip(draws.t.tolist(), draws.steps.tolist(), strict=True)):
        grid = student_grid(steps)
        before = grid[: grid.index(t)]
        jumps += len(before)
        noise = Noise(row)
        if before:
            sampled = lcm_sample(toy, schedule, noise, SHAPE, before, cond[row : row + 1])  # type: ignore[arg-type]
            expected = schedule.add_noise(sampled, noise.draw(SHAPE), t)
            assert_close(states[row : row + 1], expected, rtol=1e-4, atol=1e-4)
        else:
            assert t == 999 and torch.equal(states[row : row + 1], noise.draw(SHAPE))
    assert jumps >= 12 and not states.requires_grad
    part = [8, 1, 5]
    cut = method.draw(7, 3, part, SHAPE)
    assert_close(method.own_states(toy, cut, cond[part], 7, 3, part), states[part], rtol=1e-5, atol=1e-5)


def test_the_interval_is_the_teachers_and_the_oracles(
    schedule: NoiseSchedule, toy: Any, batch: dict[str, Tensor]
) -> None:
    narrow = kstep(schedule, guidance_interval=(300, 700))
    grids = torch.tensor([rollout_grid(int(t), 8, narrow.points) for t in batch["t"]])
    x_t, cond, uncond = batch["x_t"], batch["cond"], batch["uncond"]
    with torch.no_grad():
        expected = rollout(toy, schedule, x_t, grids, cond, uncond, 7.5, interval=(300, 700))
    target = narrow.target(toy, x_t, batch["t"], cond, uncond)
    assert torch.equal(target, expected)
    assert not torch.allclose(target, kstep(schedule).target(toy, x_t, batch["t"], cond, uncond))
    said = narrow.oracle(toy, uncond)(x_t, batch["t"], cond)
    assert_close(schedule.to_x0(said, x_t, batch["t"]), target, rtol=1e-3, atol=1e-3)


def test_the_teachers_own_pictures_begin_from_noise_of_their_own(schedule: NoiseSchedule, toy: Any) -> None:
    method = kstep(schedule)
    origins = method.draw_origins(7, 3, range(6), SHAPE)
    assert torch.equal(method.draw_origins(7, 3, [4, 1], SHAPE), origins[[4, 1]])
    noise = method.draw(7, 3, range(6), SHAPE).noise
    others = [method.draw_origins(8, 3, range(6), SHAPE), method.draw_origins(7, 4, range(6), SHAPE), noise]
    for other in others:
        assert not any(torch.equal(one, two) for one in origins for two in other)
    many = method.draw_origins(0, 0, range(500), (64,))
    assert abs(many.mean().item()) < 0.02 and abs(many.std().item() - 1) < 0.02
    cond, uncond = torch.randn(6, 2, 6), torch.randn(1, 2, 6)
    pictures = method.own_pictures(toy, origins, cond, uncond)
    assert torch.equal(pictures, method.target(toy, origins, torch.full((6,), 999), cond, uncond))
    assert not pictures.requires_grad


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_pure_noise_is_among_the_noisiest_draws(schedule: NoiseSchedule, share: float) -> None:
    draws = kstep(schedule, pure_noise_share=share).draw(0, 0, range(4000), (1,))
    top = draws.t == 999
    assert not draws.pure[~top].any()
    assert draws.pure[top].float().mean().item() == pytest.approx(share, abs=0.04 * (0 < share < 1))


def test_the_share_changes_neither_t_nor_noise(schedule: NoiseSchedule) -> None:
    none, every = (kstep(schedule, pure_noise_share=share).draw(0, 0, range(64), SHAPE) for share in (0.0, 1.0))
    assert torch.equal(none.t, every.t)
    assert torch.equal(none.noise, every.noise)


def test_start_is_pure_noise_or_noised_data(schedule: NoiseSchedule) -> None:
    method = kstep(schedule, pure_noise_share=0.5)
    x0 = torch.randn(64, *SHAPE) + 3
    draws = method.draw(0, 0, range(64), SHAPE)
    x_t = method.start(x0, draws)
    assert draws.pure.any()
    assert (~draws.pure & (draws.t == 999)).any()
    noised = schedule.add_noise(x0, draws.noise, draws.t)
    assert torch.equal(x_t[draws.pure], draws.noise[draws.pure])
    assert torch.equal(x_t[~draws.pure], noised[~draws.pure])


def test_target_is_each_samples_own_guided_rollout(schedule: NoiseSchedule, toy: Any, batch: dict[str, Tensor]) -> None:
    method = kstep(schedule)
    target = method.target(toy, **batch)
    assert not target.requires_grad
    assert toy.batches == [8] * 8  # K forwards of 2B
    points = promised_points([1, 2, 4, 8])
    for row, t in enumerate(batch["t"].tolist()):
        one = slice(row, row + 1)
        alone = rollout(
            toy,
            schedule,
            batch["x_t"][one],
            torch.tensor([rollout_grid(t, 8, points)]),
            batch["cond"][one],
            batch["uncond"],
            guidance=7.5,
        )
        assert_close(target[one], alone, rtol=1e-4, atol=2e-4)


def test_loss_is_the_distance_to_the_target_as_the_sampler_sees_it(
    schedule: NoiseSchedule, toy: Any, batch: dict[str, Tensor]
) -> None:
    x_t, t, cond = batch["x_t"], batch["t"], batch["cond"]
    target = torch.randn(4, *SHAPE)
    losses = kstep(schedule).loss(toy, x_t, t, cond, target)
    assert toy.batches == [4]  # one forward, no guidance
    assert losses.shape == (4,)
    assert losses.dtype == torch.float32
    denoised = schedule.consistency(toy(x_t, t, cond), x_t, t)
    assert_close(losses, (denoised - target).square().mean((1, 2, 3)))
    weighted = kstep(schedule, weighting="eps").loss(toy, x_t, t, cond, target)
    alpha_bar = schedule.alpha_bar(t)
    assert_close(weighted, losses * alpha_bar / (1 - alpha_bar))
    assert (kstep(schedule, criterion="huber").loss(toy, x_t, t, cond, target) != losses).all()


def test_the_student_too_keeps_the_boundary_condition(
    schedule: NoiseSchedule, toy: Any, batch: dict[str, Tensor]
) -> None:
    at_zero = torch.zeros(4, dtype=torch.int64)
    assert kstep(schedule).loss(toy, batch["x_t"], at_zero, batch["cond"], batch["x_t"]).max() == 0


def test_batched_loss_is_sample_by_sample_students_gradients_too(
    schedule: NoiseSchedule, toy: Any, batch: dict[str, Tensor]
) -> None:
    method = kstep(schedule, guidance=2.0)
    x_t, t, cond, uncond = (batch[name] for name in ("x_t", "t", "cond", "uncond"))

    def losses(rows: slice) -> Tensor:
        target = method.target(toy, x_t[rows], t[rows], cond[rows], uncond)
        return method.loss(toy, x_t[rows], t[rows], cond[rows], target)

    together = losses(slice(None))
    together.mean().backward()
    gradients = [p.grad.clone() for p in toy.parameters()]
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    toy.zero_grad()
    for row in range(4):
        alone = losses(slice(row, row + 1))
        assert_close(alone[0], together[row], rtol=1e-4, atol=1e-6)
        (alone.mean() / 4).backward()
    for parameter, gradient in zip(toy.parameters(), gradients, strict=True):
        assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)


def test_no_gradient_reaches_the_student_through_the_target(
    schedule: NoiseSchedule, toy: Any, batch: dict[str, Tensor]
) -> None:
    x_t = batch["x_t"].requires_grad_()
    assert kstep(schedule).target(toy, x_t, batch["t"], batch["cond"], batch["uncond"]).grad_fn is None


def test_the_oracle_is_the_student_without_loss(schedule: NoiseSchedule, toy: Any, batch: dict[str, Tensor]) -> None:
    method = kstep(schedule)
    x_t, t, cond, uncond = (batch[name] for name in ("x_t", "t", "cond", "uncond"))
    oracle, target = method.oracle(toy, uncond), method.target(toy, x_t, t, cond, uncond)
    loss = method.loss(oracle, x_t, t, cond, target)
    assert (loss < 1e-8 * target.square().mean((1, 2, 3))).all()
    # One step of the few-step sampler with it is the teacher's rollout from the same noise.
    noise = PictureNoise([(0, i) for i in range(4)], 1)
    picture = lcm_sample(oracle, schedule, noise, SHAPE, student_grid(1), cond)
    start = PictureNoise([(0, i) for i in range(4)], 1).draw(SHAPE)
    assert_close(picture, method.target(toy, start, torch.full((4,), 999), cond, uncond), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_counts": ()}, "no step counts"),
        ({"step_counts": (1, 51)}, "51 steps; it runs 1 to 50"),
        ({"pure_noise_share": 1.5}, "from 0 to 1"),
        ({"pairs_per_rollout": 0}, "1 or more"),
        ({"num_ddim_steps": 0}, "cannot take 0 DDIM steps"),
        ({"num_ddim_steps": 21, "step_counts": (50,)}, "cannot take 21 DDIM steps from t = 19"),
    ],
)
def test_impossible_settings_are_refused_before_training(
    schedule: NoiseSchedule, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        kstep(schedule, **changes)


def test_one_pair_a_rollout_is_the_start_and_its_target(
    schedule: NoiseSchedule, toy: Any, batch: dict[str, Tensor]
) -> None:
    method = kstep(schedule)
    x_t, t, cond, uncond = (batch[name] for name in ("x_t", "t", "cond", "uncond"))
    draws = replace(method.draw(0, 0, range(4), SHAPE), t=t)
    pairs = method.pairs(toy, x_t, draws, cond, uncond)
    assert torch.equal(pairs.x_t, x_t) and torch.equal(pairs.t, t) and pairs.rows.tolist() == [0, 1, 2, 3]
    assert torch.equal(pairs.weight, torch.ones(4))
    assert torch.equal(pairs.target, method.target(toy, **batch))


@pytest.mark.parametrize("most", [2, 4, 8])
def test_more_pairs_are_states_on_the_teachers_way(
    schedule: NoiseSchedule, toy: Any, batch: dict[str, Tensor], most: int
) -> None:
    """From each of them the rest of the rollout leads to the very same end."""
    method = kstep(schedule, pairs_per_rollout=most)
    x_t, t, cond, uncond = (batch[name] for name in ("x_t", "t", "cond", "uncond"))
    draws = replace(method.draw(0, 0, range(4), SHAPE), t=t)
    pairs = method.pairs(toy, x_t, draws, cond, uncond)
    below = {999: 7, 499: 3, 259: 1, 139: 0}
    expected = [1 + min(most - 1, below[int(one)]) for one in t]
    assert torch.bincount(pairs.rows).tolist() == expected
    for state, at, row, target in zip(pairs.x_t, pairs.t.tolist(), pairs.rows.tolist(), pairs.target, strict=True):
        grid = rollout_grid(int(t[row]), 8, method.points)
        rest = torch.tensor([grid[grid.index(at) :]])
        alone = rollout(toy, schedule, state[None], rest, cond[row : row + 1], uncond, guidance=7.5)
        assert_close(alone[0], target, rtol=1e-3, atol=1e-3)
    assert not pairs.target.requires_grad and not pairs.x_t.requires_grad
    assert toy.batches[:8] == [8] * 8  # the teacher does no more for more pairs


@pytest.mark.parametrize(("most", "from_noise"), [*((most, False) for most in (1, 2, 3, 8, 20)), (4, True), (20, True)])
def test_more_pairs_leave_every_timesteps_share_of_the_loss(
    schedule: NoiseSchedule, most: int, from_noise: bool
) -> None:
    method = kstep(schedule, pairs_per_rollout=most, guidance=1.0, from_noise=from_noise)

    def still(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return torch.zeros_like(x_t)

    count = 4_000
    draws = method.draw(0, 0, range(count), (1, 1, 1))
    pairs = method.pairs(still, draws.noise, draws, torch.zeros(count, 1, 1), None)
    for steps in (1, 2, 4, 8):
        assert set(student_grid(steps)) <= set(pairs.t.tolist())
    shares = {at: float(pairs.weight[pairs.t == at].sum()) / count for at in method.points}
    expected = dict.fromkeys(method.points, 0.0)
    for steps in (1, 2, 4, 8):
        for at in student_grid(steps):
            expected[at] += 1 / 4 / steps
    assert shares == pytest.approx(expected, abs=0.03)
    assert shares == pytest.approx(expected, rel=0.25)  # drawn 125 times, the rarest of them: within a tenth or so
    assert sum(shares.values()) == pytest.approx(1, abs=0.03)


def test_which_states_are_learnt_from_belongs_to_the_sample(
    schedule: NoiseSchedule, toy: Any, batch: dict[str, Tensor]
) -> None:
    method = kstep(schedule, pairs_per_rollout=3)
    cond, uncond, x_t = batch["cond"], batch["uncond"], batch["x_t"]
    whole = method.pairs(toy, x_t, method.draw(1, 2, range(4), SHAPE), cond, uncond)
    alone = method.pairs(toy, x_t[2:3], method.draw(1, 2, [2], SHAPE), cond[2:3], uncond)
    assert whole.t[whole.rows == 2].tolist() == alone.t.tolist()
    other = method.pairs(toy, x_t, method.draw(1, 3, range(4), SHAPE), cond, uncond)
    assert whole.t.tolist() != other.t.tolist()


@pytest.mark.parametrize("weighting", ["eps", "mid"])
def test_a_weighting_that_learns_nothing_from_pure_noise_is_refused(sd15: dict[str, Any], weighting: str) -> None:
    pure = NoiseSchedule.from_config(sd15 | {"rescale_betas_zero_snr": True}, "v_prediction")
    with pytest.raises(InputError, match=rf"loss_weighting {weighting} came .* t = 999.*pass --loss_weighting v"):
        kstep(pure, weighting=weighting)
    for allowed in ("x0", "v"):
        kstep(pure, weighting=allowed)


@pytest.mark.parametrize(("counts", "steps"), [((1, 2, 3, 4, 8), 8), ((1, 2, 4, 8), 4)])
def test_a_rollout_from_noise_that_passes_not_every_timestep_is_refused(
    schedule: NoiseSchedule, counts: tuple[int, ...], steps: int
) -> None:
    asked = {"step_counts": counts, "num_ddim_steps": steps, "pairs_per_rollout": 4}
    with pytest.raises(InputError, match=r"has to pass all \d+ timesteps.*raise --num_ddim_steps"):
        kstep(schedule, from_noise=True, **asked)
    kstep(schedule, **asked)  # from pictures each timestep is a start of its own
    enough = kstep(schedule, from_noise=True, **(asked | {"num_ddim_steps": 20}))
    assert all(weight > 0 for weight in enough._weights.values())
