"""What looks wrong in a training is said, once, and nothing else is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from fewstep.config import TrainSettings
from fewstep.train import distill
from fewstep.train.watch import FEWEST_READINGS, UPDATES_TO_LOOK_AT, Watch
from tests.train.conftest import Heard


def updates(watch: Watch, parameters: Sequence[nn.Parameter], gradients: Sequence[float | None], count: int) -> None:
    for _ in range(count):
        for parameter, value in zip(parameters, gradients, strict=True):
            parameter.grad = None if value is None else torch.full_like(parameter, value)
        watch.gradients()


def test_tensors_that_no_gradient_reaches_are_named_once() -> None:
    parameters = [nn.Parameter(torch.ones(2, 2)) for _ in range(4)]
    heard = Heard()
    watch = Watch(dict(zip("abcd", parameters, strict=True)), heard.warn)
    updates(watch, parameters, [1e-30, 0.0, None, 0.0], UPDATES_TO_LOOK_AT - 1)
    assert heard.warned == []
    updates(watch, parameters, [0.0, 0.0, None, float("nan")], 3 * UPDATES_TO_LOOK_AT)
    (warned,) = heard.warned
    assert warned.startswith("2 of 4 adapter tensors had a gradient of exactly 0 in 20 updates, first b: nothing")


def test_a_gradient_that_comes_late_is_not_dead() -> None:
    parameter = nn.Parameter(torch.ones(2))
    heard = Heard()
    watch = Watch({"a": parameter}, heard.warn)
    updates(watch, [parameter], [0.0], UPDATES_TO_LOOK_AT - 1)
    updates(watch, [parameter], [1.0], 1)
    assert heard.warned == []


def test_a_loss_that_leaps_is_named_once_and_each_timestep_has_its_own_measure() -> None:
    heard = Heard()
    watch = Watch({}, heard.warn)
    for step in range(FEWEST_READINGS):
        watch.losses(step, {"loss": 1.0, "loss/t999": 1.0 + step % 3, "loss/t259": 0.01, "gradient_norm": 1.0})
    watch.losses(10, {"loss": 50.0, "loss/t999": 9.0, "loss/t259": 0.03, "gradient_norm": 50.0})
    assert heard.warned == [], "within what is usual"
    watch.losses(11, {"loss/t259": 0.2})
    watch.losses(12, {"loss/t259": 30.0, "loss/t999": 300.0})
    (warned,) = heard.warned
    assert warned.startswith("loss/t259 leapt to 0.2 by step 11, its median was 0.01; where it does not come back")


def test_a_loss_that_climbs_for_long_is_named_once_though_it_never_leaps() -> None:
    heard = Heard()
    watch = Watch({}, heard.warn)
    scatter = [1.0, 2.0, 0.7, 1.3, 0.6, 1.8, 0.9]
    falling = [0.02 * scatter[step % 7] * 0.97**step for step in range(40)]
    climbing = [falling[-1] * scatter[step % 7] * 1.07**step for step in range(60)]
    for step, loss in enumerate(falling):
        watch.losses(step, {"loss": loss, "loss/t149": loss})
    assert heard.warned == []
    for step, loss in enumerate(climbing, len(falling)):
        watch.losses(step, {"loss": loss, "loss/t149": loss, "loss/t999": loss})
    (warned,) = heard.warned
    assert warned.startswith("loss/t149 has climbed to ") and warned.endswith("again with a lower --learning_rate")


def test_what_a_run_has_seen_before_it_was_resumed_is_remembered_and_not_said_again() -> None:
    history = [{"step": step, "loss": 1.0, "loss/t999": 1.0} for step in range(FEWEST_READINGS)]
    heard = Heard()
    watch = Watch({}, heard.warn)
    watch.remember(history)
    watch.losses(20, {"loss/t999": 11.0})
    assert len(heard.warned) == 1
    again = Watch({}, heard.warn)
    again.remember([*history, {"step": 20, "loss/t999": 11.0}])
    again.losses(21, {"loss/t999": 50.0})
    assert len(heard.warned) == 1, "it was said before the stop"


def test_too_few_readings_tell_nothing() -> None:
    heard = Heard()
    watch = Watch({}, heard.warn)
    for step in range(FEWEST_READINGS):
        watch.losses(step, {"loss/t999": 100.0**step})
    assert heard.warned == []


def test_a_run_warns_of_what_it_does_not_train(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    heard = Heard()
    short = settings.replace(output_dir=tmp_path, max_steps=3, checkpoint_every=0, validate_every=0)
    monkeypatch.setattr("fewstep.train.watch.UPDATES_TO_LOOK_AT", 3)
    honest = Watch.gradients

    def unplugs_one(self: Watch) -> None:
        next(iter(self._parameters.values())).grad = None
        honest(self)

    monkeypatch.setattr(Watch, "gradients", unplugs_one)
    distill(short, reporter=heard)
    (warned,) = heard.warned
    assert warned.startswith("1 of 64 adapter tensors had a gradient of exactly 0 in 3 updates, first unet.")


def test_captions_that_the_base_cuts_are_said_once(settings: TrainSettings, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a pattern\n" + "many words " * 60 + "\n")
    heard = Heard()
    few = settings.replace(data_dir=None, prompts_file=prompts, output_dir=tmp_path / "runs", max_steps=3)
    distill(few.replace(checkpoint_every=0, validate_every=0), reporter=heard)
    (warned,) = [line for line in heard.warned if "are cut" in line]
    assert warned.startswith("captions of more than ") and "tokens are cut, first at step " in warned
