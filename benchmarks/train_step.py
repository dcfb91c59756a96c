"""One update of K-step distillation: the naive form against ours, paired in one run, each gain switched on in turn.

    python benchmarks/train_step.py --base scenes --batch_size 8 --k 8
    python benchmarks/train_step.py --base sd15 --device cuda --mixed_precision bf16 --repeats 3 --channels_last
    python benchmarks/train_step.py --base sd15 --device cuda --mixed_precision bf16 --compile --only cached compiled

The naive form is what one writes first: a second UNet for the teacher, one sample at a time through it, guidance in two
forwards, VAE, caption and empty caption encoded for every sample. All forms that learn the same are first shown to give
the same loss and the same gradients (in fp32 held to it, else printed), then timed in alternation; the table gives
medians, and ratios to the naive form of the same repeat. Stable Diffusion 1.5's size has random weights, which take as
long as any. Peak memory is the whole process's, with the networks of all forms in it: benchmarks/memory.py has a
training's own.

The teacher's rollouts are also timed alone, with latents and embeddings at hand. Their arithmetic, and that of the
floor, is what a forward of one sample counts, times the forwards: matrix products, convolutions and attention, two
operations a multiply-add, nothing elementwise.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from fewstep import lora
from fewstep.arithmetic import flops, peak_memory
from fewstep.backbone import Backbone, adapters_off, load_backbone, random_backbone
from fewstep.backbone.compiled import Compiled
from fewstep.backbone.threads import whole_batches
from fewstep.data import Batch, Slices
from fewstep.data.loader import to_pixels
from fewstep.methods.kstep import Draws, KStep
from fewstep.solver import ddim_step
from fewstep.timesteps import rollout_grid
from fewstep.timing import machine, matrix_rate, measure, synchronise
from fewstep.train.encoding import Cached, Encoder, Fresh
from fewstep.train.rollouts import Lesson, RolloutStore, Teacher, kept_lessons

TOLERANCE = 1e-3
"""Largest difference of a gradient, over the gradients' largest value; and of the loss, over itself."""

AS_IT_IS = "UNet as it is"


@dataclass(frozen=True)
class Job:
    """What all forms work on."""

    backbone: Backbone
    method: KStep
    batch: Batch
    parameters: list[nn.Parameter]
    second_unet: nn.Module

    @property
    def draws(self) -> Draws:
        return self.method.draw(0, 0, self.batch.positions, self.backbone.latent_shape(self.batch.pictures.shape[1]))


Form = Callable[[Job], "Tensor | None"]


def naive(job: Job) -> Tensor:
    """One sample at a time, everything computed where it is needed; the loss, as all forms but the last return it."""
    total = torch.zeros((), device=job.backbone.device)
    backbone, method, draws = job.backbone, job.method, job.draws
    schedule, device = backbone.schedule, backbone.device
    for row, caption in enumerate(job.batch.captions):
        with torch.no_grad(), backbone.autocast():
            x0 = backbone.encode(to_pixels(job.batch.pictures[row : row + 1].to(device)))
            cond, uncond = backbone.embed([caption]), backbone.embed([""])
            own = Draws(**{name: part[row : row + 1] for name, part in vars(draws).items()})
            x_t = x = method.start(x0, own)
            for t, t_next in pairwise(rollout_grid(int(own.t), method.num_ddim_steps, method.points)):
                at, to = torch.tensor([t], device=device), torch.tensor([t_next], device=device)
                u, c = (job.second_unet(x, at, text).sample.float() for text in (uncond, cond))
                x = ddim_step(schedule, u + method.guidance * (c - u), x, at, to)
        loss = method.loss(backbone.denoiser(), x_t, own.t, cond, x)
        part = loss.sum() / len(job.batch.captions)
        part.backward()
        total += part.detach()
    return total


def learn(job: Job, lesson: Lesson) -> Tensor:
    """The student's part of an update."""
    mean, _ = lesson.loss(job.method, job.backbone.denoiser())
    mean.backward()
    return mean.detach()


def ours(job: Job, *, parts: bool = True, pairs: int = 1, encoder: Encoder | None = None) -> Tensor:
    """The whole batch at once, in one UNet; with `parts`, on the CPU, a part of it a thread."""
    method = replace(job.method, pairs_per_rollout=pairs)
    shape = job.backbone.latent_shape(job.batch.pictures.shape[1])
    teacher = Teacher(job.backbone, encoder or Fresh(job.backbone), method, 0, shape)
    with nullcontext() if parts else whole_batches():
        return learn(replace(job, method=method), teacher(job.batch))


def gradients(job: Job, form: Form) -> tuple[Tensor | None, Tensor]:
    """The loss, where the form returns it, and all gradients."""
    for parameter in job.parameters:
        parameter.grad = None
    loss = form(job)
    return loss, torch.cat([parameter.grad.flatten() for parameter in job.parameters if parameter.grad is not None])


def check(job: Job, reference: Form, forms: dict[str, Form], jobs: dict[str, Job]) -> None:
    """All forms give the reference's gradients; `jobs` has those of forms that work on another base."""
    loss, wanted = gradients(job, reference)
    for name, form in forms.items():
        own, found = gradients(jobs.get(name, job), form)
        error = float((found - wanted).abs().max() / wanted.abs().max())
        print(f"gradients of {name!r}: largest difference {error:.1e} of the largest gradient", end="")
        apart = float(abs(own - loss) / loss) if own is not None and loss is not None else 0.0
        print(f"; loss: {apart:.1e} of itself")
        if job.backbone.dtype == torch.float32 and max(error, apart) > TOLERANCE:
            raise SystemExit(f"error: {name!r} does not compute what the first form does")


def open_base(base: str, device: str, mixed_precision: str) -> Backbone:
    """The base; Stable Diffusion 1.5's size with weights drawn on the device itself, which a GPU does in no time."""
    if base != "sd15":
        return load_backbone(base, device=device, dtype=mixed_precision)
    backbone, place = random_backbone("sd15", device="meta", dtype=mixed_precision), torch.device(device)
    for network in (backbone.unet, backbone.vae, backbone.text_encoder):
        for module in network.to_empty(device=place).modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    for positions in backbone.text_encoder.buffers():  # the only one there is
        positions.copy_(torch.arange(positions.shape[-1]))
    return replace(backbone, device=place, schedule=backbone.schedule.to(place))


def seconds_of_forward(backbone: Backbone, shape: tuple[int, int, int], count: int, repeats: int) -> float:
    """One forward of a guided rollout of `count` samples: the network's own time, without the solver's around it."""
    x_t, device = torch.randn(2 * count, *shape, device=backbone.device), backbone.device
    t, cond = torch.full((len(x_t),), 500, device=device), backbone.embed([""]).expand(len(x_t), -1, -1)
    teacher = backbone.denoiser(adapter=False)
    with torch.no_grad(), adapters_off(backbone.unet):
        return measure(lambda: teacher(x_t, t, cond), repeats=repeats, device=device).median


def copy_of(backbone: Backbone) -> Backbone:
    """The same base around a UNet of its own."""
    return replace(backbone, unet=copy.deepcopy(backbone.unet))


def attached(backbone: Backbone) -> list[nn.Parameter]:
    """A student that has learnt something at random, on every base the same: B is zero at first, and so would be half
    of the gradients."""
    parameters = lora.attach(backbone.unet, 4, 32, ["to_q", "to_k", "to_v", "to_out.0"], 0)
    random = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.data.add_(0.01 * torch.randn(parameter.shape, generator=random).to(parameter.device))
    return parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=["scenes", "sd15"], default="scenes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mixed_precision", default="no")
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--channels_last", action="store_true", help="also the UNet in channels-last")
    parser.add_argument("--compile", action="store_true", help="also the UNet compiled, which takes minutes at first")
    parser.add_argument("--epochs", type=int, default=4, help="how often kept rollouts are learnt from")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="parts of the names of forms to run; ratios are to the first that runs"
    )
    args = parser.parse_args()

    backbone = open_base(args.base, args.device, args.mixed_precision)
    side = args.resolution or backbone.resolution
    method = KStep(
        schedule=backbone.schedule,
        step_counts=(1, 2, 4, 8),
        num_ddim_steps=args.k,
        guidance=backbone.guidance_scale,
    )
    second = copy.deepcopy(backbone.unet)
    bases = {"": backbone}
    if args.channels_last:
        bases["+ channels-last"] = copy_of(backbone)
        bases["+ channels-last"].unet.to(memory_format=torch.channels_last)
    if args.compile:
        copied = copy_of(backbone)
        bases["+ compiled"] = replace(copied, compiled=Compiled(copied.unet, args.batch_size))
    # The cache takes networks off the device that have no more to do: others than those of the forms without it.
    apart = replace(backbone, vae=copy.deepcopy(backbone.vae), text_encoder=copy.deepcopy(backbone.text_encoder))
    students = {name: attached(base) for name, base in bases.items()}
    parameters, random = students[""], torch.Generator().manual_seed(0)
    count = args.batch_size
    batch = Batch(
        update=0,
        micro=0,
        positions=tuple(range(count)),
        items=tuple(range(count)),
        pictures=torch.randint(256, (count, side, side, 3), generator=random, dtype=torch.uint8),
        captions=tuple(f"a picture of {number} things" for number in range(count)),
        replaced=(),
    )
    job = Job(backbone, method, batch, parameters, second)

    with TemporaryDirectory() as folder:
        store = RolloutStore(Path(folder), {})
        cache = Cached(Path(folder, "cache"), apart, {})
        shape = backbone.latent_shape(side)
        Teacher(backbone, cache, method, 0, shape).prepare(batch)
        cache.flush()

        # A rollout of the teacher, and one of its K forwards, of 2 · B samples: seconds.
        alone: dict[str, tuple[float, float]] = {}
        for name, base in bases.items():
            teacher = Teacher(base, cache, method, 0, shape)
            rollout = measure(partial(teacher, batch), repeats=args.repeats, device=backbone.device).median
            alone[name] = rollout, seconds_of_forward(base, shape, count, args.repeats)
            print(f"{name or AS_IT_IS}: rollout alone {1000 * rollout:,.0f} ms", flush=True)

        def kept(job: Job) -> None:
            """One rollout, then as many updates on it as there are epochs: read back from disk each time."""
            store.put(0, Teacher(backbone, Fresh(backbone), method, 0, shape)(batch))
            store.refresh()
            slices = Slices(batch_size=count)
            for _ in range(args.epochs):
                for lesson in kept_lessons(store, slices, count=count, seed=0, start=0, end=1):
                    learn(job, lesson.on(backbone.device))

        # Form, samples an update, pairs an update.
        reused = replace(method, pairs_per_rollout=4)
        lesson = Teacher(backbone, Fresh(backbone), reused, 0, shape)(batch)
        forms: dict[str, tuple[Form, int, int]] = {
            "naive": (naive, count, count),
            "whole batch, one UNet": (lambda job: ours(job, parts=False), count, count),
            **({"+ a part a thread (CPU)": (ours, count, count)} if backbone.device.type == "cpu" else {}),
            "+ latents and embeddings cached": (lambda job: ours(job, encoder=cache), count, count),
            "+ up to 4 pairs a rollout": (lambda job: ours(job, pairs=4, encoder=cache), count, len(lesson.pairs.t)),
            **{name: (lambda one: ours(one, encoder=cache), count, count) for name in list(bases)[1:]},
            f"or rollouts kept for {args.epochs} epochs": (kept, count * args.epochs, count * args.epochs),
        }
        forms = {name: form for name, form in forms.items() if any(word in name for word in args.only)}
        first = next(iter(forms))
        same = ("whole batch, one UNet", "+ a part a thread (CPU)", "+ latents and embeddings cached", *list(bases)[1:])
        jobs = {name: replace(job, backbone=bases[name], parameters=students[name]) for name in list(bases)[1:]}
        own = {name: forms[name][0] for name in same if name in forms and name != first}
        check(jobs.get(first, job), forms[first][0], own, jobs)

        seconds: dict[str, list[float]] = {name: [] for name in forms}
        memory: dict[str, int | None] = {}
        for name, (form, _, _) in list(forms.items()):  # and each is warmed up
            try:
                memory[name] = peak_memory(partial(gradients, jobs.get(name, job), form), backbone.device)
            except torch.OutOfMemoryError:
                print(f"left out: {name!r} does not fit into the memory of {backbone.device}", flush=True)
                del forms[name]
        for _ in range(args.repeats):
            for name, (form, _, _) in forms.items():
                synchronise(backbone.device)
                started = time.perf_counter()
                gradients(jobs.get(name, job), form)
                synchronise(backbone.device)
                seconds[name].append(time.perf_counter() - started)

    one = torch.zeros(1, *shape, device=backbone.device), torch.tensor([999], device=backbone.device)
    cond = backbone.embed([""])
    forward = flops(lambda: backbone.denoiser(adapter=False)(*one, cond))
    rate = matrix_rate(backbone.device, backbone.dtype)
    # The student's gradient passes through frozen weights, and costs as much as its forward.
    floor = forward * count * (2 * args.k + 2) / rate
    facts = machine(backbone.device, str(backbone.dtype).removeprefix("torch."))
    print(
        f"\n{args.base}, K = {args.k}, batch {count}, {side} pixels; {facts['device']}, {facts['precision']}, ", end=""
    )
    print(f"{facts['threads']} threads, torch {torch.__version__}; medians of {args.repeats}")
    print(f"matrix rate {rate / 1e9:,.0f} GFLOP/s; one forward {forward / 1e9:.3f} GFLOP\n")
    print(f"| form | samples/s | × {first} | pairs/s | × {first} | peak memory | share of the floor |")
    print("|---|---|---|---|---|---|---|")
    for name, (_, samples, pairs) in forms.items():
        ratios = [theirs / mine for theirs, mine in zip(seconds[first], seconds[name], strict=True)]
        ratio, median = statistics.median(ratios), statistics.median(seconds[name])
        peak = memory[name]
        share = f"{100 * floor / median:.0f} %" if (samples, pairs) == (count, count) else ""
        print(
            f"| {name} | {samples / median:.2f} | {ratio * samples / count:.1f} | {pairs / median:.2f} | "
            f"{ratio * pairs / count:.1f} | {'' if peak is None else f'{peak / 1e6:,.0f} MB'} | {share} |"
        )
    print("\n| alone, latents and embeddings cached | rollout, ms | share of the matrix rate | a forward, ms | share |")
    print("|---|---|---|---|---|")
    for name, (rollout, single) in alone.items():
        guided = forward * count * 2 / rate
        print(f"| {name or AS_IT_IS} | {1000 * rollout:,.1f} | {100 * guided * args.k / rollout:.0f} % ", end="")
        print(f"| {1000 * single:,.1f} | {100 * guided / single:.0f} % |")


if __name__ == "__main__":
    main()
