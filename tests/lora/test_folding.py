"""Layers that are learnt folded: the same outputs and gradients from fewer multiplications, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fewstep import lora
from fewstep.backbone import Backbone
from fewstep.lora import folding
from fewstep.lora.folding import FoldingLinear, folding_pays

RANK, COUNT = 32, 500


def layer_of(kind: type[Linear], inputs: int = 48, outputs: int = 80, rank: int = RANK) -> Linear:
    """A layer with an adapter that does something; of the same numbers whatever the kind."""
    torch.manual_seed(0)
    base = nn.Linear(inputs, outputs)
    base.requires_grad_(False)
    layer = kind(base, "student", LoraConfig(r=rank, lora_alpha=3 * rank), r=rank, lora_alpha=3 * rank)
    nn.init.normal_(layer.lora_B["student"].weight, std=0.1)
    return layer


def learnt(layer: Linear, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of A, B and x."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    output = layer(x)
    output.square().mean().backward()
    found = [one.grad for one in (layer.lora_A["student"].weight, layer.lora_B["student"].weight, x)]
    return [output.detach(), *(gradient for gradient in found if gradient is not None)]


def multiplications(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() // 2


def test_outputs_and_gradients_are_those_of_the_plain_layer() -> None:
    x = torch.randn(4, COUNT // 4, 48)
    folded, plain = layer_of(FoldingLinear), layer_of(Linear)
    assert folding_pays(COUNT, 48, 80, RANK)
    assert multiplications(lambda: learnt(folded, x)) < multiplications(lambda: learnt(plain, x))
    for mine, theirs in zip(learnt(folded, x), learnt(plain, x), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)
    folded.set_scale("student", 0.5)
    assert not torch.allclose(folded(x), plain(x), atol=1e-2), "the adapter's strength counts"


@pytest.mark.parametrize("count", [1, 40, 192, 4096])
@pytest.mark.parametrize(("inputs", "outputs"), [(48, 48), (128, 128), (128, 1024), (320, 320)])
@pytest.mark.parametrize("rank", [4, 32, 64])
def test_it_is_done_where_it_takes_fewer_multiplications(
    monkeypatch: pytest.MonkeyPatch, count: int, inputs: int, outputs: int, rank: int
) -> None:
    layer, x = layer_of(FoldingLinear, inputs, outputs, rank), torch.randn(count, inputs)
    either = dict[bool, int]()
    for pays in (False, True):
        monkeypatch.setattr(folding, "folding_pays", lambda *_, pays=pays: pays)
        either[pays] = multiplications(lambda: learnt(layer, x))
    assert folding_pays(count, inputs, outputs, rank) == (either[True] < either[False])


def test_what_is_drawn_is_never_folded() -> None:
    x = torch.randn(COUNT, 48)
    folded, plain = layer_of(FoldingLinear), layer_of(Linear)
    with torch.no_grad():
        assert torch.equal(folded(x), plain(x))
    assert not torch.equal(folded(x), plain(x)), "while it is learnt it is, and its sums are taken in another order"
    for layer in (folded, plain):
        layer.requires_grad_(False)
    assert torch.equal(folded(x), plain(x))


def test_nor_is_half_precision_or_a_second_adapter() -> None:
    x = torch.randn(COUNT, 48)
    folded, plain = layer_of(FoldingLinear), layer_of(Linear)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(folded(x), plain(x))
    for layer in (folded, plain):
        layer.base_layer.half()
    assert torch.equal(folded(x.half()), plain(x.half()))
    folded, plain = layer_of(FoldingLinear), layer_of(Linear)
    for layer in (folded, plain):
        torch.manual_seed(1)
        layer.update_layer("other", RANK, lora_alpha=RANK, config=LoraConfig(init_lora_weights=False))
        layer.set_adapter(["student", "other"])
    assert torch.equal(folded(x), plain(x))


def test_a_unet_learns_the_same(monkeypatch: pytest.MonkeyPatch, base: Backbone) -> None:
    parameters = lora.attach(base.unet, RANK, RANK, ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"], 0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape))
    x_t, t = torch.randn(4, *base.latent_shape(base.resolution)), torch.tensor([999, 500, 250, 1])
    cond = base.embed(["a house", "", "a tree", "a boat"])
    asked: list[bool] = []

    def noted(*sizes: int) -> bool:
        asked.append(folding_pays(*sizes))
        return asked[-1]

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(base.denoiser()(x_t, t, cond).square().mean(), parameters))

    monkeypatch.setattr(folding, "folding_pays", noted)
    mine = gradients()
    assert any(asked)
    monkeypatch.setattr(folding, "folding_pays", lambda *_: False)
    for one, other in zip(mine, gradients(), strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()
