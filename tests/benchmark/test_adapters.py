"""Several adapters in one benchmark: each drawn with its own weights, sampler and strength, from the same noise."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from fewstep import lora, opening
from fewstep.arms import control_of, student_arm
from fewstep.backbone import Backbone, random_backbone
from fewstep.benchmark import BenchmarkResult, benchmark
from fewstep.benchmark.adapters import controls, origin_of
from fewstep.checkpoint import Origin
from fewstep.config import adapter_entries, load_adapters
from fewstep.errors import CheckpointError, InputError
from fewstep.report import picture_path
from tests.benchmark.fakes import Notes, make_adapter
from tests.benchmark.test_benchmark import pixels, settings, table


def listed(folder: Path, text: str) -> Path:
    file = folder / "adapters.toml"
    file.write_text(text)
    return file


def run(folder: Path, base: Backbone, text: str, **changes: object) -> BenchmarkResult:
    plain = {"num_images": 1, "steps": (1, 2), "clip_model_id": "none", "frechet_images": 0, "solver_steps": 0}
    asked = settings(folder, adapters_file=listed(folder, text), **(plain | changes))
    return benchmark(asked, backbone=base)


@pytest.fixture
def other(base: Backbone, tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "other", base, scale=0.08)


def test_every_adapter_draws_as_it_does_alone(base: Backbone, other: Path, tmp_path: Path) -> None:
    shipped = base.abilities.adapter()  # type: ignore[union-attr]
    text = f"""
        [[adapter]]
        id = "twin"
        lora_path = "{shipped}"
        [[adapter]]
        id = "tcd"
        lora_path = "{other}"
        sampler = "tcd"
        eta = 0.3
        steps = 2
        [[adapter]]
        id = "weak"
        lora_path = "{other}"
        scale = 0.5
        steps = [2]
    """
    found = run(tmp_path, base, text, lora_path=shipped)
    arms = {arm.arm.id: arm.arm for arm in found.arms}
    assert list(arms) == [
        "teacher-5", "student-1", "student-2", "twin-1", "twin-2", "tcd-2", "weak-2", "base-1", "base-2",
        "base-tcd-eta30-2",
    ]  # fmt: skip

    def picture(arm: str) -> np.ndarray:
        return pixels(picture_path(found.folders[arm], 0, 0))

    assert np.array_equal(picture("twin-2"), picture("student-2")), "the same adapter, the same noise"
    for one, another in (
        ("tcd-2", "twin-2"),
        ("weak-2", "twin-2"),
        ("weak-2", "base-2"),
        ("tcd-2", "base-tcd-eta30-2"),
    ):
        assert np.abs(picture(one) - picture(another)).max() > 0, (one, another)
    assert found.record.summary["tcd-2"].control == "base-tcd-eta30-2"
    assert found.record.adapters["weak"]["scale"] == "0.5"
    assert found.record.from_json(found.record.to_json()) == found.record
    assert {row["sampler"] for row in table(found.outdir / "results.csv") if row["arm"] == "tcd-2"} == {"tcd"}
    # Alone, the weak one draws the same.
    lora.load_adapter(base, other)
    lora.set_scale(base.unet, 0.5)
    alone = benchmark(
        settings(tmp_path, outdir=tmp_path / "alone", num_images=1, steps=(2,), compare_baseline=False,
                 clip_model_id="none", frechet_images=0),
        backbone=base,
    )  # fmt: skip
    assert np.array_equal(picture("weak-2"), pixels(picture_path(alone.folders["student-2"], 0, 0)))


def test_a_file_of_adapters_alone_leaves_the_bases_own_out(base: Backbone, other: Path, tmp_path: Path) -> None:
    found = run(tmp_path, base, f'[[adapter]]\nid = "mine"\nlora_path = "{other}"\nsteps = 1\n', compare_baseline=False)
    assert [arm.arm.id for arm in found.arms] == ["mine-1"] and found.record.adapter is None


def test_the_base_is_the_one_that_an_adapter_of_the_file_names(
    base: Backbone, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = base.abilities.adapter()  # type: ignore[union-attr]
    text = f'[[adapter]]\nid = "released"\nlora_path = "{shipped}"\n[[adapter]]\nid = "mine"\nlora_path = "{other}"\n'
    asked = settings(tmp_path, adapters_file=listed(tmp_path, text))
    assert origin_of(asked) is None
    manifest = {"schema_version": 1, "step": 10, "base_model": "their-own", "base_fingerprint": "f" * 32, "files": {}}
    (other / "manifest.json").write_text(json.dumps(manifest | {"step_counts": [1], "revision": "abc"}))
    (other / "settings.toml").write_text('prediction_type = "v_prediction"\n')
    assert origin_of(asked) == Origin("their-own", "abc", "v_prediction")
    opened: list[tuple[object, ...]] = []

    def load(name: str, *, why: str, revision: str | None, prediction_type: str | None, **_: object) -> Backbone:
        opened.append((name, why, revision, prediction_type))
        raise InputError("seen enough")

    monkeypatch.setattr(opening, "load_backbone", load)
    for changes in ({}, {"base_model": "another"}):
        with pytest.raises(InputError, match="seen enough"):
            benchmark(asked.replace(**changes))
    assert opened == [
        ("their-own", "recorded in the adapter", "abc", "v_prediction"),
        ("another", "asked for with base_model", None, None),
    ]


def test_one_adapter_alone_is_what_its_arms_draw_with(base: Backbone, other: Path, tmp_path: Path) -> None:
    found = run(tmp_path, base, f'[[adapter]]\nid = "mine"\nlora_path = "{other}"\nsteps = 2\n')
    own, control = (pixels(picture_path(found.folders[arm], 0, 0)) for arm in ("mine-2", "base-2"))
    assert np.abs(own - control).max() > 0
    named = benchmark(
        settings(tmp_path, outdir=tmp_path / "named", lora_path=other, num_images=1, steps=(2,), compare_baseline=False,
                 clip_model_id="none", frechet_images=0),
        backbone=base,
    )  # fmt: skip
    assert np.array_equal(own, pixels(picture_path(named.folders["student-2"], 0, 0)))


@pytest.mark.parametrize(("setting", "sampler"), [("eta = 0.3", "tcd"), ("timestep_span = 0.5", "ddim")])
def test_what_a_saved_sampler_has_no_use_for_is_refused(
    base: Backbone, other: Path, tmp_path: Path, setting: str, sampler: str
) -> None:
    with pytest.raises(InputError, match=f"sampled with lcm, which has none.* add sampler={sampler}"):
        run(tmp_path, base, f'[[adapter]]\nid = "mine"\nlora_path = "{other}"\n{setting}\n')
    assert not (tmp_path / "out").exists()


def test_the_sampler_is_the_saved_schedulers(base: Backbone, other: Path, tmp_path: Path) -> None:
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "TCDScheduler"}))
    found = run(tmp_path, base, f'[[adapter]]\nid = "mine"\nlora_path = "{other}"\n', compare_baseline=False)
    assert {arm.arm.sampler for arm in found.arms} == {"tcd"} and {arm.arm.steps for arm in found.arms} == {1, 2}


def test_adapters_from_the_command_line_are_those_of_a_file(base: Backbone, other: Path, tmp_path: Path) -> None:
    table = (
        f'[[adapter]]\nid = "mine"\nlora_path = "{other}"\nsampler = "tcd"\neta = 0.3\nscale = 0.5\nsteps = [1, 2]\n'
    )
    word = f"id=mine, lora_path={other}, sampler=tcd, eta=0.3, scale=0.5, steps=1+2"
    (entry,) = load_adapters(listed(tmp_path, table))
    plain = {"adapters_file": None, "clip_model_id": "none", "frechet_images": 0, "num_images": 1}
    asked = settings(tmp_path, adapters=(word,), **plain)
    assert adapter_entries(asked) == (entry,)
    found = benchmark(asked.replace(compare_baseline=False), backbone=base)
    assert [arm.arm.id for arm in found.arms] == ["mine-1", "mine-2"]
    assert [(arm.arm.sampler, arm.arm.eta, arm.arm.scale) for arm in found.arms] == [("tcd", 0.3, 0.5)] * 2
    both = asked.replace(adapters_file=listed(tmp_path, table))
    with pytest.raises(InputError, match="adapter id mine came twice"):
        benchmark(both, backbone=base)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("mine", "NAME=VALUE with a comma"),
        ("lora_path=x", "id among them"),
        ("id=a,id=b,lora_path=x", "each name once"),
        ("id=a", "neither lora_path nor lora_id"),
        ("id=a,lora_path=x,sampler=euler", "lcm, tcd, ddim"),
        ("id=a,lora_path=x,step=4", "did you mean steps?"),
        ("id=a,lora_path=x,steps=0", "at least 1"),
    ],
)
def test_a_bad_word_for_an_adapter_is_refused_in_one_line(tmp_path: Path, word: str, words: str) -> None:
    with pytest.raises(InputError) as raised:
        settings(tmp_path, adapters=word)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_the_runs_own_adapter_is_sampled_as_its_saved_scheduler_says(
    base: Backbone, other: Path, tmp_path: Path
) -> None:
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "TCDScheduler"}))
    asked = settings(tmp_path, lora_path=other, clip_model_id="none", frechet_images=0, num_images=1, solver_steps=0)
    found = benchmark(asked, backbone=base)
    assert {arm.arm.id: arm.arm.sampler for arm in found.arms} == {
        "teacher-5": "ddim", "student-1": "tcd", "student-2": "tcd", "base-tcd-1": "tcd", "base-tcd-2": "tcd"
    }  # fmt: skip
    assert found.record.summary["student-2"].control == "base-tcd-2"


def test_no_guidance_is_no_guidance_whatever_its_number() -> None:
    students = [student_arm(4, 1.0), replace(student_arm(4, 0.0), id="recipe-4")]
    (control,) = controls(students, 1000)
    assert [control_of(student, [*students, control]) for student in students] == [control, control]


def test_an_adapter_that_changes_while_it_is_measured_is_an_error(base: Backbone, tmp_path: Path) -> None:
    class Overwriting(Notes):
        def say(self, text: str) -> None:
            if text.startswith("adapter two: "):
                make_adapter(tmp_path / "one", replace(base, unet=random_backbone("tiny").unet), scale=0.03)

    make_adapter(tmp_path / "one", base)
    make_adapter(tmp_path / "two", base, scale=0.02)
    text = "".join(f'[[adapter]]\nid = "{name}"\nlora_path = "{tmp_path / name}"\n' for name in ("one", "two"))
    asked = settings(tmp_path, adapters_file=listed(tmp_path, text), compare_baseline=False, frechet_images=0)
    with pytest.raises(CheckpointError, match="one has changed since the benchmark began"):
        benchmark(asked.replace(clip_model_id="none"), backbone=base, reporter=Overwriting())


def test_ways_to_sample_that_differ_have_controls_of_their_own() -> None:
    students = [student_arm(4, guidance) for guidance in (1.5, 15.0)]
    students += [replace(student_arm(4, sampler="tcd"), eta=eta) for eta in (0.3, 0.304)]
    students += [student_arm(4, sampler="ddim", span=span) for span in (0.5, 0.05)]
    assert [arm.id for arm in controls(students, 1000)] == [
        *("base-w1p5-4", "base-w15-4", "base-tcd-eta30-4", "base-tcd-eta30p4-4"),
        *("base-ddim-span05-4", "base-ddim-span005-4"),
    ]


def test_the_timesteps_of_a_span_are_recorded_or_said_and_have_their_own_control(
    base: Backbone, other: Path, tmp_path: Path
) -> None:
    config = other / "scheduler" / "scheduler_config.json"
    first_order = {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 1}
    config.write_text(json.dumps(json.loads(config.read_text()) | first_order))
    (other / "settings.toml").write_text("timestep_span = 0.6\n")
    assert opening.recorded_sampling(lora.locate(other), Notes()) == opening.Sampling("ddim", 0.6)
    text = f"""
        [[adapter]]
        id = "recorded"
        lora_path = "{other}"
        steps = 2
        [[adapter]]
        id = "said"
        lora_path = "{other}"
        timestep_span = 0.605
        steps = 2
        [[adapter]]
        id = "lcm"
        lora_path = "{other}"
        sampler = "lcm"
        steps = 2
    """
    found = run(tmp_path, base, text, lora_path=base.abilities.adapter(), steps=(1,))  # type: ignore[union-attr]
    timesteps = {arm.arm.id: arm.arm.timesteps for arm in found.arms}
    assert (timesteps["recorded-2"], timesteps["said-2"], timesteps["lcm-2"]) == ((999, 299), (999, 301), (999, 499))
    controls = {name: found.record.summary[f"{name}-2"].control for name in ("recorded", "said", "lcm")}
    assert controls == {"recorded": "base-ddim-span06-2", "said": "base-ddim-span0605-2", "lcm": "base-2"}
    assert timesteps["base-ddim-span0605-2"] == (999, 301)

    config.write_text(json.dumps(json.loads(config.read_text()) | {"solver_order": 2}))
    notes = Notes()
    assert opening.recorded_sampling(lora.locate(other), notes) == opening.Sampling("lcm") and len(notes.warned) == 1


@pytest.mark.parametrize("content", ['{"_class_name": "EulerDiscreteScheduler"}', "[]", "{"])
def test_a_scheduler_that_is_not_known_is_named(other: Path, content: str) -> None:
    (other / "scheduler" / "scheduler_config.json").write_text(content)
    notes = Notes()
    assert opening.recorded_sampling(lora.locate(other), notes) == opening.Sampling("lcm")
    (warned,) = notes.warned
    assert ("EulerDiscreteScheduler" if "Euler" in content else "cannot be read") in warned
    attached = opening.recorded_sampling(None, notes)
    assert attached == opening.Sampling("lcm") and not attached.known
    assert notes.warned[1].startswith("nothing says how the adapter that is attached to the base is to be sampled")


def test_a_further_adapter_that_was_trained_on_another_base_is_named(
    base: Backbone, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening.checkpoint, "recorded", lambda folder: trained_elsewhere(folder == other))
    notes = Notes()
    shipped = base.abilities.adapter()  # type: ignore[union-attr]
    words = (f"id=strange,lora_path={other},steps=1", f"id=own,lora_path={shipped},steps=1")
    asked = settings(tmp_path, adapters=words, clip_model_id="none", frechet_images=0, compare_baseline=False)
    benchmark(asked, backbone=base, reporter=notes)
    (warned,) = [line for line in notes.warned if "was not made for it" in line]
    assert warned.startswith(f"the adapter {other} was trained on elsewhere (0123abcd)")


def trained_elsewhere(elsewhere: bool) -> SimpleNamespace | None:
    return (
        SimpleNamespace(base_model="elsewhere", base_fingerprint="0123abcd" * 8, step_counts=(1, 2, 4))
        if elsewhere
        else None
    )


def test_a_sampler_with_other_timesteps_than_the_trained_ones_is_named(base: Backbone, tmp_path: Path) -> None:
    shipped = base.abilities.adapter()  # type: ignore[union-attr]
    text = f"""
        [[adapter]]
        id = "elsewhere"
        lora_path = "{shipped}"
        sampler = "ddim"
        steps = 4
        [[adapter]]
        id = "there"
        lora_path = "{shipped}"
        steps = 4
    """
    notes = Notes()
    # With an option too it is said once.
    file = listed(tmp_path, text)
    asked = settings(tmp_path, adapters_file=file, compare_baseline=False, num_images=1, fast_options="fused")
    benchmark(asked.replace(clip_model_id="none", frechet_images=0), backbone=base, reporter=notes)
    (warned,) = [line for line in notes.warned if "was not trained" in line]
    assert warned.startswith("arm elsewhere-4 samples at timesteps 749 249, where") and "759 499 259" in warned


def test_an_adapter_without_effect_is_refused_before_anything_is_written(base: Backbone, tmp_path: Path) -> None:
    empty = make_adapter(tmp_path / "empty", base, scale=0)
    with pytest.raises(CheckpointError, match="changes nothing"):
        run(tmp_path, base, f'[[adapter]]\nid = "mine"\nlora_path = "{empty}"\n')
    assert not (tmp_path / "out").exists()


def test_a_base_with_an_adapter_on_it_takes_no_file(base: Backbone, other: Path, tmp_path: Path) -> None:
    lora.load_adapter(base, other)
    with pytest.raises(InputError, match="attached already"):
        run(tmp_path, base, f'[[adapter]]\nid = "mine"\nlora_path = "{other}"\n')


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no list of adapters"),
        ("steps = 4", "no list of adapters"),
        ("[adapter]\nid = 'a'", "no list of adapters"),
        ("[[adapter]]\nlora_path = 'x'", "adapter 0 has no id"),
        ("[[adapter]]\nid = 'a'", "neither lora_path nor lora_id"),
        ("[[adapter]]\nid = 'a'\nlora_path = 'x'\nlora_id = 'o/n'", "came together"),
        ("[[adapter]]\nid = 'A b'\nlora_path = 'x'", "id: 'A b' came"),
        ("[[adapter]]\nid = 'a'\nlora_path = 'x'\nsampler = 'euler'", "lcm, tcd, ddim"),
        ("[[adapter]]\nid = 'a'\nlora_path = 'x'\nsampler = 'lcm'\neta = 0.3", "which has none"),
        ("[[adapter]]\nid = 'a'\nlora_path = 'x'\nstep = 4", "did you mean steps?"),
        ("[[adapter]]\nid = 'a'\nlora_path = 'x'\nseed = 4", "unknown setting 'seed'"),
        ("[[adapter]]\nid = 'a'\nlora_path = 'x'\n[[adapter]]\nid = 'a'\nlora_path = 'y'", "a came twice"),
        ("[[adapter", "is no TOML"),
    ],
)
def test_a_bad_file_of_adapters_is_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InputError) as raised:
        load_adapters(listed(tmp_path, text))
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_the_settings_are_reported(base: Backbone, other: Path, tmp_path: Path) -> None:
    notes = Notes()
    file = listed(tmp_path, f'[[adapter]]\nid = "mine"\nlora_path = "{other}"\nsteps = 1\n')
    benchmark(
        settings(tmp_path, adapters_file=file, num_images=1, clip_model_id="none", frechet_images=0, solver_steps=0),
        reporter=notes, backbone=base,
    )  # fmt: skip
    assert any(line.startswith("adapter mine: ") and "scale 1" in line for line in notes.said)


def test_a_file_that_was_moved_alone_says_how_it_is_sampled(base: Backbone, tmp_path: Path) -> None:
    made = tmp_path / "made"
    lora.attach(base.unet, 2, 16, ["to_q"], seed=3)
    lora.save_adapter(base.unet, made, base.scheduler_config, "ddim", 0.6, (2, 4))
    lora.detach(base.unet)
    alone = tmp_path / "loras" / "mine.safetensors"
    alone.parent.mkdir()
    shutil.copy(made / lora.WEIGHTS_NAME, alone)
    source, notes = lora.locate(alone), Notes()
    assert opening.recorded_sampling(source, notes) == opening.Sampling("ddim", 0.6)
    assert opening.promised_steps(source) == (2, 4) and not notes.said
    for stated in (None, "{", '{"sampler": "euler", "span": 1, "step_counts": []}', '{"sampler": "lcm"}'):
        weights = load_file(made / lora.WEIGHTS_NAME)
        save_file(weights, alone, {"fewstep_sampling": stated} if stated else None)
        assert opening.recorded_sampling(source, notes) == opening.Sampling("lcm")
        assert opening.promised_steps(source) is None
    assert notes.said == [f"nothing with {alone} says how it is to be sampled: with lcm"] * 4
