"""The README's commands are ones that the command line takes; the docs name every column."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from fewstep.cli import COMMANDS
from fewstep.records import Row
from fewstep.report import timing_csv
from tests.report.fakes import record

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PROGRAMS = {"train_flash_lora.py": "train", "demo.py": "bench"}


def commands() -> Iterator[list[str]]:
    """Every command of the README that is `fewstep`'s, cut into words; "…" is among those of one shown in part."""
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`((?:\.venv/bin/)?fewstep [a-z]+ [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for part in [*blocks, *(span.replace("\n", " ") + " …" for span in spans)]:  # in prose a part is shown
        for line in part.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:3] == ["torchrun", "--nproc_per_node", "8"]:
                words = words[4:]
            if words and words[0] == "python":
                words = ["fewstep", PROGRAMS[words[1]], *words[2:]]
            if words and words[0].split("/")[-1] == "fewstep" and words[1] in COMMANDS:
                yield words[1:]


def given(words: list[str]) -> dict[str, list[str]]:
    """What each flag of a command is given; what comes before them is a report's runs."""
    found: dict[str, list[str]] = {"runs": []}
    for word in words:
        if word.startswith("--"):
            found[word[2:]] = []
        else:
            found[list(found)[-1]].append(word)
    return found if found["runs"] else {name: came for name, came in found.items() if name != "runs"}


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_its_flags_are_known_and_its_values_are_taken(words: list[str]) -> None:
    settings = COMMANDS[words[0]].settings
    shown_whole, words = "…" not in words, [word for word in words[1:] if word != "…"]
    values: dict[str, Any] = {}
    for flag, came in given(words).items():
        name = flag if flag in settings.model_fields or flag == "config" else flag.removeprefix("no_")
        assert name in settings.model_fields or name == "config", flag
        if name != "config":
            values[name] = (came if len(came) > 1 else came[0]) if came else name == flag
    if shown_whole:
        settings(**values)


def test_every_column_is_told() -> None:
    told = set(re.findall(r"`([^`\s]+)`", (ROOT / "docs" / "files.md").read_text(encoding="utf-8")))
    timings = timing_csv(record()).splitlines()[0].split(",")
    assert len(timings) > 20 and set(timings) <= told
    assert {field.name for field in fields(Row) if field.name != "attributes"} <= told


def test_there_are_some() -> None:
    assert len(list(commands())) > 20
