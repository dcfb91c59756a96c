"""The settings classes: what they refuse, in which words, and that they survive the way through a TOML file."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from pydantic import ValidationError

from fewstep.config import (
    AdapterEntry,
    BenchSettings,
    DemoSettings,
    GenerateSettings,
    PretrainSettings,
    Settings,
    TrainSettings,
    load_toml,
    merged,
    nearest,
    settings_toml,
)
from fewstep.errors import InputError

ALL = [TrainSettings, BenchSettings, GenerateSettings, PretrainSettings, DemoSettings]

# The description's flags, one for one.
TRAIN_FLAGS = (
    "dataset_name data_dir output_dir run_name max_steps batch_size gradient_accumulation_steps learning_rate "
    "lora_rank lora_alpha guidance_scale num_ddim_steps num_inference_steps seed max_grad_norm resume_from_checkpoint "
    "log_file base_model revision resolution mixed_precision device checkpoint_every validate_every image_column "
    "caption_column max_dropped prediction_type"
)
BENCH_FLAGS = (
    "prompt steps seed outdir num_images compare_baseline baseline_steps baseline_guidance baseline_outdir lora_path "
    "lora_id prompts_file flash_guidance base_model device negative_prompt batch_size"
)


def refusal(settings: type[Settings], **values: object) -> str:
    with pytest.raises(InputError) as raised:
        settings(**values)
    message = str(raised.value)
    assert "\n" not in message
    assert "pydantic" not in message
    return message


@pytest.mark.parametrize(("settings", "flags"), [(TrainSettings, TRAIN_FLAGS), (BenchSettings, BENCH_FLAGS)])
def test_every_promised_flag_exists(settings: type[Settings], flags: str) -> None:
    assert set(flags.split()) <= set(settings.model_fields)


def test_promised_defaults() -> None:
    train, bench = TrainSettings(), BenchSettings()
    assert train.num_inference_steps == (1, 2, 4, 8)
    assert (train.max_steps, train.batch_size, train.learning_rate) == (3000, 8, 1e-4)
    assert (train.lora_rank, train.alpha, train.teacher_steps) == (4, 32, 8)
    assert train.lora_targets == ("to_q", "to_k", "to_v", "to_out.0")
    assert (bench.steps, bench.baseline_steps, bench.flash_guidance) == ((2, 4, 8), None, 1.0)
    assert str(bench.outdir) == "outputs"


@pytest.mark.parametrize("settings", ALL)
def test_every_field_is_documented(settings: type[Settings]) -> None:
    for name, field in settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
    assert inspect.getdoc(settings)


@pytest.mark.parametrize(
    ("settings", "values", "words"),
    [
        (TrainSettings, {"max_steps": 0}, "max_steps: 0 came; allowed: a whole number, at least 1"),
        (TrainSettings, {"max_steps": 2.5}, "max_steps: 2.5 came"),
        (TrainSettings, {"max_steps": True}, "max_steps: True came"),
        (TrainSettings, {"max_steps": "many"}, "max_steps: many came"),
        (TrainSettings, {"learning_rate": -1}, "learning_rate: -1 came; allowed: a number, above 0"),
        (TrainSettings, {"learning_rate": float("nan")}, "learning_rate: nan came"),
        (TrainSettings, {"learning_rate": float("inf")}, "learning_rate: inf came"),
        (TrainSettings, {"guidance_scale": -0.1}, "guidance_scale: -0.1 came; allowed: a number, at least 0"),
        (TrainSettings, {"num_inference_steps": []}, "num_inference_steps: nothing came"),
        (TrainSettings, {"num_inference_steps": [4, 51]}, "num_inference_steps: 51 came; allowed: one or several"),
        (TrainSettings, {"num_inference_steps": [4, 4]}, "4 came twice"),
        (BenchSettings, {"solver_steps": [0, 8]}, "0 8 came; allowed are step counts from 2, or 0 alone"),
        (BenchSettings, {"solver_steps": 1}, "1 came; allowed are step counts from 2"),
        (
            TrainSettings,
            {"guidance_interval": 5},
            "5 came; allowed: 2 of them, each a whole number, at least 0, at most 999",
        ),
        (TrainSettings, {"guidance_interval": [1, 2, 3]}, "1 2 3 came; allowed: 2 of them"),
        (TrainSettings, {"guidance_interval": [0, 1000]}, "1000 came; allowed: 2 of them"),
        (TrainSettings, {"guidance_interval": [9, 5]}, "9 5 came; allowed is the lower timestep first; write 5 9"),
        (TrainSettings, {"mixed_precision": "fp8"}, "mixed_precision: fp8 came; allowed: auto, no, fp16, bf16"),
        (TrainSettings, {"prediction_type": "sample"}, "allowed: epsilon, v_prediction"),
        (TrainSettings, {"device": "gpu"}, "'gpu' came; allowed: auto, cpu, cuda"),
        (TrainSettings, {"resolution": 100}, "a multiple of 8"),
        (TrainSettings, {"lora_alpha": 0}, "lora_alpha: 0 came"),
        (TrainSettings, {"lora_targets": []}, "lora_targets: nothing came"),
        (TrainSettings, {"run_name": "a/b"}, "the name of one folder"),
        (TrainSettings, {"run_name": ".."}, "the name of one folder"),
        *(
            (TrainSettings, {"run_name": name}, "the name of one folder, of at most 200 bytes")
            for name in (
                "../x",
                "/x",
                "a\\b",
                "a\nb",
                "a:b",
                "CON",
                "nul.txt",
                "Lpt1",
                "a.",
                "a ",
                " a",
                "ä" * 101,
                "\x7f",
            )
        ),
        (TrainSettings, {"run_name": "a\0b"}, "'a\\x00b' came; allowed is a path without NUL characters"),
        (TrainSettings, {"output_dir": "a\0b"}, "allowed is a path without NUL characters"),
        (TrainSettings, {"log_file": "a\0b"}, "allowed is a path without NUL characters"),
        (AdapterEntry, {"id": "a" * 65, "lora_path": "x"}, "came; allowed: a text"),
        (TrainSettings, {"data_dir": ""}, "an empty text came"),
        (TrainSettings, {"data_dir": "a", "dataset_name": "b"}, "dataset_name and data_dir came together"),
        (TrainSettings, {"max_steps": 10, "lr_warmup_steps": 10}, "lr_warmup_steps 10 came with max_steps 10"),
        (TrainSettings, {"timestep_span": 0.6}, "timestep_span 0.6 came with sampler lcm"),
        (TrainSettings, {"timestep_span": 0, "sampler": "ddim"}, "timestep_span: 0 came"),
        (
            AdapterEntry,
            {"id": "a", "lora_path": "x", "sampler": "tcd", "timestep_span": 0.6},
            "adapter a has timestep_span 0.6 for tcd, which has none",
        ),
        (TrainSettings, {"max_dropped": 1.1}, "max_dropped: 1.1 came"),
        (TrainSettings, {"seed": -1}, "seed: -1 came"),
        (BenchSettings, {"lora_path": "a", "lora_id": "b"}, "lora_path and lora_id came together"),
        (BenchSettings, {"prompt": "a", "prompts_file": "b"}, "prompt and prompts_file came together"),
        (
            BenchSettings,
            {"prompts_file": "b", "num_prompts": 5},
            "num_prompts 5 came with prompts_file, which is",
        ),
        (BenchSettings, {"negative_prompt": "fog"}, "--flash_guidance 1.5"),
        (BenchSettings, {"steps": 0}, "steps: 0 came"),
        (GenerateSettings, {}, "no prompt came"),
        (GenerateSettings, {"prompt": "a", "negative_prompt": "fog"}, "--flash_guidance 1.5"),
        (GenerateSettings, {"prompt": " "}, "prompt: an empty text came"),
        (PretrainSettings, {"size": "huge"}, "size: huge came; allowed: full, tiny"),
        (DemoSettings, {"steps": [100]}, "steps: 100 came"),
        (TrainSettings, {"lerning_rate": 1}, "unknown setting 'lerning_rate'; did you mean learning_rate?"),
        (PretrainSettings, {"xyzzy": 1}, "unknown setting 'xyzzy'; known are device, "),
    ],
)
def test_refusals(settings: type[Settings], values: dict[str, object], words: str) -> None:
    assert words in refusal(settings, **values)


def test_further_errors_are_counted() -> None:
    assert refusal(TrainSettings, max_steps=0, batch_size=0, seed=-1).endswith("(and 2 more)")


def test_a_long_value_is_shortened() -> None:
    assert len(refusal(TrainSettings, max_steps="9x" * 500)) < 200


def test_frozen_and_replaced() -> None:
    settings = TrainSettings(max_steps=10)
    with pytest.raises(ValidationError):
        settings.max_steps = 11  # type: ignore[misc]
    assert settings.replace(max_steps=11).max_steps == 11
    assert settings.max_steps == 10
    with pytest.raises(InputError, match="max_steps: 0 came"):
        settings.replace(max_steps=0)


def test_negative_prompt_with_guidance_is_allowed() -> None:
    assert BenchSettings(negative_prompt="fog", flash_guidance=1.5).negative_prompt == "fog"
    # Further adapters have a guidance of their own, which is looked at when all arms are known.
    assert BenchSettings(negative_prompt="fog", adapters=("id=x,lora_path=x,guidance=2",)).negative_prompt == "fog"


def test_one_value_is_a_list_of_one() -> None:
    assert TrainSettings(num_inference_steps=4).num_inference_steps == (4,)
    assert TrainSettings(lora_targets="to_q").lora_targets == ("to_q",)


def test_alpha_keeps_its_ratio_to_the_rank() -> None:
    assert TrainSettings(lora_rank=16).alpha == 128
    assert TrainSettings(lora_rank=16, lora_alpha=16).alpha == 16


def test_home_folder_is_expanded() -> None:
    assert TrainSettings(data_dir="~/coco").data_dir == Path.home() / "coco"


@pytest.mark.parametrize(
    ("values", "recorded", "chosen"),
    [
        ({}, None, ("scenes", "the default base")),
        ({"default_base": "some/base"}, None, ("some/base", "the default base")),
        ({"default_base": "some/base"}, "my/base", ("my/base", "recorded in the adapter")),
        ({"base_model": "asked/for"}, "my/base", ("asked/for", "asked for with base_model")),
    ],
)
def test_chosen_base(values: dict[str, str], recorded: str | None, chosen: tuple[str, str]) -> None:
    assert BenchSettings(**values).chosen_base(recorded) == chosen


# ----------------------------------------------------------------------------------------------------------- TOML files


@pytest.mark.parametrize("settings", ALL)
def test_defaults_survive_a_file(settings: type[Settings]) -> None:
    made = settings(prompt="a house") if settings is GenerateSettings else settings()
    assert settings(**tomllib.loads(settings_toml(made))) == made


@examples(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(
    prompt=st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip),
    learning=st.floats(min_value=0, max_value=100),
    steps=st.lists(st.integers(1, 50), min_size=1, unique=True),
)
def test_any_settings_survive_a_file(prompt: str, learning: float, steps: list[int]) -> None:
    made = BenchSettings(prompt=prompt, flash_guidance=learning, steps=steps, compare_baseline=True)
    assert BenchSettings(**tomllib.loads(settings_toml(made))) == made


def test_a_file_is_merged_and_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('max-steps = 7\nbatch_size = 3\nbase_model = "mine"\n')
    settings = merged(TrainSettings, {"batch_size": "5"}, config=file, defaults={"base_model": "theirs", "seed": 1})
    assert (settings.max_steps, settings.batch_size, settings.base_model, settings.seed) == (7, 5, "mine", 1)


def test_what_a_file_says_for_another_base_device_rank_or_sampler_is_left_out(tmp_path: Path) -> None:
    """A run's own file has all filled in: a base that predicts v is not to be trained as the file's, which does not."""
    file, left = tmp_path / "run.toml", list[str]()
    file.write_text(
        'base_model = "one"\nprediction_type = "epsilon"\nresolution = 128\nlora_rank = 4\nlora_alpha = 32\n'
        'sampler = "lcm"\nstart = "data"\nnum_ddim_steps = 8\nmax_steps = 7\ndevice = "cpu"\nmixed_precision = "no"\n'
    )
    given = {"base_model": "two", "lora_rank": "16", "sampler": "ddim", "num_ddim_steps": "8", "device": "cuda"}
    settings = merged(TrainSettings, given, config=file, warn=left.append)
    assert (settings.prediction_type, settings.resolution, settings.alpha, settings.max_steps) == (None, None, 128, 7)
    assert (settings.starts_from, settings.num_ddim_steps, settings.mixed_precision) == ("noise", 8, "auto")
    assert [line.split(" for ")[1].split(",")[0] for line in left] == [
        *("base_model two", "device cuda", "lora_rank 16", "sampler ddim"),
    ]
    assert left[0].endswith("chosen for one: prediction_type epsilon, resolution 128; to keep one, pass it as a flag")
    file.write_text(file.read_text() + "num_inference_steps = [4]\npairs_per_rollout = 4\n")
    assert (
        merged(TrainSettings, {"num_inference_steps": ["8"]}, config=file, warn=left.append).pairs_per_rollout is None
    )
    assert "for num_inference_steps 8, for they were chosen for 4: pairs_per_rollout 4" in left.pop()
    same = {"base_model": "one", "lora_rank": "4", "sampler": "lcm", "device": "cpu", "num_inference_steps": ["4"]}
    assert merged(TrainSettings, same, config=file, warn=left.append) == merged(TrainSettings, {}, config=file)
    assert len(left) == 4


def test_a_flag_takes_the_place_of_the_files_alternative(tmp_path: Path) -> None:
    file, left = tmp_path / "settings.toml", list[str]()
    file.write_text(settings_toml(TrainSettings(data_dir="coco", start="data", teacher_rollouts=64, batch_size=3)))
    captions = merged(TrainSettings, {"prompts_file": "p.txt"}, config=file, warn=left.append)
    assert (captions.data_dir, captions.starts_from, captions.batch_size) == (None, "teacher", 3)
    assert left.pop() == (
        f"left out of {str(file)!r} for prompts_file p.txt, which takes their place: data_dir coco, start data"
    )
    second = merged(TrainSettings, {"start": "student"}, config=file, warn=left.append)
    assert (second.starts_from, second.teacher_rollouts, second.data_dir) == ("student", None, Path("coco"))
    assert left.pop() == f"left out of {str(file)!r} for start student, which does without: teacher_rollouts 64"
    assert merged(TrainSettings, {"start": "teacher"}, config=file, warn=left.append).teacher_rollouts == 64
    with pytest.raises(InputError, match="data_dir and prompts_file came together"):
        merged(TrainSettings, {"prompts_file": "p.txt", "data_dir": "coco"}, config=file)
    file.write_text(settings_toml(TrainSettings(sampler="ddim", timestep_span=0.85)))
    assert merged(TrainSettings, {"sampler": "lcm"}, config=file).timestep_span == 1
    file.write_text(settings_toml(BenchSettings(data_dir="coco", num_prompts=50, lora_id="their/lora", resume=True)))
    bench = merged(BenchSettings, {"prompt": "a house", "lora_path": "mine", "overwrite": True}, config=file)
    assert (bench.data_dir, bench.num_prompts, bench.lora_id, bench.resume) == (None, 20, None, False)


def test_what_is_merged_is_checked_once_and_together(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('negative_prompt = "fog"\nnum_images = 0\n')  # each wrong alone, put right by the flags
    given = {"flash_guidance": "2", "num_images": "1"}
    assert merged(BenchSettings, given, config=file).negative_prompt == "fog"
    file.write_text('lora_path = "a"\nlora_id = "b"\n')
    with pytest.raises(InputError, match="lora_path and lora_id came together"):
        merged(BenchSettings, {"num_images": "2"}, config=file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("max_stebs = 3", "run.toml.*unknown setting 'max_stebs'; did you mean max_steps?"),
        ("[train]\nmax_steps = 3", r"has a table \[train\]; settings files are flat"),
        ("max_steps 3", "is no TOML"),
        ("max_steps = true", "max_steps: True came"),
        ("config = 'other.toml'", "unknown setting 'config'"),
    ],
)
def test_wrong_files(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(content)
    with pytest.raises(InputError, match=words):
        merged(TrainSettings, {}, config=file)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no settings file"):
        load_toml(tmp_path / "nowhere.toml")
    with pytest.raises(InputError, match="cannot be read"):
        load_toml(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'prompt = "\xe9"')
    with pytest.raises(InputError, match="cannot be read"):
        load_toml(tmp_path / "latin.toml")


def test_nearest_name() -> None:
    assert nearest("learning-rat", ["learning_rate", "seed"]) == "learning_rate"
    assert nearest("xyzzy", ["learning_rate", "seed"]) is None


def test_importing_the_package_and_its_settings_takes_no_torch() -> None:
    code = "import sys, fewstep, fewstep.cli, fewstep.ui; fewstep.TrainSettings; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
