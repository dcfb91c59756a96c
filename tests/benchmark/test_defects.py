"""On the embedded base, with the adapter that comes with it: what is broken is at the floor, what is equal is equal."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention import FeedForward

from fewstep import lora
from fewstep.arms import Arm, base_arm, student_arm
from fewstep.backbone import Backbone, load_backbone
from fewstep.metrics.alignment import CLIPAlignment, alignment_and_floor
from fewstep.metrics.intervals import bootstrap, paired_difference
from fewstep.pictures import encode_prompts, make_pictures, picture_ids

PROMPTS, STEPS = 48, 4


@pytest.fixture(scope="module")
def scenes() -> Backbone:
    backbone = load_backbone("scenes", device="cpu", dtype="no")
    assert backbone.abilities is not None
    lora.load_adapter(backbone, lora.locate(backbone.abilities.adapter()))
    return backbone


def pictures(backbone: Backbone, prompts: list[str], seed: int, arm: Arm | None = None) -> torch.Tensor:
    ids = picture_ids(len(prompts), 1)
    conditioning = encode_prompts(backbone, prompts)
    return make_pictures(
        backbone, arm or student_arm(STEPS, sampler="ddim"), conditioning, ids, seed=seed, batch_size=48
    ).pixels


def renumber(unet: torch.nn.Module) -> None:
    """Another base that draws the same: the heads of every attention, the channels in each, and the hidden units of
    every feed-forward layer, in another order.
    """
    random = torch.Generator().manual_seed(1)
    for module in unet.modules():
        if isinstance(module, FeedForward):
            up, down = module.net[0].proj, module.net[2]
            order = torch.randperm(down.weight.shape[1], generator=random)
            both = torch.cat([order, order + len(order)])  # what is gated, and the gates
            up.weight.data, up.bias.data = up.weight.data[both], up.bias.data[both]
            down.weight.data = down.weight.data[:, order]
        if not hasattr(module, "to_q"):
            continue
        width = module.to_q.weight.shape[0] // module.heads
        heads = torch.randperm(module.heads, generator=random).tolist()
        order = torch.cat([head * width + torch.randperm(width, generator=random) for head in heads])
        for part in (module.to_q, module.to_k, module.to_v):
            part.weight.data = part.weight.data[order]
            if part.bias is not None:
                part.bias.data = part.bias.data[order]
        module.to_out[0].weight.data = module.to_out[0].weight.data[:, order]


@pytest.mark.slow
def test_swapped_captions_are_at_the_floor(scenes: Backbone) -> None:
    assert scenes.abilities is not None
    prompts = scenes.abilities.prompts(PROMPTS, 3)
    swapped = prompts[1:] + prompts[:1]
    drawn, clip = pictures(scenes, prompts, 3), CLIPAlignment(scenes.abilities.alignment_model())
    embeddings, numbers = clip.images(drawn), list(range(PROMPTS))
    own = alignment_and_floor(embeddings, clip.texts(prompts), numbers, prompts)
    others = alignment_and_floor(embeddings, clip.texts(swapped), numbers, swapped)
    gain, nothing = (bootstrap(found["score"] - found["floor"], numbers) for found in (own, others))
    assert gain.low is not None and nothing.low is not None and nothing.high is not None
    assert nothing.low < 0 < nothing.high < gain.low
    answers = scenes.abilities.answers(drawn.float() / 255, swapped)["all_right"]
    assert not answers.any()


@pytest.mark.slow
def test_one_model_under_two_noises_does_not_differ(scenes: Backbone) -> None:
    assert scenes.abilities is not None
    prompts = scenes.abilities.prompts(PROMPTS, 3)
    clip = CLIPAlignment(scenes.abilities.alignment_model())
    texts, numbers = clip.texts(prompts), list(range(PROMPTS))
    found = []
    for seed in (3, 4):
        drawn = pictures(scenes, prompts, seed)
        score = alignment_and_floor(clip.images(drawn), texts, numbers, prompts)["score"]
        found.append((score, scenes.abilities.answers(drawn.float() / 255, prompts)["all_right"]))
    (score, right), (score_again, right_again) = found
    assert not torch.equal(score, score_again)
    for difference in (
        paired_difference(score, score_again, numbers),
        paired_difference(right, right_again, numbers),
    ):
        assert difference.low is not None and difference.high is not None
        # A base that is wrong once in 48 pictures has 0 for a bound: that is no difference either.
        assert difference.low <= 0 <= difference.high and not difference.excludes_zero


@pytest.mark.slow
def test_an_adapter_of_another_base_gains_nothing_over_the_base(scenes: Backbone) -> None:
    """It fits, and the other base is exactly as good; but what was learnt has its place in the first one alone."""
    assert scenes.abilities is not None
    prompts, answers = scenes.abilities.prompts(PROMPTS, 3), scenes.abilities.answers

    def right(drawn: torch.Tensor) -> torch.Tensor:
        return answers(drawn.float() / 255, prompts)["all_right"]

    # Of the steps that it promises those at which it gains the most.
    student, base = student_arm(2, sampler="ddim"), base_arm(2, sampler="ddim")
    own = right(pictures(scenes, prompts, 3, student))
    other = load_backbone("scenes", device="cpu", dtype="no")
    untouched = pictures(other, prompts[:4], 3, base)
    renumber(other.unet)
    control = pictures(other, prompts, 3, base)
    assert (control[:4].int() - untouched.int()).abs().max() <= 1, "the other base draws what the first one draws"
    lora.load_adapter(other, lora.locate(scenes.abilities.adapter()))
    strange = right(pictures(other, prompts, 3, student))
    numbers, drawn_without = range(len(prompts)), right(control)
    gain, none = (paired_difference(one, drawn_without, numbers) for one in (own, strange))
    lost = paired_difference(own, strange, numbers)
    assert gain.low is not None and none.low is not None and lost.low is not None
    assert gain.low > 0 > none.low and lost.low > 0
