"""On the embedded base, with the adapter that comes with it: what is broken is at the floor, what is equal is equal."""

from __future__ import annotations

import pytest
import torch

from fewstep import lora
from fewstep.arms import student_arm
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


def pictures(backbone: Backbone, prompts: list[str], seed: int) -> torch.Tensor:
    ids = picture_ids(len(prompts), 1)
    conditioning = encode_prompts(backbone, prompts)
    return make_pictures(backbone, student_arm(STEPS), conditioning, ids, seed=seed, batch_size=16).pixels


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
        assert difference.low < 0 < difference.high
