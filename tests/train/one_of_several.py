"""What each process of a distributed run executes: `torchrun --nproc_per_node 2 one_of_several.py settings.toml`."""

from __future__ import annotations

import sys

import torch
from accelerate import PartialState

from fewstep.config import TrainSettings, load_toml
from fewstep.train import distill


def main() -> None:
    torch.set_num_threads(1)
    result = distill(TrainSettings(**load_toml(sys.argv[1])))
    # accelerate launch --cpu starts one process without a word: see that there are as many as were asked for.
    print(f"world size {PartialState().num_processes}, rank {PartialState().process_index}, {result.steps} steps")
    torch.distributed.destroy_process_group()


main()
