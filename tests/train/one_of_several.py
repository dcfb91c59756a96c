"""What each process of a distributed run executes: `torchrun --nproc_per_node 2 one_of_several.py SETTINGS FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import PartialState

from fewstep.config import TrainSettings, load_toml
from fewstep.train import distill


def main() -> None:
    torch.set_num_threads(1)
    result = distill(TrainSettings(**load_toml(sys.argv[1])))
    # accelerate launch --cpu starts one process without a word: see that there are as many as were asked for.
    state = PartialState()
    # A file each: what two processes print into one pipe may end up in one line.
    said = f"world size {state.num_processes}, {result.steps} steps"
    Path(sys.argv[2], f"rank-{state.process_index}.txt").write_text(said)
    torch.distributed.destroy_process_group()


main()
