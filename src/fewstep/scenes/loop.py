"""The loop that every stage of `fewstep pretrain` shares: AdamW, EMA, and a state that resumes exactly.

Batches are a function of (seed, step), so a stage that was stopped goes on as if it had not been. On a GPU worker
processes make them ahead.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from fewstep.errors import InputError
from fewstep.files import read_whole, write_tensors_atomic
from fewstep.reporting import Reporter
from fewstep.signals import leave_to_the_main_process

WORKERS, AHEAD = 8, 4
LOOKED_AT = 20
"""Of this many steps on a GPU one is waited for, to see its loss and whether it is finite."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how fast a stage trains.

    With several `parts` the batch is cut into that many, each computed on one thread of its own: for a small network
    that keeps two cores busier than two threads inside every operation do.
    """

    steps: int
    batch_size: int
    parts: int = 1
    learning_rate: float
    warmup: int = 100
    beta2: float = 0.99  # of AdamW; its beta1 is 0.9
    ema_decay: float = 0.999
    weight_decay: float = 0.01
    save_seconds: float = 120.0
    max_grad_norm: float = 1.0


def learning_rate(plan: Plan, step: int) -> float:
    """Linear warm-up, then a half cosine down to 1 % at the last step."""
    warm = min(1.0, (step + 1) / plan.warmup)
    return plan.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / plan.steps)))


def ema_weight(plan: Plan, step: int) -> float:
    """EMA decay that grows with the step, so that early weights are forgotten: min(decay, (1+s)/(10+s))."""
    return min(plan.ema_decay, (1 + step) / (10 + step))


def batch_indices(seed: int, step: int, batch_size: int, count: int) -> Tensor:
    """Indices [batch_size] into `count` items: a fresh permutation an epoch, all from (seed, epoch)."""
    start = step * batch_size
    rows = []
    for epoch in range(start // count, (start + batch_size - 1) // count + 1):
        order = torch.randperm(count, generator=torch.Generator().manual_seed((seed * 100_003 + epoch) % 2**63))
        rows.append(order[max(0, start - epoch * count) : start + batch_size - epoch * count])
    return torch.cat(rows)


class _State:
    """Module, its EMA and AdamW moments, as one safetensors file and a step count."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, batch_size: int) -> None:
        self.module, self.optimizer, self.batch_size = module, optimizer, batch_size
        self.ema = {name: value.detach().clone() for name, value in module.state_dict().items()}
        self.file = folder / "state.safetensors"
        self.named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]

    def load(self) -> int:
        """Restore what was saved; returns the step to go on with (0 when nothing was saved)."""
        if not self.file.exists():
            return 0
        with read_whole(self.file, _start_again(self.file)):
            return self._restore(load_file(self.file))

    def require_batches_alike(self) -> None:
        """Refuse to go on in batches of another size, as another device takes: the steps would not be the same."""
        if not self.file.exists():
            return
        with read_whole(self.file, _start_again(self.file)), safe_open(self.file, "pt") as saved:
            before = int(saved.get_tensor("batch_size")) if "batch_size" in saved.keys() else self.batch_size  # noqa: SIM118
        if before != self.batch_size:
            raise InputError(
                f"batches of {self.batch_size} came, {str(self.file)!r} was trained in batches of {before}, as on "
                "another kind of device; allowed is the same; go on with the --device that it was begun on, or "
                f"{_start_again(self.file)}"
            )

    def _restore(self, tensors: dict[str, Tensor]) -> int:
        self.module.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model/")})
        self.ema = {name: tensors[f"ema/{name}"].to(value.device) for name, value in self.ema.items()}
        step = int(tensors["step"])
        for name, parameter in self.named:
            device = parameter.device
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=device),
                "exp_avg": tensors[f"m/{name}"].to(device),
                "exp_avg_sq": tensors[f"v/{name}"].to(device),
            }
        return step

    def save(self, step: int) -> None:
        tensors = {f"model/{k}": v for k, v in self.module.state_dict().items()}
        tensors |= {f"ema/{k}": v for k, v in self.ema.items()}
        for name, parameter in self.named:
            moments = self.optimizer.state[parameter]
            tensors |= {f"m/{name}": moments["exp_avg"], f"v/{name}": moments["exp_avg_sq"]}
        tensors["step"] = torch.tensor(step)
        tensors["batch_size"] = torch.tensor(self.batch_size)
        write_tensors_atomic(self.file, tensors)

    @torch.no_grad()
    def update_ema(self, weight: float) -> None:
        """Move the average of what is trained towards it; all else never changes."""
        averages, current = [self.ema[name] for name, _ in self.named], [p.detach() for _, p in self.named]
        get_ema_multi_avg_fn(weight)(averages, current, None)


def steps_done(folder: Path) -> int:
    """How many steps what is trained in `folder` has behind it, as far as they are saved."""
    file = folder / "state.safetensors"
    if not file.exists():
        return 0
    with read_whole(file, _start_again(file)), safe_open(file, "pt") as saved:
        return int(saved.get_tensor("step"))


def averaged(folder: Path, steps: int) -> dict[str, Tensor]:
    """The EMA weights of what was trained in `folder` for `steps`.

    Raises:
        InputError: nothing was, or not to the end.
    """
    file = folder / "state.safetensors"
    with read_whole(file, _start_again(file)):
        found = load_file(file) if file.exists() else {}
    if not found or int(found["step"]) < steps:
        what = "is not trained to its end" if found else "is not there"
        raise InputError(f"{str(file)!r} {what}: the stage {folder.name} does that; run --stage {folder.name} first")
    return {name[4:]: value for name, value in found.items() if name.startswith("ema/")}


def _start_again(file: Path) -> str:
    return f"remove it, and the stage trains {file.parent.name} from its start"


Make = Callable[[int, int], tuple[Any, ...]]
"""From a step and a part of its batch (0 where it is whole) to what the loss takes, on the CPU."""

Loss = Callable[..., dict[str, Tensor]]
"""From what `Make` gives to named scalar losses; the one named "loss" is trained."""


class _Steps(Dataset[tuple[Any, ...]]):
    """Whole batches by their steps."""

    def __init__(self, make: Make) -> None:
        self.make = make

    def __getitem__(self, step: int) -> tuple[Any, ...]:
        return self.make(step, 0)


def made_ahead(make: Make, steps: range) -> Iterator[tuple[Any, ...]]:
    """The batches of `steps` in order, made by worker processes while others are trained on."""
    loader = DataLoader(
        _Steps(make),
        batch_size=None,
        sampler=steps,
        num_workers=max(1, min(WORKERS, (os.cpu_count() or 1) - 1)),
        prefetch_factor=AHEAD,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=leave_to_the_main_process,
        multiprocessing_context="fork",  # `make` holds the stage's drawings: too many to send
    )
    yield from loader


class _Gradients:
    """Gradients of one step after the other.

    The parts of a batch are computed side by side; gradients and losses are their means, summed in a fixed order.
    """

    def __init__(
        self, module: nn.Module, make: Make, loss: Loss, steps: range, parts: int, device: torch.device, end: ExitStack
    ) -> None:
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.make, self.loss, self.parts = make, loss, parts
        if parts == 1:
            whole = made_ahead(make, steps) if device.type == "cuda" else (make(step, 0) for step in steps)
            self.batches = (send_to_device(batch, device, non_blocking=True) for batch in whole)
        else:
            end.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
            self.threads = end.enter_context(ThreadPoolExecutor(parts))

    def backward(self, step: int) -> dict[str, Tensor]:
        """Leave the gradient of a step in the parameters and return its losses."""
        if self.parts == 1:
            losses = self.loss(*next(self.batches))
            losses["loss"].backward()
            return {name: value.detach() for name, value in losses.items()}
        computed = list(self.threads.map(lambda part: self._one(step, part), range(self.parts)))
        for parameter, gradients in zip(self.parameters, zip(*(one for one, _ in computed), strict=True), strict=True):
            parameter.grad = sum(gradients[1:], start=gradients[0]).div_(self.parts)
        return {name: torch.stack([losses[name] for _, losses in computed]).mean() for name in computed[0][1]}

    def _one(self, step: int, part: int) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        losses = self.loss(*self.make(step, part))
        gradients = torch.autograd.grad(losses["loss"], self.parameters)  # .backward() would race for .grad
        return gradients, {name: value.detach() for name, value in losses.items()}


def run(
    module: nn.Module,
    make: Make,
    loss: Loss,
    plan: Plan,
    folder: Path,
    reporter: Reporter,
    device: torch.device,
    until: int | None = None,
) -> nn.Module:
    """Train `module` on `device` until `plan.steps`, going on from what `folder` holds.

    Args:
        make: a batch is a function of its step, a part the same share of it every time.
        folder: keeps `state.safetensors` and `curve.jsonl` (step and mean losses at each save).
        device: parts side by side are for the CPU alone.
        until: the step to stop at, saved, if that is before `plan.steps`.

    Returns:
        The module with the EMA weights, frozen, on `device`.
    """
    module.to(device)
    optimizer = torch.optim.AdamW(
        module.parameters(),
        lr=plan.learning_rate,
        weight_decay=plan.weight_decay,
        betas=(0.9, plan.beta2),
        fused=True,
    )
    state = _State(module, optimizer, folder, plan.batch_size)
    if steps_done(folder) < (plan.steps if until is None else until):  # what is done is taken as it is
        state.require_batches_alike()
    first = state.load()
    module.train()
    saved_at = time.monotonic()
    sums: dict[str, Tensor] = {}
    since = told = first
    last = plan.steps if until is None else until
    with ExitStack() as end:
        gradients = _Gradients(module, make, loss, range(first, last), plan.parts, device, end)
        bar = end.enter_context(reporter.progress(folder.name, max(0, last - first)))
        for step in range(first, last):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(plan, step)
            losses = gradients.backward(step)
            norm = nn.utils.clip_grad_norm_(module.parameters(), plan.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.update_ema(ema_weight(plan, step))
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros((), device=device)) + value
            done = step + 1
            saves = time.monotonic() - saved_at > plan.save_seconds or done == last
            if saves or device.type == "cpu" or done % LOOKED_AT == 0:
                if not math.isfinite(norm):
                    raise ArithmeticError(f"the gradient is not finite at step {step} of {folder.name}")
                try:
                    bar.advance(done - told, loss=float(losses["loss"]))
                except KeyboardInterrupt:  # the next run goes on from here
                    _note_means(folder, done, sums, done - since)
                    state.save(done)
                    raise
                told = done
            if saves:
                _note_means(folder, done, sums, done - since)
                state.save(done)
                sums, since, saved_at = {}, done, time.monotonic()
    module.load_state_dict(state.ema)
    return module.eval().requires_grad_(False)


def _note_means(folder: Path, step: int, sums: dict[str, Tensor], count: int) -> None:
    """A line of the curve: losses as means over the `count` steps before `step`."""
    folder.mkdir(parents=True, exist_ok=True)
    means = {name: float(total) / count for name, total in sums.items()}
    with (folder / "curve.jsonl").open("a") as file:
        file.write(json.dumps({"step": step} | means) + "\n")
