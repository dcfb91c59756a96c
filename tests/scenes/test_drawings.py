"""Drawings, captions and the answer key of the embedded base."""

from __future__ import annotations

import errno
import signal
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.errors import Interrupted
from fewstep.scenes import drawings
from fewstep.scenes.abilities import SceneAbilities
from fewstep.scenes.attributes import COMBINATIONS, HELD_OUT_SHARE, VALUES, Attributes, sample_attributes
from fewstep.scenes.captions import PHRASINGS, read_caption, unknown_words, write_caption
from fewstep.scenes.drawing import draw
from fewstep.scenes.drawings import drawn_pixels, flawed_drawings, numbered_attributes, numbered_drawing
from fewstep.scenes.judge import CLASSES, IGNORED, answers, labels
from fewstep.scenes.layout import COLUMNS, FLAWS, JITTER, PLACES, SIZE, parameters, sample_layout

any_attributes = st.builds(Attributes, **{name: st.sampled_from(values) for name, values in VALUES.items()})


def test_enough_to_caption() -> None:
    assert len(VALUES) >= 8
    assert COMBINATIONS == 663_552


@given(any_attributes, st.integers(0, len(PHRASINGS) - 1))
def test_every_phrasing_is_read_back(attributes: Attributes, phrasing: int) -> None:
    caption = write_caption(attributes, phrasing)
    assert read_caption(caption) == {name: getattr(attributes, name) for name in VALUES}
    assert unknown_words(caption) == []


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a red house", {"building": "house", "colour": "red"}),
        ("Two birds over a gray sky, in the centre", {"birds": "2", "sky": "grey", "place": "middle"}),
        ("a castle at sunset with a flower", {"building": "castle", "sky": "sunset", "flowers": "1"}),
        ("a portrait of my dog", {}),
    ],
)
def test_free_text_is_judged_on_what_it_names(prompt: str, named: dict[str, str]) -> None:
    assert read_caption(prompt) == named


def test_words_of_no_caption_are_unknown() -> None:
    assert unknown_words("A red house and astronauts on horses, 5 birds") == ["astronauts", "horses", "5"]


def test_unknown_values_are_refused() -> None:
    good = numbered_attributes(0, 0).__dict__
    with pytest.raises(ValueError, match="'pink'; allowed: red"):
        Attributes(**{**good, "colour": "pink"})


def test_splits_are_disjoint_and_of_the_stated_size() -> None:
    rng = np.random.default_rng(0)
    drawn = [Attributes(**{name: str(rng.choice(values)) for name, values in VALUES.items()}) for _ in range(4000)]
    composed = np.mean([one.split == "composed" for one in drawn])
    unseen = np.mean([one.split == "unseen" for one in drawn if one.split != "composed"])
    assert composed == pytest.approx(HELD_OUT_SHARE, abs=0.04)
    assert unseen == pytest.approx(HELD_OUT_SHARE, abs=0.02)
    for split in ("train", "unseen", "composed"):
        assert sample_attributes(rng, split).split == split


def test_composed_triples_are_in_no_training_picture() -> None:
    def triple(one: Attributes) -> tuple[str, str, str]:
        return one.building, one.colour, one.place

    trained = {triple(numbered_attributes(0, index)) for index in range(3000)}
    held_out = {triple(numbered_attributes(0, index, "composed")) for index in range(300)}
    assert not trained & held_out
    # Each part of a held-out triple is well known: it is their combination that is new.
    for position in range(3):
        assert {one[position] for one in held_out} <= {one[position] for one in trained}


def test_a_drawing_is_its_number() -> None:
    one, same, other = numbered_drawing(3, 5), numbered_drawing(3, 5), numbered_drawing(3, 6)
    assert one.pixels.shape == (128, 128, 3)
    assert one.pixels.dtype == np.uint8
    assert np.array_equal(one.pixels, same.pixels)
    assert not np.array_equal(one.pixels, other.pixels)


def test_what_the_caption_leaves_open_varies() -> None:
    attributes = numbered_attributes(0, 0)
    pictures = np.stack([numbered_drawing(0, index, attributes=attributes).pixels for index in range(6)])
    assert np.abs(pictures[1:].astype(int) - pictures[:-1]).mean(axis=(1, 2, 3)).min() > 2


def test_counted_things_are_where_the_labels_say() -> None:
    for index in range(40):
        drawing = numbered_drawing(11, index)
        layout, attributes = drawing.layout, drawing.attributes
        assert np.isfinite(layout.birds[:, 0]).sum() == int(attributes.birds)
        assert np.isfinite(layout.flowers[:, 0]).sum() == int(attributes.flowers)
        assert sum(layout.buildings[0].lit) == int(attributes.windows)
        assert abs(layout.buildings[0].x - PLACES[attributes.place]) <= 5
        assert layout.lights[0].kind == attributes.light
        assert (layout.lights[0].x < SIZE / 2) == (attributes.light == "sun")
        for places, middles in ((layout.birds, COLUMNS), (layout.flowers, COLUMNS[::-1])):
            drawn = places[np.isfinite(places[:, 0]), 0]
            assert np.abs(drawn - sorted(middles[: len(drawn)])).max(initial=0) <= JITTER


def test_counted_things_are_apart() -> None:
    for index in range(30):
        layout = numbered_drawing(12, index, flaw=("four birds", "four flowers", None)[index % 3]).layout
        for places, (apart, over) in ((layout.birds, (24, 15)), (layout.flowers, (20, 40))):
            x, y, _ = places[np.isfinite(places[:, 0])].T
            pairs = [(i, j) for i in range(len(x)) for j in range(i)]
            assert all(abs(x[i] - x[j]) > apart or abs(y[i] - y[j]) > over for i, j in pairs)


def test_flaws_are_drawn_and_labelled() -> None:
    found = {flaw: labels(numbered_drawing(2, 0, flaw=flaw)) for flaw in FLAWS}
    assert found["no building"]["buildings"] == 0
    assert found["no building"]["colour"] == IGNORED
    assert found["two buildings"]["buildings"] == 2
    assert found["no light"]["lights"] == 0
    assert found["two lights"]["light"] == IGNORED
    assert found["four birds"]["birds"] == 4
    assert found["four flowers"]["flowers"] == 4
    assert set(found["no light"]) == set(CLASSES)


def test_parameters_have_one_length_and_know_what_is_not_there() -> None:
    lengths, missing = set(), 0
    for index in range(30):
        drawing = numbered_drawing(4, index, flaw=FLAWS[index % len(FLAWS)] if index % 2 else None)
        values = parameters(drawing.attributes, drawing.layout)
        lengths.add(values.shape)
        missing += int(np.isnan(values).any())
    assert len(lengths) == 1
    assert missing > 0


def test_parameters_do_not_claim_what_a_flaw_took_away() -> None:
    ends = np.cumsum([len(values) for values in VALUES.values()])
    undefined = {
        "no building": {"building", "colour", "place", "windows"},
        "two buildings": {"building", "colour", "place", "windows"},
        "no light": {"light"},
        "two lights": {"light"},
        "four birds": {"birds"},
        "four flowers": {"flowers"},
        None: set(),
    }
    for flaw in (*FLAWS, None):
        for index in range(6):
            drawing = numbered_drawing(2, index, flaw=flaw)
            one_hot = dict(zip(VALUES, np.split(parameters(drawing.attributes, drawing.layout), ends), strict=False))
            assert {name for name, part in one_hot.items() if np.isnan(part).all()} == undefined[flaw]
            for position, (name, part) in enumerate(one_hot.items()):
                if name not in undefined[flaw]:
                    assert part.tolist() == np.eye(len(part))[drawing.attributes.indices()[position]].tolist()


@pytest.mark.parametrize(("sky", "weathers"), list(product(VALUES["sky"], combinations(VALUES["weather"], 2))))
def test_no_two_weathers_look_alike_under_any_sky(sky: str, weathers: tuple[str, str]) -> None:
    """Under a grey sky a cloud of rain once had the sky's own colour: 229 pixels told it from fair weather."""
    differing = []
    for index in range(8):
        one, other = (replace(numbered_attributes(0, index), sky=sky, weather=weather) for weather in weathers)
        layout = sample_layout(np.random.default_rng(index), one)
        difference = np.abs(draw(one, layout).astype(int) - draw(other, layout).astype(int)).max(-1)
        differing.append((difference > 20).sum())
    assert np.mean(differing) > 700


def test_other_processes_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    here = list(flawed_drawings(9, [None, "two lights"]))
    monkeypatch.setattr(drawings, "FEW", 1)
    there = list(flawed_drawings(9, [None, "two lights"]))
    assert all(np.array_equal(one.pixels, other.pixels) for one, other in zip(here, there, strict=True))
    assert [one.attributes for one in here] == [other.attributes for other in there]


def test_drawn_pixels_are_cached_whole(tmp_path) -> None:
    cache = tmp_path / "drawings.npy"
    fresh = drawn_pixels(9, 3, cache)
    assert np.array_equal(fresh, drawn_pixels(9, 3, cache))
    assert np.array_equal(fresh[2], numbered_drawing(9, 2).pixels)
    assert len(drawn_pixels(9, 2, cache)) == 2  # another count is drawn anew


def _reading(**changes: int) -> dict[str, torch.Tensor]:
    right = dict.fromkeys(CLASSES, 0) | {"buildings": 1, "lights": 1} | changes
    return {name: torch.tensor([value]) for name, value in right.items()}


def test_the_answer_key() -> None:
    wanted = [{name: values[0] for name, values in VALUES.items()}]
    assert answers(_reading(), wanted)["all_right"].item()
    assert not answers(_reading(birds=1), wanted)["all_right"].item()
    two_moons = answers(_reading(lights=2), wanted)
    assert not two_moons["intact"].item()
    assert not two_moons["all_right"].item()
    assert answers(_reading(birds=4), [{"building": "house"}])["all_right"].item()  # birds were not asked for


def test_abilities_draw_their_own_data() -> None:
    abilities = SceneAbilities()
    prompts = abilities.prompts(50, seed=1)
    assert len(set(prompts)) == 50
    assert all(Attributes(**read_caption(prompt)).split == "unseen" for prompt in prompts)
    pixels, caption = abilities.training_item(1, 0)
    assert caption == abilities.training_caption(1, 0) != abilities.training_caption(1, 1)
    assert pixels.shape == (128, 128, 3)
    assert Attributes(**read_caption(caption)).split == "train"
    pictures = abilities.reference_pictures(prompts[:2], 3, seed=0)
    assert pictures.shape == (6, 128, 128, 3)
    assert not np.array_equal(pictures[0], pictures[1])


def test_drawing_processes_leave_signals_to_the_one_that_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal from the terminal reaches them, too: one that it ended would leave a drawing out for ever."""
    monkeypatch.setattr(drawings, "FEW", 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        assert set(drawings._on_all_cores(signal.getsignal, [number] * 3)) == {signal.SIG_IGN}


def test_a_drawing_process_that_is_killed_ends_the_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel, for want of memory: what it was to draw never comes, and must not be waited for."""
    monkeypatch.setattr(drawings, "FEW", 0)
    with pytest.raises(Interrupted, match=r"a process that draws was ended from outside.*run the same again"):
        list(drawings._on_all_cores(signal.raise_signal, [signal.SIGKILL] * 3))


def test_a_full_disk_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(*_: object) -> None:  # as numpy does where a file takes less than it has
        raise OSError("49152 requested and 4096 written")

    monkeypatch.setattr(np, "save", half)
    with pytest.raises(OSError, match="No space left on device") as full:
        drawn_pixels(9, 3, tmp_path / "drawings.npy")
    assert full.value.errno == errno.ENOSPC and not any(tmp_path.iterdir())
