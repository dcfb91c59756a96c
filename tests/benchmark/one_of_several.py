"""What each process of a shared benchmark executes: `torchrun … one_of_several.py FOLDER CLIP ADAPTER`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState

from fewstep import pictures
from fewstep.backbone import random_backbone
from fewstep.benchmark import benchmark
from tests.benchmark.fakes import FakeAbilities
from tests.benchmark.test_resume import small


def main() -> None:
    torch.set_num_threads(1)
    state, folder = PartialState(cpu=True), Path(sys.argv[1])
    base = replace(random_backbone("tiny"), abilities=FakeAbilities(Path(sys.argv[2]), Path(sys.argv[3])))
    settings = small(folder)
    state.wait_for_everyone()  # both have written the same prompts
    drawn, draw = [], pictures.draw_pictures
    pictures.draw_pictures = lambda *args, **options: drawn.append(1) or draw(*args, **options)
    result = benchmark(settings, backbone=base)
    said = f"world size {state.num_processes}, {len(drawn)} of 21 batches, {len(result.rows)} rows"
    (folder / f"rank-{state.process_index}.txt").write_text(said)
    torch.distributed.destroy_process_group()


main()
