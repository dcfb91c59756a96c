"""What a run leaves in its folder: adapters that are proved to load, checkpoints to go on from, and the best so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import nn

from fewstep import checkpoint, lora
from fewstep.backbone import Backbone
from fewstep.config import TrainSettings, settings_toml
from fewstep.ema import EMA
from fewstep.errors import CheckpointError, first_line, is_out_of_memory
from fewstep.methods.kstep import KStep
from fewstep.opening import versions
from fewstep.previews import Previews
from fewstep.telemetry import Telemetry
from fewstep.train import start
from fewstep.train.encoding import Encoder
from fewstep.train.progress import Progress
from fewstep.validation import FIGURE, MEASURE, Validation


class Keeper:
    """Saves the student as it is to be sampled with, and all else of the run with it where it is to go on from there.

    Args:
        identity: what a checkpoint has to share with the run that goes on from it, besides the settings.
        encoder: its cache is written out before a save, so that what a resumed run finds is what this one had.
        main: whether this process writes; the others only hand over their part.
    """

    def __init__(
        self,
        settings: TrainSettings,
        backbone: Backbone,
        method: KStep,
        parameters: Sequence[nn.Parameter],
        ema: EMA,
        encoder: Encoder,
        progress: Progress,
        *,
        identity: Mapping[str, str | int],
        main: bool,
    ) -> None:
        self._settings, self._backbone, self._method, self._ema = settings, backbone, method, ema
        self._encoder, self._progress, self._main = encoder, progress, main
        self._adapter_bytes = sum(parameter.nbytes for parameter in parameters)
        self._more = dict(identity) | {"rank": settings.lora_rank, "alpha": settings.alpha, "versions": versions()}

    def save(
        self,
        name: str,
        step: int,
        state: Mapping[str, checkpoint.Stateful] | None = None,
        more: Mapping[str, str | float] | None = None,
    ) -> Path:
        """Write `lora/NAME` and read it back through the stock loader; called by all processes where there is a state.

        Args:
            step: updates made so far.
            state: what the run goes on from; None for an adapter alone.
            more: noted in the record.

        Raises:
            CheckpointError: the adapter does not read back as it was.
        """
        settings = self._settings
        self._encoder.flush()
        if state is not None:
            self._progress.gather()
        folder = settings.run_dir / "lora" / name
        if self._main:
            record = checkpoint.Record(
                step=step,
                base_model=self._backbone.name,
                base_fingerprint=self._backbone.fingerprint,
                step_counts=tuple(settings.num_inference_steps),
                revision=self._backbone.revision,
                more=self._more | dict(more or {}),
            )
            checkpoint.save(
                folder,
                self._publish,
                settings=settings_toml(settings, public=True),
                record=record,
                stateful=state,
                adapter_bytes=self._adapter_bytes,
            )
            checkpoint.prune(settings.run_dir, keep_last=settings.keep_last, keep_every=settings.keep_every)
        return folder

    def _publish(self, folder: Path) -> None:
        """Write the adapter as it is to be sampled with, and prove that a stock pipeline gets the same one."""
        unet, method = self._backbone.unet, self._method
        with self._ema.applied():
            lora.save_adapter(
                unet, folder, self._backbone.scheduler_config, method.sampler, method.span, method.step_counts
            )
            lora.prove_round_trip(self._backbone, folder)


class Looks:
    """Looks at the student now and then: a grid of previews, figures, and `lora/best` where they are the best so far.

    Args:
        previews, validation: None where they are not wanted, or in another process than the first.
    """

    def __init__(
        self,
        settings: TrainSettings,
        backbone: Backbone,
        ema: EMA,
        keeper: Keeper,
        telemetry: Telemetry,
        *,
        previews: Previews | None,
        validation: Validation | None,
        warn: Callable[[str], None],
    ) -> None:
        self._settings, self._ema, self._keeper, self._telemetry = settings, ema, keeper, telemetry
        self._backbone = backbone
        self._previews, self._validation, self._warn = previews, validation, warn
        self._best = settings.run_dir / "lora" / checkpoint.BEST

    def take(self, step: int) -> None:
        """Draw previews, take the figures, and keep the adapter if it is the best so far.

        What cannot be drawn is warned of, and the run goes on.
        """
        figures: dict[str, float] = {}
        try:
            with self._ema.applied():
                if self._previews is not None:
                    self._previews.save(start.preview_file(step, self._settings))
                if self._validation is not None:
                    figures = self._validation.figures()
        except Exception as error:
            # No reason to lose what has been learnt: pictures that are no numbers, no memory for them, no room on disk.
            if not (isinstance(error, CheckpointError | OSError) or is_out_of_memory(error)):
                raise
            why = "out of memory" if is_out_of_memory(error) else first_line(error)
            self._warn(f"step {step}: the student was not looked at: {why}")
        if self._validation is not None and figures:
            if self._validation.prefers(figures, checkpoint.recorded(self._best)):
                self._keeper.save(checkpoint.BEST, step, more={MEASURE: self._validation.measure, **figures})
            self._telemetry.record(step, figures)
        self.rest()

    def rest(self) -> None:
        """Take the networks that updates have no use for off the device until the student is looked at again."""
        for network in start.idle_in_training(self._settings, self._backbone):
            self._backbone.rest(network)

    def due(self, step: int) -> bool:
        """Whether to look after update `step`."""
        return start.validates_at(step, self._settings)

    def left_undone(self, step: int) -> bool:
        """Whether a run that goes on from `step` was stopped there before the student was looked at."""
        return start.left_undone(step, self._settings, self._telemetry.history, self._validation is not None)

    def best(self, step: int, say: Callable[[str], None]) -> Path | None:
        """The folder of the best student, None where nothing was measured; said if it is not that of `step`."""
        found = checkpoint.recorded(self._best)
        if found is not None and self._validation is not None and found.step < step:
            say(
                f"best: {self._best}, of step {found.step}, whose {FIGURE} was {found.more[FIGURE]:.4g}; training "
                "longer did not raise it"
            )
        return None if found is None else self._best
