"""One tiny base, pictures, and the run that nothing happened to; and what was survived, counted at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings

from tests.faults.harness import RUN, run_here, training
from tests.train.tiny import make_base, make_pictures

settings.register_profile("faults", max_examples=2_500)  # make test-faults asks for it

Words = Callable[..., list[str]]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="session")
def words(base: Path, pictures: Path) -> Words:
    """The words of a training into a folder, and more of them."""
    return partial(training, base, pictures)


@pytest.fixture(scope="session")
def undisturbed(words: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_here(words(folder)).assert_clean(0)
    return folder / RUN


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the tests that passed have noted with `record_property`: counts added up, of seconds the most."""
    counts: Counter[str] = Counter()
    most: dict[str, float] = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if isinstance(value, int):
                counts[name] += value
            else:
                most[name] = max(value, most.get(name, 0.0))
    if counts or most:
        terminalreporter.section("what was survived")
        for name, count in sorted(counts.items()):
            terminalreporter.write_line(f"{count:,} {name}")
        for name, seconds in sorted(most.items()):
            terminalreporter.write_line(f"at most {seconds:.1f} {name}")
