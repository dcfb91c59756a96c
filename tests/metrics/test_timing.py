"""Timing: what is run, what is counted, what is made of it."""

from __future__ import annotations

import time

import pytest

from fewstep.timing import Timing, machine, measure


def test_warm_up_is_run_and_not_counted() -> None:
    calls: list[int] = []

    def work() -> None:
        calls.append(len(calls))
        time.sleep(0.05 if len(calls) == 1 else 0.001)

    found = measure(work, repeats=5, warmup=1)
    assert len(calls) == 6 and len(found.seconds) == 5
    assert 0.001 <= found.median < 0.04


def test_median_and_interquartile_range() -> None:
    found = Timing((1.0, 2.0, 3.0, 4.0, 100.0))
    assert (found.median, found.iqr) == (3.0, 2.0)


def test_nothing_cannot_be_timed() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        measure(lambda: None, repeats=0)


def test_the_machine_is_named() -> None:
    found = machine("cpu", "float32")
    assert found["device"] and found["precision"] == "float32" and int(found["threads"]) >= 1
