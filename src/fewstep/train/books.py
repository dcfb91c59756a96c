"""What a run's counts, averages and losses hold of an update: entered when it is known whether the update moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate.utils import gather_object

from fewstep import checkpoint
from fewstep.ema import EMA
from fewstep.errors import InputError
from fewstep.telemetry import LossByTimestep
from fewstep.train.progress import Progress
from fewstep.train.rollouts import Lesson
from fewstep.train.update import Made

MOST_SKIPPED = 8
"""Updates in a row without a finite gradient, after which the run ends."""


class Books:
    """Holds the newest update open, so that the next one's lessons can be queued before anybody waits for it.

    Args:
        ema, losses, progress: what updates are entered in.
        warn: told of an update that is skipped, in one line.
        run_dir: of the run, whose last checkpoint is named where it ends.
    """

    def __init__(
        self, ema: EMA, losses: LossByTimestep, progress: Progress, warn: Callable[[str], None], run_dir: Path
    ) -> None:
        self._ema, self._losses, self._progress, self._warn, self._run_dir = ema, losses, progress, warn, run_dir
        self._open: tuple[int, Made, Sequence[Lesson]] | None = None

    def open(self, step: int, made: Made, taught: Sequence[Lesson]) -> None:
        """Note update `step`, counted from 1, made from the lessons `taught`; the one before has to be closed."""
        assert self._open is None
        self._open = (step, made, taught)

    def close(self) -> None:
        """Enter the update that is open, if one is: before the next one, and before anything is looked at or saved.

        It moved the weights, or its gradient was not finite and it is left out; the data goes on all the same.

        Raises:
            InputError: so many in a row were left out that training does not converge.
        """
        if self._open is None:
            return
        (step, made, taught), self._open = self._open, None
        moved = bool(made.moved)
        if moved:
            self._ema.update(step)
            for t, values in made.losses:
                self._losses.add(t, values)
        self._progress.count(moved=moved)
        if not moved:
            self._warn(_skipped(step, taught, self._progress.skipped_in_a_row))
        if self._progress.skipped_in_a_row == MOST_SKIPPED:
            raise _not_finite(step, checkpoint.checkpoints(self._run_dir))


def _skipped(step: int, taught: Sequence[Lesson], in_a_row: int) -> str:
    items = " ".join(map(str, gather_object([item for lesson in taught for item in lesson.items])))
    return (
        f"update {step} is skipped: its gradient is not finite; {in_a_row} in a row, {MOST_SKIPPED} end the run; it was"
        f" made from items {items}"
    )


def _not_finite(step: int, saved: Sequence[Path]) -> InputError:
    way = f"; the last checkpoint is {saved[0]}" if saved else ""
    return InputError(
        f"the loss or its gradient is not finite at step {step}, nor before; allowed is training that converges; lower "
        f"--learning_rate, or use --mixed_precision bf16 or no{way}"
    )
