"""The loop that every stage of `fewstep pretrain` shares: AdamW, EMA, and a state that resumes exactly.

Batches are a function of (seed, step), so a stage that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fewstep.reporting import Reporter

BETAS = (0.9, 0.99)


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
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
        rows.append(order[max(0, start - epoch * count) : start + batch_size - epoch * count])
    return torch.cat(rows)


class _State:
    """Module, its EMA and AdamW moments, as one safetensors file and a step count."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        self.module, self.optimizer = module, optimizer
        self.ema = {name: value.detach().clone() for name, value in module.state_dict().items()}
        self.file = folder / "state.safetensors"
        self.named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]

    def load(self) -> int:
        """Restore what was saved; returns the step to go on with (0 when nothing was saved)."""
        if not self.file.exists():
            return 0
        tensors = load_file(self.file)
        self.module.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model/")})
        self.ema = {k[4:]: v for k, v in tensors.items() if k.startswith("ema/")}
        step = int(tensors["step"])
        for name, parameter in self.named:
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"m/{name}"],
                "exp_avg_sq": tensors[f"v/{name}"],
            }
        return step

    def save(self, step: int) -> None:
        tensors = {f"model/{k}": v for k, v in self.module.state_dict().items()}
        tensors |= {f"ema/{k}": v for k, v in self.ema.items()}
        for name, parameter in self.named:
            moments = self.optimizer.state[parameter]
            tensors |= {f"m/{name}": moments["exp_avg"], f"v/{name}": moments["exp_avg_sq"]}
        tensors["step"] = torch.tensor(step)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial)
        partial.replace(self.file)

    @torch.no_grad()
    def update_ema(self, weight: float) -> None:
        """Move the average of what is trained towards it; all else never changes."""
        averages, current = [self.ema[name] for name, _ in self.named], [p.detach() for _, p in self.named]
        get_ema_multi_avg_fn(weight)(averages, current, None)


def averaged(folder: Path) -> dict[str, Tensor]:
    """The EMA weights of what was trained in `folder`.

    Raises:
        FileNotFoundError: nothing was.
    """
    file = folder / "state.safetensors"
    if not file.exists():
        raise FileNotFoundError(f"{file} is not there; run --stage {folder.name} first")
    return {name[4:]: value for name, value in load_file(file).items() if name.startswith("ema/")}


Loss = Callable[[int, int], dict[str, Tensor]]
"""From a step and a part of its batch (0 where it is whole) to named scalar losses; the one named "loss" is trained."""


class _Parts:
    """Computes the parts of a batch side by side; gradients and losses are their means, summed in a fixed order."""

    def __init__(self, module: nn.Module, loss: Loss, parts: int, cleanup: ExitStack) -> None:
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.loss, self.parts = loss, parts
        if parts > 1:
            cleanup.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
            self.threads = cleanup.enter_context(ThreadPoolExecutor(parts))

    def backward(self, step: int) -> dict[str, Tensor]:
        """Leave the gradient of a step in the parameters and return its losses."""
        if self.parts == 1:
            losses = self.loss(step, 0)
            losses["loss"].backward()
            return {name: value.detach() for name, value in losses.items()}
        computed = list(self.threads.map(lambda part: self._one(step, part), range(self.parts)))
        for parameter, gradients in zip(self.parameters, zip(*(one for one, _ in computed), strict=True), strict=True):
            parameter.grad = sum(gradients[1:], start=gradients[0]).div_(self.parts)
        return {name: torch.stack([losses[name] for _, losses in computed]).mean() for name in computed[0][1]}

    def _one(self, step: int, part: int) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        losses = self.loss(step, part)
        gradients = torch.autograd.grad(losses["loss"], self.parameters)  # .backward() would race for .grad
        return gradients, {name: value.detach() for name, value in losses.items()}


def run(
    module: nn.Module,
    loss: Loss,
    plan: Plan,
    folder: Path,
    reporter: Reporter,
) -> nn.Module:
    """Train `module` until `plan.steps`, going on from what `folder` holds; returns it with the EMA weights, frozen.

    Args:
        loss: see `Loss`; a batch is a function of its step, a part the same share of it every time.
        folder: keeps `state.safetensors` and `curve.jsonl` (step and mean losses at each save).
    """
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay, betas=BETAS, fused=True
    )
    state = _State(module, optimizer, folder)
    first = state.load()
    module.train()
    saved_at = time.monotonic()
    sums: dict[str, float] = {}
    since = first
    with ExitStack() as cleanup:
        parts = _Parts(module, loss, plan.parts, cleanup)
        bar = cleanup.enter_context(reporter.progress(folder.name, plan.steps - first))
        for step in range(first, plan.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(plan, step)
            losses = parts.backward(step)
            norm = nn.utils.clip_grad_norm_(module.parameters(), plan.max_grad_norm)
            if not math.isfinite(norm):
                raise ArithmeticError(f"the gradient is not finite at step {step} of {folder.name}")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.update_ema(ema_weight(plan, step))
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + float(value)
            done = step + 1
            bar.advance(1, loss=float(losses["loss"]))
            if time.monotonic() - saved_at > plan.save_seconds or done == plan.steps:
                state.save(done)
                with (folder / "curve.jsonl").open("a") as file:
                    file.write(json.dumps({"step": done} | {k: v / (done - since) for k, v in sums.items()}) + "\n")
                sums, since, saved_at = {}, done, time.monotonic()
    module.load_state_dict(state.ema)
    return module.eval().requires_grad_(False)
