"""Judges that are asked for by name: used where their weights are, named in the report where they are not."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from fewstep.backbone import Backbone
from fewstep.benchmark import benchmark
from fewstep.errors import CheckpointError
from fewstep.metrics.alignment import CLIPAlignment
from fewstep.report import picture_path
from tests.benchmark.fakes import PROMPTS, Notes, make_dino
from tests.benchmark.test_benchmark import pixels, settings, table


def test_preference_and_features_by_name(base: Backbone, tmp_path: Path) -> None:
    dino, clip = make_dino(tmp_path / "dino"), base.abilities.alignment_model()  # type: ignore[union-attr]
    asked = settings(
        tmp_path, steps=(1,), solver_steps=0, timing_repeats=1, preference_model=str(clip), feature_model=str(dino)
    )
    result = benchmark(asked, backbone=base)
    record, student = result.record, result.record.summary["student-1"]
    assert (record.preference_model, record.feature_extractor) == (str(clip), str(dino))
    assert student.frechet is not None and student.frechet.dimensions == 16

    model = CLIPAlignment(clip)
    assert model.logit_scale == pytest.approx(1 / 0.07, rel=1e-3)
    saved = [pixels(picture_path(result.folders["student-1"], prompt, n)) for prompt in range(4) for n in range(2)]
    shown = torch.stack([torch.from_numpy(picture).permute(2, 0, 1).to(torch.uint8) for picture in saved])
    expected = model.logit_scale * model.score(shown, [prompt for prompt in PROMPTS for _ in range(2)])
    scores = [score.preference for score in record.scores if score.arm == "student-1"]
    assert scores == pytest.approx(expected.tolist(), abs=1e-4)
    assert student.preference is not None and student.preference.value == pytest.approx(expected.mean().item())
    rows = {(row["arm"], row["prompt_idx"]): row for row in table(result.outdir / "results.csv")}
    for prompt in range(4):
        mine, theirs = rows["student-1", str(prompt)], rows["teacher-5", str(prompt)]
        own = expected[2 * prompt : 2 * prompt + 2].mean().item()
        assert float(mine["avg_preference"]) == pytest.approx(own, abs=1e-3)
        difference = float(mine["avg_preference"]) - float(theirs["avg_preference"])
        assert float(mine["delta_preference_vs_baseline"]) == pytest.approx(difference, abs=1e-3)
    assert student.delta_preference is not None
    text = (result.outdir / "report.html").read_text()
    assert (
        "Preference against teacher" in text
        and f"Preference by {clip}." in text
        and f"faithfulness over {dino}" in text
    )


def test_what_is_not_at_hand_is_named_in_the_report(base: Backbone, tmp_path: Path) -> None:
    notes = Notes()
    asked = settings(
        tmp_path, steps=(1,), compare_baseline=False, timing_repeats=5,  # fewer are warned of
        preference_model="nobody/no-pick", feature_model="nobody/no-dino",
    )  # fmt: skip
    result = benchmark(asked, reporter=notes, backbone=base)
    assert len(notes.warned) == 2
    text = (result.outdir / "report.html").read_text()
    for name, words in (
        ("no-pick", "no preference"),
        ("no-dino", "distances are over the base's own features ("),
    ):
        (warned,) = [line for line in notes.warned if name in line]
        assert words in warned and "is not at hand" in warned
        assert f"nobody/{name}" in text[text.index("</section>") :][:2000], "in the report, above the figures"
    assert result.record.preference_model is None
    assert re.fullmatch(r"the base's own features \([0-9a-f]{8}\)", result.record.feature_extractor or "")


def test_inception_without_its_libraries_is_named_with_the_fix(
    base: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    result = benchmark(
        settings(tmp_path, steps=(1,), compare_baseline=False, timing_repeats=5, feature_model="inception"),
        backbone=base,
    )
    (warned,) = result.record.warnings
    assert "feature_model 'inception' was asked for and is not at hand" in warned and "fewstep[fid]" in warned
    assert "over the base's own features (" in warned
    assert "fewstep[fid]" in (result.outdir / "report.html").read_text()


def test_a_preference_model_that_is_none(base: Backbone, tmp_path: Path) -> None:
    wrong = make_dino(tmp_path / "dino")
    with pytest.raises(CheckpointError, match="--preference_model"):
        benchmark(settings(tmp_path, preference_model=str(wrong)), backbone=base)
    assert not (tmp_path / "out").exists()
