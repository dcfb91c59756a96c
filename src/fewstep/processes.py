"""The processes that `torchrun` or `accelerate launch` started together, one or several, and the device of each."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import gather_object, parse_flag_from_env
from torch.distributed import DistError

from fewstep.errors import DataError, InputError, Interrupted, first_line
from fewstep.files import write_text_atomic

PATIENCE = timedelta(hours=2)
"""How long processes wait for the first one, which alone measures, draws previews and saves."""


def join_processes(device: str) -> PartialState:
    """The processes that were started together, one or several; a call after another in one process starts anew.

    Raises:
        InputError: there are more of them than GPUs here, or no GPU for several; one device is named for several, or
            accelerate was told to cut the model up.
    """
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise InputError(
                f"ACCELERATE_USE_{name} is set, as by a default of accelerate's; allowed are processes with the whole "
                "model each; start them with accelerate launch --multi_gpu, or with torchrun"
            )
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    on_cpu = device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if not on_cpu and here > gpus > 0:
        raise InputError(
            f"{here} processes came for {gpus} GPUs; allowed is one process a GPU; start {gpus} on this machine"
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    launched = "LOCAL_RANK" in os.environ and started > 1
    if launched and not on_cpu and not _shares_out_gpus():  # accelerate has each take itself for the only one
        raise InputError(
            f"{started} processes came, and torch finds no GPUs here that they could share out; allowed is a machine "
            "whose GPUs torch can use; look at `fewstep doctor`, or pass --device cpu"
        )
    try:
        processes = PartialState(cpu=on_cpu, timeout=PATIENCE)
    except (ImportError, NotImplementedError) as error:  # accelerate says what this machine lacks
        raise InputError(
            f"accelerate cannot use this machine's devices so ({first_line(error)}); allowed is what it asks for; do "
            "that, or pass --device cpu"
        ) from error
    if processes.num_processes > 1 and ":" in device:
        raise InputError(
            f"device {device!r} came with {processes.num_processes} processes, each of which takes one of its own; "
            "allowed are auto, cpu and cuda; leave --device out"
        )
    return processes


def _shares_out_gpus() -> bool:
    found = torch.accelerator.current_accelerator(check_available=True)
    return found is not None and found.type != "mps"


def own_device(device: str, processes: PartialState) -> str:
    """The device of this process: the one that is asked for, else the one that it was given among the others."""
    if processes.num_processes == 1 and device != "auto":
        return device
    return "cpu" if processes.device.type == "cpu" else str(processes.device)  # there they are numbered too: cpu:0


def require_agreement(facts: Mapping[str, str]) -> None:
    """Refuse to go on where the processes that were started together would not do the same; called by all of them.

    Args:
        facts: what must be the same in each, by a name for the error.

    Raises:
        InputError: in every process, naming the first difference.
    """
    everyones: list[dict[str, str]] = gather_object([dict(facts)])
    for name, first in everyones[0].items():
        for rank, one in enumerate(everyones):
            if one.get(name) != first:
                raise InputError(
                    f"{name} is {one.get(name)} in process {rank} and {first} in process 0; allowed is the same in all "
                    "of them; start them with the same command, on the same data and one output_dir that all see"
                )


def require_one_folder(folder: Path, name: str, processes: PartialState) -> None:
    """Refuse a folder that each process, or each machine, has of its own, before work goes into it; called by all.

    Args:
        name: what it is, for the error.

    Raises:
        InputError: as `require_agreement`.
    """
    if processes.num_processes == 1:
        return
    file = folder / ".seen-by-all"
    if processes.is_main_process:
        write_text_atomic(file, secrets.token_hex(8))
    processes.wait_for_everyone()
    require_agreement({f"{name} (by a mark in it)": file.read_text() if file.exists() else "another folder"})
    processes.wait_for_everyone()
    if processes.is_main_process:
        file.unlink(missing_ok=True)


@contextmanager
def noticing_losses(again: str = "go on with --resume_from_checkpoint auto") -> Iterator[None]:
    """Inside, what torch raises where another process has died is told as what it is.

    Args:
        again: how to go on, for the error's last words.

    Raises:
        Interrupted: it was one of those that were started together.
        DataError: it was one that loads data for this one.
    """
    try:
        yield
    except RuntimeError as error:
        reason = first_line(error)
        if isinstance(error, DistError) or "gloo" in reason:  # gloo's errors have no class of their own
            raise Interrupted(
                f"another process of this run has gone ({reason}); look at what it said last, then {again} in all of "
                "them"
            ) from error
        if reason.startswith("DataLoader worker"):
            raise DataError(
                f"a process that loads data was ended from outside ({reason}), as systems do that run out of memory; "
                f"make room in it, then {again}"
            ) from error
        raise
