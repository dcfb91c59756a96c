"""A student that begins with the weights of another adapter instead of nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fewstep.config import TrainSettings
from fewstep.doctor import doctor
from fewstep.errors import CheckpointError, InputError
from fewstep.lora import ADAPTER
from fewstep.lora.adapter import lora_layers
from fewstep.train import DistillResult, distill, start
from tests.train.conftest import Heard
from tests.train.test_rollouts import same, weights


@pytest.fixture(scope="module")
def few(settings: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    folder = tmp_path_factory.mktemp("init")
    return settings.replace(
        output_dir=folder,
        max_steps=3,
        checkpoint_every=0,
        validate_every=0,
        oracle_images=0,
        learning_rate=1e-2,
        lr_warmup_steps=0,
    )


@pytest.fixture(scope="module")
def first(few: TrainSettings) -> DistillResult:
    return distill(few.replace(run_name="first"))


def test_a_student_goes_on_from_an_adapter(few: TrainSettings, first: DistillResult) -> None:
    heard = Heard()
    still = distill(few.replace(run_name="still", init_lora=first.adapter, learning_rate=1e-12), reporter=heard)
    assert any(f"student begins as {first.adapter}" in line for line in heard.said)
    before, after = weights(first), weights(still)
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-9)
    moved = distill(few.replace(run_name="moved", init_lora=first.adapter))
    assert not same(moved, first)
    again = distill(few.replace(run_name="again", init_lora=first.adapter / "pytorch_lora_weights.safetensors"))
    assert same(again, moved)


def test_another_alpha_begins_with_the_same_pictures(few: TrainSettings, first: DistillResult) -> None:
    def updates(**changes: Any) -> dict[str, torch.Tensor]:
        backbone, _ = start.open_base(few, torch.device("cpu"), None, Heard())
        start.student_of(few.replace(init_lora=first.adapter, **changes), backbone)
        return {
            name: layer.scaling[ADAPTER] * (layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight).detach()
            for name, layer in lora_layers(backbone.unet)
        }

    mine, theirs = updates(lora_alpha=1), updates()
    assert max(float(value.abs().max()) for value in theirs.values()) > 1e-3
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name])


def test_an_alpha_that_nothing_states_is_said_to_be_assumed(
    few: TrainSettings, first: DistillResult, tmp_path: Path
) -> None:
    bare = tmp_path / "bare.safetensors"
    save_file(weights(first), bare)  # without the header that has the alpha
    heard = Heard()
    distill(few.replace(run_name="bare", init_lora=bare, max_steps=1), reporter=heard)
    (warned,) = [line for line in heard.warned if "alpha = rank assumed" in line]
    assert str(bare) in warned


def test_a_resumed_run_has_no_need_of_what_it_began_with(
    few: TrainSettings, first: DistillResult, tmp_path: Path
) -> None:
    copied = tmp_path / "adapter"
    copied.mkdir()
    file = first.adapter / "pytorch_lora_weights.safetensors"
    (copied / file.name).write_bytes(file.read_bytes())
    asked = few.replace(run_name="cut", init_lora=copied, checkpoint_every=1, resume_from_checkpoint="auto")
    distill(asked.replace(max_steps=2))
    (copied / file.name).unlink()
    doctor(asked, reporter=Heard())
    assert same(distill(asked), distill(few.replace(run_name="whole", init_lora=first.adapter)))


def test_a_second_stage_stays_on_the_base_of_the_first(few: TrainSettings, first: DistillResult, v_base: Path) -> None:
    heard, asked = Heard(), few.replace(run_name="second", init_lora=first.adapter, base_model=None, max_steps=1)
    distill(asked, reporter=heard)
    assert heard.said[0] == f"base: {few.base_model} (recorded in the adapter)"
    assert not any("was trained on" in line for line in heard.warned)
    heard = Heard()
    doctor(asked.replace(run_name="third"), reporter=heard)
    assert any(f"{few.base_model} (recorded in the adapter)" in line for line in heard.said)
    heard = Heard()
    distill(asked.replace(run_name="other", base_model=str(v_base)), reporter=heard)
    assert any("was trained on" in line and "the base here is" in line for line in heard.warned)
    assert any("was trained to predict epsilon" in line for line in heard.warned)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lora_rank": 3}, r"has rank \d+ on \d+ layers, asked for is rank 3 on \d+"),
        ({"lora_targets": ("to_q",)}, "set --lora_rank and --lora_targets as it was trained"),
        ({"init_lora": Path("nowhere")}, r"no adapter 'nowhere'.*check --init_lora$"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_before_anything_is_written(
    few: TrainSettings, first: DistillResult, changes: dict[str, Any], named: str
) -> None:
    asked = few.replace(**({"run_name": "refused", "init_lora": first.adapter} | changes))
    with pytest.raises(CheckpointError, match=named):
        distill(asked)
    assert not asked.run_dir.exists()


def test_what_a_run_began_with_is_part_of_it(few: TrainSettings, first: DistillResult) -> None:
    asked = few.replace(run_name="part", checkpoint_every=1, max_steps=1)
    distill(asked)
    with pytest.raises(InputError, match="init_lora"):
        distill(asked.replace(max_steps=2, resume_from_checkpoint="auto", init_lora=first.adapter))
