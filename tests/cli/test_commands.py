"""The command line: flags become settings, whatever goes wrong becomes one line and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fewstep import __version__, cli
from fewstep.config import STABLE_DIFFUSION, BenchSettings, Settings, TrainCommand
from fewstep.errors import CheckpointError, DataError, InputError, Interrupted, StopAsked
from fewstep.ui import ConsoleReporter

ROOT = Path(__file__).parents[2]


class Procedures:
    """Stands in for every procedure: keeps the settings it was called with, or raises."""

    def __init__(self) -> None:
        self.settings: Any = None
        self.reporter: Any = None
        self.error: BaseException | None = None

    def __call__(self, settings: Settings, *, reporter: Any) -> None:
        self.settings, self.reporter = settings, reporter
        if self.error is not None:
            raise self.error


@pytest.fixture
def procedures(monkeypatch: pytest.MonkeyPatch) -> Procedures:
    fake = Procedures()
    for command in cli.COMMANDS.values():
        module, function = command.procedure.split(":")
        stand_in = ModuleType(module)
        setattr(stand_in, function, fake)
        monkeypatch.setitem(sys.modules, module, stand_in)
    monkeypatch.delenv(cli.TRACEBACK, raising=False)
    return fake


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


# ----------------------------------------------------------------------------------------------------------------- help


def test_every_setting_has_its_place_in_the_help() -> None:
    placed = " ".join(cli.SECTIONS.values()).split()
    assert len(placed) == len(set(placed))
    fields = {name for command in cli.COMMANDS.values() for name in command.settings.model_fields}
    assert fields | {"config"} == set(placed)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_names_every_flag(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    for field in cli.COMMANDS[name].settings.model_fields:
        assert (f"--{field} " in shown) == (field != "default_base")
    assert "--config" in shown


def test_help_shows_defaults_and_choices(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    cli.main(["train", "--help"])
    shown = capsys.readouterr().out
    assert "[default: 1 2 4 8]" in shown
    assert "One of: auto, no, fp16, bf16. [default: auto]" in shown


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from fewstep.cli import main; main(['train', '--help']); "
        "print({'torch', 'numpy', 'diffusers', 'transformers', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fewstep {__version__}\n"


# ---------------------------------------------------------------------------------------------------------------- flags

TRAIN = (
    "train --data_dir coco --output_dir out --run_name coco_lora_flash --max_steps 30 --batch_size 2 "
    "--gradient_accumulation_steps 4 --learning_rate 1e-4 --lora_rank 8 --lora_alpha 16 --guidance_scale 3 "
    "--num_ddim_steps 6 --num_inference_steps 4 --seed 7 --max_grad_norm 0.5 --resume_from_checkpoint latest "
    "--log_file run.log"
)
BENCH = (
    "bench --compare_baseline --prompts_file demo_prompts.txt --num_images 10 --steps 2 4 8 --seed 42 --outdir eval "
    "--lora_path adapter --baseline_steps 30 --baseline_guidance 5 --baseline_outdir base --flash_guidance 1.5 "
    "--negative_prompt fog --lora_targets"
)


def test_the_descriptions_training_command(procedures: Procedures) -> None:
    assert cli.main(TRAIN.split()) == 0
    assert procedures.settings == TrainCommand(
        data_dir="coco", output_dir="out", run_name="coco_lora_flash", max_steps=30, batch_size=2,
        gradient_accumulation_steps=4, learning_rate=1e-4, lora_rank=8, lora_alpha=16, guidance_scale=3,
        num_ddim_steps=6, num_inference_steps=(4,), seed=7, max_grad_norm=0.5, resume_from_checkpoint="latest",
        log_file="run.log",
    )  # fmt: skip


def test_the_descriptions_benchmark_command(procedures: Procedures) -> None:
    assert cli.main(BENCH.split()[:-1]) == 0
    assert procedures.settings == BenchSettings(
        compare_baseline=True, prompts_file="demo_prompts.txt", num_images=10, steps=(2, 4, 8), seed=42, outdir="eval",
        lora_path="adapter", baseline_steps=30, baseline_guidance=5, baseline_outdir="base", flash_guidance=1.5,
        negative_prompt="fog",
    )  # fmt: skip


@pytest.mark.parametrize("command", [TRAIN, BENCH.removesuffix(" --lora_targets")])
def test_underscore_and_hyphen_are_the_same(command: str, procedures: Procedures) -> None:
    cli.main(command.split())
    underscored = procedures.settings
    cli.main([word.replace("_", "-") if word.startswith("--") else word for word in command.split()])
    assert procedures.settings == underscored


@pytest.mark.parametrize(
    ("flags", "on"),
    [("", False), ("--compare_baseline", True), ("--compare-baseline", True), ("--no_compare_baseline", False)],
)
def test_booleans(flags: str, on: bool, procedures: Procedures) -> None:
    assert cli.main(["bench", *flags.split()]) == 0
    assert procedures.settings.compare_baseline is on


@pytest.mark.parametrize("text", ["none", "null", "-1 degrees", "[draft] a house", "a = b", "true", "ein Häuschen 🏠"])
def test_prompts_arrive_as_typed(text: str, procedures: Procedures) -> None:
    assert cli.main(["generate", f"--prompt={text}"]) == 0
    assert procedures.settings.prompt == text


def test_flags_win_over_the_file(procedures: Procedures, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("compare_baseline = true\nsteps = [1, 2]\nnum_images = 3\n")
    assert cli.main(["bench", "--config", str(file), "--steps", "8", "--no_compare_baseline"]) == 0
    settings = procedures.settings
    assert (settings.steps, settings.num_images, settings.compare_baseline) == ((8,), 3, False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("bench --steps", "steps: nothing came; allowed: one or several"),
        ("bench --steps --seed 3", "steps: nothing came; allowed: one or several"),
        ("train --num-inference-steps", "num_inference_steps: nothing came"),
        ("bench --prompt", "prompt: nothing came"),
        ("bench --steps 2 99", "steps: 99 came; allowed: one or several, each a whole number, at least 1, at most 50"),
        ("bench --steps 2 -4", "steps: -4 came"),
        ("bench --seed x", "seed: x came"),
        ("bench --stebs 2", "Unknown option: --stebs. Did you mean --steps? See fewstep bench --help"),
        ("bench --prompt a house", "'house' belongs to no flag; texts with spaces need quotes"),
        ("generate house", "and every value needs its flag, as --prompt before a prompt; see fewstep generate --help"),
        ("bench --compare_baseline false", "off with no_ before its name, as in --no_compare_baseline; see fewstep"),
        ("bench --seed 1 --seed 2", "--seed specified multiple times"),
        ("bench --lora_path a --lora_id b", "lora_path and lora_id came together"),
        ("bench --negative_prompt fog", "negative_prompt came with flash_guidance 1"),
        ("bench --compare_baseline=perhaps", "--compare_baseline"),
        ("train --mixed_precision fp8", "mixed_precision: fp8 came; allowed: auto, no, fp16, bf16"),
        ("train --config nowhere.toml", "no settings file 'nowhere.toml'"),
        ("train --config", "--config"),
        ("generate", "no prompt came"),
        ("bech", 'Did you mean "bench"?'),
        ("trian", "export, ...; see fewstep --help"),
    ],
)
def test_wrong_input_is_one_line_and_2(
    arguments: str, words: str, procedures: Procedures, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments.split()) == 2
    assert words in one_line(capsys)
    assert procedures.settings is None


# ----------------------------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("no such base"), 2, "no such base"),
        (DataError("pictures\nmissing"), 3, "pictures missing"),
        (CheckpointError("[damaged] manifest"), 4, "[damaged] manifest"),
        (Interrupted("saved at 10"), 75, "saved at 10"),
        (KeyboardInterrupt(), 130, "stopped at once"),
        (KeyError("unet"), 1, "a bug in fewstep: KeyError: 'unet' (set FEWSTEP_TRACEBACK=1 to see where)"),
        (MemoryError(), 2, "out of memory; lower --batch_size"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            2,
            "out of memory; lower",
        ),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), 2, "out of memory; lower --batch_size"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), 2, "out of memory; lower --batch_size"),
        (
            RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors"),
            2,
            "the GPU cannot be used: CUDA error: no kernel image is available for execution on the device; install",
        ),
        (RuntimeError("CUDA error: device-side assert triggered"), 1, "a bug in fewstep: RuntimeError: CUDA error"),
        (RuntimeError("shapes do not match"), 1, "a bug in fewstep: RuntimeError: shapes do not match"),
        (OSError(errno.ENOSPC, "No space left on device", "run/x"), 2, "No space left on device: run/x"),
        (FileExistsError(errno.EEXIST, "File exists", "out"), 2, "File exists: out; choose another folder"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), 1, "a bug in fewstep: FileNotFoundError"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, words: str, procedures: Procedures, capsys: pytest.CaptureFixture[str]
) -> None:
    procedures.error = error
    assert cli.main(["bench"]) == code
    assert words in one_line(capsys)


@pytest.mark.parametrize(
    ("command", "code"), [("train", 75), ("cache", 75), ("pretrain", 75), ("demo", 75), ("bench", 75), ("report", 130)]
)
def test_a_first_signal_that_comes_where_nothing_is_to_be_saved(
    command: str, code: int, procedures: Procedures, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"cache": ["--cache_dir", "x"], "report": ["x"]}.get(command, [])
    procedures.error = StopAsked()
    assert cli.main([command, *more]) == code
    assert ("what was saved is whole; " in one_line(capsys)) is (code == 75)
    procedures.error = KeyboardInterrupt()  # the second one
    assert cli.main([command, *more]) == 130
    capsys.readouterr()


def test_traceback_on_request(
    procedures: Procedures, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cli.TRACEBACK, "1")
    procedures.error = KeyError("unet")
    assert cli.main(["bench"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert "in __call__" in shown


def test_other_processes_are_quiet(
    procedures: Procedures, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    cli.main(["train"])
    procedures.reporter.say("said twice")
    assert capsys.readouterr().out == ""


def test_handlers_are_put_back(procedures: Procedures) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    cli.main(["bench"])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


INTERRUPTIBLE = """
import signal, sys, time, types
from fewstep import cli
from fewstep.errors import Interrupted

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a script runs them in its background

def train(settings, *, reporter):
    try:
        with reporter.progress("distil", 1000) as bar:
            print("started", flush=True)
            for _ in range(1000):
                time.sleep(STEP)
                bar.advance()
    except KeyboardInterrupt:
        if SAVES:
            with reporter.progress("saving", 1) as bar:
                bar.advance()
            raise Interrupted("saved; go on with --resume_from_checkpoint latest") from None
        raise

module = types.ModuleType("fewstep.train")
module.train = train
sys.modules["fewstep.train"] = module
sys.exit(cli.main(["train"]))
"""


def test_a_first_signal_before_any_bar_is_told_from_a_second() -> None:
    reporter = ConsoleReporter(quiet=True)
    with reporter.holding_signals():
        with pytest.raises(StopAsked):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt) as caught:
            signal.raise_signal(signal.SIGINT)
        assert type(caught.value) is KeyboardInterrupt


def test_a_request_that_comes_twice_at_once_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler signals all processes of a job, and so does the launcher that it has signalled."""
    now = 100.0
    monkeypatch.setattr("fewstep.ui.time.monotonic", lambda: now)
    reporter = ConsoleReporter(quiet=True)
    with reporter.holding_signals():
        with pytest.raises(StopAsked):
            signal.raise_signal(signal.SIGTERM)
        now += 1.5
        signal.raise_signal(signal.SIGTERM)
        now += 1
        with pytest.raises(KeyboardInterrupt) as caught:
            signal.raise_signal(signal.SIGTERM)
        assert type(caught.value) is KeyboardInterrupt


def test_nohup_is_heeded() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ConsoleReporter(quiet=True).holding_signals():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_whose_terminal_is_closed_saves_itself() -> None:
    """The terminal's other end goes, the kernel sends SIGHUP, and nothing can be printed any more."""
    source = INTERRUPTIBLE.replace("STEP", "0.05").replace("SAVES", "True")
    main, terminal = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", source], stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True
    ) as process:
        try:
            os.close(terminal)
            shown = b""
            while b"started" not in shown:
                shown += os.read(main, 1000)
            os.close(main)
            time.sleep(0.3)
            process.send_signal(signal.SIGHUP)
            assert process.wait(timeout=20) == 75
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("number", "step", "signals", "code"),
    [
        (signal.SIGINT, 0.05, 1, 75),
        (signal.SIGTERM, 0.05, 1, 75),
        (signal.SIGHUP, 0.05, 1, 75),
        (signal.SIGINT, 30, 2, 130),
    ],
)
def test_first_signal_waits_for_the_step_the_second_does_not(
    number: signal.Signals, step: float, signals: int, code: int
) -> None:
    source = INTERRUPTIBLE.replace("STEP", str(step)).replace("SAVES", str(signals == 1))
    with subprocess.Popen(
        [sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "started\n"
        for _ in range(signals):
            process.send_signal(number)
            time.sleep(0.3)
        assert process.wait(timeout=10) == code
        shown = process.stderr.read()
    assert "stopping after this step" in shown
    assert shown.count("error: ") == 1


# --------------------------------------------------------------------------------------------------------- root scripts


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env={**os.environ})


@pytest.mark.parametrize(("script", "flag"), [("demo.py", "compare_baseline"), ("train_flash_lora.py", "max_steps")])
def test_scripts_answer_for_themselves(script: str, flag: str) -> None:
    done = run(script, "--help")
    assert done.returncode == 0
    assert f"Usage: {script}" in done.stdout
    assert f"--{flag}" in done.stdout
    wrong = run(script, "--sed", "1")
    assert wrong.returncode == 2
    assert wrong.stderr == f"error: Unknown option: --sed. Did you mean --seed? See {script} --help\n"


@pytest.mark.parametrize("command", ["bench", "train"])
def test_scripts_default_to_stable_diffusion(command: str, procedures: Procedures, tmp_path: Path) -> None:
    def chosen(*argv: str) -> str:
        assert cli.script("x.py", command, default_base=STABLE_DIFFUSION, argv=argv) == 0
        name, _ = procedures.settings.chosen_base()
        return str(name)

    assert chosen() == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert chosen("--base_model", "scenes") == "scenes"
    (tmp_path / "run.toml").write_text('base_model = "mine"\n')
    assert chosen("--config", str(tmp_path / "run.toml")) == "mine"


def test_python_dash_m() -> None:
    assert run("-m", "fewstep", "--version").stdout == f"fewstep {__version__}\n"
