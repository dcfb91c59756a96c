"""The package from outside: its names load on first use and stay what they are."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fewstep


def test_names_are_listed_and_load() -> None:
    assert set(fewstep.__all__) <= set(dir(fewstep))
    for name in fewstep.__all__:
        assert getattr(fewstep, name) is not None


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        fewstep.distil  # noqa: B018


def test_functions_are_not_hidden_by_the_modules_of_the_same_name() -> None:
    code = (
        "import fewstep.generate, fewstep.benchmark, fewstep; "
        "from fewstep.generate import GenerateResult; "
        "assert callable(fewstep.generate) and callable(fewstep.benchmark)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
