"""Freed memory is kept by our own programs: fewer faults into the system, and nothing where somebody else decides."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from fewstep.allocator import keep_freed_memory

FAULTS = """
import resource, sys
from fewstep.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
import torch
torch.set_num_threads(1)
def work():
    for _ in range(100):
        some = [torch.zeros(1 << 20).add_(1) for _ in range(5)]
        del some
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str, **environment: str) -> tuple[bool, int]:
    """Whether memory is kept, and the page faults of work that asks for the same megabytes again and again."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", FAULTS, mode]
    said = subprocess.run(command, env=plain | environment, capture_output=True, text=True, check=True).stdout.split()
    return said[0] == "True", int(said[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_the_same_megabytes_cost_no_faults_again() -> None:
    kept, few = faults("keep")
    _, many = faults("leave", MALLOC_MMAP_THRESHOLD_="131072")  # each is mapped; by itself glibc does so now and then
    assert kept and few < 0.1 * many


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def mallopt(_library: object) -> None:
        raise AssertionError("glibc was told otherwise")

    monkeypatch.setattr("ctypes.CDLL", mallopt)
    monkeypatch.setenv(name, "2")
    assert not keep_freed_memory()
