"""What the embedded base gains on a CPU: by folded layers while it learns, and by memory that is kept.

    python benchmarks/cpu.py --repeats 5

Each repeat is two processes, one that keeps freed memory and one that gives it back, in turn; in each, a training step
with every layer folded that `folding_pays` and with none, in turn. Prints medians of the ratios within a repeat.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

import torch

from fewstep import lora
from fewstep.allocator import keep_freed_memory
from fewstep.backbone import load_backbone
from fewstep.lora import folding
from fewstep.solver import Denoiser
from fewstep.timing import measure

PICTURES, LEARNT = 40, 16
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
ADAPTERS = {4: ATTENTION, 32: [*ATTENTION, "ff.net.0.proj", "ff.net.2"]}
"""Rank to targets: the description's, and the demo's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", choices=("kept", "given back"), help="what one process measures, as JSON")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measured(kept=args.measure == "kept")))
        return
    repeats = [{way: in_a_process(way) for way in ("kept", "given back")} for _ in range(args.repeats)]
    print(f"{torch.get_num_threads()} threads, medians of {args.repeats}; ms a sample")
    for name in repeats[0]["kept"]:
        kept, given = ([repeat[way][name] for repeat in repeats] for way in ("kept", "given back"))
        ratio = statistics.median(a / b for a, b in zip(kept, given, strict=True))
        print(f"{name:38} memory kept {statistics.median(kept):6.2f}, given back {statistics.median(given):6.2f}, "
              f"ratio {ratio:.2f}")  # fmt: skip
    for rank in ADAPTERS:
        folded, plain = ([repeat["kept"][step_of(rank, way)] for repeat in repeats] for way in (True, False))
        ratio = statistics.median(a / b for a, b in zip(folded, plain, strict=True))
        print(f"rank {rank}: a folded training step takes {ratio:.2f} of a plain one's time")


def step_of(rank: int, folded: bool) -> str:
    """The name of a training step."""
    return f"training step, rank {rank}, {'folded' if folded else 'plain'}"


def in_a_process(way: str) -> dict[str, float]:
    """What a fresh process measures: the allocator is set before anything is allocated."""
    command = [sys.executable, __file__, "--measure", way]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measured(*, kept: bool) -> dict[str, float]:
    """Milliseconds a sample of each kind of work."""
    if kept:
        assert keep_freed_memory(), "this C library keeps nothing"
    backbone = load_backbone("scenes", device="cpu", dtype="no")
    x_t, t = torch.randn(2 * PICTURES, 4, 16, 16), torch.full((2 * PICTURES,), 500)
    cond = backbone.embed(["a house"]).expand(2 * PICTURES, -1, -1).contiguous()
    teacher = backbone.denoiser(adapter=False)
    with torch.no_grad():
        found = {
            "UNet forward, 80 samples": 1000 * measure(lambda: teacher(x_t, t, cond)).median / len(x_t),
            "decoding, 40 pictures": 1000 * measure(lambda: backbone.decode(x_t[:PICTURES])).median / PICTURES,
        }
    for rank, targets in ADAPTERS.items():
        parameters = lora.attach(backbone.unet, rank, 8 * rank, targets, seed=0)
        found |= {
            step_of(rank, folded): statistics.median(times) / LEARNT
            for folded, times in steps_in_turn(backbone.denoiser(), parameters, (x_t, t, cond)).items()
        }
        lora.detach(backbone.unet)
    return found


def steps_in_turn(
    student: Denoiser, parameters: list[torch.nn.Parameter], inputs: tuple[torch.Tensor, ...]
) -> dict[bool, list[float]]:
    """Milliseconds of a training step with folded layers (True) and without."""

    def step() -> object:
        output = student(*(one[:LEARNT] for one in inputs))
        return torch.autograd.grad(output.square().mean(), parameters)

    rule, taken = folding.folding_pays, dict[bool, list[float]]({True: [], False: []})
    for _ in range(3):
        for folded, times in taken.items():
            folding.folding_pays = rule if folded else lambda *_: False
            times.append(1000 * measure(step, repeats=2).median)
    folding.folding_pays = rule
    return taken


if __name__ == "__main__":
    main()
