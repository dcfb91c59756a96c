"""Distillation: `distill` takes settings and leaves an adapter that a stock pipeline draws with in a few steps.

`loop` is the procedure from the first line to the last; `start` is what it settles before the first update.
"""

from __future__ import annotations

from fewstep.train.loop import DistillResult, distill, learning_rate

__all__ = ["DistillResult", "distill", "learning_rate"]
