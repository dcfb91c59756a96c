"""The benchmark: teacher, untrained solvers, student and the base without adapter, from the same noise.

Every figure has a control beside it: alignment its shuffled-caption floor, the student the same sampler without the
adapter, distances between distributions real pictures against real ones.

`run` is the procedure, `plan` what it starts from; `drawing`, `cost`, `distribution` and `summary` are what it finds
about an arm, `real` the pictures that no arm drew.
"""

from __future__ import annotations

from fewstep.benchmark.run import BenchmarkResult, benchmark

__all__ = ["BenchmarkResult", "benchmark"]
