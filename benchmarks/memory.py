"""What an update takes, seconds and memory at its peak, at Stable Diffusion 1.5's size, with random weights.

    python benchmarks/memory.py --device cuda --mixed_precision bf16 --batch_sizes 1 8
    python benchmarks/memory.py --base scenes --device cpu --batch_sizes 1 2

Whole updates as `fewstep train` makes them with its defaults: the teacher's rollout, the student's loss, backward, clip
and AdamW; with and without gradient checkpointing, with VAE and text encoder on the device, or off it as `--cache_dir`
leaves them once latents and embeddings are kept. Every sample starts from a picture, which has to be encoded first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from train_step import open_base

from fewstep import lora
from fewstep.arithmetic import peak_memory
from fewstep.backbone import Backbone
from fewstep.backbone.threads import is_small
from fewstep.config import TrainSettings
from fewstep.data import Batch
from fewstep.timing import machine, synchronise
from fewstep.train import engine, start
from fewstep.train.encoding import Cached, Encoder, Fresh
from fewstep.train.rollouts import Teacher
from fewstep.train.update import Updater
from fewstep.train.watch import Watch

TARGETS = {1: 8e9, 8: 20e9}
"""Bytes that an update of a batch may take."""

WARM_UPS, REPEATS = 2, 2
"""Updates before it is measured, and while: the first fills the cache, in the second networks leave the device."""


def measured(backbone: Backbone, settings: TrainSettings, encoder: Encoder) -> tuple[float, int | None]:
    """Seconds of an update, and bytes at its peak."""
    device, side, count = backbone.device, settings.resolution, settings.batch_size
    method = start.method_of(settings, backbone)
    parameters = start.student_of(settings, backbone)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=settings.mixed_precision)
    optimizer = accelerator.prepare(engine.adamw_of(parameters, settings, device))
    watch = Watch(lora.AdapterWeights(backbone.unet).parameters(), print)
    student = backbone.denoiser()
    update = Updater(accelerator, optimizer, parameters, settings, method=method, student=student, watch=watch)
    teacher = Teacher(backbone, encoder, method, settings.seed, backbone.latent_shape(side), settings.starts_from)
    rows, pictures = tuple(range(count)), torch.randint(256, (count, side, side, 3), dtype=torch.uint8)
    captions = tuple(f"a picture of {number} things" for number in rows)
    batch = Batch(update=0, micro=0, positions=rows, items=rows, pictures=pictures, captions=captions, replaced=())
    seconds: list[float] = []

    def updates(count: int) -> None:
        for number in range(count):
            synchronise(device)
            started = time.perf_counter()
            update(number, [teacher(batch)])
            synchronise(device)
            seconds.append(time.perf_counter() - started)

    updates(WARM_UPS)
    peak = peak_memory(partial(updates, REPEATS), device)
    return statistics.median(seconds[-REPEATS:]), peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=["scenes", "sd15"], default="sd15")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()

    backbone = open_base(args.base, args.device, args.mixed_precision)
    if not is_small(backbone.vae):  # as `start.open_base`
        backbone.vae.enable_slicing()
    facts = machine(backbone.device, str(backbone.dtype).removeprefix("torch."))
    on_gpu = backbone.device.type == "cuda"
    counter = "allocated, as torch.cuda counts" if on_gpu else "resident in the whole process, as Linux counts"
    print(f"{args.base}, {backbone.resolution} px; {facts['device']}, {facts['precision']}, torch {torch.__version__}")
    print(f"seconds an update: median of {REPEATS}; peak: {counter}\n")
    print("| batch | gradient checkpointing | encoders | seconds | peak |\n|---|---|---|---|---|", flush=True)
    fitting: dict[int, list[str]] = {size: [] for size in args.batch_sizes if size in TARGETS}
    places = (False, True) if on_gpu else (False,)  # a CPU has nowhere to send them
    for size, checkpointing, kept in product(args.batch_sizes, (False, True), places):
        asked = TrainSettings(batch_size=size, gradient_checkpointing=checkpointing, pure_noise_share=0)
        way = f"{'with' if checkpointing else 'without'} | {'off the device' if kept else 'on the device'}"
        with TemporaryDirectory() as folder:
            encoder = Cached(Path(folder), backbone, {}) if kept else Fresh(backbone)
            try:
                seconds, peak = measured(backbone, start.resolved(asked, backbone), encoder)
                shown = "unknown" if peak is None else f"{peak / 1e9:.2f} GB"
                if peak is not None and peak <= TARGETS.get(size, 0):
                    fitting[size].append(f"{way.replace(' |', ' checkpointing, encoders')} {shown}")
                print(f"| {size} | {way} | {seconds:.2f} | {shown} |", flush=True)
            except torch.OutOfMemoryError:
                print(f"| {size} | {way} | | out of memory |", flush=True)
        lora.detach(backbone.unet)
        backbone.unet.disable_gradient_checkpointing()
    for size, ways in fitting.items():
        print(f"\nbatch {size} in {TARGETS[size] / 1e9:.0f} GB: {'yes: ' + '; '.join(ways) if ways else 'no'}")


if __name__ == "__main__":
    main()
