"""The student is measured as training goes on, and the best one is kept apart."""

from __future__ import annotations

import errno
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep import lora, validation
from fewstep.backbone import Backbone, load_backbone
from fewstep.checkpoint import Record, verify
from fewstep.config import TrainSettings
from fewstep.errors import CheckpointError, InputError, Interrupted
from fewstep.methods.kstep import KStep
from fewstep.scenes.abilities import SceneAbilities
from fewstep.train import DistillResult, distill
from fewstep.train.start import captions_to_show
from fewstep.validation import FIGURE, MEASURE, Validation, open_validation
from tests.train.conftest import Heard

RISE_AND_FALL = [0.2, 0.6, 0.9, 0.4, 0.3, 0.3]
"""Figures of six measurements: the third is best."""


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Figures that validation finds, one a measurement, instead of looking at pictures."""
    coming = list(RISE_AND_FALL)

    def figures(self: Validation) -> dict[str, float]:
        return {FIGURE: coming.pop(0)}

    def opened(backbone: Backbone, method: KStep, prompts: list[str], *_: Any) -> Validation:
        drawing: Any = {"resolution": 64, "seed": 0, "batch_size": 4}
        return Validation(backbone, method, prompts, lambda batch: {}, measure="by script", **drawing)

    monkeypatch.setattr(Validation, "figures", figures)
    monkeypatch.setattr("fewstep.train.loop.open_validation", opened)
    return coming


@pytest.fixture
def short(settings: TrainSettings, tmp_path: Path) -> TrainSettings:
    return settings.replace(output_dir=tmp_path, max_steps=6, validate_every=1, validate_images=3, checkpoint_every=2)


def measured(run: DistillResult) -> dict[int, float]:
    return {int(row["step"]): row[FIGURE] for row in run.history if FIGURE in row}


def same_weights(one: Path, two: Path) -> bool:
    name = "pytorch_lora_weights.safetensors"
    return (one / name).read_bytes() == (two / name).read_bytes()


def test_what_a_student_is_chosen_by_is_not_what_a_benchmark_judges_it_by() -> None:
    settings, abilities = TrainSettings(), SceneAbilities()
    base, unopened = cast("Any", SimpleNamespace(abilities=abilities)), cast("Any", None)
    looked_at = captions_to_show(16, settings, base, unopened)
    assert len(set(looked_at)) == 16
    assert not set(looked_at) & set(abilities.prompts(200, settings.seed))


def test_the_best_is_kept_apart_and_said_where_it_is_not_the_last(scripted: list[float], short: TrainSettings) -> None:
    heard = Heard()
    run = distill(short.replace(checkpoint_every=3), reporter=heard)
    assert measured(run) == dict(enumerate(RISE_AND_FALL, start=1))
    assert run.best == run.folder / "lora" / "best"
    record = verify(run.best)
    assert record.step == 3 and record.more[FIGURE] == 0.9
    assert same_weights(run.best, run.folder / "lora" / "checkpoint-3")
    assert not same_weights(run.best, run.adapter)
    assert not (run.best / "resume").exists() and (run.best / "scheduler").is_dir()
    assert heard.said[-1] == f"best: {run.best}, of step 3, whose validation was 0.9; training longer did not raise it"


def test_nothing_is_said_where_the_last_is_the_best(scripted: list[float], short: TrainSettings) -> None:
    heard = Heard()
    run = distill(short.replace(max_steps=3), reporter=heard)
    adapter, how_to_draw = heard.said[-2:]
    assert adapter == f"adapter: {run.adapter}" and how_to_draw.startswith("with diffusers alone")
    assert run.best is not None and same_weights(run.best, run.adapter)


def test_a_resumed_run_remembers_the_best(scripted: list[float], short: TrainSettings) -> None:
    asked = iter(range(1, 7))
    with pytest.raises(Interrupted):
        distill(short, should_stop=lambda: next(asked) == 4)
    run = distill(short.replace(resume_from_checkpoint="latest"))
    assert measured(run) == dict(enumerate(RISE_AND_FALL, start=1)), "the one that the stop came before is made up for"
    assert run.best is not None and verify(run.best).step == 3


def test_a_best_that_is_broken_or_of_an_earlier_start_is_not_taken_over(
    scripted: list[float], short: TrainSettings
) -> None:
    first = distill(short.replace(max_steps=4))
    assert first.best is not None and verify(first.best).step == 3
    (first.best / "settings.toml").write_text("")
    heard = Heard()
    run = distill(short.replace(resume_from_checkpoint="auto"), reporter=heard)
    assert any(line.startswith("removed: checkpoint") and "settings.toml" in line for line in heard.warned)
    assert run.best is not None and verify(run.best).step == 5
    for folder in (run.folder / "lora").glob("checkpoint-*"):
        shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"has come to its end, and there is no checkpoint.*remove '.*final'"):
        distill(short.replace(resume_from_checkpoint="auto"))
    assert verify(run.best).step == 5 and verify(run.adapter).step == 6
    shutil.rmtree(run.adapter)
    scripted[:] = [0.1]
    again = distill(short.replace(max_steps=1, lr_warmup_steps=0, resume_from_checkpoint="auto"))
    assert again.best is not None and verify(again.best).more[FIGURE] == 0.1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (CheckpointError("the student's latents are not finite"), "the student's latents are not finite"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device"),
    ],
)
def test_a_look_that_fails_costs_a_look_and_not_the_run(
    scripted: list[float], short: TrainSettings, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    looks = []

    def figures(self: Validation) -> dict[str, float]:
        looks.append(1)
        if len(looks) == 2:
            raise error
        return {FIGURE: 0.1 * len(looks)}

    monkeypatch.setattr(Validation, "figures", figures)
    heard = Heard()
    run = distill(short.replace(max_steps=3), reporter=heard)
    assert heard.warned == [f"step 2: the student was not looked at: {said}"]
    assert verify(run.folder / "lora" / "checkpoint-2").step == 2
    assert measured(run).keys() == {1, 3} and run.best is not None and verify(run.best).step == 3


def test_what_is_looked_at_is_the_average_that_is_saved(
    scripted: list[float], short: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []

    def figures(self: Validation) -> dict[str, float]:
        unet = self._evaluate.args[0].unet
        seen.append({name: one.detach().clone() for name, one in lora.AdapterWeights(unet).parameters().items()})
        return {FIGURE: float(len(seen))}

    monkeypatch.setattr(Validation, "figures", figures)
    run = distill(short.replace(max_steps=3, ema_decay=0.9))
    assert run.best is not None and verify(run.best).step == 3
    best = load_file(run.best / "pytorch_lora_weights.safetensors")
    pairs = {name: one for name, one in best.items() if name in seen[-1]}
    assert len(pairs) == len(seen[-1]) > 0
    assert all(torch.equal(one, seen[-1][name]) for name, one in pairs.items())


# ------------------------------------------------------------------------------------------------------- the measures


def _opened(backbone: Backbone, settings: TrainSettings, reporter: Heard | None = None) -> Any:
    method = KStep(schedule=backbone.schedule, step_counts=(1, 4), num_ddim_steps=2, guidance=3.0)
    return open_validation(backbone, method, ["pattern 1", "pattern 2"], settings, reporter or Heard())


class Answers:
    """An answer key to which the first picture has one thing of two right and the second has both."""

    def answers(self, pixels: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        assert pixels.shape == (len(prompts), 3, 64, 64) and pixels.min() >= 0 and pixels.max() <= 1
        second = torch.tensor([prompt == "pattern 2" for prompt in prompts])
        return {"colour": torch.ones_like(second), "place": second, "all_right": second}


def test_a_base_with_an_answer_key_is_asked_for_the_share_that_is_right(base: Path, settings: TrainSettings) -> None:
    heard = Heard()
    backbone: Any = replace(load_backbone(base, device="cpu"), abilities=Answers())
    opened = _opened(backbone, settings, heard)
    assert opened.figures() == {FIGURE: 0.75, f"{FIGURE}/1": 0.75, f"{FIGURE}/4": 0.75}
    assert heard.said == [
        "validation: share of attributes that are right, on captions of its own, 2 pictures each at 1 4 steps"
    ]


def test_figures_of_different_measures_are_not_compared(base: Path, settings: TrainSettings) -> None:
    backbone: Any = replace(load_backbone(base, device="cpu"), abilities=Answers())
    opened = _opened(backbone, settings)

    def best(measure: str) -> Record:
        more = {MEASURE: measure, FIGURE: 0.5}
        return Record(step=1, base_model="", base_fingerprint="", step_counts=(1, 4), more=more)

    assert opened.prefers({FIGURE: 0.6}, best(opened.measure))
    assert not opened.prefers({FIGURE: 0.5}, best(opened.measure)), "the earlier of equals"
    assert opened.prefers({FIGURE: 0.1}, best("alignment x 100")) and opened.prefers({FIGURE: 0.1}, None)


def test_any_other_base_is_judged_by_a_clip_model_that_is_at_hand(
    base: Path, settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CLIP:
        """Finds that a picture fits its own prompt by 0.25, and any other not at all."""

        def __init__(self, model: str, *, fetch: bool, device: str, **_: Any) -> None:
            assert not fetch and device == "cpu", "a GPU's memory is for the training"
            if model == "missing":
                raise CheckpointError("not at hand")

        def texts(self, prompts: list[str]) -> Tensor:
            return torch.eye(len(prompts))

        def images(self, pixels: Tensor) -> Tensor:
            assert pixels.dtype == torch.uint8
            return 0.25 * torch.eye(2)

    monkeypatch.setattr(validation, "CLIPAlignment", CLIP)
    heard, backbone = Heard(), load_backbone(base, device="cpu")
    opened = _opened(backbone, settings.replace(clip_model_id="a/clip"), heard)
    assert opened.figures()[FIGURE] == 25.0
    assert _opened(backbone, settings.replace(clip_model_id="missing"), heard) is None
    assert heard.said == [
        "validation: alignment x 100 by a/clip, 2 pictures each at 1 4 steps",
        "validation: previews alone, for the base has no answer key and no CLIP 'missing' is at hand: not at hand",
    ]
