"""What makes an update faster gives the outputs and the gradients of what is slower, and refuses to train where not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.backbone import Backbone, adapters_off, compiled
from fewstep.backbone.compiled import Compiled
from fewstep.config import TrainSettings, load_toml
from fewstep.errors import InputError
from fewstep.reporting import SILENT
from fewstep.train import DistillResult, distill, engine, rehearse, start
from tests.train.conftest import Heard
from tests.train.test_rollouts import weights

SHORT: dict[str, Any] = {"max_steps": 4, "validate_every": 0, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def settings(settings: TrainSettings, base: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    """The other tests' run on a UNet with one attention block: every layer more takes seconds to trace."""
    from diffusers import UNet2DConditionModel

    folder = tmp_path_factory.mktemp("smaller") / "base"
    shutil.copytree(base, folder)
    torch.manual_seed(2)
    UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    ).save_pretrained(folder / "unet")
    return settings.replace(base_model=str(folder))


class Graphs:
    """A backend that runs what it is given as it is, and counts."""

    def __init__(self) -> None:
        self.shapes: list[int] = []
        """Samples of each graph."""

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.shapes.append(next(len(one) for one in inputs if one.dim() == 4 and one.shape[1:] == (4, 8, 8)))
        return graph.forward


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    counted = Graphs()
    monkeypatch.setattr(compiled, "BACKEND", counted)
    monkeypatch.setattr(engine, "check_compiler", lambda device, setting: None)
    torch.compiler.reset()
    yield counted
    torch.compiler.reset()


def opened(settings: TrainSettings, rows: int) -> tuple[Backbone, Backbone, list[nn.Parameter]]:
    """The base, the same quickened, and a student that has learnt something at random."""
    backbone, resolved = start.open_base(settings, "cpu", None, SILENT)
    quick = engine.quickened(backbone, settings, rows)
    parameters = start.student_of(resolved, backbone)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.05 * torch.randn(parameter.shape, generator=random)
    return backbone, quick, parameters


def inputs(count: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(count)
    return (
        torch.randn(count, 4, 8, 8, generator=random),
        torch.randint(1000, (count,), generator=random),
        torch.randn(count, 77, 32, generator=random),
    )


def learnt(base: Backbone, parameters: list[nn.Parameter], count: int) -> tuple[Tensor, list[Tensor]]:
    output = base.denoiser()(*inputs(count))
    return output.detach(), list(torch.autograd.grad(output.square().sum(), parameters))


@pytest.mark.slow
def test_teacher_and_student_are_a_graph_each_and_equal_the_unet_whatever_number_comes(
    settings: TrainSettings, graphs: Graphs
) -> None:
    plain, quick, parameters = opened(settings.replace(compile=True), 2)
    assert quick.unet is plain.unet and all(parameter.requires_grad for parameter in parameters)
    for count in (4, 2, 1, 3, 7):
        with torch.no_grad(), adapters_off(plain.unet):
            torch.testing.assert_close(
                quick.denoiser(adapter=False)(*inputs(count)), plain.denoiser(adapter=False)(*inputs(count)),
                rtol=1e-5, atol=1e-6,
            )  # fmt: skip
        (output, gradients), (mine, theirs) = learnt(plain, parameters, count), learnt(quick, parameters, count)
        torch.testing.assert_close(mine, output, rtol=1e-5, atol=1e-6)
        for found, wanted in zip(theirs, gradients, strict=True):
            assert wanted.abs().max() > 0
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
        with torch.no_grad(), adapters_off(plain.unet):
            off = plain.denoiser(adapter=False)(*inputs(count))
        assert (output - off).abs().max() > 1e-3, "on and off differ"
    assert sorted(graphs.shapes) == [2, 2, 4, 4], "two sizes, with adapter and without"
    assert not [name for name in plain.unet.state_dict() if "_orig_mod" in name]


@pytest.mark.slow
def test_autograd_of_the_compiler_gives_the_same_gradients_checkpointed_or_not(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch.compiler.reset()
    asked = settings.replace(compile=True, gradient_checkpointing=True)
    plain, quick, parameters = opened(asked, 2)
    before = [parameter.detach().clone() for parameter in parameters]
    assert engine.prove(quick, plain, parameters, asked, 2) < 1e-5
    assert all(torch.equal(now, then) for now, then in zip(parameters, before, strict=True))
    assert all(parameter.grad is None for parameter in parameters)
    torch.compiler.reset()


@pytest.mark.parametrize("wrong", ["output", "gradients"])
@pytest.mark.slow
def test_a_compiler_that_gets_the_network_wrong_is_refused(
    settings: TrainSettings, graphs: Graphs, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    asked = settings.replace(compile=True)
    plain, quick, parameters = opened(asked, 2)
    honest = Compiled.__call__

    def call(self: Compiled, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        output = honest(self, x_t, t, cond)
        scaled = 1.3 * output
        return scaled if wrong == "output" else scaled - (scaled - output).detach()

    monkeypatch.setattr(Compiled, "__call__", call)
    before = [parameter.detach().clone() for parameter in parameters]
    how = "the .* differ by 0" if wrong == "output" else "the student's gradients differ by 0.3 of their size"
    with pytest.raises(InputError, match=f"wrong on this machine: {how}"):
        engine.prove(quick, plain, parameters, asked, 2)
    assert all(torch.equal(now, then) for now, then in zip(parameters, before, strict=True))


@pytest.mark.slow
def test_a_network_that_cannot_be_compiled_is_one_line(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: object, inputs: object) -> object:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    with pytest.raises(InputError, match=r"compile came, but torch.compile does not work here \(.*leave compile out"):
        opened(settings.replace(compile=True), 2)
    monkeypatch.setattr(engine, "check_compiler", lambda device, setting: None)
    plain, quick, parameters = opened(settings.replace(compile=True), 2)
    with pytest.raises(InputError, match=r"the UNet cannot be compiled \(.*; leave --compile out"):
        engine.prove(quick, plain, parameters, settings, 2)
    torch.compiler.reset()


@pytest.fixture(scope="module")
def eager_run(settings: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> DistillResult:
    return distill(settings.replace(output_dir=tmp_path_factory.mktemp("eager"), pairs_per_rollout=2, **SHORT))


@pytest.mark.slow
def test_a_compiled_run_learns_the_same_under_the_same_names(
    settings: TrainSettings, eager_run: DistillResult, graphs: Graphs, tmp_path: Path
) -> None:
    heard = Heard()
    asked = settings.replace(output_dir=tmp_path, compile=True, pairs_per_rollout=2, **SHORT)
    run = distill(asked, reporter=heard)
    mine, theirs = weights(run), weights(eager_run)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=2e-5)
    assert len(graphs.shapes) <= 4, "nothing was compiled anew on the way"
    assert load_toml(run.adapter / "settings.toml")["compile"] is True
    assert [line for line in heard.said if line.startswith("compiled: outputs and gradients are the UNet's own")]
    assert any("engine: UNet compiled, channels first" in line and "AdamW plain" in line for line in heard.said)


@pytest.mark.slow
def test_a_run_may_be_compiled_from_a_checkpoint_on(
    settings: TrainSettings, eager_run: DistillResult, graphs: Graphs, tmp_path: Path
) -> None:
    checkpoint = eager_run.folder / "lora" / "checkpoint-2"
    more = {"output_dir": tmp_path, "resume_from_checkpoint": str(checkpoint), "pairs_per_rollout": 2, **SHORT}
    run = distill(settings.replace(compile=True, channels_last=True, **more))
    assert run.steps == 4 and graphs.shapes
    for name, value in weights(run).items():
        torch.testing.assert_close(value, weights(eager_run)[name], rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_a_rehearsal_compiles_too(settings: TrainSettings, graphs: Graphs, tmp_path: Path) -> None:
    found = rehearse(settings.replace(output_dir=tmp_path, compile=True))
    assert sorted(graphs.shapes) == [1, 2, 2, 4], "of each batch, the student's and the teacher's"
    assert found.two is not None
    assert found.two.activations == pytest.approx(2 * found.one.activations, rel=0.01)


def test_channels_last_changes_the_order_in_memory_and_neither_outputs_nor_gradients(settings: TrainSettings) -> None:
    plain, _, parameters = opened(settings, 2)
    other, _, others = opened(settings.replace(channels_last=True), 2)
    for network in (other.unet, other.vae):
        kernels = [weight for weight in network.parameters() if weight.dim() == 4 and weight.shape[2] > 1]
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)
    assert plain.fingerprint == other.fingerprint
    assert {type(one).__name__ for one in plain.unet.attn_processors.values()} == {"AttnProcessor2_0"}, "torch's SDPA"
    (output, gradients), (mine, theirs) = learnt(plain, parameters, 3), learnt(other, others, 3)
    torch.testing.assert_close(mine, output, rtol=1e-4, atol=1e-5)
    for found, wanted in zip(theirs, gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    torch.testing.assert_close(other.encode(pixels), plain.encode(pixels), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- the update


def test_adamw_is_fused_where_it_pays_and_nobody_has_to_know_of_a_skip(settings: TrainSettings) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert engine.fuses(settings.replace(mixed_precision="bf16"), cuda)
    assert not engine.fuses(settings.replace(mixed_precision="fp16"), cuda), "its skips go unseen"
    assert not engine.fuses(settings, cpu)


def trained(optimizer: torch.optim.Optimizer, weight: nn.Parameter, updates: range) -> None:
    for number in updates:
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
        optimizer.step()


@pytest.mark.parametrize(("first", "then"), [(False, True), (True, False)])
def test_a_fused_update_is_the_plain_one_and_takes_up_its_state(first: bool, then: bool) -> None:
    def made(fused: bool) -> tuple[nn.Parameter, engine.AdamW]:
        weight = nn.Parameter(torch.ones(5, 3))
        return weight, engine.AdamW([weight], lr=1e-2, fused=fused)

    (weight, whole), (moved, before), (target, after) = made(False), made(first), made(then)
    trained(whole, weight, range(6))
    trained(before, moved, range(3))
    target.data.copy_(moved.data)
    after.load_state_dict(before.state_dict())
    assert after.param_groups[0]["fused"] is then
    trained(after, target, range(3, 6))
    torch.testing.assert_close(target, weight, rtol=1e-6, atol=1e-7)
    assert after.state[target]["step"].item() == 6
