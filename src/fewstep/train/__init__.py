"""Distillation: `distill` takes settings and leaves an adapter that a stock pipeline draws with in a few steps.

`loop` is the procedure from the first line to the last; `start` is what it settles before the first update, `lessons`
where updates learn from, `update` how one is made, `books` what a run counts of it, `answers` what the host asks of the
device without waiting, `keeping` what is left in the run's folder. `rehearse` takes the same settings and says what the
run would take.
"""

from __future__ import annotations

from fewstep.config import TrainCommand, TrainSettings
from fewstep.reporting import LOG, Reporter
from fewstep.train.dry_run import DryRun, rehearse
from fewstep.train.loop import DistillResult, distill
from fewstep.train.update import learning_rate

__all__ = ["DistillResult", "DryRun", "distill", "learning_rate", "rehearse", "train"]


def train(settings: TrainCommand, *, reporter: Reporter = LOG) -> DistillResult | DryRun:
    """What `fewstep train` runs: the training, or with `dry_run` its rehearsal."""
    run = TrainSettings(**{name: getattr(settings, name) for name in TrainSettings.model_fields})
    return (rehearse if settings.dry_run else distill)(run, reporter=reporter)
