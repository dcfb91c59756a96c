"""Attaching, training, saving, and the proof that what was saved is the student."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.backbone import Backbone, random_backbone
from fewstep.errors import CheckpointError, InputError
from fewstep.lora import (
    AdapterWeights,
    attach,
    detach,
    load_adapter,
    locate,
    prove_round_trip,
    save_adapter,
    trainable_parameters,
)
from fewstep.solver import Denoiser

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
WEIGHTS = "pytorch_lora_weights.safetensors"
Run = Callable[[Backbone], Tensor]


def header(folder: Path) -> dict[str, str]:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return dict(file.metadata())


def test_the_counts_of_stable_diffusion() -> None:
    for rank, count in ((4, 797_184), (20, 3_985_920), (64, 12_754_944)):
        unet = random_backbone("sd15", device="meta").unet
        parameters = attach(unet, rank, 8 * rank, TARGETS, seed=0)
        assert trainable_parameters(unet) == count == sum(parameter.numel() for parameter in parameters)
        assert len(parameters) == 2 * 128


def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(base: Backbone, output: Run) -> None:
    before = output(base)
    parameters = attach(base.unet, 4, 32, TARGETS, seed=1)
    assert torch.equal(output(base), before)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    names = [name for name, parameter in base.unet.named_parameters() if parameter.requires_grad]
    assert len(names) == len(parameters) and all(".lora_" in name for name in names)


def test_the_first_weights_follow_the_seed_alone(base: Backbone) -> None:
    def first(seed: int, targets: tuple[str, ...] = TARGETS) -> dict[str, Tensor]:
        detach(base.unet)
        torch.rand(1)  # whatever was drawn before does not matter
        attach(base.unet, 4, 32, targets, seed)
        return AdapterWeights(base.unet).state_dict()

    one, again, other, fewer = first(1), first(1), first(2), first(1, ("to_q",))
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    assert all(not torch.equal(value, other[name]) for name, value in one.items() if "lora_A" in name)
    assert fewer.keys() < one.keys() and all(torch.equal(value, one[name]) for name, value in fewer.items())
    bound = max(float(value.abs().max()) * value.shape[1] ** 0.5 for name, value in one.items() if "lora_A" in name)
    assert 0.9 < bound <= 1  # uniform in +-1/sqrt(in), as torch's and PEFT's linear layers


def test_targets_that_are_not_there_and_second_adapters(base: Backbone) -> None:
    with pytest.raises(InputError, match=r"'to_x' names no layer.*to_q"):
        attach(base.unet, 4, 32, ("to_q", "to_x"), seed=0)
    attach(base.unet, 4, 32, ("to_q",), seed=0)
    with pytest.raises(ValueError, match="has an adapter already: student"):
        attach(base.unet, 4, 32, ("to_q",), seed=0)


def test_a_file_states_its_alpha(saved: Path, student: Backbone) -> None:
    stated, keys = json.loads(header(saved)["lora_adapter_metadata"]), load_file(saved / WEIGHTS).keys()
    assert (stated["unet.r"], stated["unet.lora_alpha"]) == (4, 32)
    assert keys == AdapterWeights(student.unet).state_dict().keys()
    assert all(key.startswith("unet.") and key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)
    again = saved.parent / "again"
    save_adapter(student.unet, again, student.scheduler_config)
    assert header(again) == header(saved)  # equal content; safetensors writes its header in any order
    one, two = load_file(saved / WEIGHTS), load_file(again / WEIGHTS)
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_the_scheduler_beside_an_adapter_is_the_bases_as_lcm(tmp_path: Path, output: Run) -> None:
    from diffusers import LCMScheduler

    base = random_backbone(seed=5, prediction_type="v_prediction")
    config = base.scheduler_config | {"beta_end": 0.02, "rescale_betas_zero_snr": True}
    attach(base.unet, 4, 32, ("to_q",), seed=0)
    save_adapter(base.unet, tmp_path, config)
    scheduler = LCMScheduler.from_pretrained(tmp_path / "scheduler", local_files_only=True)
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.beta_end == 0.02
    assert scheduler.config.clip_sample is False and scheduler.config.rescale_betas_zero_snr is True
    assert float(scheduler.alphas_cumprod[-1]) < 1e-6


def test_trained_saved_and_loaded_by_a_stock_pipeline(base: Backbone, tmp_path: Path, output: Run) -> None:
    """The whole way: ten updates, the file, and another process's view of it: a stock pipeline around the same base."""
    untrained = output(base)
    parameters = attach(base.unet, 4, 32, TARGETS, seed=1)
    optimizer = torch.optim.AdamW(parameters, 1e-2)
    x_t, t, cond = torch.randn(4, 4, 8, 8), torch.tensor([999, 759, 499, 259]), torch.randn(4, 77, 32)
    for _ in range(10):
        base.denoiser()(x_t, t, cond).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = output(base)
    save_adapter(base.unet, tmp_path, base.scheduler_config)
    assert prove_round_trip(base, tmp_path) > 0
    fresh = random_backbone(seed=5)
    pipeline = fresh.pipeline()
    pipeline.load_lora_weights(str(tmp_path), weight_name=WEIGHTS)
    assert torch.equal(output(fresh), trained)
    assert not torch.equal(trained, untrained)


def test_the_proof_leaves_the_student_as_it_was(student: Backbone, saved: Path, output: Run) -> None:
    parameters = AdapterWeights(student.unet).parameters()
    before, count = output(student), trainable_parameters(student.unet)
    change = prove_round_trip(student, saved)
    assert 0 < change < 10
    assert torch.equal(output(student), before)
    assert trainable_parameters(student.unet) == count > 0
    assert list(student.unet.peft_config) == ["student"]
    after = AdapterWeights(student.unet).parameters()
    assert all(after[name] is parameter for name, parameter in parameters.items()), "the optimizer would lose them"
    student.denoiser()(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 77, 32)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in after.values())
    student.unet.zero_grad()


def test_the_proof_holds_in_half_precision(tmp_path: Path) -> None:
    half = random_backbone(seed=5, dtype="bf16")
    parameters = attach(half.unet, 4, 32, TARGETS, seed=1)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.0123
    save_adapter(half.unet, tmp_path, half.scheduler_config)
    assert prove_round_trip(half, tmp_path) > 0
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert {value.dtype for value in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}


def test_no_file_that_is_not_the_student_passes(student: Backbone, saved: Path, output: Run) -> None:
    good, stated, before = load_file(saved / WEIGHTS), header(saved), output(student)
    name = next(iter(good))

    def refused(weights: dict[str, Tensor], metadata: dict[str, str]) -> str:
        save_file(weights, saved / WEIGHTS, metadata)
        with pytest.raises(CheckpointError) as caught:
            prove_round_trip(student, saved)
        assert list(student.unet.peft_config) == ["student"] and torch.equal(output(student), before)
        assert trainable_parameters(student.unet) > 0 and "\n" not in str(caught.value)
        return str(caught.value)

    assert "is not the student's" in refused(good | {name: good[name] + 1e-6}, stated)
    assert "the scale alpha / rank" in refused(good, {"format": "pt"})  # the missing alpha: 8 times too weak
    peft = {"base_model.model." + key.removeprefix("unet."): value for key, value in good.items()}
    assert "finds nothing in it" in refused(peft, stated) or "refuses it" in refused(peft, stated)
    fewer = {key: value for key, value in good.items() if "to_k" not in key}
    assert "differ at" in refused(fewer, stated)
    (saved / WEIGHTS).write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="refuses it"):
        prove_round_trip(student, saved)
    save_file(good, saved / WEIGHTS, stated)
    prove_round_trip(student, saved)


def test_nor_is_one_in_half_precision_where_the_teacher_rounds_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, honest = random_backbone("tiny", dtype="bf16"), Backbone.denoiser

    def denoiser(self: Backbone, adapter: bool = True) -> Denoiser:
        """On a GPU autocast, under which the student alone runs, rounds otherwise."""
        run = honest(self, adapter)
        return run if adapter else lambda x_t, t, cond, /: 1.001 * run(x_t, t, cond)

    monkeypatch.setattr(Backbone, "denoiser", denoiser)
    attach(half.unet, 4, 32, TARGETS, seed=1)
    save_adapter(half.unet, tmp_path, half.scheduler_config)
    with pytest.raises(CheckpointError, match="changes nothing"):
        prove_round_trip(half, tmp_path)
    detach(half.unet)
    with pytest.raises(CheckpointError, match="changes nothing"):
        load_adapter(half, locate(tmp_path))


def test_an_untrained_adapter_is_not_published(base: Backbone, tmp_path: Path) -> None:
    attach(base.unet, 4, 32, TARGETS, seed=1)
    save_adapter(base.unet, tmp_path, base.scheduler_config)
    with pytest.raises(CheckpointError, match="changes nothing"):
        prove_round_trip(base, tmp_path)
    with torch.no_grad():
        next(parameter for parameter in base.unet.parameters() if parameter.requires_grad).fill_(float("nan"))
    save_adapter(base.unet, tmp_path, base.scheduler_config)
    with pytest.raises(CheckpointError):
        prove_round_trip(base, tmp_path)


def test_weights_go_back_into_the_same_parameters(student: Backbone) -> None:
    weights = AdapterWeights(student.unet)
    state, parameters = weights.state_dict(), weights.parameters()
    name = next(iter(state))
    with torch.no_grad():
        parameters[name].zero_()
    weights.load_state_dict(state)
    assert torch.equal(parameters[name], state[name]) and weights.parameters()[name] is parameters[name]
    with pytest.raises(CheckpointError, match="do not fit"):
        weights.load_state_dict({key: value for key, value in state.items() if key != name})
    with pytest.raises(CheckpointError, match="do not fit"):
        weights.load_state_dict(state | {name: torch.zeros(7, 7)})


def test_a_detached_base_is_the_base(student: Backbone, saved: Path, output: Run) -> None:
    with_adapter = output(student)
    detach(student.unet)
    detach(student.unet)
    assert not torch.equal(output(student), with_adapter)
    assert torch.equal(output(student), output(random_backbone(seed=5)))
    load_adapter(student, saved)
    assert torch.equal(output(student), with_adapter)


@pytest.mark.gpu
def test_on_a_gpu_too(tmp_path: Path) -> None:
    base = random_backbone(seed=5, device="cuda", dtype="bf16")
    parameters = attach(base.unet, 4, 32, TARGETS, seed=1)
    cpu = random_backbone(seed=5)
    assert torch.equal(parameters[0].cpu(), attach(cpu.unet, 4, 32, TARGETS, seed=1)[0])
    x_t, t = torch.randn(2, 4, 8, 8, device="cuda"), torch.tensor([999, 259], device="cuda")
    optimizer = torch.optim.AdamW(parameters, 1e-2)
    for _ in range(3):
        base.denoiser()(x_t, t, base.embed(["a", "b"])).square().mean().backward()
        optimizer.step()
    save_adapter(base.unet, tmp_path, base.scheduler_config)
    assert prove_round_trip(base, tmp_path) > 0
    assert load_adapter(random_backbone(seed=5, device="cuda"), tmp_path).rank == 4
